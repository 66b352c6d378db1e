"""The plugin at the door: what is refused, the server, and the commands."""

# ruff: noqa: E402 (first of all, whether there is a vLLM)

import ast
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="needs vLLM (make test-vllm)")

import openai
import psutil
from conftest import one_sentence, tiny_tokenizer
from test_readme import README, code_blocks
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_tiny import MIN_TOKENS, folders, prompt, vllm_model

import fastfill
from fastfill import artifact as artifacts
from fastfill import cli, vllm_plugin
from fastfill.engines import vllm as engine
from fastfill.engines.transformers import generate
from fastfill.errors import UserError
from fastfill.vllm_plugin import settings
from fastfill.vllm_plugin.weights import Checkpoint

pytestmark = pytest.mark.vllm
HANG_S = 600  # no claim of speed: what has not come by then does not come; a process that has ended is noticed at once


def configure(model, artifact, fastfill=None, **arguments):
    """The configuration of an engine, as every way to start one makes it."""
    overrides = settings.overrides("llama", artifact, **(fastfill or {}))
    values = {"max_model_len": 1024, "enforce_eager": True, "hf_overrides": overrides, **arguments}
    return EngineArgs(model=model, **values).create_engine_config()


def refusal(*args, **kwargs):
    with pytest.raises(ValueError) as raised:
        configure(*args, **kwargs)
    error = engine.user_error(raised.value)
    assert isinstance(error, UserError), raised.value
    return one_sentence(error)


def test_what_does_not_fit_is_refused_at_the_start(tmp_path):
    model, artifact = folders()
    other, _ = folders(seed=1)
    assert configure(model, artifact).scheduler_config.scheduler_cls
    assert "other weights" in refusal(other, artifact)
    wide = tmp_path / "wide"
    vllm_model(intermediate_size=512).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    assert "shapes (128, 256, 2) against (128, 512, 2)" in refusal(str(wide), artifact)
    assert "pipeline parallelism" in refusal(model, artifact, pipeline_parallel_size=2)
    assert "one_copy must be true or false, not 'yes'" in refusal(model, artifact, {"one_copy": "yes"})
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    assert "speculative decoding" in refusal(model, artifact, speculative_config=speculative)
    assert "dummy weights" in refusal(model, artifact, load_format="dummy")
    for load_format in ("sharded_state", "tensorizer", "runai_streamer", "fastsafetensors"):
        assert f"--load-format {load_format}; use auto, hf, safetensors, pt" in refusal(
            model, artifact, load_format=load_format
        )
    flash = {"attention_backend": "FLASHINFER"}
    assert "attention backend FLASHINFER; start with --attention-backend FLASH_ATTN" in refusal(model, artifact, **flash)
    assert "kernel 'native' cannot run" in refusal(model, artifact, {"kernel": "native"}, dtype="half")
    assert "one_copy does nothing at sparsity 0" in refusal(model, artifact, {"one_copy": True, "sparsity": 0.0})
    for own in ({"reread": 0.1}, {"upper_share": 0.5}, {"attention": "chunks"}):
        assert next(iter(own)) in (found := refusal(model, artifact, own)) and "is for transformers" in found
    unit = {"block_size": 32, "prefix_match_unit": 16}
    assert "--prefix-match-unit 16 is no multiple of the sparse blocks of 32" in refusal(model, artifact, **unit)
    assert "LoRA" in refusal(model, artifact, enable_lora=True)
    assert "sparsty" in refusal(model, artifact, {"sparsty": 0.5})
    assert "kernel 'fast'" in refusal(model, artifact, {"kernel": "fast"})
    assert "block_size" in refusal(model, artifact, {"block_size": 0})
    threshold = {"long_prefill_token_threshold": 16}
    assert "is less than a block; give 32 or more" in refusal(model, artifact, **threshold)
    # A step with less room than 4 + 32 tokens could leave a prompt waiting for ever.
    for tokens in (16, 32, 35):
        asked = {"max_num_batched_tokens": tokens, "max_num_seqs": 4}
        assert f"--max-num-batched-tokens {tokens} is less than" in (found := refusal(model, artifact, **asked))
        assert "4 requests and a block of 32; give 36 or more" in found
    assert configure(model, artifact, max_num_batched_tokens=36, max_num_seqs=4)
    assert "--block-size 16 is no multiple of the sparse blocks of 32; give 32" in refusal(model, artifact, block_size=16)
    assert configure(model, artifact, {"block_size": 96, "min_tokens": 192}).cache_config.block_size == 384
    assert "nowhere" in refusal(model, str(tmp_path / "nowhere"))


