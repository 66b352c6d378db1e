"""Binding of the native CPU kernels: a plain C library called through ctypes, which releases the GIL.

The library is built by CMakeLists.txt from csrc/ and lies next to this file. It is loaded on first use; where it is
missing, `usable` is False and `status` says so, and importing this module never fails.
"""

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastfill.errors import UserError

if TYPE_CHECKING:
    from .int8 import Scales  # which imports this module


INTERFACE = 5  # FASTFILL_INTERFACE of csrc/fastfill.h
ISA_VARIABLE = "FASTFILL_ISA"  # environment variable: name of the instruction set to run, for tests

_ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # csrc/fastfill.h
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


class _Call(ctypes.Structure):
    """`fastfill_call` of csrc/fastfill.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "gate", "up", "down_t", "gate_bias", "up_bias", "init")),
        *((name, c_void_p) for name in ("gate_scale", "up_scale", "down_scale", "out", "ids")),
        ("rows", POINTER(c_int64)),
        ("id_offsets", POINTER(c_int64)),
        *((f"{name}_stride", c_int64) for name in ("x", "gate", "up", "down", "init", "out")),
        *((name, c_int64) for name in ("hidden", "neurons", "n_blocks")),
        *((name, c_int32) for name in ("dtype", "activation", "ids_are_64bit", "threads")),
        ("isa", c_char_p),
        ("bad_block", c_int64),
    )


class _LowRankCall(ctypes.Structure):
    """`fastfill_low_rank_call` of csrc/fastfill.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "w_in", "w_out", "bias", "out")),
        *((f"{name}_stride", c_int64) for name in ("x", "w_in", "w_out", "out")),
        *((name, c_int64) for name in ("tokens", "hidden", "rank", "columns", "block_size", "linear_rank")),
        *((name, c_int32) for name in ("dtype", "threads")),
        ("isa", c_char_p),
    )


class _RoundCall(ctypes.Structure):
    """`fastfill_round_call` of csrc/fastfill.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "q", "scale")),
        *((name, c_int64) for name in ("x_stride", "rows", "columns")),
        *((name, c_int32) for name in ("dtype", "threads")),
        ("isa", c_char_p),
    )


class _TopKCall(ctypes.Structure):
    """`fastfill_top_k_call` of csrc/fastfill.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("scores", "ids")),
        *((name, c_int64) for name in ("scores_stride", "rows", "neurons", "kept")),
        ("threads", c_int32),
        ("isa", c_char_p),
    )


class _ProductCall(ctypes.Structure):
    """`fastfill_product_call` of csrc/fastfill.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("a", "b", "out")),
        *((f"{name}_stride", c_int64) for name in ("a", "b", "out")),
        *((name, c_int64) for name in ("tokens", "rows", "columns")),
        ("threads", c_int32),
        ("isa", c_char_p),
    )


class _PackedCall(ctypes.Structure):
    """`fastfill_packed_call` of csrc/fastfill.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("blocks", "x", "out", "scale", "inverse")),
        *((f"{name}_stride", c_int64) for name in ("blocks", "x", "out")),
        *((name, c_int64) for name in ("rows", "columns", "tokens")),
        *((name, c_int32) for name in ("kind", "dtype", "transposed", "threads")),
        ("isa", c_char_p),
    )


def _library_file() -> Path | None:
    """The library in any of the package's folders (an editable install has two: sources and built files)."""
    package = sys.modules[__package__ or "fastfill.kernels"]
    for folder in [*getattr(package, "__path__", []), str(Path(__file__).parent)]:
        for name in ("_native.so", "_native.dylib", "_native.dll"):
            if (Path(folder) / name).is_file():
                return Path(folder) / name
    # scikit-build-core's editable mode leaves it in site-packages, from where its import hook maps modules.
    for entry in sys.path:
        candidate = Path(entry) / "fastfill" / "kernels" / "_native.so"
        if candidate.is_file():
            return candidate
    return None


