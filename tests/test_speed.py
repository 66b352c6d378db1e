"""Fields and formulas. Nothing here asserts how long anything takes."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    VOCABULARY,
    logits,
    tiny_artifact,
    tiny_config,
    tiny_model,
    token_ids,
)
from torch.utils.flop_counter import FlopCounterMode

from fastfill import attach, clocks, engines, models
from fastfill.cli import show
from fastfill.cost import Cost
from fastfill.engines import Prefill
from fastfill.engines.transformers import TransformersEngine
from fastfill.errors import UserError
from fastfill.lab import flops, profile, speed
from fastfill.lab.profile import PARTS

FIELDS = {*(f"{key}_{mode}{unit}" for mode in speed.MODES for key, unit in (("ttft", "_s"), ("ttft", "_quartiles_s"),
                                                                             ("ffn", "_s"), ("split", ""))),
          "prompt_tokens", "sparse_tokens", "dense_tokens", "speedup", "ratio_quartiles", "clear", "rounds",
          "ffn_share", "ceiling", "ffn_ratio", "flops_dense", "flops_sparse", "ffn_flops_ratio",
          "peak_dense_mb", "peak_sparse_mb"}  # fmt: skip


@pytest.fixture
def attachment(model):
    with attach(model, tiny_artifact(model)) as attached:
        yield attached


def test_rows_have_all_fields_and_count_tokens(attachment):
    ticks = []
    engine = TransformersEngine(attachment, "tiny")
    row = speed.measure(engine, token_ids(1, 45), 2, ticks.append)
    # a warm-up and two timed runs and two profiled ones in three modes, two for the memory; more rounds where it is noisy
    assert row.keys() == FIELDS | {"unread_tokens"} and sum(ticks) == speed.prefills(2) == 3 * (3 + 2) + 2
    assert ticks.count(0) == 3 * (row["rounds"] - 2)
    assert [row[f"{kind}_tokens"] for kind in ("prompt", "sparse", "dense", "unread")] == [45, 32, 13, 32]
    stats = attachment.stats
    assert (stats.sparse_calls, stats.dense_calls) == (row["rounds"] + 4, 2 * (row["rounds"] + 3) + 1)
    rows = speed.bench(engine, [20, 33, 9], 1)
    assert [(r["prompt_tokens"], r["sparse_tokens"]) for r in rows] == [(20, 8), (33, 24), (9, 0)]
    assert [r["speedup"] is None for r in rows] == [r["ceiling"] is None for r in rows] == [False, False, True]


def test_measuring_changes_nothing(attachment):
    model, ids = attachment.model, token_ids(1, 45)
    before, parts = logits(model, ids), [(f.predictor, f.compensator) for f in attachment.ffns]
    speed.measure(TransformersEngine(attachment, "tiny"), ids, 1)
    assert torch.equal(logits(model, ids), before)
    assert [(f.predictor, f.compensator) for f in attachment.ffns] == parts
    attachment.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class GivenTimes:
    """An engine with known times. A profiled dense run takes 4.4 s, of which 3.3 s in the FFNs; a sparse one 2.75 s."""

    def __init__(self, times=((4.0, 2.5),), skipped=0.5, sparse_tokens=30, scales=(1.0,)):
        kept = (round(INTERMEDIATE * (1 - skipped)),) * LAYERS
        self.cost = Cost(HIDDEN, INTERMEDIATE, kept, 0, 0)
        self.times = itertools.chain.from_iterable(itertools.cycle(times))
        self.scales = itertools.cycle(scales)
        self.sparse_tokens = sparse_tokens
        self.mode, self.calls = "sparse", []

    @contextmanager
    def dense(self, mode="dense"):
        self.mode = mode
        yield
        self.mode = "sparse"

    def all_neurons(self):
        return self.dense("all_neurons")

    @contextmanager
    def clocks(self):
        self.scale, seconds = next(self.scales), {}
        yield seconds
        ffn = {"sparse": (1.65, 0.3, 0.15), "dense": (3.3, 0.0, 0.0), "all_neurons": (2.2, 0.0, 0.0)}[self.mode]
        seconds.update(zip(PARTS, (self.scale * part for part in (0.6, *ffn)), strict=False))
        self.scale = None

    scale = None

    def prefill(self, ids):
        self.calls.append(self.mode)
        if self.scale:
            return Prefill(self.scale * (2.75 if self.mode == "sparse" else 4.4), 0)
        return Prefill(next(self.times), self.sparse_tokens if self.mode == "sparse" else 0)


@pytest.mark.parametrize("skipped", [0.5, 0.25])
def test_formulas_on_given_numbers(skipped):
    engine, ids = GivenTimes(((4.0, 3.2, 2.5),), skipped), token_ids(1, 45)
    row = speed.ttft(engine, ids, 3, modes=speed.MODES)
    assert engine.calls == list(speed.MODES) * 4
    row |= speed.split(engine, ids, 2, row, modes=speed.MODES)
    assert [row[f"ttft_{mode}_s"] for mode in speed.MODES] == [4.0, 3.2, 2.5] and row["speedup"] == 1.6
    assert (row["sparse_tokens"], row["dense_tokens"]) == (30, 15)
    assert row["ttft_dense_quartiles_s"] == [4.0, 4.0, 4.0]
    # the FFN's share is that of the profiled run's own TTFT, 3.3 of 4.4 s
    assert [row[f"ffn_{mode}_s"] for mode in speed.MODES] == [3.3, 2.2, 1.65] and row["ffn_ratio"] == 0.5
    assert row["split_sparse"] == {"attention": 0.6, "ffn": 1.2, "predictor": 0.3, "compensator": 0.15, "rest": 0.5}
    # 30 of 45 tokens skip neurons, and those are all that the ceiling can gain from
    assert row["ffn_share"] == 0.75 and row["ceiling"] == pytest.approx(1 / (1 - 30 / 45 * skipped * 0.75), abs=1e-4)


def test_where_all_is_dense_there_is_no_speedup_and_no_ceiling():
    engine, ids = GivenTimes(((4.0, 3.0),), sparse_tokens=0), token_ids(1, 45)
    row = speed.ttft(engine, ids, 3)
    row |= speed.split(engine, ids, 1, row)
    assert [row[key] for key in ("speedup", "ratio_quartiles", "clear", "ceiling")] == [None] * 4
    assert row["ttft_dense_s"] == 4.0 and row["rounds"] == 3  # whatever the noise: there is no effect


def test_the_first_run_of_each_mode_is_warm_up():
    engine = GivenTimes([(100.0, 200.0), (2.0, 1.0), (4.0, 2.0), (6.0, 3.0)])
    row = speed.ttft(engine, token_ids(1, 45), 3)
    assert (row["ttft_dense_s"], row["ttft_sparse_s"], row["rounds"]) == (4.0, 2.0, 3)
    assert row["ttft_dense_quartiles_s"] == [3.0, 4.0, 5.0] and row["ratio_quartiles"] == [2.0, 2.0, 2.0]


def test_rounds_go_on_until_the_noise_is_less_than_the_gain():
    """Ratios 1.5 and 1.0: median 1.25 and interquartile range 0.25, no less than the gain. With 1.5 twice more: 1.5, 0.125."""
    times = [(9.0, 9.0), (1.5, 1.0), (1.0, 1.0), (1.5, 1.0), (1.5, 1.0), (1.5, 1.0)]
    row = speed.ttft(GivenTimes(times), token_ids(1, 45), 2)
    assert not speed.is_clear([1.5, 1.0]) and speed.is_clear([1.5, 1.0, 1.5])
    assert (row["rounds"], row["clear"]) == (3, True) and row["ratio_quartiles"] == [1.25, 1.5, 1.5]


def test_noise_that_stays_is_told():
    times = [(9.0, 9.0), *((1.5, 1.0), (1.0, 2.0), (1.0, 1.0)) * 3]
    ticks = []
    row = speed.ttft(GivenTimes(times), token_ids(1, 45), 2, ticks.append)
    assert (row["rounds"], row["clear"]) == (2 * speed.PATIENCE, False)
    assert ticks == [1] * 6 + [0] * 2 * (row["rounds"] - 2)


def test_the_split_is_the_median_run_whole():
    engine = GivenTimes(scales=[3, 30, 1, 10, 2, 20])  # dense, sparse, dense, ...
    row = speed.split(engine, token_ids(1, 45), 3, {"sparse_tokens": 30})
    assert row["split_dense"] == {"attention": 1.2, "ffn": 6.6, "predictor": 0.0, "compensator": 0.0, "rest": 1.0}
    assert row["split_sparse"]["ffn"] == 24.0


def test_growth_and_lengths():
    lengths = [256, 512, 2048]
    assert speed.growth(lengths, [3e-4 * n**1.25 for n in lengths]) == 1.25
    assert speed.growth([512], [1.0]) is None and speed.growth([512, 512], [1.0, 2.0]) is None
    # by hand: logs -1, 0, 1 against 0, 0, 3 have the slope (0 * -1 + 3 * 1) / 2
    assert speed.growth([1, 2, 4], [1.0, 1.0, 8.0]) == 1.5
    assert speed.fitting([256, 8192, 16384], 8192) == [256, 8192]
    assert speed.fitting([256, 16384], 10000) == [256, 10000]
    assert speed.fitting([256, 16384], None) == [256, 16384]


def test_prompts_beyond_the_model_are_refused(attachment):
    with pytest.raises(UserError, match="600 tokens is more than the 512"):
        speed.bench(TransformersEngine(attachment, "tiny"), [600], 1)


def test_tables_fit_80_columns_and_say_it_in_words(attachment, capsys):
    row = speed.measure(TransformersEngine(attachment, "tiny"), token_ids(1, 45), 1)
    row |= {"prompt_tokens": 131072, "speedup": 11.26, "ratio_quartiles": [10.25, 11.26, 12.5], "clear": True, "ceiling": 12.0}
    row |= {f"ttft_{mode}_s": 123.456 for mode in speed.MODES} | {
        f"split_{mode}": dict.fromkeys(PARTS, 99.999) for mode in speed.MODES
    }
    row |= {"flops_dense": 2 * 10**15, "flops_sparse": 10**15, "peak_dense_mb": 12_345.6, "peak_sparse_mb": None}
    row |= {"ffn_dense_s": 4.0, "ffn_all_neurons_s": 3.0}
    noisy = row | {"prompt_tokens": 512, "speedup": 1.02, "ratio_quartiles": [0.9, 1.02, 1.1], "clear": False, "rounds": 20}
    short = row | {"prompt_tokens": 9, "sparse_tokens": 0, **dict.fromkeys(("speedup", "ratio_quartiles", "clear", "ceiling"))}
    machine = {"cpu": "AMD EPYC", "isa": "avx2", "threads": 2, "torch": "2.13.0+cpu", "transformers": "5.23.0"}
    peer = {"name": "llama-cpp-python", "version": "0.3.36", "weights": "m.gguf", "prompt_tokens": 131072, "ttft_s": 300.5}
    result = {
        **{"model": "maker/model", "dtype": "bfloat16", "kernel": "native", "sparsity": 0.5, "block_size": 32, "repeats": 5},
        **{"growth_dense": 1.234, "growth_sparse": 1.1, "model_mb": 269.0, "attached_mb": 65.7, "machine": machine},
        **{"rows": [short, noisy, row], "compare": [peer, {"name": "vLLM", "version": None, "skipped": "not installed"}]},
    }
    show.bench(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    words = " ".join(" ".join(lines).split())
    assert "131072 123.456 123.456 123.456 11.26x 10.25-12.50 12.00x" in words
    assert "9 123.456 123.456 123.456 all dense - -" in words and "1.02x? 0.90-1.10" in words and "after 20 rounds" in words
    assert "AMD EPYC (avx2), 2 threads" in words
    assert "to the power 1.23 dense, 1.10 sparse" in words and "269 MB of weights and the 66 MB that attaching adds" in words
    assert "131072 2,000,000 1,000,000" in words and "0.75 12,346 -" in words
    assert "llama-cpp-python 131072 300.500 123.456 123.456" in words and "not measured: vLLM, not installed" in words


# --- where the time goes ------------------------------------------------------------------------------------------------


def test_the_split_adds_up_to_its_own_run_by_a_counted_clock(attachment, monkeypatch):
    """Every look at the clock takes a second, so each span of a part without parts of its own lasts one second."""
    ticks = itertools.count()
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: float(next(ticks)))
    made, ids = TransformersEngine(attachment, "tiny"), token_ids(1, 45)
    with made.dense():
        dense = profile.split(made, ids)
    # two looks around the run, two for each attention and FFN: 1 + 4 * 3 in all
    assert dense == {"attention": 3, "ffn": 3, "predictor": 0, "compensator": 0, "rest": 13 - 6}
    sparse = profile.split(made, ids)
    # within an FFN now four looks more: 5 s, of which one each for predictor and compensator; but for the last, which leaves
    # the sparse tokens out
    assert sparse == {"attention": 3, "ffn": 7, "predictor": 2, "compensator": 2, "rest": 21 - 14}
    assert list(dense) == list(sparse) == list(PARTS)


def test_a_layer_that_keeps_all_neurons_predicts_nothing(attachment, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: float(next(ticks)))
    attachment.ffns[1].kept = INTERMEDIATE
    parts = profile.split(TransformersEngine(attachment, "tiny"), token_ids(1, 45))
    assert (parts["predictor"], parts["compensator"]) == (1, 1)  # the first alone; the last leaves the sparse tokens out


def test_clocks_go_after_an_error_and_without_a_compensator(model):
    with attach(model, tiny_artifact(model), compensator=False) as attachment:
        made = TransformersEngine(attachment, "tiny")
        with made.clocks() as seconds:
            logits(model, token_ids(1, 45))
        assert seconds["predictor"] > 0 and seconds["compensator"] == 0
        with pytest.raises(RuntimeError, match="stop"), made.clocks():
            raise RuntimeError("stop")
        assert not any(f.taps for f in attachment.ffns)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- memory -------------------------------------------------------------------------------------------------------------


told = pytest.mark.skipif(profile.rise_mb("cpu", lambda: None) is None, reason="the system does not tell")


@told
def test_peak_memory_sees_what_is_held_at_once():
    mb = 2**18  # fp32 values in 1.05 MB

    def run(blocks):
        kept = [torch.ones(mb) for _ in range(blocks)]
        del kept
        torch.ones(mb)

    peaks = [profile.rise_mb("cpu", lambda n=n: run(n)) for n in (96, 32, 96)]
    # pages of the allocator and of the interpreter come on top; what an earlier run freed must not hide a later one
    for peak, blocks in zip(peaks, (96, 32, 96), strict=True):
        assert blocks * 1.048 - 8 < peak < blocks * 1.048 + 24


@told
def test_memory_that_an_earlier_run_freed_does_not_hide_a_later_one():
    """Small blocks below one that stays: the allocator cannot give them back by itself."""
    before = [torch.ones(24_000) for _ in range(500)]  # 48 MB in blocks of 96 KB
    stays = torch.ones(24_000)
    del before
    peak = profile.rise_mb("cpu", lambda: len([torch.ones(24_000) for _ in range(300)]))
    assert 28.8 - 4 < peak < 28.8 + 12 and stays.numel()


def test_peak_memory_that_the_system_does_not_tell_is_none(monkeypatch):
    monkeypatch.setattr(profile, "Path", lambda _: SimpleNamespace(write_text=lambda _: (_ for _ in ()).throw(OSError)))
    assert profile.rise_mb("cpu", lambda: pytest.fail("must not run")) is None


# --- FLOPs --------------------------------------------------------------------------------------------------------------


def test_flops_by_hand():
    """H 32, F 96, 3 layers, 4 heads of 8 with 2 for keys, vocabulary 128; 10 tokens, 4 of them sparse."""
    parts = flops.prefill(tiny_config(), 10, 4, Cost(32, 96, (24, 96, 48), 100, 7))
    assert parts == {
        "projections": 3 * 10 * 2 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32),
        "attention": 3 * 2 * 2 * 32 * 55,  # 1 + 2 + ... + 10 pairs; scores and values
        "ffn": 2 * 3 * 32 * (3 * 6 * 96 + 4 * (24 + 96 + 48)),
        "predictor": 2 * 100 * 4 * 2,  # in the two layers that leave neurons out
        "compensator": 2 * 7 * 10 * 2,  # corrects all tokens, and those that are dense are cleared
        "head": 2 * 32 * 128,
    }
    assert flops.ffn(parts) == parts["ffn"] + 1600 + 280
    # two of the sparse tokens do not reach the last layer, the only upper one
    above = flops.prefill(tiny_config(), 10, 4, Cost(32, 96, (24, 96, 48), 100, 7), skipped_above=2)
    assert above == {
        "projections": 28 * 2 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32),
        "attention": 2 * 2 * 32 * (55 + 55 + 36),
        "ffn": 2 * 3 * 32 * (3 * 6 * 96 + 4 * (24 + 96) + 2 * 48),
        "predictor": 2 * 100 * (4 + 2),
        "compensator": 2 * 7 * (10 + 8),
        "head": 2 * 32 * 128,
    }
    # three tokens are read again: all neurons of every layer, and as many pairs as if each were the last token
    again = flops.prefill(tiny_config(), 10, 4, Cost(32, 96, (24, 96, 48), 100, 7), reread_tokens=3)
    assert {part: again[part] - parts[part] for part in parts} == {
        "projections": 3 * parts["projections"] // 10,
        "attention": 3 * 2 * 2 * 32 * 3 * 10,
        "ffn": 2 * 3 * 32 * 3 * 3 * 96,
        "predictor": 0,
        "compensator": 0,
        "head": 0,
    }
    # too short for a sparse block: nothing is predicted or corrected
    assert flops.prefill(tiny_config(), 10, 0, Cost(32, 96, (24, 96, 48), 100, 7)) == flops.prefill(tiny_config(), 10)


def test_the_ceiling_with_upper_layers_that_read_less():
    assert speed.ceiling(0.7, 0.5, 0.9, 0.9) == pytest.approx(10)  # every sparse token skips all of every layer
    # a tenth of the tokens skips all, the other sparse ones their neurons
    assert speed.ceiling(0.7, 0.5, 0.9, 0.1) == pytest.approx(1 / (1 - 0.1 - 0.8 * 0.35))
    assert speed.ceiling(0.7, 0.5, 0.9) == pytest.approx(1 / (1 - 0.9 * 0.35))
    # a tenth of them is read twice
    assert speed.ceiling(0.7, 0.5, 0.9, again=0.1) == pytest.approx(1 / (1.1 - 0.9 * 0.35))


def test_pairs_in_a_window():
    for tokens, window in itertools.product((1, 5, 9), (None, 1, 4, 5, 20)):
        seen = sum(1 for q in range(tokens) for k in range(q + 1) if window is None or q - k < window)
        assert flops.pairs(tokens, window) == seen

    def windows(config):
        return [window for _, window in flops.layers_of(config)]

    assert windows(tiny_config("mistral", sliding_window=16)) == [16] * LAYERS
    assert windows(tiny_config("llama")) == [None] * LAYERS
    mixed = tiny_config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert windows(mixed) == [None, 16, 16]


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_a_dense_prefill_are_those_that_torch_counts(family):
    model, tokens = tiny_model(family, attn_implementation="eager"), 45
    with FlopCounterMode(display=False) as counter:
        logits(model, token_ids(1, tokens), logits_to_keep=1)
    parts = flops.prefill(model.config, tokens)
    linear = [kind == flops.RECURRENT for kind, _ in flops.layers_of(model.config)]
    full = 4 * HIDDEN * tokens**2 * linear.count(False)  # eager attention also computes the masked pairs
    rotary = sum(
        v for name, module in counter.get_flop_counts().items() if name.endswith("rotary_emb") for v in module.values()
    )
    found = counter.get_total_flops() - rotary
    for layer in (index for index, recurrent in enumerate(linear) if recurrent):  # it is computed by chunks; see below
        of = {name: sum(v.values()) for name, v in counter.get_flop_counts().items() if f".{layer}.linear_attn" in name}
        found -= sum(count if name.endswith("linear_attn") else -count for name, count in of.items())
    assert found == sum(parts.values()) - parts["attention"] + full


@pytest.mark.skipif("qwen3_5_text" not in FAMILIES, reason="this transformers does not know Qwen3.5")
def test_flops_of_a_recurrent_layers_state():
    """Token by token: S <- decay S; S += k (beta (v - S k))^T; q S; behind a convolution of all that is projected but gates."""
    config = tiny_config("qwen3_5_text")  # two key heads, four value heads, 8 wide, a convolution of 4
    layer = 2 * 4 * (2 * 16 + 32) + 4 * 3 * 2 * 8 * 8
    attention = 4 * HIDDEN * 45 * 46 // 2
    assert flops.prefill(config, 45)["attention"] == attention + 2 * 45 * layer


def test_flops_of_the_sparse_ffns_are_those_that_torch_counts(model, monkeypatch):
    """The torch kernel gathers and multiplies as it says: nothing more, nothing less."""
    ids, counts = token_ids(1, 45), {}
    with attach(model, tiny_artifact(model), kernel="torch") as attachment:
        monkeypatch.setattr(attachment._readers, "_watched", lambda kwargs: False)  # the counter does, everywhere
        runner = TransformersEngine(attachment, "tiny")
        for kind in ("dense", "sparse"):
            with FlopCounterMode(display=False) as counter:
                if kind == "dense":
                    with attachment.dense():
                        logits(model, ids, logits_to_keep=1)
                else:
                    logits(model, ids, logits_to_keep=1)
            counts[kind] = counter.get_total_flops()
        assert attachment.stats.unread_tokens == attachment.stats.sparse_tokens == 32
        row = speed.cost(runner, {"prompt_tokens": 45, "sparse_tokens": 32, "unread_tokens": 32})
    assert row["flops_sparse"] - row["flops_dense"] == counts["sparse"] - counts["dense"]


# --- engines ------------------------------------------------------------------------------------------------------------


def test_engines_are_found_by_name():
    with pytest.raises(UserError, match="There is no engine 'os'; use one of transformers, vllm"):
        engines.load("os", "default", None)


def test_an_engine_tells_what_is_attached(model, model_folder, artifact_folder):
    from fastfill import artifact as artifacts

    artifact = artifacts.load(artifact_folder)
    settings = {"dtype": "fp32", "device": "cpu", "sparsity": 0.25, "kernel": "torch"}
    with engines.load("transformers", str(model_folder), artifact, **settings) as made:
        assert (made.engine, made.name, made.dtype, made.device) == ("transformers", str(model_folder), "float32", "cpu")
        why = {"kernel_reason": "asked for", "expected_gain": None}
        why |= {"packed": False, "attention_by": "model (by chunks 1.00x as fast at 1024 tokens)"}
        assert made.choices == {"kernel": "torch", **why, "predictor": "LearnedPredictor", "compensator": True}
        assert made.config.sparsity == 0.25 and sum(made.cost.kept) == round(0.75 * LAYERS * INTERMEDIATE)
        # what the objects on the model say of themselves, and what their ranks say
        assert made.cost == artifact.cost(0.25) == Cost(HIDDEN, INTERMEDIATE, made.cost.kept, 8 * (HIDDEN + INTERMEDIATE), 512)
        assert made.cost.skipped == pytest.approx(0.25) and made.shape.vocab_size == VOCABULARY
        assert made.model_mb == pytest.approx(4e-6 * sum(p.numel() for p in (*model.parameters(), *model.buffers())))
        assert made.prefill(token_ids(1, 45)).sparse_tokens == 32
        with made.dense():
            assert made.prefill(token_ids(1, 45)).sparse_tokens == 0
    assert models.gguf_file(str(model_folder)) is None


@pytest.mark.parametrize("kernel", ["torch", "native"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_all_neurons_is_the_dense_model_by_the_sparse_kernel(family, kernel):
    model, ids = tiny_model(family), token_ids(1, 45)
    want, ran = logits(model, ids), []
    with attach(model, tiny_artifact(model), kernel=kernel) as attachment:
        made = TransformersEngine(attachment, "tiny")
        before = logits(model, ids)
        real = type(attachment.ffns[0].kernel).sparse_ffn
        with pytest.MonkeyPatch.context() as patch, made.all_neurons():
            spy = lambda self, x, ffn, *rest, **more: ran.append(len(x)) or real(self, x, ffn, *rest, **more)  # noqa: E731
            patch.setattr(type(attachment.ffns[0].kernel), "sparse_ffn", spy)
            found = made.prefill(ids), logits(model, ids)
        assert ran == [45] * 2 * LAYERS and found[0].sparse_tokens == 0
        # The same products in another order of sums: fp32's eps of logits around 1, some hundred terms deep.
        assert torch.allclose(found[1], want, atol=1e-5) and not torch.allclose(found[1], before, atol=1e-3)
        assert torch.equal(logits(model, ids), before)
        with made.dense():
            assert torch.equal(logits(model, ids), want)
