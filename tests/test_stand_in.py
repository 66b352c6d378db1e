"""Random models and artifacts of a given shape, `fastfill bench --shape`, and how a GPU's engine measures (no GPU needed)."""

import json

import pytest
import torch
import transformers
from conftest import FAMILIES, LAYERS, one_sentence, tiny_artifact, tiny_config, token_ids

from fastfill import attach, cli, families
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.lab import cuda, ffn_op, profile, stand_in
from fastfill.lab.cuda import CudaEngine
from fastfill.lab.ffn_op import Chip, Size


def test_a_folder_is_a_shape_and_layers_cut_it(model_folder):
    loaded = stand_in.model(str(model_folder), "fp32", layers=2)
    assert len(families.dissect(loaded.model).ffns) == 2 and loaded.tokenizer is None
    assert loaded.name.endswith("(random weights, 2 layers)")
    artifact = stand_in.artifact(loaded.model, loaded.name)
    with attach(loaded.model, artifact, min_tokens=16, block_size=8) as attached:
        loaded.model(token_ids(1, 144))
        assert attached.stats.sparse_tokens == 16  # between a dense head and a dense tail of 64
        assert attached.kept == [48, 48]
    for arguments in (("nothing",), (str(model_folder), 9), (str(model_folder), 0)):
        with pytest.raises(UserError) as error:
            stand_in.config(*arguments)
        one_sentence(error)


@pytest.mark.skipif("qwen3_5_text" not in FAMILIES, reason="this transformers does not know Qwen3.5")
def test_the_text_of_a_model_with_vision_is_a_shape(tmp_path):
    text = tiny_config("qwen3_5_text", num_hidden_layers=8, layer_types=None).to_dict()
    transformers.AutoConfig.for_model("qwen3_5", text_config=text).save_pretrained(tmp_path)
    model = stand_in.model(str(tmp_path), "fp32", layers=5).model
    anatomy = families.dissect(model)
    assert len(anatomy.mixers) == 5 and anatomy.attentions == [model.model.layers[3].self_attn]
    with pytest.raises(UserError, match="no attention") as error:
        stand_in.config(str(tmp_path), 3)
    one_sentence(error)


