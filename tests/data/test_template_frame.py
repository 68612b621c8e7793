"""Frames of chat templates: what they fill in is what the template itself writes, and whoever looks
at texts has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding.chat_template import template as template_module
from lorry.data.encoding.chat_template.frame import find_template_frame
from lorry.data.encoding.chat_template.sandbox import TemplateSandbox
from lorry.data.encoding.chat_template.template import (
    ChatTemplate,
    RenderedTemplate,
    TemplateRefusedError,
)
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.content import ChatMessage, Conversation
from tests.support.chat_templates import TEMPLATES

ROLES = ["user", "assistant", "user", "assistant"]
TEXTS = st.text(
    st.sampled_from("ab <|>\n{}%\\'\u3000\x1c\u00e9\ufdd0"), max_size=6
) | st.sampled_from(["x", "</think>y", "{{ 7 }}"])
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def alone(source: str, texts: list[str], roles: list[str], prompting: bool) -> str:
    """The template's own rendering, with no frame."""
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return TemplateSandbox().from_string(source).render(
        VARIABLES, messages=messages, tools=None, documents=None, add_generation_prompt=prompting
    )  # fmt: skip


@pytest.mark.parametrize(
    "family", ["chatml", "default_system", "llama3", "gemma", "llama2", "phi3"]
)
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=4, max_size=4), turns=st.integers(1, 4), prompting=st.booleans()
)
def test_a_frame_says_what_the_template_says(
    family: str, texts: list[str], turns: int, prompting: bool
) -> None:
    source, roles = TEMPLATES[family], ROLES[:turns]
    frame = find_template_frame(source, VARIABLES, roles, add_generation_prompt=prompting)
    assert frame is not None
    said = frame.fill(texts[:turns])
    assert said is None or said == alone(source, texts[:turns], roles, prompting)
    if all(text and text == text.strip() for text in texts[:turns]):
        assert said is not None


@pytest.mark.parametrize(
    "looks",
    [
        "{% if c == 'x' %}1{% endif %}{{ c }}",
        "{% if 'x' != c %}1{% endif %}{{ c }}",
        "{% if 'x' in c %}1{% endif %}{{ c }}",
        "{% if c < 'b' %}1{% endif %}{{ c }}",
        "{{ c[0] }}",
        "{{ c[1:] }}",
        "{{ c | length }}",
        "{{ c | upper }}",
        "{{ c.upper() }}",
        "{{ c.split('x') }}",
        "{% for x in c %}{{ loop.index }}{% endfor %}",
        "{{ '%s' % c }}",
        "{{ '{}'.format(c) }}",
        "{{ c * 2 }}",
        "{{ c.format(1) }}",
        "{{ c | tojson }}",
        "{{ [c] }}",
        "{{ messages }}",
        "{{ messages | tojson }}",
        "{{ 'a' ~ [c] }}",
        "{% set d %}{{ c }}{% endset %}{{ d == 'x' }}",
        "{% macro f() %}{{ c }}{% endmacro %}{{ f() | length }}",
        "{{ {c: 1} | length }}",
        "{% if (c ~ '') == 'x' %}1{% endif %}{{ c }}",
        "{% if ('' + c) == 'x' %}1{% endif %}{{ c }}",
        "{% if c is in ['x'] %}1{% endif %}{{ c }}",
        "{% if c is sameas 'x' %}1{% endif %}{{ c }}",
        "{% if c is filter %}1{% endif %}{{ c }}",
        "{{ messages | selectattr('content', 'equalto', 'x') | list | length }}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ (messages | map(attribute='content') | list | first).upper() }}",
        "{{ c.strip('x') }}",
        "{{ c | trim('x') }}",
        "{% if c is iterable %}1{% endif %}{{ c }}",
        "{% set a, b = c %}{{ c }}",
        "{{ c | default('') | length }}",
        "{{ {'x': 1}[c] }}",
        "{% if messages[0] == {'role': 'user', 'content': 'x'} %}1{% endif %}{{ c }}",
        "{{ '\ufdd3' }}",
        "{{ '%c' % 64979 }}",
        "{{ '{:c}'.format(64979) }}",
        "{{ strftime_now(c) }}",
        "{{ c | e }}",
        "{{ c | string | length }}",
        "{{ c | last }}",
        "{% for x in [c] recursive %}{{ x }}{{ loop([]) }}{% endfor %}",
        "{% block b %}{{ c }}{% endblock %}",
        "{{ [c, 'b'] | sort | first }}",
        "{{ 1 if ('%s' | format(c)) == 'x' }}",
        "{% if not (c.startswith('x')) %}1{% endif %}{{ c }}",
        "{{ messages | last | string }}",
    ],
)
def test_a_template_that_looks_at_a_text_has_no_frame(looks: str) -> None:
    source = "{% set c = messages[0]['content'] %}" + looks
    assert find_template_frame(source, VARIABLES, ["user"], add_generation_prompt=False) is None


