"""The command, run in this process on the tiny model; what goes wrong must be one line on stderr and exit code 2."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import BLOCK, INTERMEDIATE, LAYERS, tiny_artifact, tiny_model, tiny_text, tiny_tokenizer

from fastfill import artifact as artifacts
from fastfill import cli, models
from fastfill.calibration import corpus
from fastfill.engines import transformers as engine
from fastfill.errors import LONGEST

COMMANDS = ("demo", "calibrate", "inspect", "generate", "bench", "evaluate", "report", "serve", "env")
FAST = [
    *("--sequence-length", 64, "--fit-tokens", 256, "--fit-batch", 64, "--schedule-tokens", 64, "--steps", 2),
    *("--predictor-rank", 4, "--linear-rank", 2, "--silu-rank", 2),
    *("--block-size", BLOCK, "--dense-head", BLOCK, "--min-tokens", 16, "--dense-tail", 0),
]


def run(*arguments):
    """Exit code of a command line. argparse leaves by SystemExit."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as exit_:
        return exit_.code


def answer(capsys, *arguments):
    """Run with --json, expect success, give the last line's document."""
    assert run(*arguments, "--json") == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1])


def refusal(capsys, *arguments, code=2):
    """Run, expect exit code 2 and exactly one line on stderr, which is given back."""
    assert run(*arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastfill: "), captured.err
    assert "Traceback" not in captured.err + captured.out
    return lines[0]


def generate(model_folder, artifact_folder, prompt, *more):
    return ["generate", model_folder, "--artifact", artifact_folder, "--prompt-file", prompt, "--dtype", "fp32", *more]


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": tiny_text(160, seed=s)}) for s in range(5)))
    return file


@pytest.fixture
def prompt(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(tiny_text(45, seed=7))
    return file


# --- help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    assert run(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--json" in text or command == "serve"  # which ends when it is killed
    example = text.split(f"example: fastfill {command}")[1].split()
    parsed, rest = cli.build_parser().parse_known_args([command, *example])
    assert callable(parsed.run) and (not rest or command == "serve")
    assert run("--help") == 0
    assert re.search(rf"^    {command}\s+\w", capsys.readouterr().out, re.MULTILINE)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from fastfill import cli\ntry: cli.main(['bench', '-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.splitlines()[-1] == "False"


# --- the commands -------------------------------------------------------------------------------------------------------


def test_calibrate_inspect_generate_bench_evaluate(capsys, model_folder, texts, prompt, tmp_path, monkeypatch):
    """The main job from one end to the other, each command on what the one before made."""
    monkeypatch.setattr(corpus, "ASIDE", 0)  # whether two steps help on text set aside is chance
    out = tmp_path / "made"
    made = answer(capsys, "calibrate", model_folder, "--data", f"{texts}[:4]", "--out", out, "--dtype", "fp32", *FAST)
    assert made["out"] == str(out) and sum(made["kept"]) == round(LAYERS * INTERMEDIATE / 2)

    shown = answer(capsys, "inspect", out)
    assert shown["kept"] == made["kept"] and shown["base_model"]["name"] == str(model_folder)
    assert shown["calibration"]["tokens_distilled"] == 128 and shown["quality"] == {}
    assert shown["flops"]["total"] == pytest.approx(shown["flops"]["ffn"] + shown["overhead"], abs=2e-4)  # rounded to 4 digits

    common = [model_folder, "--artifact", out, "--dtype", "fp32"]
    said = answer(capsys, "generate", *common, "--prompt-file", prompt, "--max-new-tokens", 4)
    assert (said["prompt_tokens"], said["sparse_tokens"]) == (45, 32)
    dense = answer(capsys, "generate", *common, "--prompt-file", prompt, "--max-new-tokens", 4, "--dense")
    assert (dense["sparse_tokens"], dense["dense_tokens"]) == (0, 45 + dense["new_tokens"] - 1)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    new = engine.generate(model, engine.encode(tokenizer, prompt.read_text(), chat=False), 4)
    assert dense["text"] == tokenizer.decode(new, skip_special_tokens=True)
    tail = answer(capsys, "generate", *common, "--prompt-file", prompt, "--max-new-tokens", 1, "--dense-tail", 12)
    assert tail["sparse_tokens"] == 24
    chat = answer(capsys, "generate", *common, "--prompt-file", prompt, "--max-new-tokens", 1, "--chat")
    assert chat["prompt_tokens"] == 48

    bench = answer(capsys, "bench", *common, "--prompt-lengths", "20,45", "--repeats", 1)
    assert [row["prompt_tokens"] for row in bench["rows"]] == [20, 45]
    assert (bench["dense_head"], bench["dense_tail"], bench["min_tokens"]) == (BLOCK, 0, 2 * BLOCK)
    assert bench["engine"] == "transformers" and bench["compare"] == [] and bench["growth_dense"] is not None
    assert {"cpu", "isa", "threads", "torch", "transformers"} <= bench["machine"].keys()

    scores = answer(capsys, "evaluate", *common, "--data", f"{texts}[4:]", "--tokens", 64, "--continuation", 16, "--record")
    assert (scores["dense_tail"], scores["kernel"]) == (0, bench["kernel"])
    assert scores["documents"] == 1 and scores["calibrated_on"] == 0
    assert answer(capsys, "inspect", out)["quality"]["ppl_ratio"] == scores["ppl_ratio"]
    assert "ppl_ratio" in (out / "README.md").read_text()


def test_a_gguf_file_whose_ffns_stay_packed(capsys, texts, tmp_path, monkeypatch):
    gguf_tiny = pytest.importorskip("gguf_tiny")
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path / "cache"))
    file, folder = str(tmp_path / "tiny.gguf"), str(tmp_path / "artifact")
    gguf_tiny.write(file, quantised=gguf_tiny.gguf.GGMLQuantizationType.Q8_0)
    artifacts.save(tiny_artifact(models.load(file).model), folder)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("word " * 30)
    both = [
        answer(capsys, "generate", file, "--artifact", folder, "--prompt-file", str(prompt), "--max-new-tokens", "2", *packed)
        for packed in ([], ["--packed"])
    ]
    assert both[1]["sparse_tokens"] == both[0]["sparse_tokens"] > 0
    bench = answer(capsys, "bench", file, "--artifact", folder, "--prompt-lengths", "48", "--repeats", "1", "--packed")
    assert bench["packed"] and bench["weights"] == "int8" and bench["rows"][0]["sparse_tokens"] > 0
    found = answer(
        capsys, "evaluate", file, "--artifact", folder, "--data", str(texts), "--limit", "1", "--tokens", "330", "--packed"
    )
    assert found["packed"] and found["sparse_tokens"] > 0
    assert "is none" in refusal(capsys, "bench", str(tmp_path), "--artifact", folder, "--packed")
    assert "--engine transformers" in refusal(capsys, "bench", file, "--artifact", folder, "--packed", "--engine", "vllm")


@pytest.mark.parametrize("predictor", ["oracle", "static", "first-block", "low-rank", "random"])
def test_evaluate_with_a_baseline(capsys, model_folder, artifact_folder, texts, predictor):
    line = ["evaluate", model_folder, "--artifact", artifact_folder, "--data", texts, "--limit", 2, "--dtype", "fp32"]
    line += ["--tokens", 48, "--continuation", 12, "--predictor", predictor, "--no-compensator"]
    scores = answer(capsys, *line)
    assert (scores["predictor"], scores["compensator"], scores["documents"]) == (predictor, False, 2)
    assert scores["ppl_ratio"] != 1


@pytest.fixture
def default_is_tiny(monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: models.LoadedModel(tiny_model(), tiny_tokenizer(), "tiny"))


def test_demo_prints_its_numbers_as_the_last_line(capsys, default_is_tiny, artifact_folder, tmp_path):
    (tmp_path / "doc.txt").write_text(tiny_text(350))
    arguments = ["demo", "--artifact", artifact_folder, "--document", tmp_path / "doc.txt", "--repeats", 1]
    arguments += ["--max-new-tokens", 2]
    assert run(*arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*["ttft_dense_s", "ttft_sparse_s", "speedup", "ffn_share", "ceiling", "ppl_dense", "ppl_sparse"]} <= result.keys()
    assert result["sparse_tokens"] + result["dense_tokens"] == result["prompt_tokens"] and result["sparsity"] == 0.5
    assert run(*arguments, "--sparsity", 0) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ppl_ratio"] == 1 and result["answer_dense"] == result["answer_sparse"]


def test_env(capsys):
    described = answer(capsys, "env")
    assert described["torch"] == torch.__version__ and set(described["kernels"]) == {"native", "triton", "torch"}


def test_calibrate_resumes_from_the_command_line(capsys, model_folder, texts, tmp_path, monkeypatch):
    arguments = ["calibrate", model_folder, "--data", texts, "--out", tmp_path / "a", "--dtype", "fp32", *FAST]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastfill.calibration.distill.Distiller.step", interrupt)
        assert "interrupted" in refusal(capsys, *arguments, code=130)
    assert "--resume" in refusal(capsys, *arguments)
    assert "other settings (config" in refusal(capsys, *arguments, "--seed", 1, "--resume")
    assert answer(capsys, *arguments, "--resume")["out"] == str(tmp_path / "a")
    assert not (tmp_path / "a.checkpoint").exists()


# --- bad input ----------------------------------------------------------------------------------------------------------


PLACES = {
    "calibrate": lambda model, artifact, texts, place: ["calibrate", model, "--data", texts, "--out", place],
    "evaluate": lambda *given: [*"evaluate {} --artifact {} --data {} --out {}".format(*given).split()],
    "report": lambda model, artifact, texts, place: ["report", artifact, "--out", place],
    "figures": lambda model, artifact, texts, place: ["report", artifact, "--out", "page.html", "--svg", place],
}


@pytest.mark.parametrize("command", ["inspect", "generate", "bench", "evaluate", "demo"])
def test_a_bad_artifact(capsys, model_folder, artifact_folder, prompt, texts, default_is_tiny, command):
    weights = artifact_folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    options = {
        "inspect": [artifact_folder],
        "generate": [model_folder, "--artifact", artifact_folder, "--prompt-file", prompt],
        "bench": [model_folder, "--artifact", artifact_folder],
        "evaluate": [model_folder, "--artifact", artifact_folder, "--data", texts],
        "demo": ["--artifact", artifact_folder],
    }
    assert "truncated or damaged" in refusal(capsys, command, *options[command])


@pytest.mark.parametrize("command", PLACES)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    capsys, monkeypatch, tmp_path, model_folder, artifact_folder, texts, command
):
    def too_late(*_args, **_kwargs):
        raise AssertionError("the work began")

    monkeypatch.setattr(models, "load", too_late)
    monkeypatch.setattr("fastfill.lab.report.page.figures", too_late)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "below", "/proc/below/x"):
        line = PLACES[command](model_folder, artifact_folder, texts, place)
        assert "could not be written" in refusal(capsys, *line)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "page.html").exists()


