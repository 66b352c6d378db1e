"""Rows of packed weights: every format on every instruction set of this machine, beside the package gguf."""

import gguf
import numpy as np
import pytest
import torch
from test_kernels import ISAS, on

from fastfill.kernels import cpu, int8, packed

HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}  # where a block's fp16 numbers are
CASES = [(1, 1), (3, 5), (65, 2), (21, 9), (140, 3)]  # rows, units of 256 columns; formats with short blocks get 3 blocks less
KINDS = pytest.mark.parametrize("kind", packed.KINDS)
SHAPES = pytest.mark.parametrize("shape", CASES, ids=lambda s: f"R{s[0]}-C{s[1]}")


@pytest.fixture(params=[*ISAS, "gguf"])
def isa(request, monkeypatch):
    if request.param == "gguf":  # the library is missing
        monkeypatch.setattr(cpu, "usable", lambda: False)
        yield request.param
        return
    with on(request.param):
        yield request.param


def blocks(kind, rows, units, seed=0):
    """Random bytes and scales of either sign. Row 1 is zero, row 2 has a NaN, row 3 an infinity, row 4 subnormal scales."""
    rng = np.random.default_rng(seed)
    _, columns, size = packed.KINDS[kind]
    count = units * 256 // columns - (3 if columns == 32 else 0)
    raw = rng.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        halves = (rng.standard_normal((rows, count)) * 0.02).astype(np.float16)
        halves[rng.random((rows, count)) < 0.1] = 0
        halves[1:2] = 0
        halves[2:3, count // 2] = np.nan
        halves[3:4, -1] = -np.inf
        halves[4:5] = rng.integers(-1023, 1024, count) * np.float16(2.0**-24)
        raw[:, :, at : at + 2] = halves[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, count * size))


def values(raw, kind):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(raw.contiguous().numpy(), gguf.GGMLQuantizationType[kind]))


def bits(t):
    """Its bits, those of every NaN the same."""
    t = torch.where(t.isnan(), torch.nan, t)
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def test_kinds_are_those_of_gguf():
    for name, (code, columns, size) in packed.KINDS.items():
        assert gguf.GGMLQuantizationType[name] == code
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(code)] == (columns, size)


@KINDS
@SHAPES
def test_unpack(isa, kind, shape):
    raw = blocks(kind, *shape)
    want = values(raw, kind)
    assert want.isnan().any() == (shape[0] > 2)
    assert torch.equal(bits(packed.unpack(raw, kind)), bits(want))
    assert torch.equal(bits(packed.unpack(raw, kind, torch.bfloat16)), bits(want.bfloat16()))
    assert torch.equal(packed.unpack(raw[:1], kind, torch.float16), want[:1].half())


@KINDS
@SHAPES
def test_int8(isa, kind, shape):
    raw = blocks(kind, *shape)
    q, scale = int8.rounded(values(raw, kind))
    scales = packed.scales(raw, kind)
    assert torch.equal(bits(scales.scale), bits(scale))
    assert torch.equal(packed.unpack_int8(raw, kind, scales.inverse), q)
    assert torch.equal(packed.unpack_int8(raw, kind, scales.inverse, transposed=True), q.t())
    if shape[0] > 4:
        assert scale[1] == 0 and scale[2].isnan() and scale[3].isnan() and scale[4] > 0
        assert q[4].any() and not q[1:4].any()


def halfway(kind):
    """A row whose largest weight is 254 and others are whole numbers: half of them lie between two integers."""
    size = packed.KINDS[kind].bytes
    raw = np.random.default_rng(0).integers(0, 256, (2, size), dtype=np.uint8)
    if kind in ("Q4_K", "Q5_K"):
        raw[:, 4:12], raw[:, 12:16] = 0x01, 0x11  # all scales and minima are 1
    if kind == "Q6_K":  # scales of 127 with the code 34 - 32, then of 1
        raw[0, :128], raw[0, 128:192], raw[:, 192:208] = 0x22, 0xAA, np.array([[127], [1]])
    if kind == "Q8_0":
        raw[0] = 127
    if kind in ("Q4_0", "Q5_0"):
        raw[0] = 0
    numbers = {"Q4_K": ((0, -254), (1, 0)), "Q5_K": ((0, -254), (1, 0)), "Q4_1": ((0, 254), (1, 0)), "Q5_1": ((0, 254), (1, 0))}
    numbers |= {"Q6_K": ((1,), (1,)), "Q8_0": ((2,), (1,)), "Q4_0": ((31.75,), (1,)), "Q5_0": ((15.875,), (1,))}
    for row, given in zip(raw, numbers[kind], strict=True):
        for at, number in zip(HALVES.get(kind, (0,)), given, strict=True):
            row[at : at + 2] = np.array([number], np.float16).view(np.uint8)
    return torch.from_numpy(raw.reshape(1, -1))


