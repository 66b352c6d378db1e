"""Tables for people: every one fits 80 columns with the widest values that may come, uncut; colours obey NO_COLOR."""

import inspect
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_artifact, tiny_model

from fastfill import tables
from fastfill.cli import show
from fastfill.lab.tasks import TASKS

NAME = "some-organisation/A-Model-With-A-Name-1.5B-Instruct"  # a line with it may not be wrapped
COMMON = {
    "model": NAME,
    "dtype": "bfloat16",
    "predictor": "first-block",
    "compensator": True,
    "sparsity": 0.95,
    "block_size": 1024,
    "kernel": "native",
    "sparse_tokens": 123_456_789,
    "dense_tokens": 123_456_789,
    "documents": 12_345,
    "machine": {
        "cpu": "AMD EPYC 9B14 96-Core Processor with a long name",
        "threads": 128,
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
    },
}
BIG = 123_456.789  # a perplexity that went wrong


def _reading(prefix):
    return {f"{prefix}{key}": BIG for key in ("ppl_dense", "ppl_sparse", "ppl_ratio", "kl", "top1_agreement")}


def _line(name):
    return {
        "dataset": name,
        "examples": 10_000,
        "dense": 100.0,
        "sparse": 100.0,
        "recovery": 12.3456,
        "interval": [1.2345, 12.3456],
    }


def _bench():
    kinds, parts = ("dense", "all_neurons", "sparse"), ("attention", "ffn", "predictor", "compensator", "rest")
    row = {"speedup": 12.34, "ceiling": 19.99, "ffn_share": 1.0, "ffn_ratio": 12.34, "ffn_flops_ratio": 12.34}
    row |= {"ratio_quartiles": [12.34] * 3, "clear": False, "rounds": 400, "sparse_tokens": 131_072}
    for kind in kinds:
        row |= {f"ttft_{kind}_s": 123.456, f"ttft_{kind}_quartiles_s": [123.456] * 3, f"ffn_{kind}_s": 123.456}
        row |= {f"flops_{kind}": 1.23e16, f"peak_{kind}_mb": 123_456.0, f"split_{kind}": dict.fromkeys(parts, 123.456)}
    rows = [{"prompt_tokens": tokens, **row} for tokens in (512, 131_072)]
    other = {"name": "llama.cpp", "version": "b10000", "weights": "a-file.gguf", "prompt_tokens": 131_072}
    others = [{**other, "ttft_s": 123.456}, {**other, "skipped": "it is not installed"}]
    growth = {"growth_dense": 1.23, "growth_sparse": 1.23, "model_mb": 123_456.0, "attached_mb": 123_456.0}
    reason = "fastest, 12.34x of the dense FFN's speed at 131072 tokens"
    choice = {"kernel": "native", "min_tokens": 131_072, "expected_gain": 12.34, "reason": reason}
    return {**COMMON, **growth, "engine": "transformers", "repeats": 100, "rows": rows, "choice": choice, "compare": others}


def _quality():
    point = {"from": 131_072, "to": 131_328, "nll_dense": 12.345, "nll_sparse": 23.456}
    more = {"context_kept": 0.98765, "no_context_ppl": BIG, "curve": [point] * 3}
    return {**COMMON, **_reading(""), **_reading("cont_"), **more}


def _artifact():
    artifact = tiny_artifact(tiny_model(), name="some-organisation/A-Model-1.7B-Instruct")  # its line is not wrapped
    artifact.quality = _quality()
    artifact.calibration = {
        "sequences": 10_000,
        "documents": [f"a-data-file-{i}.jsonl" for i in range(9)],
        "tokens_distilled": 123_456_789,
        "loss_first": 12.3456,
        "loss_last": 0.1234,
        "seconds": 123_456.7,
    }
    return artifact, Path("an-artifact")


def _recall():
    keys = ("held", "held_oracle", "recovery", "recall", "by_chance")
    layers = [{"layer": layer, "kept": 53_248, **dict.fromkeys(keys, 1.0)} for layer in (0, 127)]
    return {**COMMON, **dict.fromkeys(keys, 1.0), "layers": layers}


