"""Block scores, selection and compensator: every kernel and instruction set of this machine against fp64 references."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import ISAS, KERNELS, native, on
from torch import Tensor

from fastfill import kernels
from fastfill.kernels import cpu

DTYPES = [torch.float32, torch.bfloat16]
U = 2.0**-24  # unit roundoff of fp32 sums

both = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@pytest.fixture(params=KERNELS, ids=lambda p: "-".join(filter(None, p)))
def kernel(request):
    with on(request.param[1]):
        yield request.param[0]


def problem(tokens, hidden, rank, columns, dtype, seed=0) -> dict[str, Tensor]:
    """Random tensors with inner activations and logits of order one."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    return {
        "x": randn(tokens, hidden),
        "w_in": randn(rank, hidden, scale=max(hidden, 1) ** -0.5),
        "w_out": randn(columns, rank, scale=max(rank, 1) ** -0.5),
        "bias": randn(columns),
    }


def outputs(p: dict[str, Tensor], linear_rank: int | None, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """y = act(x @ w_in.T) @ w_out.T + bias in fp64, and bounds for the errors of y that add up and that do not. With s =
    unit roundoff of the dtype (2^-24 fp32, 2^-9 bf16):

    - a = x @ w_in.T is a sum of H products: |da| <= (H + 1) u (|x| @ |w_in|.T) (Higham, gamma_n). SiLU has
      |act'| <= 1.1 and is computed to 16 u relative.
    - y is a sum of r products and the bias: (r + 2) u (|a| @ |w_out|.T + |bias|).
    - a is rounded to the dtype, `rounds` times: independent errors of at most s |a_k w_k|, which add up like a random walk,
      6 sqrt(rounds) s sqrt(sum (a_k w_k)^2) (Higham and Mary 2019). In fp32 that is below the worst case above.
    - sums of bf16 dot products flush numbers below 2^-126 to zero: 2^-100 absolute covers that.
    """
    x, w_in, w_out, bias = (t.double() for t in p.values())
    s = torch.finfo(p["x"].dtype).eps / 2
    a = x @ w_in.T
    da = (x.shape[1] + 1) * U * (x.abs() @ w_in.abs().T)
    if linear_rank is not None:
        a[:, linear_rank:] *= torch.sigmoid(a[:, linear_rank:])
        da = 1.1 * da + 16 * U * a.abs()
    y = a @ w_out.T + bias
    fixed = da @ w_out.abs().T + (len(w_in) + 2) * U * (a.abs() @ w_out.abs().T + bias.abs()) + 2.0**-100
    walk = 6 * rounds**0.5 * s * (a.square() @ w_out.square().T).sqrt()
    return y, fixed, walk


def scores_excess(got: Tensor, p: dict[str, Tensor], block_size: int, kernel: str) -> float:
    """Largest error in units of its bound: at most 1 is right. A logit that is wrong by d multiplies its token's p by at
    most e^(d + max d), numerator and denominator; exp is right to 2^-21 relative (Taylor remainder r^7 / 7! for
    |r| <= ln(2) / 2 is 2^-22.5 of the result, four roundings the rest) and sees l - max rounded, u |l - max|; the sum over
    F, the quotient and the sum over B tokens add (F + B + 4) u. torch in bf16 also rounds logits and p: s |l| and s p.
    """
    tokens, columns = len(p["x"]), len(p["w_out"])
    s = torch.finfo(p["x"].dtype).eps / 2
    logits, fixed, walk = outputs(p, None, rounds=1)
    d = fixed + walk + 2 * U * (logits - logits.amax(1, keepdim=True)).abs()
    if kernel == "torch":
        d = d + s * logits.abs() * 1.01
    d = d + d.amax(1, keepdim=True)
    prob = logits.softmax(1)
    relative = d.expm1() + 2.0**-21 + (columns + block_size + 4) * U + (kernel == "torch") * 2 * s
    shape = (tokens // block_size, block_size, columns)
    want, bound = prob.view(shape).sum(1), (prob * relative).view(shape).sum(1) + block_size * 2.0**-126
    return float(((got.double() - want).abs() / bound).max()) if want.numel() else 0.0


def run_scores(p, block_size, kernel="native"):
    return kernels.block_scores(p["x"], p["w_in"], p["w_out"], p["bias"], block_size, kernel=kernel)


def run_compensate(p, linear_rank, kernel="native"):
    return kernels.compensate(p["x"], p["w_in"], p["w_out"], p["bias"], linear_rank, kernel=kernel)


def compensate_excess(got: Tensor, p: dict[str, Tensor], linear_rank: int) -> float:
    y, fixed, walk = outputs(p, linear_rank, rounds=3)  # torch rounds before and after SiLU, and its argument
    bound = fixed + walk + torch.finfo(p["x"].dtype).eps / 2 * y.abs() * 1.01
    return float(((got.double() - y).abs() / bound).max()) if y.numel() else 0.0


SHAPES = [  # blocks, block size, H, r, F
    (3, 32, 48, 16, 100),
    (2, 7, 577, 33, 211),
    (1, 1, 1, 1, 1),
    (2, 130, 31, 5, 77),
    (5, 16, 512, 64, 1536),  # rows of a power of two are copied
    (2, 30, 24, 3, 12001),  # several strips in a block
    (2, 8, 16, 0, 20),
    (2, 8, 0, 3, 20),
]
SHAPE_IDS = [f"N{n}-B{b}-H{h}-r{r}-F{f}" for n, b, h, r, f in SHAPES]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_scores_match_fp64(kernel, shape, dtype):
    blocks, block_size, *sizes = shape
    p = problem(blocks * block_size, *sizes, dtype)
    got = run_scores(p, block_size, kernel)
    assert got.dtype == torch.float32 and got.shape == (blocks, sizes[2])
    assert scores_excess(got, p, block_size, kernel) <= 1


@both
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_compensate_matches_fp64(kernel, shape, dtype):
    blocks, block_size, hidden, rank, columns = shape
    p = problem(blocks * block_size, hidden, rank, columns, dtype)
    for linear_rank in {0, rank // 3, rank}:
        got = run_compensate(p, linear_rank, kernel)
        assert got.dtype == dtype and compensate_excess(got, p, linear_rank) <= 1


@settings(max_examples=120, deadline=None)
@given(
    st.tuples(*(st.integers(1, n) for n in (4, 50, 140, 70, 400))),
    st.sampled_from(DTYPES),
    st.sampled_from(KERNELS),
    st.integers(0, 9),
    st.data(),
)
def test_sweep(shape, dtype, which, seed, data):
    blocks, block_size, hidden, rank, columns = shape
    p = problem(blocks * block_size, hidden, rank, columns, dtype, seed)
    linear_rank = data.draw(st.integers(0, rank))
    kernel, isa = which
    with on(isa):
        scores, y = run_scores(p, block_size, kernel), run_compensate(p, linear_rank, kernel)
    assert scores_excess(scores, p, block_size, kernel) <= 1
    assert compensate_excess(y, p, linear_rank) <= 1


def mutants(p):
    """Inputs of a kernel that does one thing wrong."""
    yield "no bias", p | {"bias": torch.zeros_like(p["bias"])}
    yield "neurons one off", p | {"w_out": p["w_out"].roll(1, 0)}
    yield "bias one off", p | {"bias": p["bias"].roll(1, 0)}
    yield "a rank missing", p | {"w_out": p["w_out"].index_fill(1, torch.tensor([5]), 0)}
    yield "a column of x missing", p | {"x": p["x"].index_fill(1, torch.tensor([-1 % p["x"].shape[1]]), 0)}
    yield "a token twice", p | {"x": torch.cat([p["x"][:1], p["x"][:-1]])}


@both
def test_mutants_fail(dtype):
    """The bounds are tight enough to see each of these mistakes."""
    p = problem(64, 96, 24, 200, dtype)
    for name, wrong in mutants(p):
        assert scores_excess(run_scores(wrong, 32, "auto"), p, 32, "native") > 1, name
        assert compensate_excess(run_compensate(wrong, 8, "auto"), p, 8) > 1, name
    singles = run_scores(p, 1, "auto").view(2, 32, -1)
    assert scores_excess(singles.sum(1), p, 32, "native") <= 1
    assert scores_excess(singles[:, :-1].sum(1), p, 32, "native") > 1, "a token missing"
    assert compensate_excess(run_compensate(p, 9, "auto"), p, 8) > 1


def test_large_logits_and_infinities(kernel):
    """The largest logit is subtracted first; -inf is a share of zero; NaN and +inf make the block NaN, as softmax does."""
    w_in, bias = torch.ones(1, 1), torch.zeros(5)
    w_out = torch.tensor([[1.0], [1.0], [0.999], [-1.0], [0.0]])
    x = torch.tensor([[1e30], [-1e30], [1e4], [0.0]])
    got = kernels.block_scores(x, w_in, w_out, bias, 1, kernel=kernel)
    want = (x.double() @ w_out.double().T).softmax(1)
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=1e-35)  # exp of 10 that is rounded at 1e4: 2 ulp
    bias[1] = -torch.inf
    got = kernels.block_scores(x[3:], w_in, w_out, bias, 1, kernel=kernel)
    torch.testing.assert_close(got, torch.tensor([[0.25, 0, 0.25, 0.25, 0.25]]))
    for bad in (torch.nan, torch.inf):
        x = torch.zeros(6, 1)
        x[3] = bad
        got = kernels.block_scores(x, w_in, w_out, bias, 2, kernel=kernel)
        assert got.isnan().all(1).tolist() == [False, True, False] and not got[::2].isnan().any()


def test_inputs_that_are_views(kernel):
    p = problem(24, 40, 6, 50, torch.bfloat16)
    want_scores, want = run_scores(p, 8, kernel), run_compensate(p, 2, kernel)
    wide = {name: torch.cat([t, t], -1)[..., : t.shape[-1]] for name, t in p.items()}
    turned = {name: t.T.contiguous().T for name, t in p.items() if t.dim() == 2} | {"bias": p["bias"].repeat_interleave(2)[::2]}
    for views in (wide, turned):
        assert torch.equal(run_scores(views, 8, kernel), want_scores)
        assert torch.equal(run_compensate(views, 2, kernel), want)


@native
@both
def test_threads_do_not_change_the_result(monkeypatch, dtype):
    p = problem(7 * 45, 70, 20, 300, dtype)
    before = torch.get_num_threads()
    try:
        for isa in ISAS:
            monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                scores = run_scores(p, 45)
                results.append((scores, run_compensate(p, 9), kernels.top_k(scores, 100, kernel="native")))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True)), isa
    finally:
        torch.set_num_threads(before)