def test_what_no_test_has_tried_is_refused_by_name():
    """One option after another changed in a configuration that works, as vLLM's parser would on machines that have it."""
    config = configure(*folders())
    config.scheduler_config.scheduler_cls, config.parallel_config.worker_extension_cls = None, ""
    settings.refuse(config)
    for path, value, words in (
        ("model_config.enable_sleep_mode", True, "sleep mode"),
        ("model_config.model_weights", "s3://bucket/model", "object store"),
        ("weight_transfer_config", object(), "weights from a trainer"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
        ("cache_config.kv_offloading_size", 4.0, "--kv-offloading-size"),
        ("offload_config.uva.cpu_offload_gb", 4.0, "offloaded weights"),
        ("offload_config.prefetch.offload_group_size", 2, "offloaded weights"),
        ("parallel_config.enable_eplb", True, "--enable-eplb"),
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("parallel_config.ubatch_size", 2, "--ubatch-size"),
        ("parallel_config.prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size"),
    ):
        *owners, name = path.split(".")
        owner = config
        for part in owners:
            owner = getattr(owner, part)
        before = getattr(owner, name)
        object.__setattr__(owner, name, value)
        with pytest.raises(UserError, match=words) as refused:
            settings.refuse(config)
        one_sentence(refused.value)
        object.__setattr__(owner, name, before)
    settings.refuse(config)


@pytest.mark.parametrize("load_format", settings.LOAD_FORMATS)
def test_allowed_load_formats_hand_the_weights_to_the_model(load_format, tmp_path):
    """All of them, once, to `load_weights`: what the sparse kernel reads is taken there."""
    model, artifact = folders()
    if load_format == "pt":
        shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(vllm_model().state_dict(), tmp_path / "model" / "model.pt")
        model = str(tmp_path / "model")
    seen = []

    class Receiver(torch.nn.Module):
        def load_weights(self, weights):
            seen.append(Checkpoint(weights))
            return {name for name, _ in seen[-1]}

    config = configure(model, artifact, load_format=load_format)
    with set_current_vllm_config(config):
        get_model_loader(config.load_config).load_weights(Receiver(), config.model_config)
    (checkpoint,) = seen
    checkpoint.check(artifacts.load(artifact))


def test_graphs_of_prompts_are_refused_and_those_of_decode_steps_are_not():
    for mode in CUDAGraphMode:
        config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))
        if mode == CUDAGraphMode.FULL:
            with pytest.raises(UserError, match="full CUDA graphs over prompts") as refused:
                settings.check_graphs(config)
            one_sentence(refused.value)
        else:
            settings.check_graphs(config)
    assert "full CUDA graphs" in refusal(*folders(), enforce_eager=False, compilation_config={"cudagraph_mode": "FULL"})


@pytest.mark.parametrize("name", settings.ATTENTION)
def test_the_metadata_of_allowed_attention_backends_can_carry_where_requests_lie(name):
    """From their sources, as most cannot be imported without a GPU: plain dataclasses take one more attribute, `build` is
    handed vLLM's common metadata second, and what is made without it is a copy of what was built."""
    module = AttentionBackendEnum[name].value.rpartition(".")[0]
    classes = [node for node in ast.parse(Path(importlib.util.find_spec(module).origin).read_text()).body]
    classes = {node.name: node for node in classes if isinstance(node, ast.ClassDef)}
    (metadata,) = (node for title, node in classes.items() if title.endswith("AttentionMetadata"))
    (builder,) = (node for title, node in classes.items() if title.endswith("MetadataBuilder"))
    assert [ast.unparse(line) for line in metadata.decorator_list] == ["dataclass"]
    methods = {node.name: node for node in builder.body if isinstance(node, ast.FunctionDef)}
    names = [argument.arg for argument in methods["build"].args.args]
    assert names[:3] == ["self", "common_prefix_len", "common_attn_metadata"]
    assert "update_block_table" not in methods or "copy.copy(metadata)" in ast.unparse(methods["update_block_table"])


def test_hf_overrides_are_taken_however_they_are_written():
    """The parser merges options with dots, and knows abbreviations: the artifact would be lost without a word."""
    model, artifact = folders()
    for rest in (
        ["--hf-overrides", "{}"],
        ["--hf-overrides={}"],
        ["--hf_overrides.fastfill.sparsity", "0.1"],
        ["--hf-ov", "{}"],
    ):
        with pytest.raises(UserError, match="--hf-overrides is taken") as refused:
            engine.serve(model, artifact, rest)
        one_sentence(refused.value)


