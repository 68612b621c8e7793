"""Chat templates are programs from strangers: they render as in transformers, reach nothing, and
cannot run away.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.data.encoding.chat_template import budget
from lorry.data.encoding.chat_template.sandbox import ALLOWED_FILTERS
from lorry.data.encoding.chat_template.template import (
    ChatTemplate,
    TemplateRefusedError,
    common_prefix,
)
from lorry.data.reading.content import ChatMessage
from lorry.errors import ModelError
from tests.support.chat_templates import TEMPLATES

# so that only the attack can make a template fail
SHOW = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHAT = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")]
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
            "ns.s + ns.s",
            "ns.s ~ ns.s",
            "ns.s * 2",
            "[ns.s, ns.s]|join",
            "ns.s.join([ns.s, ns.s])",
            "'%s%s' % (ns.s, ns.s)",
            "ns.s.replace('a', 'aa')",
            "ns.s|replace('a', 'aa')",
            "ns.s|indent(ns.s)|string ~ ns.s",
            "'{0}{0}'.format(ns.s)",
        )
    ),
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    *(
        NEST + end
        for end in ("{{ ns.s }}", "{{ ns.s|tojson }}", "{{ ns.s ~ 'x' }}", "{{ ns.s|upper }}")
    ),
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "x" * 600_000,
]


BIG = "{% set ns = namespace(s='ab' * 400000, t='ab' * 399999 + 'c', l=[0] * 900000, m=[0] * 899999 + [1], n=2**8000, x=0) %}"
# two structures of sixty elements that are 2^60 to whoever compares, prints or hashes them
DEEP = (
    "{% set ns = namespace(t=(1,), u=(1,)) %}"
    "{% for i in range(60) %}{% set ns.t = (ns.t, ns.t) %}{% set ns.u = (ns.u, ns.u) %}{% endfor %}"
)


def ninety_thousand(body: str) -> str:
    return BIG + "{% for i in range(90000) %}" + body + "{% endfor %}"


# Each value is small enough; what grows is their sum, or the time of single operations that jinja2
# compiles to bare Python.
SUMMED = [
    "{% set ns = namespace(l=[]) %}{% for i in range(3000) %}{% set ns.l = ns.l + [[0] * 1000000] %}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = [ns.l, 'a' * 1000000] %}{% endfor %}",
    *(
        ninety_thousand("{% set ns.x = BY %}".replace("BY", by) * 30)
        for by in (
            "ns.s[1:]",
            "ns.s == ns.t",
            "ns.t in ns.s",
            "ns.l == ns.m",
            "ns.l[1:]",
            "ns.n * ns.n",
            "ns.n // 3 + ns.n",
            "ns.s.rfind('b' + ns.s[:300000])",
            "ns.s.lstrip('x' * 500000 + 'ab')",
            "ns.s | trim('x' * 500000 + 'ab')",
            "[ns.x, ns.s.split('a')]",
            "[ns.x, ns.s | list]",
            "ns.s | title",
            "ns.s is lower",
            "ns.s.lower()",
            "ns.s < ns.t",
            "[1, 2] == ns.l",
            "ns.l is eq ns.m",
            "ns.l.count(5)",
            "'%s' % ns.s",
            "ns.s ~ 'a'",
            "ns.l | map('string') | list",
        )
    ),
    *(
        DEEP + end
        for end in (
            "{% set d = {ns.t: 1} %}",
            "{{ {}[ns.t] }}",
            "{{ {}.get(ns.t) }}",
            "{{ ns.t in {} }}",
            "{{ dict([(ns.t, 1)]) }}",
            "{{ [ns.t] | unique | list }}",
            "{{ ns.t == ns.u }}",
            "{{ ns.t is eq ns.u }}",
            "{{ [ns.t].index(ns.u) }}",
            "{% for x in [ns.t, ns.u] %}{{ loop.changed(x) }}{% endfor %}",
            "{{ [ns.t, ns.u] | sort }}",
        )
    ),
    "{% for i in range(90000) %}{% set x = [" + "0," * 20000 + "] %}{% endfor %}",
    "{% macro g() %}{{ varargs | length }}{% endmacro %}{% for i in range(90000) %}{% set x = g(*([0] * 100000)) %}{% endfor %}",
    "{% for i in range(9999) %}{% set x = (['a' * 50] * 20000) | sort %}{% endfor %}",
    "{{ ([[0] * 1000] * 1000) | sum(start=[]) | length }}",
    "{{ 1.5 | round(10000000, 'ceil') }}",
    "{{ 3 ** 100000 }}",
    "{{ ('f' * 1000000) | int(0, 16) }}",
    "{{ ('\t' * 1000000).expandtabs(1000) | length }}",
    "{% set b = ('a' * 1000000).encode() %}{{ b.join([b] * 1000) | length }}",
    "{{ (('<!---->' * 100000) | safe).striptags() }}",
    "{% set ns = namespace(t=[0] * 1000) %}{% for i in range(200) %}{% set ns.t = [ns.t] %}{% endfor %}"
    "{{ ([ns.t] * 100) | tojson(indent=16) | length }}",
    "{{ ([0] * 100000) | tojson(separators=('x' * 100000, ':')) | length }}",
]


@pytest.mark.parametrize(
    "attack", SUMMED, ids=lambda attack: attack.removeprefix(BIG).removeprefix(DEEP)[:70]
)
def test_one_account_for_all_that_a_rendering_does(
    attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours and tens of gigabytes before. The steps decide, so that a busy machine says the same."""
    monkeypatch.setattr(budget, "MOST_STEPS", 20_000)  # a tenth, to be quick here
    begun = time.thread_time()
    with pytest.raises(
        ModelError,
        match=r"stopped: it (takes more than \d+ steps|builds|uses|works|calls)|stopped: its values",
    ):
        ChatTemplate(attack + SHOW, {})
    assert time.thread_time() - begun < 10


