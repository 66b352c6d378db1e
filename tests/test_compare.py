"""Other engines beside ours, with stand-ins that take what the real ones take and print what they print."""

import json
import sys
import time
from pathlib import Path

import pytest

from fastfill import cli
from fastfill.lab import compare

GGUF = "model.Q4_1.gguf"
JOB = compare.Job("some/folder", GGUF, "bfloat16", "cpu", [20, 45], repeats=2, threads=3, vocabulary=128)

RECORD = """
import json, os
def record(**what):
    what["threads"] = os.environ["OMP_NUM_THREADS"]
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")
"""

VLLM = (
    RECORD
    + """
__version__ = "0.26.0"
print("INFO 11-23 09:00:00 [__init__.py:250] Automatically detected platform cpu.")
class SamplingParams:
    def __init__(self, *, temperature=1.0, max_tokens=16, ignore_eos=False, detokenize=True):
        assert temperature == 0.0 and max_tokens == 1 and ignore_eos
class LLM:
    def __init__(self, model, *, dtype="auto", seed=0, max_model_len=None, enable_prefix_caching=None):
        record(model=model, dtype=dtype, max_model_len=max_model_len, caching=enable_prefix_caching,
               bind=os.environ["VLLM_CPU_OMP_THREADS_BIND"])
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not use_tqdm
        (prompt,) = prompts
        record(ids=prompt["prompt_token_ids"])
"""
)
TRANSFORMERS = ("transformers, fp32", "transformers, dynamic int8")
PLATFORMS = "class current_platform:\n    device_type = 'cpu'\n"

LLAMA_CPP = (
    RECORD
    + """
__version__ = "0.3.36"
def llama_supports_gpu_offload():
    return False
class Llama:
    def __init__(self, model_path, *, n_gpu_layers=0, n_ctx=512, n_threads=None, n_threads_batch=None, verbose=True):
        record(model=model_path, n_gpu_layers=n_gpu_layers, n_ctx=n_ctx, n_threads=[n_threads, n_threads_batch])
        self.steps = []
    def reset(self):
        self.steps = ["reset"]
    def eval(self, tokens):
        assert self.steps == ["reset"]
        record(ids=tokens)
        self.steps.append("eval")
    def sample(self, top_k=40, top_p=0.95, min_p=0.05, typical_p=1.0, temp=0.80):
        assert self.steps == ["reset", "eval"] and temp == 0.0
        return 7
"""
)

LLAMA_BENCH = """#!{python}
import json, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({calls!r}, "w") as file:
    json.dump(arguments, file)
print("load_backend: loaded CPU backend", file=sys.stderr)
tests = []
for length in arguments["-p"].split(","):
    tests.append({{
        "build_commit": "8cf427ff", "build_number": 5163, "cpu_info": "AMD Ryzen 7", "gpu_info": "", "backends": "CPU",
        "model_filename": arguments["-m"], "model_type": "llama 135M Q4_1", "n_threads": int(arguments["-t"]),
        "n_prompt": int(length), "n_gen": 0, "n_depth": 0, "test_time": "2025-04-24T11:58:50Z",
        "avg_ns": 5, "stddev_ns": 1, "avg_ts": 7100.002165, "stddev_ts": 140.341520,
        "samples_ns": [ 74601900, int(length) * 1000000, 1 ], "samples_ts": [ 6863.1, 7147.55, 7136.37 ],
    }})
print(json.dumps(tests, indent=2))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(name, text) puts a module or a program in sight; calls() reads what the stand-ins were asked."""
    calls = tmp_path / "calls"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CALLS", str(calls))

    def put(name, text):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    put.calls = lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    put.file = calls
    # Those of transformers are real, and have a test of their own.
    others = {name: measure for name, measure in compare.OTHERS.items() if name not in TRANSFORMERS}
    monkeypatch.setattr(compare, "OTHERS", others)
    return put


def reasons(rows):
    return {row["name"]: row["skipped"] for row in rows if "skipped" in row}