def test_short_prompts_are_dense_unless_the_user_says_otherwise_and_that_is_logged(monkeypatch):
    """The artifact would begin at 96 tokens; in vLLM 512 are the least by default. All else is the artifact's."""
    model, artifact = folders()
    said = []
    monkeypatch.setattr(
        "vllm.logger.init_logger", lambda _: SimpleNamespace(info=lambda text, *values: said.append(text % values))
    )
    found = settings.read(configure(model, artifact)).prefill
    assert MIN_TOKENS < settings.MIN_TOKENS
    assert found == dataclasses.replace(artifacts.load(artifact).prefill, min_tokens=settings.MIN_TOKENS)
    assert len(said) == 1 and "under 512 tokens stay dense, not only those under the artifact's 96" in said[0]
    asked = {"min_tokens": MIN_TOKENS, "dense_tail": 40, "dense_head": 0}
    found = settings.read(configure(model, artifact, asked)).prefill
    assert asked.items() <= dataclasses.asdict(found).items() and len(said) == 1


def test_other_versions_of_vllm_are_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(UserError, match=r"vLLM 0\.31\.2 is not supported by this fastfill; install vllm>=0\.32,<0\.33\."):
        settings.check_version()
    monkeypatch.setattr(vllm, "__version__", "0.32.7+cpu")
    settings.check_version()


def test_registering_changes_no_model_of_vllm():
    from vllm.model_executor.models.registry import ModelRegistry

    vllm_plugin.register()
    vllm_plugin.register()
    for stock, ours in vllm_plugin.MODELS.items():
        assert ModelRegistry.models[stock].module_name.startswith("vllm.")
        assert ModelRegistry.models[ours].module_name == "fastfill.vllm_plugin.models"
    plain = EngineArgs(model=folders()[0], max_model_len=1024).create_engine_config()
    assert plain.scheduler_config.scheduler_cls is None and not plain.model_config.logits_processors


def test_the_switch_knows_true_and_false_only():
    assert settings.wants_sparse(None) and settings.wants_sparse({}) and settings.wants_sparse({"other": 0})
    assert settings.wants_sparse({"fastfill": True}) and settings.wants_sparse({"fastfill": 1})
    assert not settings.wants_sparse({"fastfill": False}) and not settings.wants_sparse({"fastfill": 0})
    with pytest.raises(ValueError, match="not 'off'"):
        settings.wants_sparse({"fastfill": "off"})


def test_a_model_that_is_not_supported_is_a_sentence():
    with pytest.raises(UserError, match="'gpt2' are not supported"):
        settings.overrides("gpt2", folders()[1])


def environment():
    """A process as a user starts it."""
    own = ("VLLM_ENABLE_V1_MULTIPROCESSING", "PROMETHEUS_MULTIPROC_DIR")  # of engines in this process
    kept = {key: value for key, value in os.environ.items() if key not in own}
    return {**kept, "VLLM_LOGGING_LEVEL": "INFO"}


def command(*arguments):
    return [sys.executable, "-m", "fastfill.cli", *arguments]


