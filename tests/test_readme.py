"""The README and the docs: their commands run, their links lead somewhere, their numbers come from benchmarks/results."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import script

from fastfill import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = ("make", "git", "pip", ".", "cd", "curl")  # by other tests, or without a result to check


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The `fastfill ...` lines of a shell block as argument lists. A line that is neither run nor knowingly left out fails."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] not in NOT_RUN:
            assert words[0] == "fastfill", f"nobody checks the command {line!r}"
            if words[1] != "serve":  # tests/test_vllm_serve.py
                found.append(words[1:])
    return found


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's paths exist and into which its commands may write."""
    for name in ("src", "artifacts"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


README_BLOCKS = [block for block in code_blocks(README, "sh") if commands(block)]


# On less text where they take long; of an option the last counts. As they stand they are parsed (below).
LESS = {
    "bench": ["--prompt-lengths", "512"],
    "evaluate": ["--tokens", "768", "--limit", "1"],
    "calibrate": ["--fit-tokens", "512", "--steps", "1"],
}


@pytest.mark.real
@pytest.mark.parametrize("block", README_BLOCKS, ids=[" ".join(commands(block)[0][:1]) for block in README_BLOCKS])
def test_readme_commands_run(block: str, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(block):
        assert cli.main([*words, *LESS.get(words[0], []), "--json"]) == 0
        out = capsys.readouterr().out
        assert isinstance(json.loads(out.splitlines()[-1]), dict), f"{words[0]} ends without a JSON document"


@pytest.mark.real
def test_readme_python_runs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = code_blocks(README, "python")
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["attached"].stats.sparse_tokens > 1000
    assert all("forward" not in vars(module) for module in names["attached"].modules)  # detached at the end
    assert "sparse_tokens=" in capsys.readouterr().out


def test_readme_shows_every_command_and_no_other() -> None:
    known = {action.dest: action for action in cli.build_parser()._actions if action.choices}
    (subcommands,) = known.values()
    assert set(re.findall(r"^\| `fastfill (\w+)`", README, re.MULTILINE)) == set(subcommands.choices or ())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_shell_commands_in_documents_are_understood(path: Path) -> None:
    parser = cli.build_parser()
    for block in code_blocks(path.read_text(encoding="utf-8"), "sh"):
        for words in commands(block):
            assert callable(parser.parse_args(words).run)  # argparse leaves with SystemExit on an unknown flag


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_compiles_and_imports_what_exists(path: Path) -> None:
    for block in code_blocks(path.read_text(encoding="utf-8"), "python"):
        names: dict[str, Any] = {}
        assert compile(block, path.name, "exec")
        for line in re.findall(r"^(?:import|from) fastfill.*$", block, re.MULTILINE):
            exec(line, names)
            assert len(names) > 1, line  # more than the builtins


def anchors(text: str) -> set[str]:
    """The ids that a forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{path.name}: no heading for #{anchor}"


def test_readme_numbers_are_the_results() -> None:
    report = script("report_tables")
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        assert report.render(text) == text, "run: python benchmarks/report_tables.py"
    if list(report.RESULTS.glob("bench-*.json")) and (report.RESULTS / "quality.jsonl").exists():
        assert "{{" not in README


def test_readme_is_short() -> None:
    assert len(README.split()) <= 1500


def test_readme_has_no_numbers_in_tables_of_its_own() -> None:
    outside = re.sub(r"<!-- results:\S+ -->.*?<!-- /results -->", "", README, flags=re.DOTALL)
    assert outside.count("results:") == 0
    for line in outside.splitlines():
        assert not (line.startswith("|") and re.search(r"\d", line)), f"a number that no result backs: {line}"


def test_readme_states_the_cost_that_the_defaults_have() -> None:
    from fastfill.config import default_ranks

    hidden, intermediate = 576, 1536  # SmolLM2-135M
    predictor, linear, silu = default_ranks(hidden)
    cost = (predictor * (hidden + intermediate) + 2 * hidden * (linear + silu)) / (3 * hidden * intermediate)
    assert f"cost {cost * 100:.1f} %" in README
    assert f"{(0.5 + cost) * 100:.1f} % of the arithmetic" in README


MACHINE = {"cpu": "Some CPU", "gpu": None, "threads": 2, "torch": "2.13.0", "transformers": "5.20.0"}
HEAD = {"model": "maker/tiny", "dtype": "bfloat16", "sparsity": 0.5, "block_size": 64}
SAME = {"ttft_dense_s": 2.0, "ffn_dense_s": 1.0, "ffn_sparse_s": 0.5, "ffn_ratio": 0.5, "ffn_share": 0.5, "ceiling": 1.3333}
BENCH: dict[str, Any] = {**HEAD, "kernel": "native", "repeats": 3, "machine": MACHINE, "rows": []}
for tokens, speedup, sparse in ((128, 1.0, 0), (512, 0.97, 448), (1024, 1.19, 960)):
    counts = {"prompt_tokens": tokens, "sparse_tokens": sparse, "dense_tokens": tokens - sparse}
    BENCH["rows"].append({**SAME, **counts, "speedup": speedup, "ttft_sparse_s": 2.0 / speedup})
PARTS = ("attention", "ffn", "predictor", "compensator", "rest")
SPLIT = {
    "split_dense": dict.fromkeys(PARTS, 0.25),
    "split_sparse": dict(zip(PARTS, (0.25, 0.5, 0.125, 0.0625, 0.5), strict=True)),
    **{"flops_dense": 2_500_000_000_000, "flops_sparse": 2_000_000_000_000, "ffn_flops_ratio": 0.6},
    **{"peak_dense_mb": 70.4, "peak_sparse_mb": None},
}
WITH_SPLIT = {**BENCH, "rows": [{**row, **SPLIT} for row in BENCH["rows"]], "model_mb": 269.0, "attached_mb": 65.7}
QUALITY = {
    **HEAD,
    **{"predictor": "learned", "compensator": True, "documents": 9, "sources": [f"news.jsonl#{row}" for row in range(9)]},
    **{"tokens": 17_847, "cont_tokens": 2295, "no_context_ppl": 25.0, "context_kept": 0.87, "calibrated_on": 0},
    **{"ppl_dense": 13.0, "ppl_sparse": 19.5, "ppl_ratio": 1.5, "kl": 0.4, "top1_agreement": 0.71},
    **{"cont_ppl_dense": 13.3, "cont_ppl_sparse": 14.2, "cont_ppl_ratio": 1.0677, "cont_kl": 0.07, "cont_top1_agreement": 0.85},
}


TIMES = {"ttft_stock_s": 0.4, "ttft_sparse_s": 0.5, "speedup": 0.8, "ceiling": 1.25, "ffn_share": 0.4}
VLLM: dict[str, Any] = {
    **{"step": "m", "model": "org/M", "dtype": "bfloat16", "sparsity": 0.5, "block_size": 32, "vllm": "0.32.0"},
    "machine": {"cpu": "A CPU", "gpu": None, "threads": 2, "torch": "2.13.0"},
    "one_copy": True,
    "rows": [{"prompt_tokens": 64, "sparse_tokens": 0, **TIMES}, {"prompt_tokens": 1024, "sparse_tokens": 960, **TIMES}],
}
DECODE = {**VLLM, "step": "decode", "rows": [{"model": "org/M", "stock_ms": 30.04, "sparse_ms": 31.0, "ratio": 0.97}]}
DECODE.pop("one_copy")


def write_tasks(tmp_path: Path) -> None:
    scores = {"dense": 40.04, "sparse": 36.0, "recovery": 0.899, "interval": [0.7, 1.08], "examples": 24}
    none = {**scores, "dataset": "vt@1024", "dense": 0.0, "recovery": None, "interval": None, "examples": 2}
    sets = [{**scores, "dataset": "cwe@1024", "examples": 22}, none]
    result = {**QUALITY, "average": scores, "examples": 24, "datasets": sets}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "ruler.json").write_text(json.dumps(result))


def write_real(folder: Path) -> None:
    """Results of a real model."""
    folder.mkdir()
    model = {"model": "models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"}
    (folder / "bench-native.json").write_text(json.dumps({**WITH_SPLIT, **model}))
    (folder / "quality.jsonl").write_text(json.dumps({**QUALITY, **model}) + "\n")
    nats = {"dense": 2.3, "sparse": 2.32, "loss": 0.02, "kl": 0.03, "first_token_agreement": 0.9}
    row = {"examples": 3, "interval": [-0.01, 0.05], **nats}
    sets = [{"dataset": "qasper", "likelihood": row}]
    result = {**QUALITY, **model, "max_prompt_tokens": 2048, "likelihood": row, "datasets": sets}
    (folder / "longbench.json").write_text(json.dumps(result))


def write_machine(results: Path, isa: str, dtype: str) -> Path:
    """Speed of a real model on another processor, in its own type and in eight bits, and llama.cpp's there; its folder."""
    folder = results / isa / "qwen2.5-coder-1.5b"
    folder.mkdir(parents=True)
    machine = {**MACHINE, "isa": isa}
    for name, seconds, more in (("native", 1.6, {}), ("int8", 1.0, {"weights": "int8"})):
        row = {**BENCH["rows"][2], "ttft_all_neurons_s": 1.8, "ttft_sparse_s": seconds, "speedup": 2.0 / seconds}
        model = {"model": "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "dtype": dtype}
        result = {**BENCH, **more, **model, "machine": machine, "rows": [row]}
        (folder / f"bench-{name}.json").write_text(json.dumps(result))
    lines = [
        {"n_prompt": 1024, "avg_ns": ns, "model_type": f"qwen2 1.5B {form}"} for ns, form in ((3e9, "Q8_0"), (2.4e9, "Q4_0"))
    ]
    (folder / "llama-bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_report_writes_results_between_the_markers(tmp_path: Path) -> None:
    report = script("report_tables")
    (tmp_path / "bench-tiny.json").write_text(json.dumps(WITH_SPLIT))
    write_tasks(tmp_path)
    modules, interval = [f"module{row}.py#0" for row in range(9)], [1.6, 2.0]
    rows = [
        {**QUALITY, "predictor": "random", "compensator": False, "ppl_sparse": 25_819.0, "ppl_ratio": 1986.0},
        {**QUALITY, "ppl_ratio": 9.9},  # measured again below: the later row counts
        QUALITY,
        {**QUALITY, "dense_tail": 0, "ppl_ratio": 1.7},  # another setting: neither replaces the other
        {**QUALITY, "sources": modules, "ppl_ratio": 1.8, "ppl_ratio_interval": interval},  # other text: another table
    ]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "vllm.jsonl").write_text(json.dumps(VLLM) + "\n")
    write_real(tmp_path / "qwen2.5-coder-0.5b")
    again = {**BENCH, "reread": 0.1, "rows": [{**BENCH["rows"][2], "reread_tokens": 154}]}
    for isa, dtype in (("avx2", "float32"), ("amx", "bfloat16")):
        folder = write_machine(tmp_path, isa, dtype)
        (folder / "reread.jsonl").write_text(json.dumps(again) + "\n")
        (tmp_path / isa / "vllm.jsonl").write_text(json.dumps({**VLLM, "dtype": dtype}) + "\n")
    page = "\n".join(report.render(text.read_text(encoding="utf-8"), tmp_path) for text in report.PAGES)
    assert "{{" not in page
    assert "\nQwen2.5-Coder-0.5B-Instruct, a prompt of" in page
    assert "| all sets | 3 | 2.300 | 2.320 | 0.020 | -0.010 to 0.050 |" in page
    assert "2.00 s → 1.68 s, **1.19x**" in page and "at most 1.31x" in page and "**1.07x**" in page and "**1.50x**" in page
    assert "| 128 | 2.000 s | 2.000 s | all dense |  |" in page
    more = {"ttft_all_neurons_s": 1.9, "ffn_all_neurons_s": 0.9}
    ours = {**BENCH, "attention_by": "chunks (4x)", "rows": [{**row, **more} for row in BENCH["rows"]]}
    assert "**1.19x**, of which skipping is 1.13x, the rest our kernel and attention" in report.claim([ours], [], [])
    assert "bfloat16, its attention by chunks, 50%" in report.bench_tables([ours])
    packed = {**ours, "weights": "int8", "packed": True}
    assert "sparse in int8, FFNs packed, its attention" in report.bench_tables([packed])
    assert "In eight bits" in report.claim([ours, {**packed, "packed": False}], [], [])
    assert "In eight bits" not in report.claim([ours, packed], [], [])
    assert "Some CPU (avx2), 2 threads" in page and "Some CPU (amx), 2 threads" in page
    assert "\nThe first gains with AMX 1.25x, 2.00x in int8 over dense in bf16" in page
    assert "; without AVX-512 1.25x, 2.00x in int8 over dense in fp32" in page
    assert "-1.5B-Instruct | 1,024 | 2.00 s | 1.80 s | 1.60 s | 1.25x | 1.12x | 2.40 s, Q4_0 | 1.50x |" in page
    assert "-1.5B-Instruct, int8 | 1,024 | 2.00 s | 1.80 s | 1.00 s | 2.00x | 1.80x | 2.40 s, Q4_0 | 2.40x |" in page
    assert "0.97x (slower)" in page
    assert page.count("vLLM 0.32.0, bfloat16") == 2 and page.count("vLLM 0.32.0, float32") == 1
    assert "; 9 held-out documents, 17,847 tokens" in page and "; 9 held-out Python modules, 17,847 tokens" in page
    assert "| **learned** | yes | 19.50 | 1.50x |" in page and "| **learned** | yes | 19.50 | 1.70x |" in page
    assert "| **learned** | yes | 19.50 | 1.80x (1.60 to 2.00) |" in page and "different seeds" not in page
    assert "9.90x" not in page and "| random | no | 25,819 | 1986.00x |" in page
    assert page.index("**learned**") < page.index("| random |")
    assert report.render(page, tmp_path) == page  # writing twice changes nothing
    assert report.render(page.replace("1.19x", "1.91x"), tmp_path) == page  # an edited number is put right


def test_rivals_and_levels_are_what_was_measured() -> None:
    report = script("report_tables")
    row = {**BENCH["rows"][2], "ttft_sparse_s": 1.0, "ttft_all_neurons_s": 1.5}
    peers = [
        {"name": "transformers, fp32", "weights": "fp32", "prompt_tokens": 1024, "ttft_s": 4.0},
        {"name": "llama-bench", "weights": "a.gguf", "prompt_tokens": 1024, "ttft_s": 9.0},
        {"name": "vLLM", "skipped": "not installed"},
    ]
    eight = {**BENCH, "weights": "int8", "rows": [row], "compare": peers}
    llama = [{"n_prompt": 1024, "avg_ns": 3e9, "model_type": "qwen2 1.5B Q4_K - Medium"}]
    served = [{"dtype": "bfloat16", "rows": [{"prompt_tokens": 1024, "ttft_sparse_s": 1.25, "ttft_stock_s": 1.75}]}]
    lines = report.rivals_table([BENCH, eight], llama, served).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[4:]] == [
        "fastfill, 50% sparsity, int8",
        "vLLM with fastfill, bfloat16",
        "fastfill, int8, all neurons kept",
        "fastfill, 50% sparsity, bfloat16",
        "vLLM, bfloat16",
        "transformers, bfloat16",
        "llama.cpp, Q4_K_M",
        "transformers, fp32",
    ]
    assert "| 3.00 s | 3.00x |" in lines[-2]
    assert report.rivals_table([BENCH], llama, served) == ""
    more = [
        {**BENCH, "sparsity": 0.3, "rows": [{**row, "prompt_tokens": 2048, "sparse_tokens": 1920, "speedup": 1.1}]},
        {**QUALITY, "sparsity": 0.7},
    ]
    table = report.levels_table([BENCH], [QUALITY], more)
    assert "| sparsity | 128 | 512 | 1,024 | 2,048 |" in table and "| 30% |  |  |  | 1.10x (1.31x) |  |  |  |  |" in table
    assert "| 70% |  |  |  |  | 1.50x |" in table


def test_upper_layers_beside_the_same_sparsity_alone() -> None:
    report = script("report_tables")
    row = {**BENCH["rows"][2], "ttft_dense_s": 2.5, "ttft_sparse_s": 1.0, "speedup": 2.5}
    above = {**BENCH, "upper_share": 0.25, "rows": [row, {**row, "prompt_tokens": 4096}]}
    tasks = [{**answered("suite", lost=False), "upper_share": share} for share in (1.0, 0.25)]
    tasks[1]["likelihood"] = {**tasks[1]["likelihood"], "loss": 0.0789}
    alone = {**BENCH, "rows": [{**row, "ttft_sparse_s": 1.5}]}
    lines = report.upper_table([above, *tasks], [alone]).splitlines()
    assert "upper layers that read 25% of the blocks (`--upper-share 0.25`)" in lines[0]
    assert lines[4:6] == [
        "| bfloat16 | 1,024 | 2.50 s | 1.50 s | 1.00 s | 2.50x | 1.50x |",
        "| bfloat16 | 4,096 | 2.50 s |  | 1.00 s | 2.50x |  |",
    ]
    assert lines[-3] == "| **all sets** | 701 | 0.079 (-0.050 to 0.250) | 0.034 | 0.046 (-0.050 to 0.250) | 0.034 |"
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| lcc", "| vt@64"]


def test_tokens_that_are_read_again_beside_those_that_are_read_once(tmp_path: Path) -> None:
    report = script("report_tables")
    folder = write_machine(tmp_path, "avx2", "float32")
    (tmp_path / "qwen2.5-coder-1.5b").mkdir()
    model = {"model": "models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"}
    once = [
        {**QUALITY, **model, "weights": "int8", "cont_kl": 0.5},
        {**QUALITY, **model, "weights": "model", "cont_kl": 0.0446},
    ]
    (tmp_path / "qwen2.5-coder-1.5b" / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in once))
    row = {**BENCH["rows"][2], "ttft_dense_s": 2.0, "ttft_sparse_s": 1.25, "speedup": 1.6, "reread_tokens": 154}
    tasks = [{**answered("suite", lost=False), **model, "reread": share} for share in (0, 0.1)]
    tasks[1]["likelihood"] = {**tasks[1]["likelihood"], "loss": 0.0123}
    lines = [{**BENCH, **model, "reread": 0.1, "rows": [row]}, {**QUALITY, **model, "reread": 0.1, "cont_kl": 0.0123}, *tasks]
    (folder / "reread.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.reread_tables(tmp_path, "avx2")
    assert page.startswith("`--reread 0.1`, 50% sparsity")
    assert "-1.5B-Instruct | 1,024 | 154 | 2.00 s | 1.60 s | 1.25 s | 1.60x |" in page
    kept = f"{QUALITY['cont_ppl_ratio']:.3f}x"
    assert f"-1.5B-Instruct | {kept} | 0.012 | {kept} | 0.045 |" in page
    assert "| **all sets** | 701 | 0.012 (-0.050 to 0.250) | 0.034 | 0.046 (-0.050 to 0.250) | 0.034 |" in page


def answered(task: str, lost: bool) -> dict[str, Any]:
    """A result with scores and likelihoods of two sets; lost: the second is at chance."""
    loss = {"loss": -0.0123, "interval": [-0.05, 0.25], "kl": 0.0341}
    line = {"dataset": "vt@64", "examples": 700, "dense": 80.0, "sparse": 60.0, "recovery": 0.75, "interval": [0.5, 1.0]}
    one = {"dataset": "lcc", "examples": 1, "dense": 50.0, "sparse": 45.0, "recovery": 0.9, "interval": None}
    one |= {"likelihood": {**loss, "interval": None}}
    sets = [{**one, "chance": 40.0, "at_chance": lost}, {**line, "chance": 1.25, "at_chance": False, "likelihood": loss}]
    average = {**line, "dense": 65.0, "sets": 2 - lost, "mean_recovery": 0.8251, "mean_recovery_interval": [0.7, 0.95]}
    head = {**HEAD, "task": task, "kernel": "triton", "max_prompt_tokens": 4000, "cut_prompts": 3, "examples": 701}
    head |= {"machine": {**MACHINE, "gpu": "Some GPU"}, "likelihood": {**loss, "loss": 0.0456, "examples": 701}}
    return {**head, "datasets": sets, "average": average}


def test_report_of_answers(tmp_path: Path) -> None:
    report = script("report_tables")
    head, *lines = report.answers_table(answered("suite", lost=False)).splitlines()
    assert "triton kernel; Some GPU, torch 2.13.0, transformers 5.20.0: made rows of 2 sets" in head and "chance," not in head
    assert "prompts of at most 4,000 tokens (3 cut in the middle)" in head
    assert lines[3:] == [
        "| lcc | 1 | 50.0 | 45.0 | 40.0 | 90.0% | -0.012 | 0.034 |",
        "| vt@64 | 700 | 80.0 | 60.0 | 1.2 | 75.0% (50.0% to 100.0%) | -0.012 (-0.050 to 0.250) | 0.034 |",
        "| **mean of 2 sets** | 701 | 65.0 | 60.0 |  | 82.5% (70.0% to 95.0%) | 0.046 (-0.050 to 0.250) | 0.034 |",
    ]
    # Scores of sets at chance are in no mean, their likelihoods are.
    head, *lines = report.answers_table(answered("longbench", lost=True)).splitlines()
    assert "rows of MiniLongBench (2 of LongBench's 21 sets)" in head and "Behind the mean: sets at chance, on which" in head
    assert lines[3].startswith("| vt@64 | 700 |") and lines[4:] == [
        "| **mean of 1 set** | 700 | 65.0 | 60.0 |  | 82.5% (70.0% to 95.0%) |  |  |",
        "| lcc (at chance) | 1 | 50.0 | 45.0 | 40.0 |  | -0.012 | 0.034 |",
        "| **mean of all 2 sets** | 701 |  |  |  |  | 0.046 (-0.050 to 0.250) | 0.034 |",
    ]
    # No set above chance, no recovery.
    none = answered("suite", lost=True)
    none["datasets"].pop()
    none["average"] = {"dense": None, "sparse": None, "recovery": None, "interval": None, "sets": 0}
    assert "| **mean of 0 sets** | 0 |  |  |  |  |  |  |" in report.answers_table(none)
    # Of either file; without scores the table of likelihoods stays.
    write_real(tmp_path / "qwen2.5-coder-0.5b")
    (tmp_path / "qwen2.5-coder-1.5b").mkdir()
    for task in ("suite", "longbench"):
        (tmp_path / "qwen2.5-coder-1.5b" / f"{task}.json").write_text(json.dumps(answered(task, lost=True)))
    page = report.render("<!-- results:real -->\n<!-- /results -->\n", tmp_path)
    assert page.count("| lcc (at chance) |") == 2 and page.index("made rows of") < page.index("rows of MiniLongBench (2")
    assert "| all sets | 3 | 2.300 | 2.320 | 0.020 | -0.010 to 0.050 |" in page


def test_stored_examples_are_those_of_their_result() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*/*-examples.csv"))
    assert files
    for file in files:
        result = json.loads(file.with_name(file.name.replace("-examples.csv", ".json")).read_text(encoding="utf-8"))
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert len(rows) == len({row["key"] for row in rows}) == result["examples"]
        for line in result["datasets"]:
            group = [row for row in rows if row["dataset"] == line["dataset"]]
            sums = {key: sum(float(row[key]) for row in group) for key in group[0] if key not in ("key", "dataset")}
            loss, tokens = line["likelihood"], sums["gold_tokens"]
            assert (len(group), sums["prompt_tokens"], tokens) == (line["examples"], line["prompt_tokens"], loss["tokens"])
            for kind in ("dense", "sparse"):  # rows have 5 digits, a result 2 and 4
                assert 100 * sums[f"score_{kind}"] / len(group) == pytest.approx(line[kind], abs=0.0056)
                assert sums[f"nll_{kind}"] / tokens == pytest.approx(loss[kind], abs=6e-5)
            assert sums["kl"] / tokens == pytest.approx(loss["kl"], abs=1.1e-5)


def test_report_of_long_tasks(tmp_path: Path) -> None:
    report = script("report_tables")
    assert report.tasks_tables(tmp_path).startswith("{{tasks")
    write_tasks(tmp_path)
    lines = report.render("<!-- results:tasks -->\n<!-- /results -->\n", tmp_path).splitlines()
    assert "| RULER-style, 1,024 and 4,096 tokens | 24 | 40.0 | 36.0 | 90% | 70% to 108% |" in lines
    assert "RULER-style, 1,024 and 4,096 tokens:" in lines
    assert "| cwe@1024 | 22 | 40.0 | 36.0 | 90% | 70% to 108% |" in lines and "| vt@1024 | 2 | 0.0 | 36.0 |  |  |" in lines


def test_report_of_seeds(tmp_path: Path) -> None:
    report = script("report_tables")
    (tmp_path / "quality.jsonl").write_text(json.dumps(QUALITY))
    rows = [{**QUALITY, "ppl_ratio": ratio, "kl": kl} for ratio, kl in ((1.5, 0.4), (1.4, 0.41), (1.6, 0.42))]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report.render("<!-- results:quality -->\n<!-- /results -->\n", tmp_path)
    # Standard deviations by hand, n - 1 in the denominator: 0.1 of 1.4, 1.5, 1.6, and 0.01 of the KL.
    assert "strict ratio 1.500, 1.400, 1.600 (standard deviation 0.100); KL 0.4000" in page
    assert "0.4200 (standard deviation 0.0100)" in page and "1.0677 (standard deviation 0.0000)" in page


def test_report_of_a_bench_with_split_growth_and_other_engines(tmp_path: Path) -> None:
    peer = {"name": "llama-bench", "version": "b5163", "weights": "m.gguf"}
    peers = [{**peer, "prompt_tokens": tokens, "ttft_s": seconds} for tokens, seconds in ((512, 0.5), (1024, 1.25))]
    peers.insert(0, {"name": "vLLM", "version": None, "skipped": "not installed"})
    result = {**WITH_SPLIT, "growth_dense": 1.234, "growth_sparse": 1.2, "engine": "transformers", "compare": peers}
    report = script("report_tables")
    (tmp_path / "bench-old.json").write_text(json.dumps(BENCH))
    page = "<!-- results:bench -->\n<!-- /results -->\n<!-- results:split -->\n<!-- /results -->\n"
    assert "{{split" in report.render(page, tmp_path)
    (tmp_path / "bench-tiny.json").write_text(json.dumps(result))
    page = report.render(page, tmp_path)
    assert "{{" not in page and page.count("| 512 | 2.000 s |") == 2 and page.count("GFLOP") == 1
    assert "From 128 to 1,024 tokens the time grows with the prompt length to the power 1.23 dense and 1.20 sparse." in page
    assert "vLLM was not measured: not installed." in page
    assert "llama-bench b5163 (m.gguf) takes 0.500 s for 512, 1.250 s for 1,024 tokens." in page
    assert "| 512 | dense | 0.250 s | 0.250 s | 0.250 s | 0.250 s | 0.250 s | 2,500 | 70 MB |" in page
    assert "| 1,024 | sparse | 0.250 s | 0.500 s | 0.125 s | 0.062 s | 0.500 s | 2,000 |  |" in page


def test_report_of_vllm() -> None:
    common = {key: VLLM[key] for key in ("model", "dtype", "sparsity", "block_size", "vllm", "machine")}
    server = {"ttft_median_s": 1.5, "ttft_p99_s": 9.25, "prompt_tokens_s": 1234.4, "new_tokens_s": 5.0, "errors": ["x"]}
    kinds = [{"engine": kind, **server, "answers_equal_to_alone": 31} for kind in ("stock", "fastfill")]
    load = {"requests": 32, "shortest": 200, "longest": 4000, "per_second": 0.5, "new_tokens": 32}
    report = script("report_tables")
    assert report.vllm_tables([]).startswith("{{vllm")
    lines = report.vllm_tables([VLLM, DECODE, {"step": "load", **common, **load, "rows": kinds}]).splitlines()
    assert lines[0].startswith("vLLM 0.32.0, bfloat16, blocks of 32; A CPU, 2 threads, torch 2.13.0")
    assert lines[4:6] == [
        "| M (one copy) | 50% | 64 | 0.400 s | 0.500 s | all dense |  | 40% |",
        "| M (one copy) | 50% | 1,024 | 0.400 s | 0.500 s | 0.80x (slower) | 1.23x | 40% |",
    ]
    assert lines[7].endswith("(median ratio of the rounds): M 30.0 and 31.0 (0.97x).")
    assert "32 prompts of 200 to 4,000 tokens" in lines[9]
    assert lines[-1] == "| with fastfill | 1.50 s | 9.25 s | 1,234 | 5.0 | 1 | 31 of 32 |"


def test_report_refuses_documents_that_were_calibrated_on(tmp_path: Path) -> None:
    (tmp_path / "quality.jsonl").write_text(json.dumps({**QUALITY, "calibrated_on": 2}))
    with pytest.raises(ValueError, match="2 of the documents were calibrated on"):
        script("report_tables").render(README, tmp_path)


def test_report_refuses_an_unknown_marker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="results:taste is not known"):
        script("report_tables").render("<!-- results:taste -->\n<!-- /results -->", tmp_path)