def _gomp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP library torch has loaded (several may be loaded: torch's own first)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    files = {f for f in files if Path(f).name.startswith(("libgomp", "libiomp5", "libomp"))}
    torch_home = str(Path(torch.__file__).parent)
    for file in sorted(files, key=lambda f: (not f.startswith(torch_home), f)):
        try:
            return ctypes.cast(ctypes.CDLL(file).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def problem(x: Tensor) -> str | None:
    """Why the ops cannot run on tensors like x, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU and x is on {x.device}"
    return None if x.dtype in _DTYPE_CODES else f"it knows bfloat16 and float32 and x is {x.dtype}"


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library ready to be called, or one line that says why there is none."""
    file = _library_file()
    if file is None:
        return "the native library was not built (no C++ compiler at install time): the slower torch path runs"
    try:
        lib = ctypes.CDLL(str(file))
        built = lib.fastfill_interface() if hasattr(lib, "fastfill_interface") else 1
        if built != INTERFACE:
            return f"the native library is of another fastfill (interface {built}, not {INTERFACE}): install fastfill again"
        lib.fastfill_sparse_ffn.argtypes = [POINTER(_Call)]
        lib.fastfill_block_scores.argtypes = [POINTER(_LowRankCall)]
        lib.fastfill_compensate.argtypes = [POINTER(_LowRankCall)]
        lib.fastfill_round.argtypes = [POINTER(_RoundCall)]
        lib.fastfill_product.argtypes = [POINTER(_ProductCall)]
        lib.fastfill_top_k.argtypes = [POINTER(_TopKCall)]
        for op in ("unpack", "packed_scales", "unpack_int8", "packed_linear"):
            getattr(lib, f"fastfill_{op}").argtypes = [POINTER(_PackedCall)]
        lib.fastfill_scratch_bytes.restype = c_int64
        lib.fastfill_release.restype = None
        lib.fastfill_isa_name.restype = c_char_p
        lib.fastfill_use_gomp.argtypes = [c_void_p]
        lib.fastfill_use_gomp.restype = None
        lib.fastfill_use_gomp(_gomp_parallel())
    except (OSError, AttributeError) as error:
        return f"the native library does not load: {error}"
    return lib


@functools.cache
def build() -> str:
    """Differs between libraries: a digest of the file, empty without one."""
    file = _library_file()
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file else ""


@functools.cache
def isas() -> dict[str, bool]:
    """Instruction sets in the library, best first -> whether this processor has them. Empty without the library."""
    lib = _load()
    if isinstance(lib, str):
        return {}
    return {lib.fastfill_isa_name(i).decode(): bool(lib.fastfill_isa_supported(i)) for i in range(lib.fastfill_isa_count())}


def isa() -> str:
    """The instruction set that runs: what FASTFILL_ISA names, or the best this processor has.

    Raises UserError where FASTFILL_ISA names one that does not exist or that this processor lacks.
    """
    return _pick_isa(os.environ.get(ISA_VARIABLE, ""))


@functools.cache
def _pick_isa(wanted: str) -> str:
    known = isas()
    if not wanted:
        return next((name for name, supported in known.items() if supported), "none")
    if not known.get(wanted):
        can = ", ".join(name for name, supported in known.items() if supported)
        raise UserError(f"{ISA_VARIABLE}={wanted} cannot run here: there are {can or 'none'}; unset it, or name one of these.")
    return wanted


@functools.cache
def threads_from() -> str:
    """Whose threads the kernel runs on."""
    return "torch's own pool" if _gomp_parallel() else "started for each call (torch's OpenMP library was not found)"


def usable() -> bool:
    """Whether the native kernel can run here."""
    return not isinstance(_load(), str)


def status() -> str:
    """One line: which instruction set runs and why, or why the kernel cannot run."""
    lib = _load()
    if isinstance(lib, str):
        return lib
    why = f"{ISA_VARIABLE} says so" if os.environ.get(ISA_VARIABLE) else "the best of this processor"
    missing = [name for name, supported in isas().items() if not supported]
    return f"{isa()}, {why}" + (f" (it lacks {', '.join(missing)})" if missing else "")


def scratch_bytes() -> int:
    """Bytes of scratch memory in use or kept between calls; 0 where there is no library."""
    lib = _load()
    return 0 if isinstance(lib, str) else int(lib.fastfill_scratch_bytes())


def release() -> None:
    """Free the scratch memory that no call is using."""
    lib = _load()
    if not isinstance(lib, str):
        lib.fastfill_release()


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Sequence[int],
    id_offsets: Sequence[int],
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    init: Tensor | None,
    out: Tensor,
    scales: "Scales | None" = None,
) -> None:
    """As `torch_ref.sparse_ffn`. Shapes and dtypes are checked by the caller, the ids here (in C++)."""
    lib = _library()
    ids = ids.contiguous()
    x = _unit_rows(x)
    gate_bias, up_bias = (None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias))
    init = None if init is None else _unit_rows(init)
    scaled = {} if scales is None else {f"{name}_scale": scale.contiguous() for name, scale in scales._asdict().items()}
    target = out if out.stride(1) == 1 or out.shape[1] == 1 else torch.empty(out.shape, dtype=out.dtype)
    n = len(rows)
    call = _Call(
        x=x.data_ptr(),
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        down_t=down_t.data_ptr(),
        gate_bias=None if gate_bias is None else gate_bias.data_ptr(),
        up_bias=None if up_bias is None else up_bias.data_ptr(),
        init=None if init is None else init.data_ptr(),
        **{name: scale.data_ptr() for name, scale in scaled.items()},
        out=target.data_ptr(),
        ids=ids.data_ptr(),
        rows=(c_int64 * n)(*rows),
        id_offsets=(c_int64 * n)(*id_offsets),
        x_stride=_row_stride(x),
        gate_stride=_row_stride(gate),
        up_stride=_row_stride(up),
        down_stride=_row_stride(down_t),
        init_stride=0 if init is None else _row_stride(init),
        out_stride=_row_stride(target),
        hidden=x.shape[1],
        neurons=gate.shape[0],
        n_blocks=n - 1,
        dtype=_DTYPE_CODES[x.dtype],
        activation=_ACTIVATION_CODES[activation],
        ids_are_64bit=ids.dtype == torch.int64,
        threads=torch.get_num_threads(),
        isa=isa().encode(),
    )
    code = lib.fastfill_sparse_ffn(byref(call))
    if code == 1:
        raise ValueError(f"ids must lie in [0, {gate.shape[0]}): those of block {call.bad_block} do not")
    if code == 2:
        raise ValueError(f"ids must be sorted and unique within each block: those of block {call.bad_block} are not")
    _check_code(code)
    if target is not out:
        out.copy_(target)


