"""Templates by strangers: every attack ends soon, in one clear message."""

import time

import pytest

from ftjax.data.template import ChatTemplate, Cut, RowFault
from ftjax.errors import UserError
from tests.data.conftest import chat_row, fault_of

TALK = chat_row("hi", "yo")["messages"]


def render(source, messages=TALK):
    template = ChatTemplate(source, {"bos_token": "<s>"}, "chat_template.jinja")
    try:
        [reply] = template.render([(messages, [Cut(len(messages))])])
    finally:
        template.close()
    return reply


@pytest.mark.parametrize(
    "source, named",
    [
        ("{{ messages.__class__ }}", "__class__"),
        ("{{ ''['__class__'] }}", "__class__"),
        ("{{ ''|attr('__class__') }}", "__class__"),
        ("{{ lipsum.__globals__['os'].system('touch canary') }}", "__globals__"),
        ("{{ lipsum(1000) }}", "lipsum"),
        ("{{ strftime_now.__self__ }}", "__self__"),
        ("{% include '/etc/passwd' %}", "include"),
        ("{% import 'x' as y %}", "import"),
        ("{% extends 'x' %}", "extends"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ 'a' * 10**8 }}", "characters"),
        ("{{ [0] * 10**9 }}", "memory"),
        ("{{ 'a'.ljust(10**10) }}", "memory"),
        ("{{ '%10000000000d' % 1 }}", "memory"),
        ("{{ '{:>10000000000}'.format(1) }}", "memory"),
        ("{{ range(10**9)|list }}", "memory"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}",
            "memory",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
            "{% endfor %}",
            "longer than",
        ),
        ("{{ 9 ** (9 ** 9) }}", "longer than"),
    ],
)
def test_attacks_end_soon_in_one_message(source, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    error = fault_of(lambda: render(source))
    assert time.monotonic() - start < 30  # a few seconds on a machine that is idle
    assert error.what == "the chat template was stopped by the sandbox"
    assert error.where == "chat_template.jinja"
    assert named in error.got
    assert not list(tmp_path.iterdir())


def test_a_template_that_is_too_large():
    with pytest.raises(UserError, match="too large"):
        render("a" * 2_000_000)


def test_a_syntax_error_names_the_line():
    error = fault_of(lambda: render("ok\n{% for"))
    assert "not valid Jinja" in error.what
    assert error.got.startswith("line 2")


def test_printing_what_is_not_there_is_an_error_but_testing_is_not():
    reply = render("{{ messages[0].contnt }}")
    assert isinstance(reply, RowFault) and "contnt" in reply.error
    tests = "{% if tools or nope or messages[0].tool_calls %}a{% else %}b{% endif %}"
    assert render(tests) == ["b"]
    assert render("{{ nope is defined }}{{ nope | default('d') }}") == ["Falsed"]


def test_what_templates_expect_is_there():
    assert render("{{ bos_token }}{{ strftime_now('%d %b %Y') }}") == ["<s>26 Jul 2024"]
    assert render("{{ {'a': '<\u00e9'} | tojson }}") == ['{"a": "<\u00e9"}']
    assert render("{% for m in messages %}{% break %}{% endfor %}x") == ["x"]
    blocks = "  {% if true %}\nx\n  {% endif %}\n"
    assert render(blocks) == ["x\n"]
    assert render("{{ raise_exception('no') }}") == RowFault("no")


def test_one_child_serves_many_rows_and_can_be_started_again():
    template = ChatTemplate("{{ messages[0].content }}", {}, "t")
    jobs = [(chat_row(str(i), "b")["messages"], [Cut(1), Cut(2)]) for i in range(500)]
    first = template.render(jobs)
    child = template._child
    assert first[499] == ["499", "499"]
    assert template.render(jobs) == first and template._child is child
    template.close()
    assert template.render(jobs[:1]) == first[:1]
    template.close()
