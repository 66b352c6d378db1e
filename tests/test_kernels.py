"""The sparse FFN op: every kernel and instruction set of this machine against an fp64 reference."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastfill import kernels
from fastfill.kernels import cpu

CSRC = Path(__file__).parent.parent / "csrc"
ISAS = [name for name, supported in cpu.isas().items() if supported]
KERNELS = [("torch", "")] + [("native", isa) for isa in ISAS]  # what this machine can run
ACTS = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": lambda g: 0.5 * g * torch.special.erfc(-g / 2**0.5),
    "gelu_tanh": lambda g: g * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)),
    "relu": torch.relu,
}

BIASES = ("gate_bias", "up_bias")

native = pytest.mark.skipif(not ISAS, reason=cpu.status() if not ISAS else "")


@contextmanager
def on(isa):
    """Where hypothesis draws the instruction set, no fixture can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.ISA_VARIABLE, isa)
        yield


@pytest.fixture(params=KERNELS, ids=lambda p: "-".join(filter(None, p)))
def kernel(request):
    with on(request.param[1]):
        yield request.param[0]


def problem(lengths, kept, hidden, neurons, dtype, seed=0, init=True, biases=False):
    """Random tensors with g, u and y of order one, and one random selection per block."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng)

    tokens = sum(lengths)
    scale = hidden**-0.5 if hidden else 1.0
    p = {
        "x": randn(tokens, hidden).to(dtype),
        "gate": (randn(neurons, hidden) * scale).to(dtype),
        "up": (randn(neurons, hidden) * scale).to(dtype),
        "down_t": (randn(neurons, hidden) * max(1, *kept) ** -0.5).to(dtype),
        "ids": torch.cat([torch.randperm(neurons, generator=rng)[:k].sort().values for k in kept]),
        "rows": torch.tensor([0, *lengths]).cumsum(0),
        "id_offsets": torch.tensor([0, *kept]).cumsum(0),
        "init": randn(tokens, hidden).to(dtype) if init else None,
    }
    return p | {name: randn(neurons).to(dtype) for name in BIASES if biases}


def reference(p: dict, activation: str, rounds_between: bool) -> tuple[Tensor, Tensor]:
    """The op in fp64, and a bound for the error of each output element. With s = unit roundoff of the dtype
    (2^-24 fp32, 2^-9 bf16) and u = 2^-24 of the fp32 sums:

    - g and v = x @ up.T are sums of H products: |dg| <= H u (|x| @ |gate|.T), likewise dv (Higham, gamma_n, n u << 1). A
      bias is one summand more: (H + 1) u (|x| @ |gate|.T + |bias|).
    - h = act(g) v; the four activations have |act'| <= 1.13 and are computed to 16 u relative:
      |dh| <= 1.13 |dg| |v| + |act(g)| |dv| + 16 u |h|. A kernel that rounds g, v, act(g) to the dtype in between
      (torch in bf16) adds s (1.13 |g v| + 2 |h|). AMX in bf16 computes them to 2^-13, s / 16, which the 6 s below cover.
    - y = init + sum of K products: |dy| <= sum |dh d| + (K + 2) u sum |h d|, and s |y| for the result, twice in torch,
      which adds init apart.
    - h itself is rounded to the dtype: K independent errors of at most s |h_k d_k|, which add up like a random walk:
      6 s sqrt(sum (h_k d_k)^2) (Higham and Mary 2019; never less than the worst case for K <= 36). The worst case
      s sum |h_k d_k| would let a dropped neuron pass from K = 500 on; this lets none pass (test_mutants). The
      roundings in between are treated in the same way.
    - sums of bf16 dot products flush numbers below 2^-126 to zero: 2^-100 absolute covers that.
    """
    x, gate, up, down = (p[name].double() for name in ("x", "gate", "up", "down_t"))
    s = torch.finfo(p["x"].dtype).eps / 2
    u = 2.0**-24
    b_gate, b_up = (p[name].double() if p.get(name) is not None else gate.new_zeros(len(gate)) for name in BIASES)
    terms = x.shape[1] + any(p.get(name) is not None for name in BIASES)
    y = torch.zeros_like(x) if p["init"] is None else p["init"].double()
    bound = torch.zeros_like(x)
    for n in range(len(p["rows"]) - 1):
        t = slice(int(p["rows"][n]), int(p["rows"][n + 1]))
        i = p["ids"][int(p["id_offsets"][n]) : int(p["id_offsets"][n + 1])].long()
        xb, d, init = x[t], down[i], y[t].clone()
        g, v = (xb @ w[i].T + b[i] for w, b in ((gate, b_gate), (up, b_up)))
        dg, dv = (terms * u * (xb.abs() @ w[i].abs().T + b[i].abs()) for w, b in ((gate, b_gate), (up, b_up)))
        a = ACTS[activation](g)
        h = a * v
        dh = 1.13 * dg * v.abs() + a.abs() * dv + dg * dv + 16 * u * h.abs()
        walk = s * h.abs()
        if rounds_between:
            walk = walk + s * (1.13 * (g * v).abs() + 2 * h.abs())
        y[t] = init + h @ d
        bound[t] = dh @ d.abs() + (len(i) + 2) * u * (h.abs() @ d.abs() + init.abs()) + 6 * (walk**2 @ d**2).sqrt()
        bound[t] += (1 + rounds_between) * s * (y[t].abs() + init.abs() * rounds_between) * 1.01 + 2.0**-100
    return y, bound


def excess(y: Tensor, p: dict, activation="silu", kernel="native") -> float:
    """Largest error in units of its bound: at most 1 is right."""
    want, bound = reference(p, activation, rounds_between=kernel == "torch")
    if want.numel() == 0:
        return 0.0
    return float(((y.double() - want).abs() / bound.clamp(min=1e-300)).max())


def run(p: dict, **kwargs) -> Tensor:
    p = {**p, **kwargs}
    return kernels.sparse_ffn(p.pop("x"), p.pop("gate"), p.pop("up"), p.pop("down_t"), p.pop("ids"), **p)


SHAPES = [  # lengths, kept, hidden, neurons
    ([16] * 4, [50] * 4, 48, 100),
    ([32, 32, 7], [100, 99, 3], 577, 211),
    ([1], [33], 33, 33),
    ([1, 0, 130, 2], [0, 5, 77, 77], 31, 77),
    ([600, 3], [40, 41], 64, 90),  # a block long enough to be cut
    ([8] * 9, [700] * 9, 72, 1100),  # several chunks of neurons, read ahead
    ([16, 24, 40, 48] * 2, [129] * 8, 512, 300),  # rows of a power of two are packed
    ([1100, 1100], [12, 13], 20, 40),  # more than one pass
    ([5], [0], 8, 0),
    ([3, 3], [1, 1], 1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"H{s[2]}-F{s[3]}-N{len(s[0])}")
def test_matches_fp64(kernel, shape, dtype):
    p = problem(*shape, dtype)
    assert excess(run(p, kernel=kernel), p, kernel=kernel) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ACTS)
def test_activations(kernel, activation, dtype):
    p = problem([20, 21], [60, 61], 40, 90, dtype, init=False)
    p["x"] *= 4
    assert excess(run(p, kernel=kernel, activation=activation), p, activation, kernel) <= 1


@st.composite
def problems(draw):
    n = draw(st.integers(1, 6))
    neurons = draw(st.integers(1, 300))
    lengths = draw(st.lists(st.integers(0, 70), min_size=n, max_size=n))
    kept = draw(st.lists(st.one_of(st.integers(0, neurons), st.just(neurons)), min_size=n, max_size=n))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    p = problem(lengths, kept, draw(st.integers(1, 140)), neurons, dtype, draw(st.integers(0, 9)), draw(st.booleans()), True)
    return p | {name: None for name in BIASES if draw(st.booleans())}


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from(KERNELS), st.sampled_from(sorted(ACTS)), st.booleans())
def test_sweep(p, which, activation, narrow_ids):
    kernel, isa = which
    if narrow_ids:
        p["ids"] = p["ids"].int()
    with on(isa):
        y = run(p, kernel=kernel, activation=activation)
    assert excess(y, p, activation, kernel) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_neurons_that_crowd_at_the_front(kernel, dtype):
    """The last chunks have none of theirs; a rest of them that is no whole tile is added once."""
    kept = [1, 33, 2499]
    p = problem([20, 3, 16], kept, 64, 5000, dtype)
    p["ids"] = torch.cat([torch.arange(k) for k in kept])
    assert excess(run(p, kernel=kernel), p, kernel=kernel) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept", [20, 700])
def test_mutants(kernel, kept, dtype):
    """The bound sees one wrong id, one neuron dropped, and a neighbour's selection."""
    p = problem([32, 32], [kept, kept], 64, 900, dtype)
    assert excess(run(p, kernel=kernel), p, kernel=kernel) <= 1
    ids = p["ids"].clone()
    free = next(f for f in range(900) if f not in ids[:kept])
    ids[:kept] = torch.cat([ids[: kept // 2], ids[kept // 2 + 1 : kept], torch.tensor([free])]).sort().values
    assert excess(run(p, kernel=kernel, ids=ids), p, kernel=kernel) > 1
    dropped = torch.cat([p["ids"][: kept - 1], p["ids"][kept:]])
    y = run(p, kernel=kernel, ids=dropped, id_offsets=torch.tensor([0, kept - 1, 2 * kept - 1]))
    assert excess(y, p, kernel=kernel) > 1
    swapped = torch.cat([p["ids"][kept:], p["ids"][:kept]])
    assert excess(run(p, kernel=kernel, ids=swapped), p, kernel=kernel) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"H{s[2]}-F{s[3]}-N{len(s[0])}")
def test_biases(kernel, shape, dtype):
    """Of gate and up, together and alone; no bias is a bias of zero, and where a bias is forgotten or of the next neuron the
    bound sees it."""
    p = problem(*shape, dtype, biases=True)
    assert excess(run(p, kernel=kernel), p, kernel=kernel) <= 1
    for name in BIASES:
        alone = p | {name: None}
        assert excess(run(alone, kernel=kernel), alone, kernel=kernel) <= 1
        zero = run(p, kernel=kernel, **{name: torch.zeros_like(p[name])})
        assert torch.equal(zero, run(alone, kernel=kernel))
        if sum(shape[0]) * shape[3] > 100:
            assert excess(run(alone, kernel=kernel), p, kernel=kernel) > 1
            assert excess(run(p, kernel=kernel, **{name: p[name].roll(1)}), p, kernel=kernel) > 1
    apart = {name: torch.stack([p[name]] * 2, 1)[:, 0] for name in BIASES}
    assert torch.equal(run(p, kernel=kernel, **apart), run(p, kernel=kernel))


def test_equal_blocks_form(kernel):
    """(N, K) ids without boundaries are the same as 1-D ids with them; out and init may be one tensor."""
    p = problem([16] * 4, [30] * 4, 48, 100, torch.float32)
    want = run(p, kernel=kernel)
    args = (p["x"], p["gate"], p["up"], p["down_t"], p["ids"].view(4, 30))
    assert torch.equal(kernels.sparse_ffn(*args, init=p["init"], kernel=kernel), want)
    out = p["init"].clone()
    assert kernels.sparse_ffn(*args, init=out, out=out, kernel=kernel) is out
    assert torch.equal(out, want)


def test_non_contiguous(kernel):
    """Strided rows, transposed x and out give the same; weights with strided rows are refused."""
    p = problem([16, 17], [30, 31], 48, 100, torch.bfloat16)
    want = run(p, kernel=kernel)
    wide = {name: torch.cat([p[name], p[name]], 1)[:, :48] for name in ("x", "gate", "up", "down_t", "init")}
    assert torch.equal(run(p, kernel=kernel, **wide), want)
    out = torch.empty(48, 33, dtype=torch.bfloat16).t()
    run(p, kernel=kernel, x=p["x"].t().contiguous().t(), out=out, ids=torch.stack([p["ids"]] * 2, 1)[:, 0])
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match="rows of down_t must be contiguous"):
        run(p, kernel=kernel, down_t=p["down_t"].t().contiguous().t())


def misaligned(t):
    """The same numbers, one byte beyond where their elements should begin."""
    raw = torch.zeros(t.numel() * t.element_size() + 1, dtype=torch.uint8)
    odd = torch.frombuffer(raw.numpy(), dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)
    return odd.copy_(t)


@pytest.mark.parametrize("name", ["x", "gate", "up", "down_t", "ids", "init", "out"])
def test_misaligned_is_refused(kernel, name):
    p = problem([16], [30], 48, 100, torch.float32)
    p["out"] = torch.empty_like(p["x"])
    with pytest.raises(ValueError, match=rf"{name} is not aligned.*{name}.clone\(\)"):
        run(p, kernel=kernel, **{name: misaligned(p[name])})
    p["ids"] = p["ids"].int()
    with pytest.raises(ValueError, match="ids is not aligned to its 4-byte"):
        run(p, kernel=kernel, ids=misaligned(p["ids"]))


@pytest.mark.parametrize("name", ["x", "gate", "up", "down_t", "init", "out"])
def test_a_view_of_negated_numbers_is_refused(kernel, name):
    """`z.conj().imag` has the memory of `z.imag`."""
    p = problem([16], [30], 48, 100, torch.float32)
    p["out"] = torch.empty_like(p["x"])
    with pytest.raises(ValueError, match=rf"{name} is a view of negated numbers.*resolve_neg"):
        run(p, kernel=kernel, **{name: torch._neg_view(p[name])})


def aliases(p):
    """Ways to give an `out` that is read, or has no place of its own for each element, and what the error says."""
    x, hidden = p["x"], 48
    tall = torch.zeros(64, hidden)
    tall[:33] = x
    both = torch.zeros(33, 2 * hidden)
    both[:, :hidden] = x
    many = torch.zeros(200, hidden)
    many[:100] = p["gate"]
    numbers = torch.zeros(33 * hidden + 8)
    ids = numbers.view(torch.int32)[: p["ids"].numel()].copy_(p["ids"])
    init = torch.zeros(40, hidden)
    init[:33] = p["init"]
    skewed, short = both.view(-1)[90:].as_strided((33, hidden), (60, 1)), (hidden - 1, 1)
    return {
        "x": (dict(out=x), "out must not overlap x"),
        "rows of x": (dict(x=tall[:33], out=tall[31:64]), "out must not overlap x"),
        "columns of x": (dict(x=both[:, :hidden], out=both[:, 40 : 40 + hidden]), "out must not overlap x"),
        "columns and rows of x": (dict(x=both[:, :hidden], out=skewed), "out must not overlap x"),
        "gate": (dict(gate=many[:100], out=many[99:132]), "out must not overlap gate"),
        "up": (dict(up=many[:100], out=many[10:43]), "out must not overlap up"),
        "down_t": (dict(down_t=many[:100], out=many[:33]), "out must not overlap down_t"),
        "ids": (dict(ids=ids, out=numbers[8:].view(33, hidden)), "out must not overlap ids"),
        "a part of init": (dict(init=init[:33], out=init[1:34]), "init itself"),
        "init, transposed": (dict(x=x[:, :33], gate=p["gate"][:, :33], up=p["up"][:, :33], down_t=p["down_t"][:, :33],
                                  init=x[:, :33].contiguous()), None),
        "one row for all": (dict(out=torch.zeros(hidden).expand(33, hidden)), "expanded or overlapping"),
        "one column for all": (dict(out=torch.zeros(33, 1).expand(33, hidden)), "expanded or overlapping"),
        "rows that overlap": (dict(out=torch.zeros(33 * hidden).as_strided((33, hidden), short)), "expanded or overlap"),
        "columns that overlap": (dict(out=torch.zeros(33 * hidden).as_strided((33, hidden), (1, 32))), "expanded or overlap"),
    }  # fmt: skip


@pytest.mark.parametrize("name", aliases(problem([16, 17], [30, 31], 48, 100, torch.float32)))
def test_an_out_that_is_read_or_overlaps_itself_is_refused(kernel, name):
    p = problem([16, 17], [30, 31], 48, 100, torch.float32)
    change, words = aliases(p)[name]
    if words is None:
        change["out"] = change["init"].t()
        words = "init itself"
    before = {key: value.clone() for key, value in change.items() if key != "out"}
    with pytest.raises(ValueError, match=words):
        run(p, kernel=kernel, **change)
    assert all(torch.equal(change[key], value) for key, value in before.items())


def test_an_out_beside_what_is_read_is_taken(kernel):
    """Columns of one matrix, the row behind the last, init itself through another view, a single row of any stride."""
    p = problem([16, 17], [30, 31], 48, 100, torch.float32)
    want = run(p, kernel=kernel)
    both = torch.cat([p["x"], torch.zeros(33, 48)], 1)
    assert torch.equal(run(p, kernel=kernel, x=both[:, :48], out=both[:, 48:]), want)
    both = torch.cat([torch.zeros(33, 48), p["x"]], 1)
    assert torch.equal(run(p, kernel=kernel, x=both[:, 48:], out=both[:, :48]), want)
    tall = torch.cat([p["x"], torch.zeros(33, 48)])
    assert torch.equal(run(p, kernel=kernel, x=tall[:33], out=tall[33:]), want)
    init = p["init"].clone()
    assert torch.equal(run(p, kernel=kernel, init=init, out=init.view(-1).view(33, 48)), want)
    spread = p["init"].new_zeros(48, 66).t()[::2]
    assert torch.equal(run(p, kernel=kernel, out=spread), want)
    # An expanded init is only read.
    row = p["init"][:1].expand(33, 48)
    assert torch.equal(run(p, kernel=kernel, init=row), run(p, kernel=kernel, init=row.contiguous()))


@pytest.mark.parametrize("stride", [0, 1, 7, 2**61, 2**62 + 1])
def test_the_stride_of_a_single_row_says_nothing(kernel, stride):
    p = problem([1], [1], 48, 1, torch.float32)
    names = ("x", "gate", "up", "down_t", "init")
    odd = {name: p[name].as_strided((1, 48), (stride, 1)) for name in names}
    out = torch.zeros(48).as_strided((1, 48), (stride, 1))
    assert excess(run(p, kernel=kernel, **odd, out=out), p, kernel=kernel) <= 1
    init = p["init"].clone()
    y = run(p, kernel=kernel, init=init, out=init.as_strided((1, 48), (stride, 1)))
    assert excess(y, p, kernel=kernel) <= 1


def test_more_neurons_than_can_be_counted_are_refused(kernel):
    p = problem([2], [1], 4, 3, torch.float32)
    huge = torch.zeros(1, 4).expand(2**32 + 3, 4)
    with pytest.raises(ValueError, match="gate has 4294967299 rows"):
        run(p, kernel=kernel, gate=huge, up=huge, down_t=huge)


def test_an_out_that_wants_a_gradient_is_no_place_for_a_kernel():
    p = problem([16], [30], 48, 100, torch.float32)
    out = torch.zeros(16, 48, requires_grad=True)
    with pytest.raises((ValueError, RuntimeError), match=r"no gradient|leaf"):
        run(p, kernel="native" if ISAS else "torch", out=out)
    assert float(out.detach().abs().max()) == 0


@native
def test_scratch_is_counted_and_released():
    p = problem([300], [400], 64, 500, torch.bfloat16)
    kernels.release()
    assert kernels.scratch_bytes() == 0
    want = run(p, kernel="native")
    held = kernels.scratch_bytes()
    assert held >= 300 * (64 + 400) * 2  # packed x and the activations, at least
    run(problem([3], [4], 64, 500, torch.bfloat16), kernel="native")
    assert kernels.scratch_bytes() == held  # the same buffer again
    large = problem([1500], [2000], 64, 2100, torch.bfloat16)
    run(large, kernel="native")
    assert kernels.scratch_bytes() >= 1500 * (64 + 2000) * 2  # it replaces the smaller one
    assert f"native scratch: {kernels.scratch_bytes() / 1e6:.0f} MB" in kernels.describe()
    kernels.release()
    assert kernels.scratch_bytes() == 0 and "native scratch: 0 MB" in kernels.describe()
    assert torch.equal(run(p, kernel="native"), want)
    kernels.release()


def test_bad_input_is_refused(kernel):
    p = problem([16, 16], [4, 4], 8, 20, torch.float32)
    ids = p["ids"]
    cases = [
        (dict(ids=ids.flip(0)), "sorted and unique"),
        (dict(ids=torch.tensor([0, 1, 1, 2, 0, 1, 2, 3])), "sorted and unique"),
        (dict(ids=torch.tensor([0, 1, 2, 20, 0, 1, 2, 3])), r"must lie in \[0, 20\)"),
        (dict(ids=torch.tensor([-1, 1, 2, 3, 0, 1, 2, 3])), r"must lie in \[0, 20\)"),
        (dict(ids=ids.float()), "int32 or int64"),
        (dict(ids=ids.view(2, 4)), "without id_offsets"),
        (dict(id_offsets=torch.tensor([0, 4, 9])), "id_offsets must rise"),
        (dict(id_offsets=torch.tensor([0, 9, 8])), "id_offsets must rise"),
        (dict(rows=torch.tensor([0, 16, 31])), "rows must rise"),
        (dict(rows=torch.tensor([0.0, 16, 32])), "rows must be N"),
        (dict(rows=torch.tensor([0, 16, 32], device="meta")), "rows must be on the CPU"),
        (dict(id_offsets=torch.tensor([0, 4, 8]).bool()), "id_offsets must be N"),
        (dict(id_offsets=torch.tensor([0, 4, 8]).to(torch.uint8)), "id_offsets must be N"),
        (dict(id_offsets=torch.tensor([0, 4, 8], device="meta")), "id_offsets must be on the CPU"),
        (dict(rows=torch.tensor([0, 32])), "2 boundaries, but there are 2 blocks"),
        (dict(x=p["x"].double()), "gate is torch.float32"),
        (dict(x=p["x"][:, :7]), r"gate must be \(F, 7\)"),
        (dict(up=p["up"][:19]), "up must be"),
        (dict(init=p["init"][:5]), "init must be"),
        (dict(gate_bias=p["x"][0]), r"gate_bias must be \(20,\) like the rows of gate"),
        (dict(up_bias=p["gate"][:, :1]), r"up_bias must be \(20,\)"),
        (dict(up_bias=p["gate"][:, 0].bfloat16()), "up_bias is torch.bfloat16"),
        (dict(gate_bias=p["gate"][:, 0].to("meta")), "gate_bias is torch.float32 on meta"),
        (dict(out=p["init"].double()), "out is torch.float64"),
        (dict(activation="tanh"), "there are silu, gelu"),
    ]
    for change, message in cases:
        change = {"kernel": kernel, **change}
        if "x" in change and change["x"].dtype == torch.float64:
            change["kernel"] = "auto"
        with pytest.raises(ValueError, match=message):
            run(p, **change)
    with pytest.raises(ValueError, match="do not make 3 equal blocks"):
        kernels.sparse_ffn(p["x"], p["gate"], p["up"], p["down_t"], torch.zeros(3, 1, dtype=torch.int64), kernel=kernel)
    with pytest.raises(ValueError, match="there are auto, native, triton, torch"):
        run(p, kernel="fast")


def test_nan_and_inf_pass_as_in_dense(kernel):
    p = problem([10, 33], [21, 21], 40, 60, torch.float32)
    kept = p["ids"][:21]
    skipped = next(f for f in range(60) if f not in p["ids"])
    p["x"][3, 5] = float("nan")
    p["x"][7, 0] = float("inf")
    p["gate"][kept[4], 2] = float("-inf")
    p["down_t"][kept[20], 9] = float("inf")  # the last of an odd number
    p["down_t"][kept[2], 11] = float("nan")
    for name in ("gate", "up", "down_t"):
        p[name][skipped] = float("nan")  # nobody asked for it
    y, want = run(p, kernel=kernel), reference(p, "silu", False)[0]
    assert want.isnan().any() and want.isfinite().any()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in p.items()}
    y = run(half, kernel=kernel)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())