def test_the_clock_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST_SECONDS", -1.0)
    with pytest.raises(ModelError, match="takes more than -1 seconds"):
        ChatTemplate("{% for i in range(9) %}{% endfor %}" + SHOW, {})


FAULTY = [
    ("{% set x = 1e999 %}", "line 1: a number is too large for a float"),
    ("{{ 'a'*1e999 }}{{ x }}", "too large for a float"),
    ("{{ '1e999' | float }}{% set x = 'nan' | float %}", "'nan' is not defined"),
    ("{{ 'a'.index('b') }}", "ValueError"),
    ("{{ 'a'.isalpha(1) }}", "TypeError"),
    ("{{ 2.0 ** 9999 }}", "OverflowError"),
    ("{{ {}.popitem() }}", "popitem"),
    ("{{ 1 % 0 }}", "ZeroDivisionError"),
    ("{{ [1, 'a'] | sort }}", "TypeError"),
    ("{{ '%d' % 'x' }}", "TypeError"),
    ("{{ '{0}'.format() }}", "IndexError"),
    ("{{ '%q' % 1 }}", "ValueError"),
    ("{% set a, b = 1, 2, 3 %}", "ValueError"),
    ("{% for a, b in [1] %}{% endfor %}", "TypeError"),
    ("{{ loop.index }}", "'loop' is undefined"),
    ("{{ 'a' | tojson(indent='x') }}", "ValueError"),
    ("{{ super() }}", "super"),
    ("{% block x %}{{ super() }}{% endblock %}", "no parent block"),
    ("{{ messages[0].content.x.y }}", "has no attribute"),
    ("{{ strftime_now(1) }}", "TypeError"),
    ("{{ range(0, 9, 0) | list }}", "ValueError"),
    ("{{ [{}] | sum }}", "TypeError"),
    ("{{ nan.x }}", "'nan' is undefined"),
    ("{{ inf + 1 }}", "'inf' is undefined"),
    ("{{ messages | tojson(default=1) }}", "TypeError"),
    ("{% extends 'x' %}", "loader"),
    ("{{ caller() }}", "'caller' is undefined"),
    ("{{ dict(1) }}", "TypeError"),
    ("{{ '9' * 5000 }}{{ ('9' * 5000) | int / 0 }}", "ZeroDivisionError"),
]


@pytest.mark.parametrize(("source", "message"), FAULTY)
def test_every_fault_of_a_template_is_one_error(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=r"the chat template .*" + re.escape(message)) as caught:
        ChatTemplate(source + SHOW, {})
    assert "\n" not in str(caught.value)


