"""The sparse FFN on weights in eight bits: every instruction set of this machine, the reference in torch, and sums by hand."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_kernels import ACTS, BIASES, ISAS, KERNELS, native, on, run

from fastfill import kernels
from fastfill.kernels import Scales, cpu, int8

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [  # lengths, kept, hidden, neurons
    ([16] * 4, [50] * 4, 48, 100),
    ([32, 32, 7], [100, 99, 3], 577, 211),  # half a unit at the end of each row
    ([1, 0, 130, 2], [0, 5, 77, 77], 31, 77),  # nothing kept, no token; two keep all
    ([600, 3], [40, 41], 64, 90),  # a block long enough to be cut
    ([8] * 9, [700] * 9, 72, 1100),  # two chunks of h, the second a short one
    ([9, 20, 1], [1500, 3000, 1], 20, 3000),
    ([16, 24, 40, 48] * 2, [129] * 8, 1024, 300),  # rows that are packed
    ([1100, 1100], [12, 13], 20, 40),  # more than one pass
    ([5], [0], 8, 0),
    ([3, 3], [1, 1], 1, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"H{s[2]}-F{s[3]}-N{len(s[0])}")


@pytest.fixture(params=ISAS)
def isa(request):
    with on(request.param):
        yield request.param


def problem(lengths, kept, hidden, neurons, dtype=torch.float32, exact=False, seed=0, biases=True):
    """Random tensors with g, u and y of order one. exact: x is whole numbers of a power of two, up to 127 of them."""
    rng = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def weight():
        return torch.randint(-128, 128, (neurons, hidden), generator=rng, dtype=torch.int8)

    def scale(n):  # no two near each other: one in another's place is seen
        return 10 ** torch.rand(n, generator=rng) * 0.005

    x = torch.randn(tokens, hidden, generator=rng)
    if exact:
        whole = torch.randint(-127, 128, x.shape, generator=rng)
        whole[torch.arange(tokens), torch.randint(0, hidden, (tokens,), generator=rng)] = 127
        x = whole * 2.0 ** torch.randint(-9, -5, (tokens, 1), generator=rng)
    made = {
        "x": x.to(dtype),
        "gate": weight(),
        "up": weight(),
        "down_t": weight(),
        "scales": Scales(scale(neurons) / hidden**0.5, scale(neurons) / hidden**0.5, scale(hidden) / max(1, *kept) ** 0.5),
        "ids": torch.cat([torch.randperm(neurons, generator=rng)[:k].sort().values for k in kept]),
        "rows": torch.tensor([0, *lengths]).cumsum(0),
        "id_offsets": torch.tensor([0, *kept]).cumsum(0),
        "init": torch.randn(tokens, hidden, generator=rng).to(dtype),
    }
    return made | {name: torch.randn(neurons, generator=rng).to(dtype) for name in BIASES if biases}


def by_hand(p, activation):
    """The op in fp64 on the whole numbers that x is (`exact`), and a bound of the error. u = 2^-24, all sums are exact.

    - g = S (s_gate s_x) + b: S becomes fp32, is multiplied (s_x is a power of two), b is added: |dg| <= 2 u |g - b| + u |g|.
    - a = act(g), |act'| <= 1.13, computed to 16 u: |da| <= 1.13 |dg| + 16 u |a|; h = a v: |dh| <= |da v| + |a dv| + u |h|.
    - r = 127 h / top, three roundings: |dr| <= (127 / top) (|dh| + |h| (dtop / top + 3 u)). Where r is as near as that to half
      a number, it may be rounded to either side: one step of h, times its row of down.
    - y = sum over chunks of I s, s = top / 127: each to dtop / top + 3 u, and u of the sum so far for each that is added;
      times the scale of down, plus init: 2 u; the result in its type.
    """
    x, out = p["x"].double(), torch.empty(p["x"].shape, dtype=torch.float64)
    bound = torch.empty_like(out)
    u, s = 2.0**-24, torch.finfo(p["x"].dtype).eps / 2
    bias = [
        p[name].double() if p.get(name) is not None else torch.zeros(len(p["gate"]), dtype=torch.float64) for name in BIASES
    ]
    top_x = x.abs().amax(1, keepdim=True)
    whole = x * 127 / top_x
    assert torch.equal(whole, whole.round())
    for n in range(len(p["rows"]) - 1):
        t = slice(int(p["rows"][n]), int(p["rows"][n + 1]))
        ids = p["ids"][int(p["id_offsets"][n]) : int(p["id_offsets"][n + 1])].long()
        g, v = (
            (whole[t] @ p[name][ids].double().T) * scale[ids].double() * (top_x[t] / 127)
            for name, scale in zip(("gate", "up"), p["scales"], strict=False)
        )
        b, c = (one[ids] for one in bias)
        dg, dv = (2 * u * one.abs() + u * (one + add).abs() for one, add in ((g, b), (v, c)))
        g, v = g + b, v + c
        a = ACTS[activation](g)
        h = a * v
        da = 1.13 * dg + 16 * u * a.abs()
        dh = da * v.abs() + a.abs() * dv + da * dv + u * h.abs()
        y, dy, size = (torch.zeros_like(x[t]) for _ in range(3))
        for chunk in range(-(-len(p["gate"]) // 1024)):
            mine = ids // 1024 == chunk
            if not bool(mine.any()):
                continue
            hc, dhc, down = h[:, mine], dh[:, mine], p["down_t"][ids[mine]].double()
            top = hc.abs().amax(1, keepdim=True)
            dtop = dhc.amax(1, keepdim=True) / top.clamp(min=1e-30)
            r = hc * 127 / top.clamp(min=1e-30)
            dr = 127 / top.clamp(min=1e-30) * (dhc + hc.abs() * (dtop + 3 * u))
            flips = ((r - r.floor() - 0.5).abs() <= dr).double()
            part = (r.round() @ down) * top / 127
            flipped = flips @ down.abs() * top / 127
            y, size = y + part, size + part.abs() + flipped
            dy += flipped + (part.abs() + flipped) * (dtop + 3 * u) + u * size
        factor = p["scales"].down.double()
        init = p["init"].double()[t] if p.get("init") is not None else 0.0
        out[t] = y * factor + init
        bound[t] = dy * factor + 2 * u * ((y * factor).abs() + out[t].abs()) + s * (out[t].abs() + dy * factor) + 1e-30
    return out, bound


def excess(y, p, activation="silu"):
    """Largest error in units of its bound: at most 1 is right."""
    want, bound = by_hand(p, activation)
    return float(((y.double() - want).abs() / bound).max()) if want.numel() else 0.0


@DTYPES
@shapes
@pytest.mark.parametrize("activation", ACTS)
def test_torch_computes_the_whole_numbers(activation, shape, dtype):
    p = problem(*shape, dtype, exact=True)
    assert excess(run(p, kernel="torch", activation=activation), p, activation) <= 1


@native
@DTYPES
@shapes
def test_native_gives_the_bits_of_torch(isa, shape, dtype):
    """Where the activation is exact. With and without biases and init; x of any numbers."""
    p = problem(*shape, dtype)
    for change in ({}, {"gate_bias": None}, {"up_bias": None, "init": None}):
        got, want = (run(p | change, kernel=name, activation="relu") for name in ("native", "torch"))
        assert torch.equal(got, want)


@native
@DTYPES
@pytest.mark.parametrize(
    "activation, shape", [*(("silu", shape) for shape in SHAPES), ("gelu", SHAPES[4]), ("gelu_tanh", SHAPES[4])], ids=str
)
def test_native_computes_the_whole_numbers(isa, activation, shape, dtype):
    p = problem(*shape, dtype, exact=True)
    assert excess(run(p, kernel="native", activation=activation), p, activation) <= 1


def test_the_bound_sees_mistakes():
    """A neuron dropped, scales of gate and up exchanged, a weight off by one, another chunk of h."""
    p = problem([9, 20], [700, 1100], 40, 1100, exact=True)

    def wrong(**change):
        return excess(run(p | change, kernel="torch"), p)

    assert wrong() <= 1
    gate, up, down = p["scales"]
    assert wrong(scales=Scales(up, gate, down)) > 1 and wrong(scales=Scales(gate, up, down.roll(1))) > 1
    offsets = p["id_offsets"] - torch.tensor([0, 1, 1])
    assert wrong(ids=torch.cat([p["ids"][:350], p["ids"][351:]]), id_offsets=offsets) > 1
    for name in ("gate", "up", "down_t"):
        assert wrong(**{name: (p[name].clamp(max=126) + 1)}) > 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "H_CHUNK", 1023)
        assert wrong() > 1


@pytest.mark.parametrize("which", KERNELS, ids=lambda p: "-".join(filter(None, p)))
@pytest.mark.parametrize("weight", [-128, 127])
def test_nothing_saturates(which, weight):
    """The largest weights and activations everywhere: pairs of products that 16 bits do not hold."""
    hidden, neurons, tokens = 515, 1030, 37
    full = torch.full((neurons, hidden), weight, dtype=torch.int8)
    one = Scales(torch.ones(neurons) / 2**16, torch.ones(neurons) / 2**16, torch.ones(hidden) / 2**16)
    for sign in (1.0, -1.0):
        x = torch.full((tokens, hidden), 127 * sign)
        with on(which[1]):
            y = kernels.sparse_ffn(
                x, full, full, full, torch.arange(neurons)[None], scales=one, activation="relu", kernel=which[0]
            )
        g = max(0, 127 * sign * weight * hidden / 2**16)  # exact: every h is at its largest, and rounded to 127
        want = g * g * neurons * weight / 2**16
        assert torch.allclose(y.double(), torch.full(y.shape, want, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(70, 300), (3, 1024), (2, 5000), (0, 7), (4, 0), (1, 1)], ids=str)
@DTYPES
def test_rounding(shape, dtype):
    """Torch to nearest, away from ties by more than three roundings; native the same bits."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, shape[0])[:, None]).to(dtype)
    q, scale = int8.rounded(x)
    top = x.double().abs().amax(1, keepdim=True) if shape[1] else torch.zeros(shape[0], 1, dtype=torch.float64)
    want = x.double() * 127 / top
    assert bool(((q - want).abs() <= 0.5 + 127 * 3 * 2.0**-24).all())
    assert torch.allclose(scale.double()[:, None], top / 127, rtol=2.0**-23, atol=0)
    for name in ISAS:
        with on(name):
            for one in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, : shape[1]]):
                assert all(torch.equal(got, ref) for got, ref in zip(cpu.rounded(one), (q, scale), strict=True))