def test_what_is_missing_is_listed(stand_in):
    assert reasons(compare.compare(JOB)) == {
        "vLLM": "not installed (pip install vllm)",
        "llama-cpp-python": "not installed (pip install llama-cpp-python)",
        "llama-bench": "not on PATH (it comes with llama.cpp)",
    }
    folder = compare.Job("some/folder", None, "float32", "cpu", [20], 1, 1, 128)
    assert reasons(compare.compare(folder))["llama-bench"] == "reads GGUF files only; give MODEL as one"


def test_transformers_in_fp32_and_in_torchs_eight_bits(model_folder, monkeypatch):
    monkeypatch.setattr(compare, "OTHERS", {name: compare.OTHERS[name] for name in TRANSFORMERS})
    job = compare.Job(str(model_folder), None, "bfloat16", "cpu", [20], repeats=1, threads=1, vocabulary=128)
    rows = compare.compare(job)
    assert [(row["name"], row["weights"]) for row in rows] == list(zip(TRANSFORMERS, ("fp32", "int8"), strict=True))
    assert all(row["ttft_s"] > 0 for row in rows)
    assert set(reasons(compare.compare(compare.Job(**{**vars(job), "device": "cuda"})))) == set(TRANSFORMERS)


def check_prompts(calls):
    """One warm-up and two timed prompts of each length, none twice, within the vocabulary."""
    prompts = [call["ids"] for call in calls]
    assert [len(ids) for ids in prompts] == [20] * 3 + [45] * 3
    assert len({tuple(ids) for ids in prompts}) == 6 and all(0 <= i < 128 for ids in prompts for i in ids)


def test_vllm(stand_in):
    stand_in("vllm/__init__.py", VLLM)
    stand_in("vllm/platforms.py", PLATFORMS)
    rows = compare.compare(JOB)
    assert [row["name"] for row in rows] == ["vLLM", "vLLM", "llama-cpp-python", "llama-bench"]
    for row, length in zip(rows, (20, 45), strict=False):
        assert row.pop("ttft_s") > 0
        assert row == {"name": "vLLM", "version": "0.26.0", "weights": "bfloat16", "prompt_tokens": length}
    start, *prompts = stand_in.calls()
    assert start == {
        **{"model": "some/folder", "dtype": "bfloat16", "max_model_len": 46, "caching": False},
        **{"bind": "nobind", "threads": "3"},
    }
    check_prompts(prompts)


def test_llama_cpp_python(stand_in):
    stand_in("llama_cpp.py", LLAMA_CPP)
    rows = [row for row in compare.compare(JOB) if row["name"] == "llama-cpp-python"]
    assert [(row["version"], row["weights"], row["prompt_tokens"]) for row in rows] == [
        ("0.3.36", GGUF, 20),
        ("0.3.36", GGUF, 45),
    ]
    start, *prompts = stand_in.calls()
    assert start == {"model": GGUF, "n_gpu_layers": 0, "n_ctx": 46, "n_threads": [3, 3], "threads": "3"}
    check_prompts(prompts)


def test_llama_bench(stand_in):
    stand_in("llama-bench", LLAMA_BENCH.format(python=sys.executable, calls=str(stand_in.file)))
    rows = [row for row in compare.compare(JOB) if row["name"] == "llama-bench"]
    assert rows == [  # medians of the samples
        {"name": "llama-bench", "version": "b5163 (8cf427ff)", "weights": GGUF, "prompt_tokens": n, "ttft_s": n / 1000}
        for n in (20, 45)
    ]
    expected = {"-m": GGUF, "-p": "20,45", "-n": "0", "-t": "3", "-r": "2", "-ngl": "0", "-o": "json"}
    assert json.loads(stand_in.file.read_text()) == expected
    gpu = compare.Job(**{**vars(JOB), "device": "cuda"})
    assert reasons(compare.compare(gpu))["llama-bench"] == "built for CPU, not for a GPU"