def test_bench_of_a_shape(model_folder, capsys):
    words = ["bench", "--shape", str(model_folder), "--layers", "2", "--prompt-lengths", "300", "--repeats", "1", "--json"]
    assert cli.main([*words, "--dtype", "fp32", "--block-size", "16"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "random weights" in result["model"] and result["rows"][0]["sparse_tokens"] == 160
    for wrong in (["default"], ["--artifact", "default"], ["--compare"]):
        assert cli.main([*words, *wrong]) == 2
    assert cli.main(["bench", "default"]) == 2 and cli.main(["bench", "default", "--artifact", "default", "--layers", "1"]) == 2
    assert "Name MODEL and --artifact, or --shape" in capsys.readouterr().err


def test_work_and_floors_by_hand():
    """H = 4, F = 8, two blocks of 3 tokens that keep 4 neurons, ranks 2 and 1, bf16."""
    size = Size(4, 8, 6, 3, 4, 2, 1)
    assert ffn_op.work(size) == {
        "dense": (6 * 6 * 4 * 8, 2 * (96 + 48 + 96)),
        "sparse": (6 * 6 * 4 * 4, 2 * (12 * 6 + 48 + 48) + 4 * 8),  # two random halves have 3/4 of the rows: 6
        "scores": (2 * 6 * 2 * 12, 2 * (24 + 8 + 24) + 4 * 2 * 8),
        "top_k": (0, 4 * 2 * 12),
        "compensator": (2 * 6 * 8, 2 * (8 + 4 + 48)),
    }
    slow_memory, slow_arithmetic = (ffn_op.floors(size, Chip(f, b, "")) for f, b in ((1e12, 1.0), (1.0, 1e12)))
    assert slow_memory["dense"] == 480 and slow_arithmetic["dense"] == 1152
    assert slow_arithmetic["layer"] == pytest.approx(576 + 288 + 96 + 96 / 1e12)


def test_prefill_floors_by_hand():
    """A shape where only FFNs cost anything worth naming: half of them is half the time, but for head and tail."""
    from fastfill.lab import flops

    shape = stand_in.config("Llama-3.1-8B")
    found = ffn_op.prefill_floors(shape, 4096, PrefillConfig(block_size=128), Chip(1e12, 1e30, ""))
    parts = flops.prefill(shape, 4096)
    assert found["dense"] == pytest.approx(sum(parts.values()) / 1e12)
    sparse = (4096 - 128 - 128) / 4096  # both ends fall into a block of their own
    assert found["bare"] == pytest.approx((sum(parts.values()) - 0.5 * sparse * parts["ffn"]) / 1e12)
    assert found["bare"] < found["sparse"] < found["dense"]
    one_token = ffn_op.prefill_floors(shape, 1, PrefillConfig(), Chip(1e30, 1.0, ""))
    assert one_token["dense"] == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=0.01)  # all weights but the embedding


@pytest.mark.parametrize("compensator", [0, 4])
def test_the_op_is_measured_part_by_part(compensator):
    row = ffn_op.measure(Size(32, 96, 24, 8, 48, 8, compensator, 4), torch.float32, "cpu", "torch", repeats=2)
    assert {f"{part}_s" for part in (*ffn_op.PARTS, "dense", "layer", "gemm")} <= row.keys() and row["over_floor"] is None
    assert all(row[key] > 0 for key in row if key.endswith("_s"))
    assert row["speedup"] == pytest.approx(row["dense_s"] / row["sparse_s"])
    assert row["of_gemm"] == pytest.approx((6 * 24 * 32 * 48 / row["sparse_s"]) / (2 * 24 * 32 * 96 / row["gemm_s"]))


@pytest.fixture
def engine(model, monkeypatch):
    seconds = {"eager": 3.0, "graph": 2.0, "compiled": 1.0}
    clocked = []

    def clock(run):
        run()
        clocked.append(run)
        return seconds[getattr(run, "way", "eager")]

    def capture(run):
        def replay():
            return run()

        replay.way = "compiled" if any(m._compiled_call_impl for m in attached.model.modules()) else "graph"
        run()
        return replay

    monkeypatch.setattr(cuda, "clock", clock)
    monkeypatch.setattr(cuda, "capture", capture)
    monkeypatch.setattr(cuda.compiled.__wrapped__, "__defaults__", ("eager",))  # no C++ compiler in a test
    with attach(model, tiny_artifact(model)) as attached:
        made = CudaEngine(attached, "tiny")
        made.seconds, made.clocked = seconds, clocked
        yield made


def test_each_kind_is_measured_the_fastest_way(engine):
    ids = token_ids(1, 45)
    read = engine.prefill(ids)
    assert (read.seconds, read.sparse_tokens) == (1.0, 32)
    for mode in (engine.dense, engine.all_neurons):
        with mode():
            assert engine.prefill(ids).sparse_tokens == 0
    assert engine.ways == {f"45 {mode}": engine.seconds for mode in ("sparse", "dense", "all neurons")}
    before = len(engine.clocked)
    assert engine.prefill(ids).seconds == 1.0 and len(engine.clocked) == before + 1  # chosen once
    engine.prefill(token_ids(1, 50))
    assert [key[0] for key in engine._ready] == [50]  # the graphs of the other length are gone
    assert not any(m._compiled_call_impl for m in engine.model.modules())


def test_new_ids_are_read(engine):
    model, found = engine.model, []
    with engine.dense():
        engine.prefill(token_ids(1, 45))
    there, run, _ = engine._ready[45, "dense"]
    for seed in range(1, 9):
        ids = token_ids(1, 45, seed=seed)
        with engine.dense():
            engine.prefill(ids)
        with torch.no_grad(), engine.dense():
            want = model(ids).logits[:, -1].argmax(-1)
            assert torch.equal(there, ids) and torch.equal(run(), want)
        found.append(int(want))
    assert len(set(found)) > 1


def test_a_way_that_fails_is_told_and_left_out(engine, monkeypatch):
    def refuse(_run):
        raise RuntimeError("no graphs here\nand more")

    monkeypatch.setattr(cuda, "capture", refuse)
    with engine.dense():
        assert engine.prefill(token_ids(1, 45)).seconds == 3.0
    assert engine.ways["45 dense"] == {"eager": 3.0, "graph": "no graphs here", "compiled": "no graphs here"}
    assert engine.prefill(token_ids(1, 45)).sparse_tokens == 32  # attached again after the compiled way failed


def test_compiled_dense_is_the_model_without_the_artifact(engine):
    attached, ids = engine.attachment, token_ids(1, 45)
    with torch.no_grad():
        want = attached.model(ids).logits
        for ffns in (True, False):
            with cuda.compiled(attached, ffns, "eager"):
                on = [m for m in attached.model.modules() if m._compiled_call_impl]
                assert len(on) == 2 * LAYERS + 1 + (LAYERS if ffns else 0)
                swapped = ["forward" in m.__dict__ for m in attached.modules]
                assert swapped == [not ffns] * LAYERS
        assert torch.equal(attached.model(ids).logits, want)


def test_a_row_of_bench_on_a_gpu(engine, monkeypatch):
    from fastfill.lab import speed

    monkeypatch.setattr(profile, "peak_mb", lambda engine, ids: None)
    row = speed.measure(engine, token_ids(1, 45), 1)
    assert (row["ttft_dense_s"], row["ttft_sparse_s"], row["speedup"]) == (1.0, 1.0, 1.0)
    (op,) = ffn_op.of_engine(engine, [45, 5], 1)
    assert (op["T"], op["B"], op["K"]) == (40, 8, 48)