def test_rows_without_a_scale():
    """The same by torch and native: 0 for zeros and what is below 2^-100, NaN for what is not finite."""
    x = torch.ones(7, 130) * torch.tensor([0.0, 2.0**-101, -(2.0**-100), 1e38, 1.0, 1.0, 1.0])[:, None]
    x[[4, 5, 6], 129] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for found in (int8.rounded(x), kernels.rounded(x), kernels.rounded(x.bfloat16())):
        q, scale = found
        assert not q[:2].any() and q[2:4, 0].tolist() == [-127, 127]
        assert not scale[:2].any() and bool(scale[4:].isnan().all()) and scale[2] == 2.0**-100 / 127


def test_ties_go_to_even_and_ends_are_127():
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]]) * 2.0**-70
    for found in (int8.rounded(x), kernels.rounded(x), kernels.rounded(x.bfloat16())):
        assert found[0].tolist() == [[127, -127, 0, 2, 2, 0, -2, 126]] and found[1].tolist() == [2.0**-70]


@pytest.mark.parametrize("which", KERNELS, ids=lambda p: "-".join(filter(None, p)))
@pytest.mark.parametrize("biases", [False, True])
@DTYPES
def test_tokens_without_a_scale(which, biases, dtype):
    """Zeros, and what is too small, give what biases and init give. NaN, infinity and an h beyond fp32 make all of their token
    NaN. No other token changes."""
    p = problem([20, 3], [40, 30], 30, 1100, dtype, biases=biases)
    odd, others = [2, 21], [t for t in range(23) if t not in (2, 21)]

    def given(value, column=slice(None)):
        x = p["x"].clone()
        x[torch.tensor(odd), column] = value
        with on(which[1]):
            y = run(p | {"x": x}, kernel=which[0], activation="relu")
        assert torch.equal(y[others], want[others])
        return y[odd]

    with on(which[1]):
        want = run(p, kernel=which[0], activation="relu")
    zero = given(0.0)
    assert torch.equal(given(2.0**-101), zero) and bool(zero.isfinite().all())
    if not biases:
        assert torch.equal(zero, p["init"][odd])
    for value in (torch.nan, torch.inf, -torch.inf):
        assert bool(given(value, 5).isnan().all())
    assert bool(given(1e38).isnan().all())