@native
def test_concurrent_calls_equal_calls_in_sequence():
    cases = [problem(96, 64 + i, 16, 300 + i, torch.bfloat16, seed=i) for i in range(6)]

    def all_ops(p):
        scores = run_scores(p, 16)
        return scores, run_compensate(p, 4), kernels.top_k(scores, 150, kernel="native")

    want = [all_ops(p) for p in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for i, found in enumerate(pool.map(all_ops, cases * 20)):
            assert all(torch.equal(a, b) for a, b in zip(found, want[i % len(cases)], strict=True))


# ---- selection --------------------------------------------------------------------------------------------------------


def full_sort(scores: np.ndarray, kept: int) -> np.ndarray:
    """Independent: a stable sort, best first, so that of equal scores the lowest ids come first."""
    order = np.argsort(-np.where(np.isnan(scores), np.inf, scores), axis=1, kind="stable")
    return np.sort(order[:, :kept], axis=1)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 1.0000001]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 400),
    st.sampled_from(["normal", "few", "special", "equal"]),
    st.sampled_from(KERNELS),
    st.integers(0, 99),
    st.data(),
)
def test_top_k_equals_a_full_sort(blocks, neurons, kind, which, seed, data):
    kept = data.draw(st.one_of(st.integers(0, neurons), st.sampled_from([0, neurons])))
    rng = np.random.default_rng(seed)
    scores = {
        "normal": lambda: rng.normal(size=(blocks, neurons)),
        "few": lambda: rng.integers(-2, 3, (blocks, neurons)),
        "special": lambda: rng.choice(SPECIAL, (blocks, neurons)),
        "equal": lambda: np.full((blocks, neurons), 0.5),
    }[kind]().astype(np.float32)
    kernel, isa = which
    with on(isa):
        ids = kernels.top_k(torch.from_numpy(scores), kept, kernel=kernel)
    assert ids.dtype == torch.int32 and ids.is_contiguous() and ids.shape == (blocks, kept)
    np.testing.assert_array_equal(ids.numpy(), full_sort(scores, kept))


