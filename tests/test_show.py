"""Tables for people: what others wrote is shown as it is, sets at chance apart; colours obey NO_COLOR."""

import os
import pty
import re
import subprocess
import sys

from fastfill.lab.tasks import TASKS

COMMON = {"model": "some/Model", "dtype": "bfloat16", "predictor": "learned", "compensator": True, "kernel": "native"}
COMMON |= {"sparsity": 0.5, "block_size": 32, "sparse_tokens": 123_456_789, "dense_tokens": 123_456_789, "documents": 12_345}


def _line(name):
    scores = {"dense": 100.0, "sparse": 100.0, "recovery": 12.3456, "interval": [1.2345, 12.3456]}
    return {"dataset": name, "examples": 10_000, **scores}


def _suite():
    loss = {"examples": 100, "dense": 12.345, "loss": -0.1234, "interval": [-0.2345, 0.1234], "kl": 1.234}
    loss["first_token_agreement"] = 1.0
    names = ("passage_retrieval_en:made", "niah_multivalue@131072", "niah_multiquery@1024-4096")
    lines = [{**_line(name), "likelihood": loss, "chance": 12.34, "at_chance": name[0] == "p"} for name in names]
    average = {**_line("average"), "sets": 2, "mean_recovery": 0.9876, "mean_recovery_interval": [0.9123, 1.0123]}
    counts = {"examples": 99_000, "planned": 100_000, "same_answers": 100, "cut_prompts": 100}
    return {**COMMON, "task": "suite", "datasets": lines, "average": average, "likelihood": loss, **counts}


def test_sets_at_chance_have_a_table_of_their_own(capsys):
    TASKS["suite"].show(_suite())
    first, second = capsys.readouterr().out.split("at chance, and not in the average")
    assert "passage_retrieval_en" not in first and second.count("passage_retrieval_en") == 2 and "12.34" in second
    assert "mean of the 2 recoveries: 98.8% (91.2% to 101.2%)" in first and "99000 of 100000 examples are done" in second


def test_likelihoods_alone(capsys):
    result = _suite()
    del result["average"]
    for line in result["datasets"]:
        for key in ("dense", "sparse", "recovery", "interval", "chance", "at_chance"):
            line.pop(key, None)
    TASKS["suite"].show(result)
    out = capsys.readouterr().out
    assert "recover" not in out and "-0.123" in out and "-0.234 to +0.123" in out


COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-7]|4[0-7]|9[0-7]|38|48)(?:;[\d;]*)?m")
PROGRESS = "import time; from fastfill.progress import stage\nwith stage('things', 2) as bar: bar.step(); time.sleep(0.3)"


def on_a_terminal(code, **environment):
    """What a program writes when its streams are a terminal."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    kept |= {"PYTHONPATH": ":".join(sys.path), "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    ours, theirs = pty.openpty()
    done = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=kept)
    os.close(theirs)
    out = b""
    try:
        while part := os.read(ours, 65536):
            out += part
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert done.wait(60) == 0
    return out.decode()


def test_progress_has_an_eta_and_obeys_no_color():
    coloured, plain = on_a_terminal(PROGRESS), on_a_terminal(PROGRESS, NO_COLOR="1")
    assert "things" in plain and "ETA" in plain and "1/2" in plain
    assert COLOUR.search(coloured) and not COLOUR.search(plain)


def test_tables_obey_no_color():
    code = "from fastfill import tables as t; t.table('title', ['a'], [['b']]); t.console().print('[red]x[/red]', markup=True)"
    coloured, plain = on_a_terminal(code), on_a_terminal(code, NO_COLOR="1")
    assert COLOUR.search(coloured) and not COLOUR.search(plain) and "title" in plain


def test_nothing_but_results_where_there_is_no_terminal():
    code = PROGRESS + "\nfrom fastfill import tables; from fastfill.progress import waiting\n"
    code += "with waiting('for something'): tables.table('title', ['a'], [['b']])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stderr == "" and "\x1b" not in done.stdout and done.stdout.split() == ["title", "a", "b"]