def test_serve_says_in_one_sentence_that_the_artifact_is_of_another_model():
    done = subprocess.run(
        command("serve", folders(seed=1)[0], "--artifact", folders()[1], "--max-model-len", "1024"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fastfill: This artifact belongs to another model")
    assert "Traceback" not in done.stderr


def tiny_server(port, log):
    model, artifact = folders()
    options = ("--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--min-tokens", "96")
    return server(port, log, "serve", model, "--artifact", artifact, "--served-model-name", "tiny", *options)


@contextmanager
def server(port, log, *arguments):
    """`fastfill serve`, ready; killed at the end with all its children."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command(*arguments),
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        end = time.monotonic() + HANG_S
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
        yield process, client
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(client, ids, tokens=12, **extra):
    answer = client.completions.create(
        model="tiny", prompt=ids, max_tokens=tokens, temperature=0.0, extra_body={"ignore_eos": True, **extra}
    )
    return answer.choices[0].text.split()


def test_server(tmp_path):
    """Sparse and dense answers over HTTP are the transformers engine's; it listens on localhost only; when it is killed in
    the middle of a request, the next start answers as before."""
    ids, model = prompt(500), vllm_model()
    with fastfill.attach(model, folders()[1]) as attachment:
        sparse = tiny_tokenizer().decode(generate(model, torch.tensor([ids]), 12)).split()
        with attachment.dense():
            dense = tiny_tokenizer().decode(generate(model, torch.tensor([ids]), 12)).split()
    assert sparse != dense
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, failed = tmp_path / "server.log", []

    def long_request(client):
        try:
            ask(client, ids, tokens=500)
        except openai.APIError as error:  # no answer at all, or that of a server whose engine is gone already
            failed.append(error)

    with tiny_server(port, log) as (process, client):
        assert ask(client, ids) == sparse
        assert ask(client, ids, vllm_xargs={"fastfill": 0}) == dense
        assert ask(client, ids, vllm_xargs={"fastfill": 1}) == sparse
        with pytest.raises(openai.BadRequestError, match="fastfill must be true or false"):
            ask(client, ids, vllm_xargs={"fastfill": "no"})
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        listening = [c.laddr for c in psutil.net_connections("tcp") if c.pid in family and c.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening if address.port == port} == {"127.0.0.1"}
        # 32..480 of the sparse request, and of its repetition what is behind three cached pages of 128 tokens.
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            lines = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if not line.startswith("#"))
        read, dense_tokens = (float(lines[f"fastfill:{kind}_tokens_total"]) for kind in ("sparse", "dense"))
        assert read == 448 + 96 and dense_tokens >= 52 + 500 + 20
        assert float(lines["fastfill:predictor_seconds_total"]) > 0
        assert not any(line.startswith("fastfill:dense_steps_total{") for line in lines)
        assert float(lines["fastfill:mean_sparsity"]) == pytest.approx(0.5 * read / (read + dense_tokens))
        assert any(line.startswith("vllm:prompt_tokens_total") for line in lines)
        running = threading.Thread(target=long_request, args=(client,))
        running.start()
        time.sleep(0.1)  # 500 tokens take several times as long
    running.join()
    assert failed
    with tiny_server(port, log) as (_, client):
        assert ask(client, ids) == sparse
    assert "belongs to another model" not in log.read_text()


def test_the_readme_serves(tmp_path):
    """Its commands as printed, but for torch.compile, which takes a minute."""
    section = README.partition("## Serve it\n")[2].partition("\n## ")[0]
    lines = "".join(code_blocks(section, "sh")).replace("\\\n", " ").splitlines()
    (serve,) = (shlex.split(line, comments=True) for line in lines if line.startswith("fastfill serve"))
    (curl,) = (line for line in lines if line.startswith("curl"))
    port = int(serve[serve.index("--port") + 1]) if "--port" in serve else 8000
    with server(port, tmp_path / "server.log", *serve[1:], "--enforce-eager"):
        done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["text"], done


def test_bench_and_evaluate_in_vllm(tmp_path, capsys):
    """The commands on the tiny model: rows with a split that adds up, and a task whose sparse answers are counted."""
    model, artifact = folders()
    common = ["--artifact", artifact, "--engine", "vllm", "--dtype", "fp32", "--min-tokens", "96", "--json"]
    assert cli.main(["bench", model, *common, "--prompt-lengths", "90,256", "--repeats", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["engine"] == "vllm" and found["sparsity"] == 0.5 and found["attached_mb"] > 0 and found["model_mb"] > 0
    assert [(row["prompt_tokens"], row["sparse_tokens"]) for row in found["rows"]] == [(90, 0), (256, 224)]
    for row in found["rows"]:
        assert row["peak_dense_mb"] is None and row["ttft_dense_s"] > 0
        assert row["split_sparse"]["ffn"] > 0 and row["split_dense"]["attention"] > 0
        assert (row["split_sparse"]["predictor"] > 0) == (row["sparse_tokens"] > 0)
        assert row["split_dense"]["predictor"] == 0
    task = ["--task", "ruler", "--lengths", "300", "--limit", "1", "--datasets", "niah_single", "--max-new-tokens", "4"]
    assert cli.main(["evaluate", model, *common, *task, "--out", str(tmp_path / "out")]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["engine"] == "vllm" and scores["examples"] == 1
    assert 0 < scores["sparse_tokens"] < scores["prompt_tokens"]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["engine"] == "vllm"
    assert cli.main(["evaluate", model, *common, "--task", "recall", "--data", __file__]) == 2
    assert "needs --engine transformers" in capsys.readouterr().err