def block_scores(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, block_size: int) -> Tensor:
    """As `torch_ref.block_scores`. Shapes and dtypes are checked by the caller."""
    out = torch.empty(x.shape[0] // block_size, w_out.shape[0], dtype=torch.float32)
    _low_rank("fastfill_block_scores", x, w_in, w_out, bias, out, block_size=block_size)
    return out


def compensate(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, linear_rank: int) -> Tensor:
    """As `torch_ref.compensate`. Shapes and dtypes are checked by the caller."""
    out = torch.empty(x.shape[0], w_out.shape[0], dtype=x.dtype)
    _low_rank("fastfill_compensate", x, w_in, w_out, bias, out, linear_rank=linear_rank)
    return out


def _low_rank(op: str, x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, out: Tensor, **sizes: int) -> None:
    x, w_in, w_out, bias = _unit_rows(x), _unit_rows(w_in), _unit_rows(w_out), bias.contiguous()
    call = _LowRankCall(
        x=x.data_ptr(),
        w_in=w_in.data_ptr(),
        w_out=w_out.data_ptr(),
        bias=bias.data_ptr(),
        out=out.data_ptr(),
        x_stride=_row_stride(x),
        w_in_stride=_row_stride(w_in),
        w_out_stride=_row_stride(w_out),
        out_stride=out.shape[1],
        tokens=x.shape[0],
        hidden=x.shape[1],
        rank=w_in.shape[0],
        columns=w_out.shape[0],
        dtype=_DTYPE_CODES[x.dtype],
        threads=torch.get_num_threads(),
        isa=isa().encode(),
        **sizes,
    )
    _check_code(getattr(_library(), op)(byref(call)))


def top_k(scores: Tensor, kept: int) -> Tensor:
    """As `torch_ref.top_k`. Shapes are checked by the caller."""
    scores = _unit_rows(scores.float())
    ids = torch.empty(scores.shape[0], kept, dtype=torch.int32)
    call = _TopKCall(
        scores=scores.data_ptr(),
        ids=ids.data_ptr(),
        scores_stride=_row_stride(scores),
        rows=scores.shape[0],
        neurons=scores.shape[1],
        kept=kept,
        threads=torch.get_num_threads(),
        isa=isa().encode(),
    )
    _check_code(_library().fastfill_top_k(byref(call)))
    return ids


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `int8.rounded`, of x (T, K) in one of `DTYPES`."""
    x = _unit_rows(x)
    q = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(len(x), dtype=torch.float32, device="cpu")
    call = _RoundCall(
        x=x.data_ptr(),
        q=q.data_ptr(),
        scale=scale.data_ptr(),
        x_stride=_row_stride(x),
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=_DTYPE_CODES[x.dtype],
        threads=torch.get_num_threads(),
        isa=isa().encode(),
    )
    _check_code(_library().fastfill_round(byref(call)))
    return q, scale


def product(a: Tensor, b: Tensor) -> Tensor:
    """As `int8.product`, of a's from -127 and at most `int8.WIDEST` columns, which the caller checks."""
    a, b = _unit_rows(a), _unit_rows(b)
    out = torch.empty(len(a), len(b), dtype=torch.float32, device="cpu")
    call = _ProductCall(
        a=a.data_ptr(),
        b=b.data_ptr(),
        out=out.data_ptr(),
        a_stride=_row_stride(a),
        b_stride=_row_stride(b),
        out_stride=len(b),
        tokens=len(a),
        rows=len(b),
        columns=a.shape[1],
        threads=torch.get_num_threads(),
        isa=isa().encode(),
    )
    _check_code(_library().fastfill_product(byref(call)))
    return out


def unpack(blocks: Tensor, kind: int, out: Tensor) -> None:
    """As `packed.unpack`, into out (R, C). Shapes and dtypes are checked by the caller, here and below."""
    _packed("unpack", blocks, kind, *out.shape, out=out, out_stride=_row_stride(out), dtype=_DTYPE_CODES[out.dtype])


def packed_scales(blocks: Tensor, kind: int, columns: int) -> tuple[Tensor, Tensor]:
    """As `packed.scales`."""
    scale, inverse = (torch.empty(len(blocks), dtype=torch.float32) for _ in range(2))
    _packed("packed_scales", blocks, kind, len(blocks), columns, scale=scale, inverse=inverse)
    return scale, inverse


def unpack_int8(blocks: Tensor, kind: int, inverse: Tensor, out: Tensor, transposed: bool) -> None:
    """As `packed.unpack_int8`, into out."""
    rows, columns = reversed(out.shape) if transposed else out.shape
    inverse = inverse.contiguous()
    strides = {"out_stride": _row_stride(out)}
    _packed("unpack_int8", blocks, kind, rows, columns, inverse=inverse, out=out, transposed=transposed, **strides)


def packed_linear(x: Tensor, blocks: Tensor, kind: int) -> Tensor:
    """As `packed.linear`."""
    x, out = _unit_rows(x), torch.empty(len(x), len(blocks), dtype=x.dtype)
    sizes = {"x_stride": _row_stride(x), "out_stride": len(blocks), "tokens": len(x), "dtype": _DTYPE_CODES[x.dtype]}
    _packed("packed_linear", blocks, kind, len(blocks), x.shape[1], x=x, out=out, **sizes)
    return out


def _packed(op: str, blocks: Tensor, kind: int, rows: int, columns: int, **fields: Tensor | int) -> None:
    blocks = _unit_rows(blocks)
    call = _PackedCall(
        blocks=blocks.data_ptr(),
        blocks_stride=_row_stride(blocks),
        rows=rows,
        columns=columns,
        kind=kind,
        threads=torch.get_num_threads(),
        isa=isa().encode(),
        **{name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()},
    )
    _check_code(getattr(_library(), f"fastfill_{op}")(byref(call)))


def _library() -> ctypes.CDLL:
    lib = _load()
    if isinstance(lib, str):
        raise RuntimeError(lib)
    return lib


def _check_code(code: int) -> None:
    if code == 3:
        raise MemoryError("no memory for the native kernel's scratch")
    if code:
        raise RuntimeError(f"the native kernel failed with code {code}")


def _unit_rows(t: Tensor) -> Tensor:
    """``t`` itself if its rows are contiguous, else a copy."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _row_stride(t: Tensor) -> int:
    """Elements from a row to the next; of a single row torch may say anything, also what no multiplication survives."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]
