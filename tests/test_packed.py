"""FFNs that stay packed as in their GGUF file: what is loaded, what each call computes, what is refused."""

import copy
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import gguf
import gguf_tiny
import numpy as np
import pytest
import torch
from conftest import logits, tiny_artifact, token_ids, user_error

from fastfill import attach, kernels, models
from fastfill import packed as packing
from fastfill.calibration import calibrate
from fastfill.engines.transformers import TransformersEngine
from fastfill.engines.transformers import generate as run_generate
from fastfill.families import dissect
from fastfill.lab.baselines import named
from fastfill.packed import FEW, PackedLinear, put

KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
IDS, SHORT = token_ids(2, 45) % 256, token_ids(2, FEW // 2, seed=1) % 256
SIZES = {"intermediate_size": 96, "hidden_act": "relu"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def both(tmp_path, cache):
    """(kind) -> the model of a file as it is unpacked, and packed."""

    def load(kind="Q4_0", dtype="fp32", family="qwen2"):
        file = tmp_path / f"{kind}.gguf"
        gguf_tiny.write(file, family, quantised=gguf.GGMLQuantizationType[kind], **SIZES)
        return [models.load(str(file), dtype, packed=packed).model for packed in (False, True)]

    return load


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_packed_model_is_the_unpacked_one(both, kind, dtype):
    wide, packed = both(kind, dtype)
    assert packed.config.intermediate_size == wide.config.intermediate_size == SIZES["intermediate_size"]
    for theirs, ours in zip(dissect(wide).ffns, dissect(packed).ffns, strict=True):
        assert isinstance(ours.module.gate_proj, PackedLinear) and ours.packed and not theirs.packed
        exact = ours.read().wide()
        for role in ("gate", "up", "down"):  # unpacked to bf16 once, whatever the model's type
            assert torch.equal(getattr(exact, role).bfloat16(), getattr(theirs, role).bfloat16())
    if dtype == "bf16":  # the same values, multiplied by the same product
        assert torch.equal(logits(packed, IDS), logits(wide, IDS))


def unpacked(packed):
    """A copy with plain Linears that have the file's values in the model's type."""
    model = copy.deepcopy(packed)
    for ffn, layer in zip(dissect(packed).ffns, model.model.layers, strict=True):
        for role, values in vars(ffn.read().wide()).items():
            if role in ("gate", "up", "down"):
                linear = torch.nn.Linear(*values.shape[::-1], bias=False)
                linear.weight = torch.nn.Parameter(values, requires_grad=False)
                setattr(layer.mlp, f"{role}_proj", linear)
    return model


def eight(model, like=None, **settings):
    static = {"predictor": named("static"), "compensator": False, "weights": "int8"}
    return attach(model, tiny_artifact(like or model), **{**static, **settings})


@pytest.mark.parametrize("ids", [IDS, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_calls_have_the_values_of_the_file(both, kind, ids):
    _, packed = both(kind)
    wanted = logits(unpacked(packed), ids)
    torch.testing.assert_close(logits(packed, ids), wanted, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
    with eight(packed) as attachment, attachment.dense():
        torch.testing.assert_close(logits(packed, ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_prompts_are_those_of_int8_weights(both, kind, kernel):
    _, packed = both(kind)
    plain = unpacked(packed)
    with eight(plain, kernel=kernel) as attachment:
        wanted = logits(plain, IDS)
    with eight(packed, kernel=kernel) as attachment:
        found = logits(packed, IDS)
        assert attachment.stats.sparse_tokens == 64
    assert torch.equal(found, wanted)  # the same int8 rows, scales and op
    assert not torch.allclose(found, logits(packed, IDS), atol=1e-3)


def test_eight_bits_come_whatever_is_asked_and_decode_stays_packed(both):
    _, packed = both()
    with eight(packed, weights=None) as attachment:
        assert attachment.config.weights == "int8"
    with eight(packed, dense_weights="int8") as attachment:
        few = logits(packed, SHORT)
    with eight(packed, dense_weights="int8") as attachment:
        for projection in attachment.projections:
            projection.on = False
        assert torch.equal(logits(packed, SHORT), logits_of_dense(packed, attachment))
    assert not torch.equal(few, logits(packed, SHORT))  # the attention's projections are in eight bits then


def logits_of_dense(model, attachment):
    with attachment.dense():
        return logits(model, SHORT)


def test_a_prompt_is_generated_from(both):
    _, packed = both()
    plain = unpacked(packed)
    with eight(plain) as attachment:
        wanted = run_generate(plain, IDS[:1], 6)
    with eight(packed) as attachment:
        assert torch.equal(run_generate(packed, IDS[:1], 6), wanted)
        assert attachment.stats.sparse_tokens == 32


def test_threads_do_not_share_the_rows_that_they_unpack(both):
    _, packed = both()
    first, second = (ffn.read().int8() for ffn in dissect(packed).ffns[:2])
    mine = first.unpacked()
    wanted = [weight.clone() for weight in (mine.gate, mine.up, mine.down)]
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(lambda: second.unpacked().gate.clone()).result()
    assert not torch.equal(theirs, wanted[0])
    assert all(map(torch.equal, (mine.gate, mine.up, mine.down), wanted))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_an_artifact_of_the_unpacked_model_is_its_partner(both, dtype):
    wide, packed = both(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(packed, tiny_artifact(wide)).detach()


def test_memory_is_that_of_the_file(both):
    wide, packed = both(dtype="bf16")
    blocks = sum(tensor.nbytes for name, tensor in packed.named_buffers() if name.endswith("blocks"))
    ffns = [weight for name, weight in wide.named_parameters() if ".mlp." in name]
    assert blocks == sum(weight.numel() for weight in ffns) // 32 * 18
    assert not [name for name, _ in packed.named_parameters() if ".mlp." in name]
    assert {name.rpartition(".")[2] for name in packed.state_dict() if ".mlp." in name} == {"blocks"}
    mb = []
    for model in (wide, packed):
        with attach(model, tiny_artifact(model)) as attachment:
            mb.append(TransformersEngine(attachment, "tiny").model_mb)
    assert mb[0] - mb[1] == pytest.approx((sum(weight.nbytes for weight in ffns) - blocks) / 1e6, abs=1e-9)
    own = {tensor.data_ptr() for tensor in packed.buffers()} - {0}
    with eight(packed) as attachment:
        assert not own & {tensor.data_ptr() for ffn in attachment.ffns for tensor in ffn.tensors}
        assert {ffn.down_t.numel() for ffn in attachment.ffns} == {0}


def test_a_call_that_learns_has_the_gradient_of_its_input_where_it_is_dense(both):
    _, packed = both()
    x = torch.randn(3, packed.config.hidden_size, requires_grad=True)
    linear = packed.model.layers[0].mlp.up_proj
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.values().sum(0).expand_as(x))
    with eight(packed):
        embedded = packed.get_input_embeddings()(IDS).requires_grad_()
        loss = packed(inputs_embeds=embedded).logits.sum()
        with user_error("no gradient"):
            loss.backward()


@pytest.mark.parametrize("attached", [False, True])
def test_a_model_that_is_cast_is_that_of_the_other_type(both, attached):
    _, packed = both(dtype="fp32")
    wanted = both(dtype="bf16")[1].bfloat16()  # which casts rope's frequencies, too
    with eight(wanted):
        found = logits(wanted, IDS)
    if attached:
        with eight(packed):
            logits(packed, IDS)
            packed.bfloat16()
            assert torch.equal(logits(packed, IDS), found)
    else:
        with eight(packed.bfloat16().float().bfloat16()):
            assert torch.equal(logits(packed, IDS), found)


def test_blocks_that_are_written_to_are_followed(both):
    _, packed = both()
    blocks = packed.model.layers[0].mlp.up_proj.blocks
    with eight(packed):
        before = logits(packed, IDS)
        with torch.no_grad():
            blocks.copy_(blocks.roll(1, 0))
        with pytest.warns(UserWarning, match="have changed"):
            after = logits(packed, IDS)
    with eight(packed):
        assert torch.equal(logits(packed, IDS), after) and not torch.equal(before, after)


def test_without_the_native_kernel(both, monkeypatch):
    _, packed = both()
    with eight(packed, kernel="torch"):
        wanted = logits(packed, IDS)
    monkeypatch.setattr(kernels.cpu, "usable", lambda: False)
    packing._memory._held = None
    with eight(packed, kernel="torch"):
        with torch.inference_mode():
            packed(input_ids=IDS)
        torch.testing.assert_close(logits(packed, IDS), wanted, rtol=1e-4, atol=1e-5)


def test_few_tokens_are_multiplied_by_the_blocks(both, monkeypatch):
    _, packed = both()
    linear, asked = packed.model.layers[0].mlp.up_proj, []
    own = packing.packed.linear
    monkeypatch.setattr(packing.packed, "linear", lambda x, *rest: asked.append(len(x)) or own(x, *rest))
    for tokens in (0, 1, FEW, FEW + 1):
        assert linear(torch.zeros(tokens, 32)).shape == (tokens, 96)
    assert linear(torch.zeros(0, 3, 32)).shape == (0, 3, 96)
    assert asked == [0, 1, FEW, 0]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, cache, both, monkeypatch):
    both()
    other = tmp_path / "other.gguf"
    gguf_tiny.write(other, "qwen2", quantised=gguf.GGMLQuantizationType.Q4_0, seed=1, **SIZES)
    own = models._put_packed
    monkeypatch.setattr(models, "_put_packed", lambda *parts: os.replace(other, tmp_path / "Q4_0.gguf") or own(*parts))
    with user_error("was changed while it was read"):
        models.load(str(tmp_path / "Q4_0.gguf"), "fp32", packed=True)


def test_the_users_generator_is_left_alone(tmp_path, both):
    both()
    before = torch.get_rng_state()
    models.load(str(tmp_path / "Q4_0.gguf"), "fp32", packed=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_stay_packed_is_refused(tmp_path, cache, both):
    for kind in ("F16", "BF16"):
        file = tmp_path / f"{kind}.gguf"
        gguf_tiny.write(file, "qwen2", quantised=gguf.GGMLQuantizationType[kind], **SIZES)
        with user_error(f"type '{kind}'; packed can stay Q4_0"):
            models.load(str(file), packed=True)
    with user_error("keeps the weights of a .gguf file"):
        models.load(str(tmp_path), packed=True)
    _, packed = both()
    with user_error("without --packed"):
        calibrate(packed, None, ["text"], tmp_path / "out")
    bad = np.frombuffer(np.full(96, np.nan, np.float16).tobytes(), np.uint8)
    blocks = torch.zeros(32, 54, dtype=torch.uint8)
    blocks[3, :2] = torch.from_numpy(bad[:2].copy())
    with user_error("not finite"):
        put(packed, "model.layers.0.mlp.down_proj", blocks, "Q4_0", torch.float32)


def test_an_ffn_that_is_packed_in_part_is_refused(both):
    _, packed = both()
    packed.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    with user_error("Layer 1: up_proj is not a packed Linear"):
        dissect(packed)
