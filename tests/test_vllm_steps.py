"""What the plugin knows without vLLM: which rows of a step are sparse and why others are not, and whose weights go by."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, one_sentence, tiny_artifact, tiny_model

from fastfill import families, partner
from fastfill.attachment import Stats
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.vllm_plugin import metrics, settings, steps
from fastfill.vllm_plugin.weights import ROLES, Checkpoint

PREFILL = PrefillConfig(sparsity=0.5, block_size=32, dense_head=32, min_tokens=96, dense_tail=0)


class Device(torch.Tensor):
    """A tensor whose values cost a wait: whatever is asked of it fails."""

    @classmethod
    def __torch_function__(cls, function, *_):
        raise AssertionError(f"the device was asked: {function}")


def common(*requests, host=True):
    """vLLM's `CommonAttentionMetadata` of requests (tokens of this step, tokens with those before it)."""
    new = torch.tensor([0, *(count for count, _ in requests)])
    return SimpleNamespace(
        query_start_loc=new.as_subclass(Device),
        query_start_loc_cpu=new.cumsum(0),
        seq_lens=new.as_subclass(Device),
        seq_lens_cpu_upper_bound=torch.tensor([total for _, total in requests]) if host else None,
        max_query_len=int(new.max()),
        num_actual_tokens=int(new.sum()),
    )


def batch(*requests):
    return steps.Batch.of(common(*requests))


def planned(found, prompts, prefill=PREFILL):
    plan, reasons = steps.plan(found, prompts, found.tokens, prefill)
    return plan.sparse_tokens if plan else 0, reasons