def test_what_fails_is_listed_with_its_last_line(stand_in):
    stand_in("vllm/__init__.py", VLLM)
    stand_in("vllm/platforms.py", PLATFORMS.replace("cpu", "cuda"))
    stand_in("llama_cpp.py", "raise ImportError('libgomp.so.1: cannot open shared object file')")
    stand_in("llama-bench", f"#!{sys.executable}\nprint('| model | size |')\n")
    found = reasons(compare.compare(JOB))
    assert found["vLLM"] == "failed with exit code 1: RuntimeError: this vLLM is built for cuda"
    assert found["llama-cpp-python"].endswith("exit code 1: ImportError: libgomp.so.1: cannot open shared object file")
    assert found["llama-bench"].startswith("its answer is not understood (JSONDecodeError")
    stand_in("llama-bench", f"#!{sys.executable}\nimport sys\nsys.exit('error: failed to load model')\n")
    stand_in("llama_cpp.py", "import os; os._exit(0)")
    found = reasons(compare.compare(JOB))
    assert found["llama-bench"] == "failed with exit code 1: error: failed to load model"
    assert found["llama-cpp-python"] == "ended without an answer"
    stand_in("llama-bench", "not a program")
    assert reasons(compare.compare(JOB))["llama-bench"].startswith("could not be run (")


def test_what_takes_too_long_is_ended_with_its_children(stand_in, monkeypatch):
    monkeypatch.setattr(compare, "TIMEOUT_S", 1)
    child = f"""#!{sys.executable}
import subprocess, time
child = subprocess.Popen([{sys.executable!r}, "-c", "import time; time.sleep(60)"], stdout=-3, stderr=-3)
with open({str(stand_in.file)!r}, "w") as file:
    file.write(str(child.pid))
time.sleep(60)
"""
    stand_in("llama-bench", child)
    assert reasons(compare.compare(JOB))["llama-bench"] == "took longer than 1 s"
    process = Path("/proc", stand_in.file.read_text())
    for _ in range(100):  # the kernel needs a moment to end it
        if not process.exists() or (process / "stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of an engine that was ended still runs")


def test_other_engines_see_our_device_only(monkeypatch):
    def visible(device, before=""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        return compare._environment(compare.Job(**{**vars(JOB), "device": device}))["CUDA_VISIBLE_DEVICES"]

    assert visible("cpu") == "" and visible("cpu", "0,1") == ""
    assert visible("cuda") == "0" and visible("cuda:1") == "1" and visible("cuda:1", "4,6") == "6"


def test_bench_compares(stand_in, model_folder, artifact_folder, capsys):
    stand_in("vllm/__init__.py", VLLM)
    stand_in("vllm/platforms.py", PLATFORMS)
    command = ["bench", str(model_folder), "--artifact", str(artifact_folder), "--dtype", "fp32", "--repeats", "1"]
    assert cli.main([*command, "--prompt-lengths", "20,600", "--compare", "--json"]) == 0
    out = capsys.readouterr().out
    *printed, last = out.splitlines()
    result = json.loads(last)
    assert printed[0] == "The model holds 512 tokens: that is the longest prompt here, not 600."
    assert [row["prompt_tokens"] for row in result["rows"]] == [20, 512] and result["engine"] == "transformers"
    measured, missing = result["compare"][:2], result["compare"][2:]
    assert [(row["name"], row["prompt_tokens"], row["weights"]) for row in measured] == [
        ("vLLM", 20, "float32"),
        ("vLLM", 512, "float32"),
    ]
    assert [row["name"] for row in missing] == ["llama-cpp-python", "llama-bench"]
    assert stand_in.calls()[0]["model"] == str(model_folder)
    assert "vLLM 0.26.0, weights float32" in printed
    assert "not measured: llama-bench, reads GGUF files only; give MODEL as one" in printed
    assert max(len(line) for line in printed) <= 80 + len(str(model_folder))
