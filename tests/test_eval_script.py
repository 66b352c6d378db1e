"""benchmarks/eval.py with a stand-in for the command: what is run, what is kept, what is skipped, and how it stops."""

import json
import sys
from pathlib import Path

import conftest
import pytest

from fastfill import cli, data
from fastfill.cli import evaluate
from fastfill.lab import longbench

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "eval.py"
FAKE = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
Path("calls.jsonl").open("a").write(json.dumps(words) + "\\n")
name = words[words.index("--task") + 1] if "--task" in words else words[0]
if name in Path("fails.txt").read_text().split():
    sys.exit(3)
print("a table")
if name not in Path("mute.txt").read_text().split():
    print(json.dumps({"task": name}))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    module = conftest.script("eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA", raising=False)
    for name, text in (("fake.py", FAKE), ("fails.txt", ""), ("mute.txt", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "FASTFILL", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr(module, "MAKE_TASKS", [sys.executable, "-c", "import sys; open('made.txt', 'w').write(str(sys.argv))"])
    return module


def calls():
    path = Path("calls.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "squad_v2_dev_part.json").write_text("{}")
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    return str(tmp_path / "data")


def test_every_step_writes_its_result_and_the_report_ends_it(script, folder, capfd):
    assert script.main([]) == 0
    results = Path("benchmarks/results/eval")
    names = [step.name for step in script.plan(script.find_text(folder), results, Path("t"))]
    assert sorted(file.name for file in results.iterdir()) == sorted(f"{name}.json" for name in names if name != "report")
    assert json.loads((results / "peers.json").read_text()) == {"task": "peers"}
    made = calls()
    assert len(made) == len(names) == 12
    assert made[-1] == ["report", str(results), "--out", str(results / "report.html"), "--svg", "docs/figures"]
    assert "data/squad_v2_dev_part.json" in Path("made.txt").read_text()
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1].startswith("all") and [line.split()[0] for line in lines[-1 - len(names) : -1]] == names


def test_the_commands_are_understood(script, folder, monkeypatch):
    """Each by the real parser, and what `evaluate` refuses before it loads a model."""
    monkeypatch.setattr(data, "load_documents", lambda sources: [data.Document(str(sources), "elsewhere#0")])
    monkeypatch.setattr(longbench, "read", lambda *_: [])
    for step in script.plan(script.find_text(folder), Path("out"), Path("tasks")):
        options = cli.build_parser().parse_args(step.command)
        assert options.json or step.name == "report"
        if step.command[0] == "evaluate":
            task = evaluate.task_of(options)
            task.check(out=options.out)
            task.read()


@pytest.mark.parametrize("file, words", [("fails.txt", "exit code 3"), ("mute.txt", "not a JSON document")])
def test_a_failing_step_stops_with_its_command_and_the_next_run_goes_on(script, folder, capfd, file, words):
    Path(file).write_text("recall")
    assert script.main([]) == 1
    error = capfd.readouterr().err
    assert words in error and "fastfill evaluate default --artifact default --task recall" in error
    assert f"'{folder}/longbench_multi_news_part.jsonl[:20]'" in error  # can be pasted into a shell
    results = Path("benchmarks/results/eval")
    assert sorted(file.name for file in results.iterdir()) == ["bench.json", "demo.json", "inspect.json", "perplexity.json"]
    Path(file).write_text("")
    before = len(calls())
    assert script.main([]) == 0
    assert len(calls()) - before == 8  # all but the four that were there


def test_what_a_killed_step_left_is_removed_when_it_is_done(script, folder):
    left = Path("build/eval/peers")
    left.mkdir(parents=True)
    (left / "predictions.jsonl").write_text("{}")
    Path("fails.txt").write_text("peers")
    assert script.main(["--steps", "peers"]) == 1 and left.is_dir()
    assert calls()[0][-3:] == ["--out", str(left), "--json"]
    Path("fails.txt").write_text("")
    assert script.main(["--steps", "peers"]) == 0 and not left.exists()


def test_without_data_it_says_what_it_reads(script, capfd):
    assert script.main([]) == 0
    assert "DATA is not set" in capfd.readouterr().out
    peers = next(words for words in calls() if "peers" in words)
    evaluated = peers[peers.index("--data") + 1 : peers.index("--limit")]
    other = peers[peers.index("--calibration") + 1 : peers.index("--out")]
    for source in (*evaluated, *other):
        assert Path(source.split("[")[0]).is_file()
    assert not {source.split("[")[0] for source in evaluated} & {source.split("[")[0] for source in other}
    assert not any("multi_news" in words for words in calls()) and "--squad" not in Path("made.txt").read_text()


def test_held_out_slices_are_those_of_the_recipe(script):
    recipe = (SCRIPT.parent / "recipes" / "smollm2.sh").read_text()
    text = script.find_text("$DATA")
    assert all(f'"{source}"' in recipe for source in text.documents)
