"""Chat templates are programs from strangers: they render as in transformers, reach nothing, and cannot run away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorry.data.content import Message
from lorry.data.template import ChatTemplate, TemplateRefusal, common_prefix
from lorry.errors import ModelError

SHOW = "{% for m in messages %}{{ m.content }}{% endfor %}"  # so that only the attack can make a template fail
CHAT = [Message("user", "Hi"), Message("assistant", "Hello")]
GROW = "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = BY %}{% endfor %}"
NEST = "{% set ns = namespace(s=['a']) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"

REACHING_OUT = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ dict.__base__.x }}",
    "{{ messages.__class__.x }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{{ messages|map(attribute='__class__')|map(attribute='x')|list }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(_x=1) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ config.items() }}",
]
RUNNING_AWAY = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**9 * ['a'] }}",
    "{{ ('a',) * 10**9 }}",
    "{{ 2**(10**9) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a'.zfill(10**6) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:>1000000000}'.format('a') }}",
    "{{ '{:{}}'.format('a', 1000000000) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 'x'.translate({120: 'y' * 1000}) }}",
    "{{ range(10**9)|list }}",
    "{{ ('x' * 1000000)|list|tojson(indent=100000) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(999) %}{% set x = range(9999)|sum %}{% endfor %}",
    "".join(f"{{% for x{n} in 'aaaaaaaaaa' %}}" for n in range(9)) + "{% endfor %}" * 9,
    "{% for i in range(5000) %}" + "x" * 100_000 + "{% endfor %}",
    "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    *(
        GROW.replace("BY", by)
        for by in (
            "ns.s + ns.s", "ns.s ~ ns.s", "ns.s * 2", "[ns.s, ns.s]|join", "ns.s.join([ns.s, ns.s])", "'%s%s' % (ns.s, ns.s)",
            "ns.s.replace('a', 'aa')", "ns.s|replace('a', 'aa')", "ns.s|indent(ns.s)|string ~ ns.s", "'{0}{0}'.format(ns.s)",
        )
    ),
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    *(NEST + end for end in ("{{ ns.s }}", "{{ ns.s|tojson }}", "{{ ns.s ~ 'x' }}", "{{ ns.s|upper }}")),
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "x" * 600_000,
]  # fmt: skip


@pytest.mark.parametrize("attack", REACHING_OUT + RUNNING_AWAY, ids=lambda attack: attack[:60])
def test_hostile_templates_are_stopped(attack: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(attack + SHOW, {})


def test_an_attack_that_waits_for_a_row() -> None:
    template = ChatTemplate("{% if messages|length > 3 %}{{ 'a' * 10**10 }}{% endif %}" + SHOW, {})
    assert template.render(CHAT).text == "HiHello"
    with pytest.raises(ModelError, match="stopped: it builds a value of 10000000000 characters"):
        template.render([*CHAT, *CHAT])
    assert template.render(CHAT).text == "HiHello", "the account is opened anew for every rendering"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "not valid: line 1"),
        ("\n\n{{ x", "not valid: line 3"),
        ("{{ x|nosuchfilter }}", "No filter named 'nosuchfilter'"),
        ("hello", "does not show what the assistant says"),
        ("{{ nothing.at.all }}", "cannot render one question and one answer: .*'nothing' is undefined"),
        ("{{ raise_exception('I am closed') }}", "I am closed"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_broken_templates(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatTemplate(source, {})


def test_a_template_may_refuse_a_row() -> None:
    template = ChatTemplate("{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}" + SHOW, {})
    with pytest.raises(TemplateRefusal, match="refuses this conversation: too many"):
        template.render([*CHAT, *CHAT])


RICH = """{%- macro shown(m) -%}<{{ m.role | upper }}>{{ m['content'] | trim }}{%- endmacro -%}
{%- set ns = namespace(n=0, names=[]) -%}
{{- bos_token or 'none' }}{{ strftime_now is defined }}
{% for m in messages %}
  {%- if m.role == 'system' %}{% continue %}{% endif %}
  {%- set ns.n = ns.n + 1 %}
  {{- shown(m) ~ loop.index0 }}{{ loop.last and not add_generation_prompt }}
  {%- if ns.n > 2 %}{% break %}{% endif %}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}
{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': [1, 2]} | dictsort }}
{{ messages[::-1][0].content[:3] }}{{ messages[1:] | length }}{{ 'x' in messages[0].content }}
{{ '%s-%03d' % ('a', 7) }}{{ '{:>5}|{x}'.format('a', x=2) }}{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip().replace('x', 'yy') }}
{{ messages[0].get('tool_calls', 'no') }}{{ messages[0].content | indent(2) }}{{ range(3) | list }}{{ (7 // 2) ** 2 % 5 }}
{% generation %}G{{ messages[-1].content }}{% endgeneration %}
{%- for k, v in dict(a=1, b='t').items() %}{{ k }}={{ v }};{% endfor %}{{ tools is none }}{{ messages | last | string | length }}
{{ messages | map('tojson') | join('\n') }}{{ undefined_name | default('d') }}{{ '<b>' | e }}{{ [3, 1, 2] | sort | first }}
"""


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_as_transformers_does(tokenizer_of: Callable[..., Any], add_generation_prompt: bool) -> None:
    """Every construct that chat templates use, against transformers' own renderer."""
    tokenizer = tokenizer_of("llama3")
    chat = [Message("system", "S x"), Message("user", " Hi\nyou "), Message("assistant", "Hé <b>"), Message("user", "é\"'")]
    messages = [{"role": m.role, "content": m.content} for m in chat]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=RICH, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    template = ChatTemplate.made(RICH, tokenizer)
    assert template.render(chat, add_generation_prompt=add_generation_prompt).text == expected


def test_generation_blocks_are_placed(tokenizer_of: Callable[..., Any]) -> None:
    source = (
        "{% for m in messages %}[{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}]{% endfor %}"
    )
    rendered = ChatTemplate(source, {}).render([*CHAT, *CHAT])
    assert rendered.text == "[Hi][Hello.][Hi][Hello.]"
    assert [rendered.text[start:end] for start, end in rendered.blocks] == ["Hello.", "Hello."]


def test_the_date_stands_still() -> None:
    """A template that writes today's date would give other tokens tomorrow, and the run could not be resumed."""
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }} " + SHOW, {}).render(CHAT).text == "26 Jul 2024 HiHello"


def test_variables_reach_the_template(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("gemma")
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", chat_template="{{ bos_token }}{{ mood }}" + SHOW
    )
    template = ChatTemplate.of(tokenizer, {"mood": "calm "})
    assert template is not None
    assert template.render(CHAT).text == "<bos>calm HiHello"


@pytest.mark.parametrize(
    ("one", "other", "same"), [("", "a", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("x", "y", 0), ("same", "same", 4)]
)
def test_common_prefix(one: str, other: str, same: int) -> None:
    assert common_prefix(one, other) == common_prefix(other, one) == same