VALUES = (
    "1",
    "-1",
    "0",
    "1e308",
    "1e999",
    "2**64",
    "''",
    "'ab'",
    "'é' * 9",
    "[]",
    "[1, 'a', none]",
    "(1, 2)",
    "{'a': 1}",
    "none",
    "true",
    "messages",
    "messages[0]",
    "x",
    "undefined_name",
    "loop",
    "namespace(a=1)",
    "range(9)",
    "dict",
    "raise_exception",
    "1.5",
    "'%s'",
    "'{}'",
)
OPERATORS = (
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "**",
    "~",
    "==",
    "<",
    "in",
    "not in",
    "and",
    "or",
    "is",
    "is eq",
    "is in",
    "is divisibleby",
)
PARTS = (
    *(f"| {name}" for name in ALLOWED_FILTERS),
    "| join",
    "| tojson",
    "| indent",
    "| sum",
    "| replace('a', 'b')",
    "| format(1)",
    "[0]",
    "['a']",
    "[1:]",
    "[::-1]",
    "[::0]",
    ".content",
    ".items()",
    ".split()",
    ".upper()",
    ".x",
    "(1)",
    "()",
    "| map('upper')",
    "| map(attribute='a')",
    "| selectattr('a')",
    "| int(1, 99)",
    "| round(-3)",
    ".format(1)",
    ".index(1)",
)
TERM = st.builds(
    lambda value, parts: value + "".join(parts),
    st.sampled_from(VALUES),
    st.lists(st.sampled_from(PARTS), max_size=3),
)
EXPRESSION = (
    st.builds(lambda a, op, b: f"({a}) {op} ({b})", TERM, st.sampled_from(OPERATORS), TERM) | TERM
)
STATEMENT = st.builds(
    lambda form, e: form.replace("E", e),
    st.sampled_from(
        [
            "{{ E }}",
            "{% set x = E %}",
            "{% for x in E %}{{ x }}{% endfor %}",
            "{% if E %}a{% endif %}",
            "{% set x, y = E %}",
            "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(E) }}",
            "{% for x in [1, 2] if E %}{{ loop.index }}{% endfor %}",
        ]
    ),
    EXPRESSION,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STATEMENT, min_size=1, max_size=3).map("".join))
def test_any_template_renders_or_is_one_error(source: str) -> None:
    with contextlib.suppress(ModelError):
        ChatTemplate(source + SHOW, {})


def test_a_template_that_looks_at_all_messages_at_each_of_them() -> None:
    """As Gemma 4's own does."""
    looking = "{% for m in messages %}{% set ns = namespace(n=0) %}{% for o in messages %}{% if o.role == m.role %}"
    template = ChatTemplate(
        looking + "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.n }}{% endfor %}" + SHOW,
        {},
    )
    assert template.render(CHAT * 250).text == "250" * 500 + "HiHello" * 250


@pytest.mark.parametrize("family", sorted(TEMPLATES))
def test_long_conversations_stay_inside_the_account(
    tokenizer_of: Callable[..., Any], family: str
) -> None:
    """Two hundred turns, and a message of a million characters, byte for byte as transformers
    renders them.
    """
    tokenizer = tokenizer_of(family)
    turns = [
        ChatMessage(
            ("user", "assistant")[i % 2], f" Turn {i}, <think>é</think> {'日本' * (i % 7)}\n"
        )
        for i in range(200)
    ]
    long = [
        ChatMessage("user", "Hi " + "words and wörds. " * 60_000),
        ChatMessage("assistant", "<think>a\n</think>" + "yes " * 100_000),
    ]
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    for chat in (turns, long, turns * 5):
        messages = [{"role": m.role, "content": m.content} for m in chat]
        for prompted in (False, True):
            expected = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompted
            )
            assert template.render(chat, add_generation_prompt=prompted).text == expected


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
        ("hello", "the chat template does not render the assistant"),
        (
            "{{ nothing.at.all }}",
            "cannot render one question and one answer: .*'nothing' is undefined",
        ),
        ("{{ raise_exception('I am closed') }}", "I am closed"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_broken_templates(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatTemplate(source, {})


def test_a_template_may_refuse_a_row() -> None:
    template = ChatTemplate(
        "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}" + SHOW, {}
    )
    with pytest.raises(TemplateRefusedError, match="refuses this conversation: too many"):
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
def test_renders_as_transformers_does(
    tokenizer_of: Callable[..., Any], add_generation_prompt: bool
) -> None:
    """Every construct that chat templates use, against transformers' own renderer."""
    tokenizer = tokenizer_of("llama3")
    chat = [
        ChatMessage("system", "S x"),
        ChatMessage("user", " Hi\nyou "),
        ChatMessage("assistant", "Hé <b>"),
        ChatMessage("user", "é\"'"),
    ]
    messages = [{"role": m.role, "content": m.content} for m in chat]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=RICH, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    template = ChatTemplate.from_source(RICH, tokenizer)
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
    """A template that writes today's date would give other tokens tomorrow, and the run could not
    be resumed.
    """
    assert (
        ChatTemplate("{{ strftime_now('%d %b %Y') }} " + SHOW, {}).render(CHAT).text
        == "26 Jul 2024 HiHello"
    )


def test_variables_reach_the_template(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("gemma")
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<bos>",
        chat_template="{{ bos_token }}{{ mood }}" + SHOW,
    )
    template = ChatTemplate.of(tokenizer, {"mood": "calm "})
    assert template is not None
    assert template.render(CHAT).text == "<bos>calm HiHello"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("", "a", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("x", "y", 0), ("same", "same", 4)],
)
def test_common_prefix(one: str, other: str, same: int) -> None:
    assert common_prefix(one, other) == common_prefix(other, one) == same