@pytest.mark.parametrize("tail", [0, 40])
def test_chunks_at_block_ends_are_sparse_as_the_whole_prompt_and_give_no_reason(tail):
    prefill = PrefillConfig(sparsity=0.5, block_size=32, dense_head=40, min_tokens=96, dense_tail=tail)
    for prompt in (96, 100, 127, 500):
        whole, reasons = planned(batch((prompt, prompt)), {0: prompt}, prefill)
        assert not reasons and whole == max(0, (prompt - tail) // 32 * 32 - 64)
        for chunk in (32, 64, 160):
            parts = [(min(chunk, prompt - at), min(at + chunk, prompt)) for at in range(0, prompt, chunk)]
            found = [planned(batch(part), {0: prompt}, prefill) for part in parts]
            assert sum(sparse for sparse, _ in found) == whole and not any(reasons for _, reasons in found)
    # A prompt that is read again with what was generated after it, and beside it one that is decoded.
    assert planned(batch((1, 700), (520, 520)), {1: 500}, PREFILL) == (448, set())


@pytest.mark.parametrize("tail", [0, 40])
def test_what_a_step_gives_for_sparse_rows_is_read_if_a_prompt_ends_there_or_shows_its_logits(tail):
    prefill = PrefillConfig(sparsity=0.5, block_size=32, dense_head=40, min_tokens=96, dense_tail=tail)

    def unread(prompts, *requests, whole=False):
        plan, _ = steps.plan(batch(*requests), prompts, sum(count for count, _ in requests), prefill, whole)
        return plan.unread

    assert unread({0: 500}, (500, 500)) and not unread({0: 500}, (500, 500), whole=True)
    assert unread({0: 512}, (512, 512)) == (tail > 0)  # 512 tokens are 16 blocks: without a tail the last one is sparse
    assert unread({0: 512}, (256, 256)) and unread({0: 512}, (224, 480))  # the prompt goes on: nothing is sampled
    assert unread({1: 512, 2: 500}, (1, 700), (512, 512), (500, 500)) == (tail > 0)
    assert unread({0: 500}, (501, 501)) and unread({0: 512}, (513, 513))  # read again with what was generated after it


def test_a_part_that_should_be_sparse_and_is_not_has_a_reason():
    """A chunk that begins inside the block 64..96 loses the rest of it, one that ends inside the block 96..128 its begin."""
    assert planned(batch((56, 128)), {0: 500}) == (32, {steps.CUT_BLOCK})
    assert planned(batch((60, 124)), {0: 500}) == (32, {steps.CUT_BLOCK})
    assert planned(batch((20, 84)), {0: 500}) == (0, {steps.CUT_BLOCK})
    assert planned(batch((20, 500)), {0: 500}) == (0, set())  # what fills no block is dense
    assert planned(batch((20, 20)), {0: 500}) == (0, set())  # the head too
    for row in (0, 1):
        found = batch(*[(300, 300), (1, 50)][:: 1 if row == 0 else -1])
        assert planned(found, {row: steps.EMBEDDINGS}) == (0, {steps.AS_EMBEDDINGS})
    assert planned(batch((90, 90)), {0: steps.EMBEDDINGS}) == (0, set())  # short
    assert planned(batch((1, 301), (40, 40)), {0: steps.EMBEDDINGS}) == (0, set())  # decoding


def test_the_device_is_not_asked_and_what_the_host_does_not_know_is_a_reason():
    with pytest.raises(AssertionError, match="the device was asked"):
        common((500, 500)).seq_lens.tolist()
    assert planned(batch((1, 700), (200, 300)), {1: 500}) == (160, {steps.CUT_BLOCK})  # 128..288 of 100..300
    unknown = steps.Batch.of(common((500, 500), host=False))
    assert steps.plan(unknown, {0: 500}, 500, PREFILL) == (None, {steps.NOT_TOLD})
    assert steps.plan(unknown, {}, 500, PREFILL) == (None, set())
    assert steps.plan(unknown, {0: 500}, 4, PREFILL) == (None, set())


def checkpoint_of(model, names=None, dtype=None):
    """The weights as a loader hands them on. names: ours -> the format's."""
    for name, weight in model.state_dict().items():
        for ours, theirs in (names or {}).items():
            name = name.replace(ours, theirs)
        yield name, weight.to(dtype or weight.dtype)


def passed(weights):
    checkpoint = Checkpoint(weights)
    assert all(isinstance(name, str) for name, _ in checkpoint)
    return checkpoint


def test_the_checkpoints_own_dtype_is_looked_at_and_everything_is_handed_on():
    """In fp16 these weights would have another fingerprint, and artifacts of the first schema know one alone: rounding twice is
    not rounding once."""
    model = tiny_model()
    sampled = tiny_artifact(model)
    artifact = dataclasses.replace(sampled, samples={})
    artifact.base_model.pop("fingerprints", None)
    handed_on = dict(Checkpoint(checkpoint_of(model)))
    assert all(handed_on[name] is not None for name in model.state_dict())
    passed(checkpoint_of(model)).check(artifact)
    passed(checkpoint_of(model, dtype=torch.bfloat16)).check(artifact)
    mistral = {f"{role}_proj": name for name, (role, *_) in ROLES.items() if name.startswith("w")}
    assert mistral == {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    passed(checkpoint_of(model, names={"model.layers": "layers", "mlp": "feed_forward", **mistral})).check(artifact)
    with pytest.raises(UserError, match="other weights"):
        passed(checkpoint_of(model, dtype=torch.float16)).check(artifact)
    with pytest.raises(UserError, match="other weights"):
        passed(checkpoint_of(tiny_model(seed=1))).check(artifact)
    passed(checkpoint_of(model, dtype=torch.float16)).check(sampled)
    assert artifact.base_model["fingerprint"] == partner.fingerprints(families.dissect(model))["bf16"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_checkpoint_is_known(family):
    model = tiny_model(family)
    passed(checkpoint_of(model)).check(tiny_artifact(model))
    with pytest.raises(UserError, match="other weights"):
        passed(checkpoint_of(tiny_model(family, seed=1))).check(tiny_artifact(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_checkpoint_is_judged_before_it_is_loaded(family, tmp_path):
    """Also where gate and up are one: of each the rows that are looked at are its own."""
    model, artifact = tiny_model(family), tiny_artifact(tiny_model(family))
    model.save_pretrained(tmp_path)
    settings.check_checkpoint(artifact, tmp_path)
    ffn = families.dissect(model).ffns[1]
    for part in (ffn.gate, ffn.up, ffn.down):  # one of them alone makes it another model
        before = part.clone()
        part.copy_(torch.randn_like(part))
        model.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="artifact") as refused:
            settings.check_checkpoint(artifact, tmp_path)
        one_sentence(refused.value)
        part.copy_(before)


def test_a_checkpoint_that_lacks_ffn_weights_is_refused():
    model = tiny_model()
    weights = [(n, w) for n, w in checkpoint_of(model) if not n.endswith("layers.1.mlp.up_proj.weight")]
    with pytest.raises(UserError, match=r"no up weights of layer 1 .*1 weights are missing") as refused:
        passed(weights).check(tiny_artifact(model))
    one_sentence(refused.value)
    with pytest.raises(UserError, match="9 weights are missing"):
        passed(checkpoint_of(model, names={"mlp": "ffn"})).check(tiny_artifact(model))


def test_counters_of_several_engines_add_up():
    prometheus = pytest.importorskip("prometheus_client")

    def value(*sample):
        return prometheus.REGISTRY.get_sample_value(*sample) or 0

    first, second = metrics.Counters(), metrics.Counters()
    sparse, dense = value("fastfill:sparse_tokens_total"), value("fastfill:dense_tokens_total")  # of engines in other tests
    first.set(Stats(sparse_tokens=3, dense_tokens=1, dense_because={"a": 1}), 0.5, 0.25)
    first.set(Stats(sparse_tokens=5, dense_tokens=1, dense_because={"a": 2, "b": 1}), 0.5, 0.25)
    second.set(Stats(sparse_tokens=1, dense_tokens=1, dense_because={"a": 4}), 0.5, 0.25)
    assert value("fastfill:sparse_tokens_total") - sparse == 6 and value("fastfill:dense_tokens_total") - dense == 2
    assert value("fastfill:dense_steps_total", {"reason": "a"}) == 6
    assert value("fastfill:dense_steps_total", {"reason": "b"}) == 1