def test_a_record_that_cannot_be_written_is_told_before_the_work(capsys, monkeypatch, model_folder, artifact_folder, texts):
    def full(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr("fastfill.files.tempfile.mkdtemp", full)
    line = ["evaluate", model_folder, "--artifact", artifact_folder, "--data", texts, "--record"]
    assert "could not be written: Read-only file system" in refusal(capsys, *line)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--sparsity", "0.96"], "sparsity must lie in [0, 0.95]"),
        (["--sparsity", "nan"], "sparsity must lie in [0, 0.95]"),
        (["--block-size", "0"], "block_size must be a whole number of at least 1"),
        (["--kernel", "cuda"], "native, triton, torch"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--max-new-tokens", "468"], "The prompt has 45 tokens and the answer up to 468, more than the 512"),
        (["--dense-tail", "-1"], "dense_tail must be a whole number of at least 0"),
        (["--threads", "0"], "--threads"),
        (["--threads", "1000000"], "--threads 1000000 is more than the"),
        (["--dtype", "int4"], "dtype 'int4' is not known"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
    ids=" ".join,
)
def test_bad_options(capsys, model_folder, artifact_folder, prompt, more, words):
    assert words in refusal(capsys, *generate(model_folder, artifact_folder, prompt), *more)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--sequence-length", "8"], "sequence_length must be a whole number of at least 16"),
        (["--sequence-length", "513"], "sequence_length 513 is more than the 512 tokens"),
        (["--schedule", "best"], "schedule must be"),
    ],
    ids=" ".join,
)
def test_bad_calibration_settings(capsys, model_folder, texts, tmp_path, more, words):
    arguments = ["calibrate", model_folder, "--data", texts, "--out", tmp_path / "a", *FAST, *more]
    assert words in refusal(capsys, *arguments)
    assert not list(tmp_path.glob("a*"))


