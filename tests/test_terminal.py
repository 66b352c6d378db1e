"""Text that others wrote may not steer a terminal, nor be taken for markup."""

import pytest
from rich.text import Text

from fastfill import tables, terminal

HOSTILE = "x\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\ud800\x00"


def test_what_a_terminal_obeys_is_written_out():
    found = terminal.text_of(HOSTILE)
    assert found == r"x\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\ud800\x00"
    assert terminal.text_of("tab\tand line\nand \u4e2d\u6587 \U0001f600\r\n") == "tab\tand line\nand \u4e2d\u6587 \U0001f600\n"
    assert terminal.text_of("caf\udce9") == r"caf\xe9"  # a byte of a file's name


@pytest.mark.parametrize(
    "text", ["What does [/INST] mean?", "[bold]x", "[link=http://a]x[/link]", "a\\", "[red]:smile:[/red]", "[/]"]
)
def test_text_is_no_markup(capsys, text):
    tables.console().print(text)
    tables.console().headed("[bold]head[/bold] ", text)
    tables.table(text, [text], [[text]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [text, f"head {text}", text, text, text]


def test_nothing_that_is_printed_steers(capsys):
    tables.console().print(HOSTILE)
    tables.console().headed("head ", HOSTILE)
    tables.table(HOSTILE, [HOSTILE], [[HOSTILE]])
    terminal.say(HOSTILE)
    terminal.complain(HOSTILE)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).replace("\n", "").isprintable()
    tables.console().print(Text("styled", style="bold"))
    assert capsys.readouterr().out == "styled\n"