@KINDS
def test_halves_go_to_even_numbers(isa, kind):
    raw = halfway(kind)
    w = values(raw, kind)
    assert w.abs().max() == 254 and {0.5, 1.5} <= set((w.abs() / 2 % 2).flatten().tolist())
    assert torch.equal(packed.unpack_int8(raw, kind, packed.scales(raw, kind).inverse), (w / 2).round().to(torch.int8))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_linear(isa, kind, dtype, tokens):
    """C products and sums in fp32, in at least 8 lanes: each lane rounds at most C / 8 times, their sum 4 times."""
    raw = blocks(kind, 65, 9)
    raw[2:4] = blocks(kind, 1, 9, seed=1)  # all finite
    w = values(raw, kind).double()
    x = torch.randn(tokens, w.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    y = packed.linear(x, raw, kind)
    assert y.dtype == dtype and y.shape == (tokens, 65)
    want, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    sums = (w.shape[1] / 8 + 4) * 2.0**-24 * size
    if isa == "gguf":  # weights in the type of x, sums in an order of torch's own
        sums = (w.shape[1] * 2.0**-24 + torch.finfo(dtype).eps / 2) * size
    assert ((y.double() - want).abs() <= sums + torch.finfo(dtype).eps / 2 * (want.abs() + sums)).all()
    if isa != "gguf":
        assert all(torch.equal(packed.linear(x[t : t + 1], raw, kind)[0], y[t]) for t in range(tokens))


@KINDS
def test_linear_of_what_is_not_finite(isa, kind):
    raw = blocks(kind, 4, 2)
    y = packed.linear(torch.ones(2, values(raw, kind).shape[1]), raw, kind)
    assert y[:, :2].isfinite().all() and y[:, 2].isnan().all() and not y[:, 3].isfinite().any()


@KINDS
def test_slices_strides_and_threads(isa, kind):
    """Some rows of a tensor, into some columns of another; two threads give the bits of one."""
    raw = blocks(kind, 140, 3)
    part = raw[5:135:2]  # 65 rows
    scales = packed.scales(raw, kind)
    q = int8.rounded(values(raw, kind))[0]
    x = torch.randn(9, q.shape[1] + 1)[:, :-1]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            into = torch.full((65, q.shape[1] + 3), 99, dtype=torch.int8)
            into_t = torch.full((q.shape[1], 70), 99, dtype=torch.int8)
            packed.unpack_int8(part, kind, scales.inverse[5:135:2], out=into[:, :-3])
            packed.unpack_int8(part, kind, scales.inverse[5:135:2], out=into_t[:, 2:67], transposed=True)
            assert torch.equal(into[:, :-3], q[5:135:2]) and (into[:, -3:] == 99).all()
            assert torch.equal(into_t[:, 2:67], q[5:135:2].t()) and (into_t[:, [0, 1, 67, 68, 69]] == 99).all()
            assert torch.equal(bits(packed.unpack(part, kind)), bits(values(part, kind)))
            assert torch.equal(packed.scales(part, kind).inverse, scales.inverse[5:135:2])
            results.append(bits(packed.linear(x, part, kind)))
        finally:
            torch.set_num_threads(1)
    assert isa == "gguf" or torch.equal(*results)


@KINDS
def test_nothing(isa, kind):
    none = blocks(kind, 1, 2)[:0]
    columns = packed.unpack(none, kind).shape[1]
    assert columns and len(packed.scales(none, kind).inverse) == 0
    assert packed.unpack_int8(none, kind, torch.empty(0), transposed=True).shape == (columns, 0)
    assert packed.linear(torch.ones(2, columns), none, kind).shape == (2, 0)
    assert packed.linear(torch.ones(0, columns), blocks(kind, 3, 2), kind).shape == (0, 3)
    empty = torch.empty(3, 0, dtype=torch.uint8)
    assert packed.unpack(empty, kind).shape == (3, 0)
    assert not packed.linear(torch.ones(2, 0), empty, kind).any()


def test_gradients_are_of_x():
    raw, x = blocks("Q4_K", 2, 2), torch.randn(3, 512, requires_grad=True)
    packed.linear(x, raw, "Q4_K").sum().backward()
    torch.testing.assert_close(x.grad[0], values(raw, "Q4_K").sum(0))


def test_what_does_not_fit_is_refused():
    raw = blocks("Q4_K", 3, 2)
    inverse, x = packed.scales(raw, "Q4_K").inverse, torch.ones(2, 512)
    q = torch.empty(3, 512, dtype=torch.int8)
    for match, call in {
        "unknown kind 'Q2_K': there are Q4_0, ": lambda: packed.unpack(raw, "Q2_K"),
        "must be uint8 .R, a multiple of 144.: it is torch.uint8 .3, 287.": lambda: packed.unpack(raw[:, 1:], "Q4_K"),
        "must be uint8 .*it is torch.int8": lambda: packed.scales(raw.to(torch.int8), "Q4_K"),
        "must be uint8 .*it is torch.uint8 .288,.": lambda: packed.scales(raw[0], "Q4_K"),
        "inverse must be fp32 .3,. .*float64": lambda: packed.unpack_int8(raw, "Q4_K", inverse.double()),
        "inverse must be fp32 .3,. .*.2,.": lambda: packed.unpack_int8(raw, "Q4_K", inverse[:2]),
        r"out must be int8 \(512, 3\)": lambda: packed.unpack_int8(raw, "Q4_K", inverse, q, transposed=True),
        r"out must be int8 \(3, 512\) on cpu: it is torch.uint8": lambda: packed.unpack_int8(raw, "Q4_K", inverse, q.byte()),
        "rows of out must be contiguous": lambda: packed.unpack_int8(raw, "Q4_K", inverse, q.t(), transposed=True),
        "x must be floating point .T, 512. .*.2, 511.": lambda: packed.linear(x[:, 1:], raw, "Q4_K"),
        "x must be floating point .*.512,.": lambda: packed.linear(x[0], raw, "Q4_K"),
        "x must be floating point .*int64": lambda: packed.linear(x.long(), raw, "Q4_K"),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