@native
def test_large_gates_saturate(kernel):
    """exp beyond the range of fp32: silu goes to 0 and to the identity, never to NaN."""
    x = torch.tensor([[-1e4], [-200.0], [-88.5], [88.5], [200.0], [1e4]])
    one = torch.ones(1, 1)
    y = kernels.sparse_ffn(x, one, one, one, torch.zeros(1, 1, dtype=torch.int64), kernel=kernel)
    # silu to 16 u and three roundings, u = 2^-24: 1.1e-6; e^-88 is 1e-38.
    assert torch.allclose(y.double(), ACTS["silu"](x.double()) * x.double(), rtol=19 * 2**-24, atol=1e-30)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_do_not_change_the_result(monkeypatch, dtype):
    p = problem([32] * 7 + [5], [300] * 7 + [301], 96, 600, dtype)
    before = torch.get_num_threads()
    try:
        for isa in ISAS:
            monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(run(p, kernel="native"))
            assert all(torch.equal(r, results[0]) for r in results[1:]), isa
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("release", [False, True])
def test_concurrent_calls_equal_calls_in_sequence(release):
    """Also where each gives the buffers back before it."""
    cases = [problem([16] * 6, [150 + i] * 6, 64 + i, 400, torch.bfloat16, seed=i) for i in range(5)]
    want = [run(p, kernel="native") for p in cases]

    def again(i):
        if release:
            kernels.release()
        return torch.equal(run(cases[i], kernel="native"), want[i])

    with ThreadPoolExecutor(len(cases)) as pool:
        assert all(pool.map(again, [*range(len(cases))] * 25))
    kernels.release()
    assert kernels.scratch_bytes() == 0