def test_top_k_of_views_and_other_dtypes(kernel):
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = full_sort(scores.float().numpy(), 11)
    mean = torch.arange(40.0)
    for view in (scores, scores.float(), scores.T.contiguous().T, torch.cat([scores, scores], 1)[:, :40]):
        np.testing.assert_array_equal(kernels.top_k(view, 11, kernel=kernel).numpy(), want)
    assert kernels.top_k(mean.expand(2, -1), 3, kernel=kernel).tolist() == [[37, 38, 39]] * 2
    assert kernels.top_k(scores[:0], 3, kernel=kernel).shape == (0, 3)


# ---- around the ops ---------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(kernel):
    p = problem(24, 40, 6, 50, torch.float32)
    changes = [
        (p | {"x": p["x"][0]}, "x must be"),
        (p | {"w_in": p["w_in"][:, 1:]}, "w_in must be"),
        (p | {"w_out": p["w_out"][:, 1:]}, "w_out must have 6 columns"),
        (p | {"bias": p["bias"][1:]}, "bias must be"),
        (p | {"bias": p["bias"].double()}, "bias is torch.float64"),
    ]
    for wrong, message in changes:
        with pytest.raises(ValueError, match=message):
            run_scores(wrong, 8, kernel)
        with pytest.raises(ValueError, match=message):
            run_compensate(wrong, 2, kernel)
    for block_size in (0, -8, 7):
        with pytest.raises(ValueError, match="do not make blocks"):
            run_scores(p, block_size, kernel)
    for linear_rank in (-1, 7):
        with pytest.raises(ValueError, match="linear_rank must lie in 0 to 6"):
            run_compensate(p, linear_rank, kernel)
    for kept in (-1, 41):
        with pytest.raises(ValueError, match="kept must lie in 0 to 40"):
            kernels.top_k(p["x"], kept, kernel=kernel)
    with pytest.raises(ValueError, match="scores must be"):
        kernels.top_k(p["x"].int(), 3, kernel=kernel)
    with pytest.raises(ValueError, match="unknown kernel"):
        kernels.top_k(p["x"], 3, kernel="fast")


