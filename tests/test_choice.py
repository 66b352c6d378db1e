"""Which kernel runs and from which length: clocks are injected, so that no test depends on this machine's speed."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import PREFILL, tiny_artifact, tiny_model, token_ids

import fastfill
from fastfill import calls, choice, kernels

COST = {"dense": 1.0, "torch": 0.5}  # seconds a token


@pytest.fixture
def gains():
    """The real thing, in the place of conftest's."""


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Time by a rule. rule: (way, tokens) -> seconds, where way is "dense" or a kernel. timed: what was asked for."""
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels.cpu, "_load", lambda: "not built")
    clock = SimpleNamespace(rule=lambda way, tokens: COST[way] * tokens, timed=[])

    def seconds(ffn, config, names, tokens):
        clock.timed.append((tokens, tuple(names)))
        return {way: clock.rule(way, tokens) for way in ("dense", *names)}

    monkeypatch.setattr(choice, "_seconds", seconds)
    return clock


def attached(**more):
    model = tiny_model()
    return model, fastfill.attach(model, tiny_artifact(model), **more)


def test_the_shortest_prompt_that_gains_raises_min_tokens(clock):
    clock.rule = lambda way, tokens: tokens if way == "dense" else 60 + tokens / 4  # equal at 80 tokens
    model, there = attached()
    with there:
        first = PREFILL.shortest_prompt
        assert clock.timed == [(first << step, ("torch",)) for step in range(len(clock.timed))]
        assert there.config.min_tokens == clock.timed[-1][0] and there.config.min_tokens // 2 < 80 < there.config.min_tokens
        gain = there.config.min_tokens / (60 + there.config.min_tokens / 4)
        assert there.choices["expected_gain"] == pytest.approx(gain, abs=1e-3)
        assert f"{gain:.2f}x" in there.choices["kernel_reason"] and there.choices["kernel"] == "torch"
        model(token_ids(1, 79))
        assert there.stats.sparse_tokens == 0 and not there.stats.dense_because
        model(token_ids(1, 130))
        assert there.stats.sparse_tokens > 0


def test_a_threshold_is_never_lowered(clock):
    model = tiny_model()
    artifact = tiny_artifact(model, prefill=PREFILL.with_(min_tokens=100))
    with fastfill.attach(model, artifact) as there:
        assert clock.timed == [(100, ("torch",))] and there.config.min_tokens == 100


def test_where_nothing_gains_all_stays_dense_and_says_so_once(clock):
    clock.rule = lambda way, tokens: tokens * (1.0 if way == "dense" else 1 / choice.MARGIN + 0.001)
    model = tiny_model()
    ids = token_ids(1, 45)
    want = model(ids).logits
    with pytest.warns(UserWarning, match=r"does not gain here .*1\.03x .* name a kernel or min_tokens") as told:
        there = fastfill.attach(model, tiny_artifact(model))
    assert len(told) == 1 and there.config.min_tokens == PREFILL.min_tokens
    with there, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(ids).logits, want)
        model(ids[:, :5])  # too short anyhow
        assert there.stats.sparse_calls == 0 and there.stats.dense_because == {calls.SLOWER: 1}
    assert max(tokens for tokens, _ in clock.timed) <= choice.MOST


@pytest.mark.parametrize(
    "named", [{"kernel": "torch"}, {"min_tokens": 16}, {"prefill": PREFILL}, {"sparsity": 0.0}, {"dense_head": 2**31 - 1}]
)
def test_nothing_is_measured_where_the_user_says_what_runs_or_prompts_have_no_bound(clock, named):
    with attached(**named)[1] as there:
        assert not clock.timed and there.config.min_tokens == PREFILL.min_tokens
        assert there.choices["expected_gain"] is None


def test_it_is_remembered_for_the_same_layer_settings_and_library_alone(clock, monkeypatch, tmp_path):
    with attached()[1] as there:
        first = there.choices
    assert len(clock.timed) == 1
    with attached()[1] as there:
        assert there.choices == first and len(clock.timed) == 1
    for other in ({"block_size": 16}, {"sparsity": 0.4}, {"compensator": False}):
        count = len(clock.timed)
        attached(**other)[1].detach()
        assert len(clock.timed) == count + 1, other
    files = [file for file in (tmp_path / "cache" / "choices").iterdir() if not file.name.startswith("attention-")]
    assert len(files) == 4
    for content in ("", "[]", "{}", '{"kernel": "fast", "tokens": 1, "gain": 2.0}', '{"kernel": "torch", "gain": "x"}'):
        count = len(clock.timed)
        for file in files:
            file.write_text(content)
        with attached()[1] as there:
            assert there.choices == first and len(clock.timed) == count + 1
    count = len(clock.timed)
    monkeypatch.setattr(kernels.cpu, "build", lambda: "another")
    attached()[1].detach()
    assert len(clock.timed) == count + 1


def test_a_cache_that_cannot_be_written_is_done_without(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path / "file"))
    with attached()[1] as there:
        assert there.choices["expected_gain"] == 2.0


@pytest.mark.skipif(not kernels.cpu.usable(), reason=kernels.cpu.status())
@pytest.mark.parametrize("faster", ["native", "torch"])
def test_the_faster_kernel_runs_while_the_weights_stay(monkeypatch, tmp_path, faster):
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path))
    seconds = {"dense": 1.0, "native": 0.7, "torch": 0.7, faster: 0.5}
    monkeypatch.setattr(choice, "_seconds", lambda *_: seconds)
    model, there = attached()
    with there:
        assert {ffn.kernel.name for ffn in there.ffns} == {faster}
        there.refresh()
        assert {ffn.kernel.name for ffn in there.ffns} == {faster}
        model.double()  # which the native kernel does not know
        there.refresh()
        assert {ffn.kernel.name for ffn in there.ffns} == {"torch"} and there.choices["expected_gain"] is None


def test_what_is_timed_is_what_runs(monkeypatch, tmp_path):
    """Every way gives the layer's output on the same tokens; the user's random numbers, plan and taps stay untouched."""
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path))
    outputs = []
    monkeypatch.setattr(choice, "clock", lambda run, _: outputs.append(run()) or 1.0)
    model = tiny_model(dtype=torch.float64)
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="does not gain"), fastfill.attach(model, tiny_artifact(model)) as there:
        assert torch.equal(torch.random.get_rng_state(), state)
        each = len(outputs) // (choice.ROUNDS + 1)
        assert each > 1 and there.stats.sparse_tokens == there.stats.dense_tokens == 0
        dense, sparse = outputs[:2]
        assert dense.shape == sparse.shape == (1, PREFILL.shortest_prompt, 32)
        head = PREFILL.first_sparse
        torch.testing.assert_close(dense[:, :head], sparse[:, :head])
        assert (dense[:, head:] - sparse[:, head:]).abs().max() > 0.01