def test_choice(monkeypatch):
    assert set(kernels.available()) == {"native", "triton", "torch"}
    assert kernels.choose("torch") == "torch"
    assert kernels.choose("auto", torch.zeros(1, dtype=torch.float64)) == "torch"
    with pytest.raises(ValueError, match="there are auto, native, triton, torch"):
        kernels.choose("fast")
    with pytest.raises(ValueError, match="cannot run"):
        kernels.choose("native", torch.zeros(1, dtype=torch.float64))
    assert kernels.choose() in kernels.describe()
    if ISAS:
        monkeypatch.setenv(cpu.ISA_VARIABLE, "avx9")
        with pytest.raises(ValueError, match="avx9 cannot run here"):
            cpu.isa()


@pytest.mark.parametrize("name", [name for name in ("native", "torch") if name == "torch" or ISAS])
def test_a_kernel_is_chosen_once_and_still_reads_no_memory_that_is_not_its_own(monkeypatch, name):
    p = problem([16], [30], 48, 100, torch.float32)
    kernel, want = kernels.resolve(name, p["x"]), run(p, kernel=name)
    monkeypatch.setattr(kernels, "choose", lambda *_: pytest.fail("chosen again"))
    assert torch.equal(run(p, kernel=kernel), want)
    p["x"].requires_grad_()
    run(p, kernel=kernel).sum().backward()
    assert p["x"].grad is not None
    scores = torch.rand(2, 9)
    assert torch.equal(kernel.top_k(scores, 9), torch.arange(9, dtype=torch.int32).expand(2, 9))
    if name == "native":
        for other in (scores.to("meta"), scores.double()):
            with pytest.raises(ValueError, match=r"cannot run: it (runs on the CPU|knows bfloat16)"):
                kernel.top_k(other, 3)


