"""What a user would choose instead, beside `bench`: transformers in fp32 and in torch's own eight bits, stock vLLM,
llama-cpp-python, and llama.cpp's own llama-bench.

Each runs in its own process, one after the other, with as many threads as we had, so that thread pools do not
compete. Missing and failing engines are listed with the reason. The inside of such a process is

    python -m fastfill.lab.compare MODULE ANSWER

with a `Job` as JSON on stdin; it writes what it measured to the file ANSWER.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 3600


@dataclass(frozen=True)
class Job:
    """folder: Hugging Face folder or id. gguf: the model as a GGUF file, or None. dtype, device: as torch names them.
    lengths: prompts in tokens. repeats: timed runs after one warm-up. vocabulary: ids are drawn below it."""

    folder: str
    gguf: str | None
    dtype: str
    device: str
    lengths: list[int]
    repeats: int
    threads: int
    vocabulary: int
    seed: int = 0

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


class _Skipped(Exception):
    """Why an engine was not measured, as half a sentence."""


def compare(job: Job) -> list[dict[str, Any]]:
    """{"name", "version", "weights", "prompt_tokens", "ttft_s"} (medians) for every engine and length, and {"name", "version",
    "skipped"} with the reason for one that is missing or fails. weights: the precision, or the GGUF file."""
    from fastfill.progress import stage

    rows = []
    with stage("other engines", len(OTHERS)) as bar:
        for name, measure in OTHERS.items():
            bar.step(0, name)
            try:
                found = measure(job)
                rows += [
                    {
                        "name": name,
                        "version": found["version"],
                        "weights": found["weights"],
                        "prompt_tokens": length,
                        "ttft_s": round(statistics.median(found["ttft_s"][str(length)]), 5),
                    }
                    for length in job.lengths
                ]
            except _Skipped as reason:
                rows.append({"name": name, "version": None, "skipped": str(reason)})
            except OSError as error:
                rows.append({"name": name, "version": None, "skipped": f"could not be run ({error})"})
            except (KeyError, TypeError, ValueError, IndexError) as error:
                rows.append({"name": name, "version": None, "skipped": f"its answer is not understood ({error!r})"})
            bar.step()
    return rows


# --- our side ------------------------------------------------------------------------------------------------------------


def _package(module: str, package: str, job: Job) -> dict[str, Any]:
    if importlib.util.find_spec(module) is None:
        raise _Skipped(f"not installed (pip install {package})")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "fastfill.lab.compare", module, str(answer)]
        _run(command, job, json.dumps(dataclasses.asdict(job)))
        try:
            return json.loads(answer.read_text())
        except OSError as error:
            raise _Skipped("ended without an answer") from error


def _vllm(job: Job) -> dict[str, Any]:
    return _package("vllm", "vllm", job)


def _llama_cpp(job: Job) -> dict[str, Any]:
    _gguf(job)
    return _package("llama_cpp", "llama-cpp-python", job)


def _llama_bench(job: Job) -> dict[str, Any]:
    """llama-bench prefills a prompt of each length; it warms up by itself, and samples no token."""
    gguf, program = _gguf(job), shutil.which("llama-bench")
    if program is None:
        raise _Skipped("not on PATH (it comes with llama.cpp)")
    lengths = ",".join(str(length) for length in job.lengths)
    command = [program, "-m", gguf, "-p", lengths, "-n", "0", "-t", str(job.threads), "-r", str(job.repeats)]
    tests = json.loads(_run([*command, "-ngl", "99" if job.cuda else "0", "-o", "json"], job))
    if job.cuda and not any(name in tests[0]["backends"] for name in ("CUDA", "ROCm", "HIP")):
        raise _Skipped(f"built for {tests[0]['backends']}, not for a GPU")
    return {
        "version": f"b{tests[0]['build_number']} ({tests[0]['build_commit']})",
        "weights": Path(gguf).name,
        "ttft_s": {str(test["n_prompt"]): [ns / 1e9 for ns in test["samples_ns"]] for test in tests if not test["n_gen"]},
    }


def _transformers(dtype: str) -> Callable[[Job], dict[str, Any]]:
    def measure(job: Job) -> dict[str, Any]:
        if job.cuda:
            raise _Skipped("measured on the CPU only")
        return _package("transformers", "transformers", dataclasses.replace(job, dtype=dtype))

    return measure


OTHERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "transformers, fp32": _transformers("fp32"),
    "transformers, dynamic int8": _transformers("int8"),
    "vLLM": _vllm,
    "llama-cpp-python": _llama_cpp,
    "llama-bench": _llama_bench,
}


def _gguf(job: Job) -> str:
    if job.gguf is None:
        raise _Skipped("reads GGUF files only; give MODEL as one")
    return job.gguf


def _run(command: Sequence[str], job: Job, text: str = "") -> str:
    """stdout of a process that gets `text`; with its children it is ended when it takes too long or we are interrupted."""
    process = subprocess.Popen(
        command,
        env=_environment(job),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(text, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise _Skipped(f"took longer than {TIMEOUT_S} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        last = [line.strip() for line in (err.strip() or out.strip()).splitlines()][-1:] or ["no message"]
        raise _Skipped(f"failed with exit code {process.returncode}: {last[0][:200]}")
    return out


def _environment(job: Job) -> dict[str, str]:
    """Ours, with the same modules in sight, the same threads and no other device."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    index = job.device.partition(":")[2] or "0"
    gpu = (visible[int(index)] if visible else index) if job.cuda else ""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(job.threads),
        "MKL_NUM_THREADS": str(job.threads),
        "CUDA_VISIBLE_DEVICES": gpu,
        "HIP_VISIBLE_DEVICES": gpu,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM then takes OMP_NUM_THREADS
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one token more than the longest prompt
        "VLLM_NO_USAGE_STATS": "1",
    }