@pytest.mark.parametrize(
    "blind",
    [
        "{% if c %}{{ c }}{% endif %}",
        "{{ c | trim }}!",
        "{{ (' ' + c + '\n') | trim }}!",
        "{{ c.strip() ~ '!' }}",
        "{{ c is string }}{{ c }}",
        "{{ c | default('none') }}",
        "{{ messages | length }}{{ messages[-1].content }}",
        "{{ messages[0].get('content') }}",
        "{% for m in messages[0:] %}{{ loop.index0 }}{{ m.content }}{% endfor %}",
        "{{ c or 'x' }}{{ 'no' if not c }}",
        "{{ c }}{{ c }}",
        "{{ (messages | selectattr('role', 'equalto', 'user') | list | first).content }}",
        "{% for k, v in messages[0].items() %}{{ v }}{% endfor %}",
    ],
)
def test_a_template_that_joins_texts_has_one(blind: str) -> None:
    source = "{% set c = messages[0]['content'] %}" + blind
    frame = find_template_frame(source, VARIABLES, ["user"], add_generation_prompt=False)
    assert frame is not None
    for text in ("x", "two words", "\ufdd0", "{{ c }}", "é\n%s"):
        assert frame.fill([text]) == alone(source, [text], ["user"], False)
    for text in ("", " x", "x\n", "\u3000x", "x\x1c"):
        assert frame.fill([text]) is None


def test_texts_beyond_the_account_are_rendered_themselves() -> None:
    frame = find_template_frame(TEMPLATES["chatml"], VARIABLES, ROLES, add_generation_prompt=False)
    assert frame is not None
    assert frame.fill(["x" * 300, "y", "z", "w"]) is not None
    assert frame.fill(["x" * 3_000_000, "y", "z", "w"]) is None


@pytest.mark.parametrize("family", sorted(TEMPLATES))
def test_rows_are_encoded_alike_without_frames(
    family: str,
    tokenizer_of: Callable[..., Any],
    prose: Callable[[int, int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [prose(seed, 1 + seed % 9) for seed in range(60)] + [
        "a",
        " b ",
        "<think>c</think>d",
        "e</think>",
    ]
    rows = [
        Conversation(
            tuple(
                ChatMessage(
                    role, texts[(at + 7 * k) % 64].strip() if at % 3 else texts[(at + 7 * k) % 64]
                )
                for k, role in enumerate(ROLES[: 2 + 2 * (at % 2)])
            )
        )
        for at in range(64)
    ]
    framed = ExampleEncoder(tokenizer_of(family), max_length=60)
    made = framed.encode_many(rows)
    monkeypatch.setattr(template_module, "find_template_frame", lambda *_, **__: None)
    plain = ExampleEncoder(tokenizer_of(family), max_length=60)
    assert made == plain.encode_many(rows)
    assert framed.notes == plain.notes
    assert framed.template.notes == plain.template.notes


def test_a_refusal_stays_a_refusal() -> None:
    made = ChatTemplate(TEMPLATES["gemma"], VARIABLES)
    asked = [ChatMessage("user", "a"), ChatMessage("user", "b")]
    for _ in range(2):
        with pytest.raises(TemplateRefusedError, match="must alternate"):
            made.render(asked)
    assert made.render([ChatMessage("user", "a")]) == RenderedTemplate(
        "<s><start_of_turn>user\na<end_of_turn>\n"
    )


@pytest.mark.parametrize(
    ("many", "variables"),
    [("{{ 'a'" + "~'a'" * 20_000 + " }}", {}), ("", {"list": ["a"] * 200_000})],
)
def test_more_literals_or_variables_than_are_looked_through_have_no_frame(
    many: str, variables: dict[str, Any]
) -> None:
    assert (
        find_template_frame(
            many + "{{ messages[0].content }}", variables, ["user"], add_generation_prompt=False
        )
        is None
    )