def test_without_library(monkeypatch):
    """No compiler at install time: the torch path runs and says why."""
    monkeypatch.setattr(cpu, "_load", lambda: "the native library was not built")
    assert kernels.choose() == "torch"
    assert "not built" in kernels.describe()
    p = problem([16], [30], 48, 100, torch.float32)
    assert excess(run(p), p, kernel="torch") <= 1
    with pytest.raises(ValueError, match="not built"):
        run(p, kernel="native")


def test_a_library_of_another_interface_is_refused(monkeypatch):
    class Older:  # the first interface had no number
        def __init__(self, _):
            pass

    monkeypatch.setattr(cpu.ctypes, "CDLL", Older)
    monkeypatch.setattr(cpu, "_library_file", lambda: Path("_native.so"))
    assert f"interface 1, not {cpu.INTERFACE}): install fastfill again" in cpu._load.__wrapped__()


@pytest.mark.parametrize("name", ["x", "up_bias"])
def test_gradients_take_the_torch_path(name):
    p = problem([16], [30], 48, 100, torch.float32, biases=True)
    p[name].requires_grad_()
    run(p).sum().backward()
    assert p[name].grad is not None
    if ISAS:
        with pytest.raises(ValueError, match="no gradient"):
            run(p, kernel="native")


@pytest.mark.parametrize("name", sorted({name for name, _ in KERNELS}))
def test_custom_op(name):
    p = problem([16, 9], [30, 31], 48, 100, torch.float32, biases=True)
    args = (p["x"], p["gate"], p["up"], p["down_t"], p["ids"], p["rows"], p["id_offsets"], "silu")
    args = (*args, p["gate_bias"], p["up_bias"], p["init"], None, None, None, name)
    torch.library.opcheck(kernels._op, args)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q: run(q, kernel=name), backend=backend, fullgraph=True)
    assert torch.equal(compiled(p), run(p, kernel=name))
    (graph,) = graphs
    assert sum("fastfill" in str(node.target) for node in graph.graph.nodes) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_sanitizers(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over all instruction sets, in buffers without spare room."""
    flags = ["-std=c++17", "-O0", "-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    exact = ["-ffp-contract=off"]
    sources = {"driver": [], "sparse_ffn": [], "predict": [], "packed": [], "product": [], "check": exact, "isa_portable": []}
    sources |= {"int8_portable": exact, "packed_portable": exact}
    if platform.machine() in ("x86_64", "AMD64"):
        avx512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
        flags.append("-DFASTFILL_X86")
        avx2 = ["-mavx2", "-mfma"]
        sources |= {"isa_avx2": avx2, "isa_avx512": avx512, "isa_avx512_bf16": [*avx512, "-mavx512bf16"]}
        sources |= {"isa_amx": [*avx512, "-mavx512bf16"], "int8_amx": [*avx512, "-mavx512vnni", *exact]}
        sources |= {"int8_avx2": [*avx2, *exact], "int8_avx_vnni": [*avx2, "-mavxvnni", *exact]}
        sources |= {"int8_avx512_vnni": [*avx512, "-mavx512vnni", *exact]}
        sources |= {"packed_avx2": [*avx2, *exact], "packed_avx512": [*avx512, *exact]}
    jobs = [
        subprocess.Popen(["g++", *flags, *extra, "-c", CSRC / f"{name}.cpp", "-o", tmp_path / f"{name}.o"])
        for name, extra in sources.items()
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    objects = [tmp_path / f"{name}.o" for name in sources]
    subprocess.run(["g++", *flags, *objects, "-o", tmp_path / "check", "-lpthread"], check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