@native
@DTYPES
def test_threads_do_not_change_the_bits(isa, dtype):
    p = problem([32] * 7 + [5], [300] * 7 + [301], 96, 1600, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((run(p, kernel="native"), *kernels.rounded(p["x"])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, first) for more in results[1:] for one, first in zip(more, results[0], strict=True))


@native
def test_concurrent_calls_equal_calls_in_sequence():
    cases = [problem([16] * 6, [150 + i] * 6, 64 + i, 1400, torch.bfloat16, seed=i) for i in range(4)]
    want = [run(p, kernel="native") for p in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        assert all(pool.map(lambda i: torch.equal(run(cases[i], kernel="native"), want[i]), [*range(len(cases))] * 15))


def refusals(p):
    """What does not fit, and words of the error."""
    gate, up, down = p["scales"]
    scaled = "the scales of {} must be "
    return {
        "no scales": ({"scales": None}, "gate is torch.int8"),
        "weights in fp32": ({"up": p["up"].float()}, "up is torch.float32 .* must be torch.int8 with scales"),
        "short": ({"scales": Scales(gate[1:], up, down)}, scaled.format("gate")),
        "a matrix": ({"scales": Scales(gate, up[None], down)}, scaled.format("up")),
        "of neurons": ({"scales": Scales(gate, up, gate)}, scaled.format("down")),
        "fp64": ({"scales": Scales(gate, up, down.double())}, scaled.format("down")),
        "x needs a gradient": ({"x": p["x"].clone().requires_grad_()}, "no gradient"),
        "a bias needs a gradient": ({"up_bias": p["up_bias"].clone().requires_grad_()}, "no gradient"),
        "out is a scale": ({"out": down.expand(33, 48)}, "expanded|overlap"),
    }


@pytest.mark.parametrize("name", refusals(problem([16, 17], [30, 31], 48, 100)))
@pytest.mark.parametrize("kernel", ["auto", "torch", *["native"] * bool(ISAS)])
def test_refusals(kernel, name):
    p = problem([16, 17], [30, 31], 48, 100)
    change, words = refusals(p)[name]
    with pytest.raises(ValueError, match=words):
        run(p | change, kernel=kernel)


def test_more_columns_than_32_bits_hold_are_refused():
    row = torch.zeros(1, 1, dtype=torch.int8).expand(1, int8.WIDEST + 1).contiguous()
    x, one = row.float(), torch.ones(1)
    scales = Scales(one, one, torch.ones(int8.WIDEST + 1))
    with pytest.raises(ValueError, match="at most 65536 columns"):
        kernels.sparse_ffn(x, row, row, row, torch.zeros(1, 1, dtype=torch.int64), scales=scales)


@native
@pytest.mark.parametrize("weight", [-128, 127])
def test_the_widest_rows_fit_32_bits(isa, weight):
    wide = int8.WIDEST
    row, x = torch.full((1, wide), weight, dtype=torch.int8), torch.full((2, wide), 127.0)
    x[1] = -127
    scales = Scales(torch.tensor([2.0**-30]), torch.tensor([2.0**-30]), torch.full((wide,), 1 / 127))
    y = kernels.sparse_ffn(x, row, row, row, torch.zeros(1, 1, dtype=torch.int64), activation="relu", scales=scales)
    g = 127 * weight * wide / 2**30
    want = torch.tensor([max(g, 0) * g, max(-g, 0) * -g]).double()[:, None] * weight / 127
    assert torch.allclose(y.double(), want.expand(2, wide), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted({name for name, _ in KERNELS}))
def test_as_an_operator_of_torch(name):
    p = problem([16, 9], [30, 31], 48, 100)
    args = [p[key] for key in ("x", "gate", "up", "down_t", "ids", "rows", "id_offsets")]
    torch.library.opcheck(kernels._op, (*args, "silu", p["gate_bias"], p["up_bias"], p["init"], *p["scales"], name))
    compiled = torch.compile(lambda q: run(q, kernel=name), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(p), run(p, kernel=name))


PRODUCTS = """
import torch
from fastfill.kernels import int8
a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((33, 2100), (5, 2100)))
a[0], b[0] = -128, -128
for x, y in ((a, b), (a[:0], b), (a, b[:0]), (a[:, :0], b[:, :0])):
    assert torch.equal(int8.product(x, y), (x.double() @ y.double().t()).float())
for columns in (1024, 1700, 2100, 5000):  # one sum, one rounding, several sums
    x, y = (torch.randint(-128, 128, (rows, columns), dtype=torch.int8) for rows in (33, 5))
    x[:8], y[:4] = -128, -128
    y[1::2, -1] = 1
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(int8._by_pieces(x, y), (x.double() @ y.double().t()).float())
"""


def test_products_are_exact():
    """Also where torch's own are not: oneDNN without VNNI adds pairs in 16 bits, which saturate."""
    exec(PRODUCTS, {})
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, check=True)


@native
@pytest.mark.parametrize("shape", [(1, 5, 3), (8, 13, 64), (9, 1, 77), (33, 100, 1024), (130, 257, 1537), (0, 3, 8), (3, 0, 8)])
def test_the_native_product_is_exact(isa, shape):
    """Fewer tokens than a vector, ragged strips, tiles and units; the least byte of b; rows that lie apart."""
    tokens, rows, columns = shape
    a = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    b = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    a[::3], b[::2] = 127, -128
    a[1::3] = -127
    want = (a.double() @ b.double().T).float()
    assert torch.equal(cpu.product(a, b), want)
    apart_a, apart_b = torch.zeros(tokens, columns + 5, dtype=torch.int8), torch.zeros(2 * rows, columns, dtype=torch.int8)
    apart_a[:, 2:-3], apart_b[::2] = a, b
    assert torch.equal(cpu.product(apart_a[:, 2:-3], apart_b[::2]), want)
    assert torch.equal(cpu.product(a, b.T.contiguous().T), want)


@native
def test_a_byte_that_the_native_product_cannot_take_goes_another_way(isa):
    a, b = torch.full((4, 40), -128, dtype=torch.int8), torch.full((3, 40), -7, dtype=torch.int8)
    assert torch.equal(int8._native(a, b), torch.full((4, 3), 128.0 * 7 * 40))


@pytest.mark.parametrize("given", [{"size": (3, 64)}, {"dtype": torch.float32}, {"device": "meta"}], ids=str)
def test_a_product_of_what_does_not_fit_is_refused(given):
    a, b = torch.ones(2, 100, dtype=torch.int8), torch.zeros(**{"size": (3, 100), "dtype": torch.int8} | given)
    for x, y in ((a, b), (b, a), (a[0], b)):
        with pytest.raises(ValueError, match=r"must be int8 \(T, K\) and \(N, K\) on one device: they are torch"):
            int8.product(x, y)


def test_more_columns_than_32_bits_hold():
    a = torch.full((1, 140_000), 127, dtype=torch.int8)
    assert torch.equal(int8.product(a, a), torch.tensor([[127.0 * 127 * 140_000]]))


def test_another_default_device_changes_nothing():
    a = torch.full((3, 40), 7, dtype=torch.int8)
    int8._fastest.cache_clear()
    with torch.device("meta"):
        got, (q, scale) = int8.product(a, a), kernels.rounded(a.float())
    assert torch.equal(got, torch.full((3, 3), 49.0 * 40)) and q.device.type == scale.device.type == "cpu"


LATE_S = 0.2  # ten times what the other product takes in fp64 on a busy core
RUNS = ["_by_torch", "_native", "_by_pieces"]


@native
@pytest.mark.parametrize("fast", RUNS)
def test_of_the_exact_products_the_fastest_runs(monkeypatch, fast):
    """Without VNNI torch has loops of its own, slower than fp32."""

    def exact(a, b):
        return (a.double() @ b.double().T).float()

    def late(a, b):
        time.sleep(LATE_S)
        return exact(a, b)

    for name in RUNS:
        monkeypatch.setattr(int8, name, exact if name == fast else late)
    assert int8._fastest.__wrapped__() is exact


@pytest.mark.parametrize("low", [-(2**15), -(2**31)])
def test_a_product_of_torchs_that_saturates_never_runs(monkeypatch, low):
    def saturates(a, b):
        return (a.double() @ b.double()).clamp(low, -low - 1).int()

    monkeypatch.setattr(torch, "_int_mm", saturates)
    monkeypatch.setattr(int8, "_native", lambda a, b: time.sleep(LATE_S))
    monkeypatch.setattr(int8, "_by_pieces", lambda a, b: time.sleep(LATE_S))
    assert (int8._fastest.__wrapped__() is int8._by_torch) is (low == -(2**31))