def test_gradients_and_other_dtypes_take_the_torch_path():
    p = problem(16, 10, 4, 20, torch.float64)
    assert run_scores(p, 8, "auto").dtype == torch.float32 and run_compensate(p, 2, "auto").dtype == torch.float64
    p = problem(16, 10, 4, 20, torch.float32)
    p["w_in"].requires_grad_()
    (run_scores(p, 8, "auto")[:, 0].sum() + run_compensate(p, 2, "auto").sum()).backward()
    assert p["w_in"].grad is not None
    if ISAS:
        with pytest.raises(ValueError, match="no gradient"):
            run_scores(p, 8, "native")


def test_without_library(monkeypatch):
    monkeypatch.setattr(cpu, "_load", lambda: "the native library was not built")
    p = problem(16, 10, 4, 20, torch.float32)
    scores = run_scores(p, 8, "auto")
    assert scores_excess(scores, p, 8, "torch") <= 1 and compensate_excess(run_compensate(p, 2, "auto"), p, 2) <= 1
    np.testing.assert_array_equal(kernels.top_k(scores, 7).numpy(), full_sort(scores.numpy(), 7))
    with pytest.raises(ValueError, match="not built"):
        kernels.top_k(scores, 7, kernel="native")


@pytest.mark.parametrize("name", sorted({name for name, _ in KERNELS}))
def test_custom_ops(name):
    p = problem(16, 10, 4, 20, torch.float32)
    torch.library.opcheck(kernels._block_scores_op, (*p.values(), 8, name))
    torch.library.opcheck(kernels._compensate_op, (*p.values(), 2, name))
    torch.library.opcheck(kernels._top_k_op, (p["w_out"].T.contiguous(), 7, name))

    def both_ops(p):
        return kernels.top_k(run_scores(p, 8, name), 7, kernel=name), run_compensate(p, 2, name)

    compiled = torch.compile(both_ops, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(p), both_ops(p), strict=True))
