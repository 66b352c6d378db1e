"""The sparse forward against a reference written by hand in fp64 numpy: every predictor with every kernel."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import BLOCK, HIDDEN, INTERMEDIATE, KERNELS, PREFILL, tiny_artifact, tiny_model

from fastfill import families, kernels
from fastfill.blocks import make_plan
from fastfill.calibration.student import StudentFFN, _MaskedFFN
from fastfill.ffn import FFN
from fastfill.lab.baselines import BASELINES, LowRank
from fastfill.sparse_ffn import SparseFFN, current_plan

TOKENS, KEPT, LAYER = 45, 40, 1
# Sequence 0: head 0..7, sparse 8..39, tail. Sequence 1: 4 rows of padding, head, sparse 12..43, tail.
PLAN = make_plan([(0, 45, 0), (4, 45, 0)], TOKENS, PREFILL)
SPARSE = [(0, 8, 40), (1, 12, 44)]  # the same, by hand: sequence, first, last
EPS = 2.0**-23


def silu(z):
    return z / (1 + np.exp(-z))


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


class Reference:
    """fp64, by hand, token by token where it matters."""

    def __init__(self, model, artifact):
        mlp = model.model.layers[LAYER].mlp
        self.gate, self.up, self.down = (
            np.asarray(p.weight.detach(), np.float64) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        biases = (p.bias for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.biases = [0.0 if bias is None else np.asarray(bias.detach(), np.float64) for bias in biases]
        prefix = f"layers.{LAYER}."
        self.t = {k[len(prefix) :]: np.asarray(v, np.float64) for k, v in artifact.tensors.items() if k.startswith(prefix)}
        self.linear = artifact.ranks["linear"]

    def hidden(self, x, ids=slice(None)):
        b, c = (np.broadcast_to(bias, INTERMEDIATE)[ids] for bias in self.biases[:2])
        return silu(x @ self.gate[ids].T + b) * (x @ self.up[ids].T + c)

    def energy(self, x):
        return (self.hidden(x) * np.sqrt((self.down**2).sum(0))) ** 2

    def scores(self, kind, block, first_block, index):
        if kind == "learned":
            return softmax(block @ self.t["predictor.w_in"].T @ self.t["predictor.w_out"].T + self.t["predictor.bias"]).sum(0)
        if kind in ("oracle", "low-rank"):  # low rank is tested at full rank, where nothing is lost
            return self.energy(block).sum(0)
        if kind == "static":
            return self.t["stats.importance"]
        if kind == "first-block":
            h = self.hidden(first_block)
            return (h**2 / (h**2).sum(1, keepdims=True)).sum(0)
        return torch.rand(PLAN.blocks, INTERMEDIATE, generator=torch.Generator().manual_seed(LAYER)).numpy()[index]

    def __call__(self, x, kind, compensate=True, spoil=lambda ids: ids):
        """x: (2, T, H) -> the output and the smallest gap between kept and skipped scores, relative."""
        x = np.asarray(x, np.float64)
        y = self.hidden(x) @ self.down.T + self.biases[2]
        gap, index = 1.0, 0
        for sequence, first, last in SPARSE:
            start = {0: 0, 1: 4}[sequence]
            for at in range(first, last, BLOCK):
                block = x[sequence, at : at + BLOCK]
                scores = self.scores(kind, block, x[sequence, start : start + BLOCK], index)
                order = np.argsort(-scores)
                gap = min(gap, (scores[order[KEPT - 1]] - scores[order[KEPT]]) / scores[order[KEPT]])
                ids = spoil(order[:KEPT].copy())
                out = self.hidden(block, ids) @ self.down[:, ids].T + self.biases[2]
                if compensate:
                    inner = block @ self.t["compensator.w_in"].T
                    inner[:, self.linear :] = silu(inner[:, self.linear :])
                    out = out + inner @ self.t["compensator.w_out"].T + self.t["compensator.bias"]
                y[sequence, at : at + BLOCK] = out
                index += 1
        return y, gap


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases"])
def parts(request):
    model = tiny_model(mlp_bias=request.param)
    artifact = tiny_artifact(model)
    x = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5))
    return model, artifact, x, Reference(model, artifact)


def sparse_ffn(model, artifact, kind, kernel, compensate=True, kept=KEPT, tap=None):
    part = families.dissect(model).ffns[LAYER]
    if kind == "learned":
        predictor = artifact.predictor(LAYER, part.gate)
    elif kind == "low-rank":
        predictor = LowRank(part, torch.ones(HIDDEN), HIDDEN)
    else:
        predictor = BASELINES[kind](part, LAYER, artifact.statistics(LAYER, part.gate), 8)
    compensator = artifact.compensator(LAYER, artifact.kept()[LAYER], part.gate) if compensate else None
    down_t, taps = part.down.t().contiguous(), [tap] if tap else []
    return SparseFFN(part.module.forward, part.now(), down_t, kept, predictor, compensator, kernels.resolve(kernel), taps)


def run(ffn, x, plan=PLAN):
    token = current_plan.set(plan)
    try:
        with torch.no_grad():
            return ffn(x)
    finally:
        current_plan.reset(token)


def tolerance(y):
    # fp32 sums of H terms, then of K and r terms, each rounded at eps of partial sums that grow like the root of their number;
    # relative to the largest output, with a margin of four.
    return 4 * EPS * (HIDDEN**0.5 + KEPT**0.5) * np.abs(y).max()


@pytest.mark.parametrize("compensate", [True, False], ids=["compensated", "bare"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["learned", *BASELINES])
def test_equals_the_reference(parts, kind, kernel, compensate):
    model, artifact, x, reference = parts
    expected, gap = reference(x, kind, compensate)
    assert gap > 1e-5, "scores too close for fp32 to rank: choose another seed"
    ffn = sparse_ffn(model, artifact, kind, kernel, compensate)
    np.testing.assert_allclose(run(ffn, x).numpy(), expected, rtol=0, atol=tolerance(expected))


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_sparse_touches_the_dense_rows(parts, kernel):
    """Head, tail and padding: the FFN of all neurons, to rounding (`test_equals_the_reference` compares them with fp64 too),
    whatever the selection and the compensator are, even NaN."""
    model, artifact, x, _ = parts
    got = run(sparse_ffn(model, artifact, "learned", kernel), x).view(-1, HIDDEN)
    other = sparse_ffn(model, artifact, "random", kernel)
    other.compensator = lambda rows, _kernel: torch.full_like(rows, float("nan"))
    spoilt = run(other, x).view(-1, HIDDEN)
    sparse = torch.zeros(len(got), dtype=torch.bool)
    for sequence, first, last in SPARSE:
        sparse[sequence * TOKENS + first : sequence * TOKENS + last] = True
    assert torch.equal(spoilt[~sparse], got[~sparse]) and bool(spoilt[sparse].isnan().all())
    dense = run(sparse_ffn(model, artifact, "learned", kernel, kept=INTERMEDIATE), x).view(-1, HIDDEN)
    limit = tolerance(dense.numpy())
    torch.testing.assert_close(got[~sparse], dense[~sparse], rtol=0, atol=limit)
    assert float((got - dense)[sparse].abs().max()) > 1000 * limit  # a dense call would not pass for a sparse one


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["learned", *BASELINES])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_inside(parts, kind, kernel, dtype):
    """Everything is computed in the type of the weights, and comes back in the type of x: autocast makes x narrow where a layer
    before it has."""
    model, artifact, x, _ = parts
    ffn = sparse_ffn(model, artifact, kind, kernel)
    expected, rounded = run(ffn, x), run(ffn, x.to(dtype).float()).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(run(ffn, x), expected)
        assert torch.equal(run(ffn, x.to(dtype)), rounded)
        assert torch.is_autocast_enabled("cpu")


def test_without_a_plan_or_at_full_width_it_is_the_dense_ffn(parts):
    model, artifact, x, _ = parts
    dense = model.model.layers[LAYER].mlp
    with torch.no_grad():
        expected = dense(x)
    assert torch.equal(run(sparse_ffn(model, artifact, "learned", "torch"), x, plan=None), expected)
    assert torch.equal(run(sparse_ffn(model, artifact, "learned", "torch", kept=INTERMEDIATE), x), expected)
    other = make_plan([(0, 44, 0)], 44, PREFILL)  # a plan of another call
    assert torch.equal(run(sparse_ffn(model, artifact, "learned", "torch"), x, plan=other), expected)


def test_taps_are_told_every_step_in_order(parts):
    model, artifact, x, _ = parts
    seen = []
    ffn = sparse_ffn(model, artifact, "static", "torch", tap=lambda *told: seen.append(told))
    y = run(ffn, x)
    assert [step for step, *_ in seen] == ["input", "scores", "selected", "corrected", "output"]
    assert all(told[1] is ffn and told[2] is PLAN for told in seen)
    ids = seen[2][3]
    best = np.sort(np.argsort(-artifact.tensors[f"layers.{LAYER}.stats.importance"].numpy())[:KEPT])
    np.testing.assert_array_equal(ids.numpy(), np.tile(best, (8, 1)))
    assert torch.equal(seen[4][3].view_as(y), y)


@pytest.mark.parametrize("ranks", [(8, 4, 4), (8, 5, 0), (8, 0, 5), (8, 0, 0)], ids=str)
@pytest.mark.parametrize("tokens, head", [(45, 8), (40, 0), (45, 11), (16, 8), (7, 8)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_student_of_calibration_is_the_same_function(parts, ranks, tokens, head, kernel):
    """What is trained must be what runs: masked and gathered forms agree to fp32 rounding."""
    model = parts[0]
    artifact = tiny_artifact(model, ranks=ranks)
    part = families.dissect(model).ffns[LAYER]
    prefix = f"layers.{LAYER}."
    weights = {k[len(prefix) :]: v for k, v in artifact.tensors.items() if k.startswith(prefix)}
    x = parts[2][:1, :tokens]
    rule = dataclasses.replace(PREFILL, dense_head=head, min_tokens=1)
    student = StudentFFN(part, weights, KEPT, artifact.ranks["linear"], BLOCK, rule.first_sparse)
    expected = student(x)
    got = run(sparse_ffn(model, artifact, "learned", kernel), x, make_plan([(0, tokens, 0)], tokens, rule))
    # Both are fp32: two rounding errors of the size above; the student's sum runs over F terms.
    limit = 2 * 4 * EPS * (HIDDEN**0.5 + INTERMEDIATE**0.5) * float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=limit)
    if tokens == 45:  # and the comparison is of sparse outputs, not of dense ones
        with torch.no_grad():
            assert float((part.module(x) - expected).abs().max()) > 1000 * limit


def test_the_student_with_gradient_has_the_same_value(parts):
    model, artifact, x, _ = parts
    part = families.dissect(model).ffns[LAYER]
    prefix = f"layers.{LAYER}."
    weights = {k[len(prefix) :]: v.clone() for k, v in artifact.tensors.items() if k.startswith(prefix)}
    student = StudentFFN(part, weights, KEPT, artifact.ranks["linear"], BLOCK, BLOCK)
    plain = student(x[:1])
    for name in weights:
        weights[name].requires_grad_("stats" not in name)
    value = student(x[:1])
    assert torch.equal(value.detach(), plain)
    value.square().sum().backward()
    for name, weight in weights.items():
        if "stats" not in name:
            assert weight.grad is not None and float(weight.grad.abs().max()) > 0, name


def test_the_students_gradient_is_that_of_the_formula(parts):
    """In fp64, against autograd on the same masked product."""
    part = families.dissect(parts[0]).ffns[LAYER]
    biases = [None if bias is None else bias.double() for bias in (part.gate_bias, part.up_bias, part.down_bias)]
    part = FFN(part.gate.double(), part.up.double(), part.down.double(), "silu", *biases)
    b, c, d = (0.0 if bias is None else bias for bias in biases)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, INTERMEDIATE, generator=generator, dtype=torch.float64)
    slope = torch.randn(40, HIDDEN, generator=generator, dtype=torch.float64)
    rows = slice(8, 32)
    wide = torch.ones(40, INTERMEDIATE, dtype=torch.float64)
    wide = torch.cat([wide[:8], mask.repeat_interleave(BLOCK, 0), wide[32:]])
    plain = (torch.nn.functional.silu(x @ part.gate.T + b) * (x @ part.up.T + c) * wide) @ part.down.T + d
    expected = torch.autograd.grad((plain * slope).sum(), x)
    seen = []
    value = _MaskedFFN.apply(x, part, rows, lambda x, h: seen.append((x.clone(), h.clone())) or mask)
    found = torch.autograd.grad((value * slope).sum(), x)
    hidden = torch.nn.functional.silu(x @ part.gate.T + b) * (x @ part.up.T + c)  # none of it masked
    # fp64: sums of 96 terms near one carry 96 eps, 2e-14; ten times that.
    for one, other in zip((value, *found, seen[0][0], seen[0][1]), (plain, *expected, x[rows], hidden[rows]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-13)