def _picks():
    shares = {key: [1.0, 1.0] for key in ("overlap", "always", "never")}
    return {
        **COMMON,
        **shares,
        "document": f"{'a-long-name' * 8}.jsonl#12345",
        "blocks": 4096,
        "neurons": 53_248,
        "kept": [53_248] * 2,
    }


def _peers():
    row = {"sparsity": 1.0, "ffn_flops": 1.0, "ppl_ratio": 34.12, "kl": 3.435, "cont_ppl_ratio": 1.234, "cont_kl": 0.36}
    row |= {"compensator": True, "context_kept": 0.34, "ttft_s": 123.456, "speedup": 1.22}
    nothing = {"ppl_ratio": None, "kl": None, "context_kept": None, "ttft_s": None, "speedup": None, "compensator": False}
    rows = [{**row, "method": "first-block", "published_as": "GRIFFIN-like"}]
    rows.append({**row, "method": "layer-drop", "published_as": "POP-like", **nothing})
    return {**COMMON, "documents": 1000, "prompt_tokens": 131_072, "rows": rows, "calibration": ["demo_document.txt"]}


def _pareto():
    result = _peers()
    result["rows"] = [{**row, "method": "first-block", "ppl_ratio": 34.12, "kl": 3.435} for row in result["rows"]]
    return result


def _suite():
    loss = {"examples": 100, "dense": 12.345, "loss": -0.1234, "interval": [-0.2345, 0.1234], "kl": 1.234}
    loss["first_token_agreement"] = 1.0
    names = ("passage_retrieval_en:made", "niah_multivalue@131072", "niah_multiquery@1024-4096")
    lines = [{**_line(name), "likelihood": loss, "chance": 12.34, "at_chance": name[0] == "p"} for name in names]
    average = {**_line("average"), "sets": 2, "mean_recovery": 0.9876, "mean_recovery_interval": [0.9123, 1.0123]}
    counts = {"examples": 99_000, "planned": 100_000, "same_answers": 100, "cut_prompts": 100}
    return {**COMMON, "task": "suite", "datasets": lines, "average": average, "likelihood": loss, **counts}


SAMPLES = {  # function -> its arguments
    show.artifact: _artifact,
    show.bench: lambda: (_bench(),),
    show.engines: lambda: (_bench(),),
    TASKS["perplexity"].show: lambda: (_quality(),),
    TASKS["suite"].show: lambda: (_suite(),),  # longbench's and ruler's too
    TASKS["recall"].show: lambda: (_recall(),),
    TASKS["picks"].show: lambda: (_picks(),),
    TASKS["peers"].show: lambda: (_peers(),),
    TASKS["pareto"].show: lambda: (_pareto(),),
}


def test_every_table_has_a_sample_here():
    """A new function of `show`, or a new task, needs a line in SAMPLES."""
    of_verbs = {found for name, found in inspect.getmembers(show, inspect.isfunction) if found.__module__ == show.__name__}
    assert {found for found in of_verbs if found.__name__[0] != "_"} | {task.show for task in TASKS.values()} == SAMPLES.keys()


@pytest.mark.parametrize("function", SAMPLES, ids=lambda function: function.__qualname__)
def test_it_fits_80_columns_and_nothing_is_cut(capsys, function):
    function(*SAMPLES[function]())
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 80, "\n".join(line for line in lines if len(line) > 80)
    assert "…" not in out


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


def test_brackets_are_shown(capsys):
    tables.table("title of a.jsonl[20:]", ["a"], [["b.jsonl[red]"]])
    assert capsys.readouterr().out.split("\n") == ["title of a.jsonl[20:]", "a           ", "b.jsonl[red]", ""]


def test_a_word_that_is_too_long_is_folded(capsys):
    tables.table("title", ["a", "b"], [["x" * 200, "y" * 5]])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and out.count("x") == 200 and out.count("y") == 5


# --- terminals ----------------------------------------------------------------------------------------------------------

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