def test_another_models_artifact_and_what_is_missing(capsys, model_folder, artifact_folder, prompt, tmp_path):
    assert "There is no model folder" in refusal(capsys, *generate(tmp_path / "none", artifact_folder, prompt))
    assert "There is no file" in refusal(capsys, *generate(tmp_path / "none.gguf", artifact_folder, prompt))
    artifacts.save(tiny_artifact(tiny_model(seed=1)), artifact_folder)
    assert "belongs to another model" in refusal(capsys, *generate(model_folder, artifact_folder, prompt))
    assert "is not an artifact" in refusal(capsys, *generate(model_folder, tmp_path / "none", prompt))
    assert "is not an artifact" in refusal(capsys, "inspect", tmp_path / "none")


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
@pytest.mark.parametrize(
    "name, content, words", [("missing.jsonl", None, "cannot be read"), ("short.txt", b"w9 w10", "too short")], ids=str
)
def test_bad_data(capsys, model_folder, artifact_folder, tmp_path, command, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    options = {"calibrate": ["--out", tmp_path / "a", *FAST], "evaluate": ["--artifact", artifact_folder, "--tokens", 48]}[
        command
    ]
    assert words in refusal(capsys, command, model_folder, "--data", tmp_path / name, "--dtype", "fp32", *options)
    assert not list(tmp_path.glob("a.checkpoint"))


def test_evaluating_too_few_tokens(capsys, model_folder, artifact_folder, texts):
    arguments = ["evaluate", model_folder, "--artifact", artifact_folder, "--data", texts, "--dtype", "fp32"]
    assert "too few for a sparse part" in refusal(capsys, *arguments, "--tokens", 30, "--continuation", 20)
    assert "psychic" in refusal(capsys, *arguments, "--predictor", "psychic", "--tokens", 48)


def test_bad_prompts_and_lengths(capsys, model_folder, artifact_folder, tmp_path, prompt):
    assert "cannot be read: No such file" in refusal(capsys, *generate(model_folder, artifact_folder, tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in refusal(capsys, *generate(model_folder, artifact_folder, tmp_path / "empty.txt"))
    bench = ["bench", model_folder, "--artifact", artifact_folder]
    assert "--prompt-lengths" in refusal(capsys, *bench, "--prompt-lengths", "512,many")
    assert "prompt length" in refusal(capsys, *bench, "--prompt-lengths", "0")
    assert "--repeats" in refusal(capsys, *bench, "--repeats", 0)
    if importlib.util.find_spec("vllm") is None:
        assert "run: pip install 'fastfill[vllm]'" in refusal(capsys, *bench, "--engine", "vllm")


def test_serve_hands_its_options_on(monkeypatch):
    from fastfill.engines import vllm

    seen = []
    monkeypatch.setattr(vllm, "serve", lambda *named, **options: seen.append((named, options)))
    assert run("serve", "m", "--artifact", "a", "--one-copy", "--port", 1, "--block-size", 128) == 0
    ((named, options),) = seen
    assert named == ("m", "a", ["--port", "1", "--block-size", "128"]) and options["one_copy"] is True
    assert {value for name, value in options.items() if name != "one_copy"} == {None}


def test_a_demo_document_that_is_too_short_or_too_long(capsys, default_is_tiny, artifact_folder, tmp_path):
    demo = ["demo", "--artifact", artifact_folder, "--repeats", 1, "--max-new-tokens", 2, "--document", tmp_path / "doc.txt"]
    (tmp_path / "doc.txt").write_text("w9")
    assert f"prompts under {2 * BLOCK} stay dense" in refusal(capsys, *demo)
    assert f"prompts under {20 * BLOCK} stay dense" in refusal(capsys, *demo, "--block-size", 10 * BLOCK)
    (tmp_path / "doc.txt").write_text(tiny_text(600))
    assert "more than the 512" in refusal(capsys, *demo)
    (tmp_path / "doc.txt").write_text(tiny_text(40))
    assert f"{2 * BLOCK + 256} are needed to measure perplexity" in refusal(capsys, *demo)
    assert "--repeats" in refusal(capsys, *demo, "--repeats", 0)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(5, "Input/output error", "/a/file"), "/a/file cannot be used: Input/output error."),
        (OSError("odd"), "A file cannot be used: odd."),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "not enough memory"),
    ],
    ids=str,
)
def test_trouble_with_the_machine_is_one_sentence(capsys, monkeypatch, artifact_folder, error, words):
    def fail(*_):
        raise error

    monkeypatch.setattr(artifacts, "load", fail)
    assert words in refusal(capsys, "inspect", artifact_folder)


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, artifact_folder):
    def fail(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(artifacts, "load", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        run("inspect", artifact_folder)


BENCH, CALIBRATE = ["bench", "m", "--artifact", "a"], ["calibrate", "m", "--data", "d", "--out", "o"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "required: COMMAND; see: fastfill --help"),
        (["generate"], "required: MODEL, --artifact, --prompt-file; see: fastfill generate --help"),
        ([*BENCH, "--repeats", "two"], "argument --repeats: invalid int value"),
        (["fl\x1b[2Jy"], "invalid choice"),
        (["inspect", "a", "\x1b[2J" * 1000], "unrecognized arguments"),
        ([*BENCH, "--repeats", "9" * 5000], "--repeats"),
        ([*BENCH, "--prompt-lengths", "9" * 5000], "--prompt-lengths must be numbers"),
        ([*BENCH, "--prompt-lengths", "9" * 30], "each prompt length must be a whole number of at most"),
        ([*BENCH, "--seed", str(10**20)], "--seed must be a whole number"),
        (["evaluate", "m", "--artifact", "default", "--data", "d", "--limit", "9" * 30], "--limit must be a whole number"),
        ([*CALIBRATE, "--seed", str(2**63 - 1)], "--seed must be a whole number"),
        ([*CALIBRATE, "--fit-lr", "1e300"], "fit_lr must be a positive number of at most"),
        ([*CALIBRATE, "--steps", "9" * 30], "steps must be a whole number of at most"),
        ([*CALIBRATE, "--processes", "99999", "--batch", "99999"], "too few for --processes"),
        (["inspect", "x" * 100_000], "File name too long"),
        (["report", "x\x1b[2J" * 1000], "File name too long"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_printable_line(capsys, arguments, words):
    line = refusal(capsys, *arguments)
    assert words in line and line.isprintable() and len(line) <= LONGEST + len("fastfill: ")


def test_the_json_is_strict(capsys, monkeypatch, artifact_folder):
    from fastfill.cli import show

    made = {"nan": float("nan"), "list": [float("inf"), 1.5, (float("-inf"),)], "text": "cut \ud83d", "whole": 2**60}
    monkeypatch.setattr(artifacts.Artifact, "summary", lambda _: made)
    monkeypatch.setattr(show, "artifact", lambda *_: None)
    assert run("inspect", artifact_folder, "--json") == 0

    def forbidden(name):
        raise ValueError(name)

    found = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=forbidden)
    assert found == {"nan": None, "list": [None, 1.5, [None]], "text": "cut \ufffd", "whole": 2**60}


def test_a_prompt_that_is_far_too_long_is_not_tokenized(capsys, monkeypatch, model_folder, artifact_folder, tmp_path):
    (tmp_path / "long.txt").write_text("w9 " * 20_000)
    monkeypatch.setattr(engine, "encode", None)
    words = refusal(capsys, *generate(model_folder, artifact_folder, tmp_path / "long.txt"))
    assert "The prompt has 60,000 characters, more than the 512 tokens" in words


def test_a_question_of_markup_and_controls(capsys, default_is_tiny, artifact_folder, tmp_path):
    (tmp_path / "doc.txt").write_text(tiny_text(350))
    question = "What does [/INST] mean\x1b[2J?\udce9"
    arguments = ["demo", "--artifact", artifact_folder, "--document", tmp_path / "doc.txt", "--repeats", 1]
    assert run(*arguments, "--max-new-tokens", 1, "--question", question) == 0
    out = capsys.readouterr().out
    assert "Question What does [/INST] mean\\x1b[2J?" in out and "\x1b" not in out
    assert json.loads(out.splitlines()[-1])["question"] == "What does [/INST] mean\x1b[2J?\ufffd"


@pytest.mark.parametrize("words", [["report", "a", "--out", "\0"], ["inspect", "a\0b"], ["report", "a", "--svg", "\ud800"]])
def test_arguments_that_no_system_passes(capsys, words):
    assert cli.main(words) == 2
    assert "null character" in capsys.readouterr().err