# --- inside the process of a Python package ------------------------------------------------------------------------------


def _answer(version: str, weights: str, job: Job, read: Callable[[list[int]], Any]) -> dict[str, Any]:
    """Time `read`, which takes a prompt's ids and returns when its first new token is known."""
    generator = random.Random(job.seed)
    times: dict[str, list[float]] = {}
    for length in job.lengths:
        for repeat in range(job.repeats + 1):
            ids = [generator.randrange(job.vocabulary) for _ in range(length)]
            begin = time.perf_counter()
            read(ids)
            if repeat:  # the first is the warm-up
                times.setdefault(str(length), []).append(time.perf_counter() - begin)
    return {"version": version, "weights": weights, "ttft_s": times}


def _inside_vllm(job: Job) -> dict[str, Any]:
    import vllm
    from vllm.platforms import current_platform

    if current_platform.device_type != job.device.partition(":")[0]:
        raise RuntimeError(f"this vLLM is built for {current_platform.device_type}")
    engine = vllm.LLM(
        model=job.folder, dtype=job.dtype, max_model_len=max(job.lengths) + 1, enable_prefix_caching=False, seed=job.seed
    )
    one = vllm.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    return _answer(
        vllm.__version__, job.dtype, job, lambda ids: engine.generate([{"prompt_token_ids": ids}], one, use_tqdm=False)
    )


def _inside_llama_cpp(job: Job) -> dict[str, Any]:
    import llama_cpp

    if job.cuda and not llama_cpp.llama_supports_gpu_offload():
        raise RuntimeError("this llama-cpp-python is built without a GPU")
    assert job.gguf is not None
    llama = llama_cpp.Llama(
        model_path=job.gguf,
        n_ctx=max(job.lengths) + 1,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        n_gpu_layers=-1 if job.cuda else 0,
        verbose=False,
    )

    def read(ids: list[int]) -> None:
        llama.reset()
        llama.eval(ids)
        llama.sample(temp=0.0)

    return _answer(llama_cpp.__version__, Path(job.gguf).name, job, read)


def _inside_transformers(job: Job) -> dict[str, Any]:
    """dtype "int8": every Linear of the layers in torch's dynamic int8 (oneDNN), which wants fp32 around it. Not the head: for
    one token it takes seconds there (Qwen2.5-0.5B, torch 2.13)."""
    import torch

    from fastfill import families, models
    from fastfill.engines.transformers import generate

    torch.set_num_threads(job.threads)
    model = models.load(job.folder, "fp32").model
    if job.dtype == "int8":
        torch.backends.quantized.engine = next(
            name for name in ("onednn", "x86", "fbgemm", "qnnpack") if name in torch.backends.quantized.supported_engines
        )
        torch.ao.quantization.quantize_dynamic(families.base_of(model), {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    with torch.inference_mode():
        return _answer(torch.__version__, job.dtype, job, lambda ids: generate(model, torch.tensor([ids]), 1))


def main() -> None:
    module, answer = sys.argv[1:]
    inside = {"vllm": _inside_vllm, "llama_cpp": _inside_llama_cpp, "transformers": _inside_transformers}[module]
    Path(answer).write_text(json.dumps(inside(Job(**json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
