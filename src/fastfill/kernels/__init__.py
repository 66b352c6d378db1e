"""The ops of a sparse FFN layer, in the order they run: `block_scores`, `top_k`, `compensate`, `sparse_ffn`.

Three kernels compute each: ``native`` (C++, CPU), ``triton`` (CUDA) and ``torch`` (also the reference). Which of them runs
is decided in `choose` and nowhere else.
"""

import functools
import importlib.util
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, torch_ref

__all__ = ["ACTIVATIONS", "available", "block_scores", "choose", "compensate", "describe", "sparse_ffn", "top_k"]

KERNELS = ("native", "triton", "torch")
ACTIVATIONS = tuple(torch_ref.ACTIVATIONS)


CHECK_IDS_ON_GPU = False  # True, for debugging: ids on a GPU are checked too, which waits for it at every call


def available() -> dict[str, str]:
    """Name of each kernel -> one line that says whether it can run here, and why (not)."""
    triton = _triton_missing() or "usable for CUDA tensors"
    return {"native": cpu.status(), "triton": triton, "torch": "usable everywhere; copies the selected rows"}


def choose(kernel: str = "auto", x: Tensor | None = None, grad: bool = False) -> str:
    """The kernel that will run: ``"native"``, ``"triton"`` or ``"torch"``.

    ``kernel`` is a name or ``"auto"``, which takes ``triton`` for CUDA tensors and ``native`` for others, where they are
    installed, know the device and dtype of ``x`` and no gradient is wanted (``grad``), and ``torch`` otherwise. Raises
    ValueError for a name that does not exist or cannot run here.
    """
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"unknown kernel {kernel!r}: there are {', '.join(('auto', *KERNELS))}")
    if kernel == "torch":
        return "torch"
    name = kernel if kernel != "auto" else "triton" if x is not None and x.is_cuda else "native"
    problem = _problem(name, x, grad)
    if problem is None:
        return name
    if kernel != "auto":
        raise ValueError(f"kernel {name!r} cannot run: {problem}")
    return "torch"


def _problem(name: str, x: Tensor | None, grad: bool) -> str | None:
    """Why the kernel cannot run on x, or None."""
    missing = _triton_missing() if name == "triton" else None if cpu.usable() else cpu.status()
    if missing:
        return missing
    if grad:
        return "it has no gradient and an input requires one (use torch.no_grad or kernel='torch')"
    if x is None:
        return None
    if name == "native":
        if x.device.type != "cpu":
            return f"it runs on the CPU and x is on {x.device}"
        return None if x.dtype in cpu.DTYPES else f"it knows bfloat16 and float32 and x is {x.dtype}"
    gpu = _gpu()
    if not x.is_cuda and not gpu.INTERPRETED:
        return f"it runs on CUDA and x is on {x.device}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"it needs compute capability 8.0 and {x.device} has less"
    return None if x.dtype in gpu.DTYPES else f"it knows bfloat16, float16 and float32 and x is {x.dtype}"


@functools.cache
def _triton_missing() -> str | None:
    """Why Triton cannot be used, or None. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastfill[gpu]')"
    return None


def _gpu() -> ModuleType:
    """The Triton kernels, imported on first use."""
    return importlib.import_module(".gpu", __name__)


def _ops(name: str) -> ModuleType:
    """Where a kernel's ops are."""
    return _gpu() if name == "triton" else cpu if name == "native" else torch_ref


def describe() -> str:
    """Which kernel runs here, on which instruction set and with how many threads, and why; for ``fastfill env``."""
    threads = f"{torch.get_num_threads()} threads (torch.get_num_threads())"
    if choose() == "native":
        threads += f", {cpu.threads_from()}"
    lines = [f"kernel {choose()}: {cpu.status()}", threads]
    if torch.cuda.is_available():
        here = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        lines.append(
            f"on {torch.cuda.get_device_name()}: kernel {choose(x=here)} ({_problem('triton', here, False) or 'Triton'})"
        )
    return "\n".join(lines)


def _boundaries(name: str, bounds: Tensor, n: int | None, total: int) -> list[int]:
    """Check cumulative boundaries 0 = b[0] <= ... <= b[-1] = total and give them as a list."""
    if bounds.dim() != 1 or bounds.dtype not in (torch.int64, torch.int32) or bounds.numel() == 0:
        raise ValueError(f"{name} must be N + 1 int64 boundaries, not {bounds.dtype} {list(bounds.shape)}")
    b: list[int] = bounds.tolist()
    if n is not None and len(b) != n + 1:
        raise ValueError(f"{name} has {len(b)} boundaries, but there are {n} blocks: expected {n + 1}")
    if b[0] != 0 or b[-1] != total or any(lo > hi for lo, hi in pairwise(b)):
        raise ValueError(f"{name} must rise from 0 to {total} without falling")
    return b


def _check_ids(ids: Tensor, id_offsets: list[int], n_neurons: int) -> None:
    """Raise ValueError unless ids are inside [0, F) and strictly rising within each block."""
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= n_neurons:
        raise ValueError(f"ids must lie in [0, {n_neurons}): found {int(low)} to {int(high)}")
    rising = ids[1:] > ids[:-1]
    starts = torch.tensor(id_offsets[1:-1], device=ids.device, dtype=torch.int64) - 1  # pairs across blocks are free
    starts = starts[(starts >= 0) & (starts < rising.numel())]
    rising[starts] = True
    if not bool(rising.all()):
        raise ValueError("ids must be sorted and unique within each block")


def block_scores(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, block_size: int, *, kernel: str = "auto") -> Tensor:
    """What the predictor says of each block: ``softmax(w_out (w_in x_t) + bias)`` summed over its tokens t.

    Args:
        x: ``(T, H)``, the tokens of N blocks of ``block_size`` one after the other.
        w_in, w_out, bias: ``(r, H)``, ``(F, r)`` and ``(F,)``.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``; see `choose`.

    Returns:
        ``(N, F)`` fp32. A token with NaN or +inf among its logits makes its block's scores NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if torch.compiler.is_compiling():  # one opaque node in the graph
        scores: Tensor = _block_scores_op(x, w_in, w_out, bias, block_size, kernel)
        return scores
    _check_low_rank(x, w_in, w_out, bias)
    if block_size < 1 or x.shape[0] % block_size:
        raise ValueError(f"{x.shape[0]} tokens do not make blocks of {block_size}")
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_in, w_out, bias))
    return _ops(choose(kernel, x, grad)).block_scores(x, w_in, w_out, bias, block_size)


def compensate(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, linear_rank: int, *, kernel: str = "auto") -> Tensor:
    """What the compensator adds to each token: ``w_out a + bias`` with ``a = w_in x``, SiLU on ``a[linear_rank:]``.

    Args:
        x: ``(T, H)``.
        w_in, w_out, bias: ``(r, H)``, ``(H', r)`` and ``(H',)``.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``; see `choose`.

    Returns:
        ``(T, H')`` in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if torch.compiler.is_compiling():
        y: Tensor = _compensate_op(x, w_in, w_out, bias, linear_rank, kernel)
        return y
    _check_low_rank(x, w_in, w_out, bias)
    if not 0 <= linear_rank <= w_in.shape[0]:
        raise ValueError(f"linear_rank must lie in 0 to {w_in.shape[0]}, the rows of w_in, not {linear_rank}")
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_in, w_out, bias))
    return _ops(choose(kernel, x, grad)).compensate(x, w_in, w_out, bias, linear_rank)


def top_k(scores: Tensor, kept: int, *, kernel: str = "auto") -> Tensor:
    """The ids of the ``kept`` largest scores of each row, rising. Of equal scores the lowest ids are kept; 0 and -0 are
    equal; NaN counts as infinity.

    Args:
        scores: ``(N, F)``.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``; see `choose`.

    Returns:
        ``(N, K)`` int32.

    Raises:
        ValueError: scores that are no floating point matrix, ``kept`` outside 0 to F.
    """
    if torch.compiler.is_compiling():
        ids: Tensor = _top_k_op(scores, kept, kernel)
        return ids
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be a floating point (N, F), not {scores.dtype} {list(scores.shape)}")
    if not 0 <= kept <= scores.shape[1]:
        raise ValueError(f"kept must lie in 0 to {scores.shape[1]}, the neurons of a row, not {kept}")
    return _ops(choose(kernel, scores)).top_k(scores, kept)


@torch.library.custom_op("fastfill::block_scores", mutates_args=())
def _block_scores_op(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, block_size: int, kernel: str) -> Tensor:
    return block_scores(x, w_in, w_out, bias, block_size, kernel=kernel)


@_block_scores_op.register_fake
def _(x, w_in, w_out, bias, block_size, kernel):
    return x.new_empty(x.shape[0] // block_size, w_out.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastfill::compensate", mutates_args=())
def _compensate_op(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, linear_rank: int, kernel: str) -> Tensor:
    return compensate(x, w_in, w_out, bias, linear_rank, kernel=kernel)


@_compensate_op.register_fake
def _(x, w_in, w_out, bias, linear_rank, kernel):
    return x.new_empty(x.shape[0], w_out.shape[0])


@torch.library.custom_op("fastfill::top_k", mutates_args=())
def _top_k_op(scores: Tensor, kept: int, kernel: str) -> Tensor:
    return top_k(scores, kept, kernel=kernel)


@_top_k_op.register_fake
def _(scores, kept, kernel):
    return scores.new_empty(scores.shape[0], kept, dtype=torch.int32)


def _check_low_rank(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point (T, H), not {x.dtype} {list(x.shape)}")
    if w_in.dim() != 2 or w_in.shape[1] != x.shape[1]:
        raise ValueError(f"w_in must be (r, {x.shape[1]}), not {list(w_in.shape)}")
    if w_out.dim() != 2 or w_out.shape[1] != w_in.shape[0]:
        raise ValueError(f"w_out must have {w_in.shape[0]} columns, the rows of w_in, not {list(w_out.shape)}")
    if bias.shape != w_out.shape[:1]:
        raise ValueError(f"bias must be ({w_out.shape[0]},) like the rows of w_out, not {list(bias.shape)}")
    for label, t in (("w_in", w_in), ("w_out", w_out), ("bias", bias)):
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{label} is {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}")


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    *,
    rows: Tensor | None = None,
    id_offsets: Tensor | None = None,
    activation: str = "silu",
    init: Tensor | None = None,
    out: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """FFN of ``N`` blocks of tokens, each with the neurons it keeps: per block

    ``y = init + (act(x @ gate[ids].T) * (x @ up[ids].T)) @ down_t[ids]``, sums in fp32, result in the dtype of ``x``.

    Args:
        x: ``(T, H)``, the tokens of all blocks one after the other.
        gate, up, down_t: ``(F, H)`` weights, one row per neuron (``down_t`` is the down projection transposed).
        ids: ``(N, K)`` int32 or int64, sorted and unique within a row; or 1-D ``(S,)`` together with ``id_offsets``.
        rows: ``(N + 1,)`` int64 on the CPU, cumulative token boundaries of the blocks; None: N blocks of T / N tokens.
        id_offsets: ``(N + 1,)`` int64 on the CPU, cumulative boundaries of the blocks in 1-D ``ids``.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        init: ``(T, H)`` added to the result (the compensator's output), or None.
        out: ``(T, H)`` to write into; may be ``init`` itself, must not overlap ``x``. None: a new tensor.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``; see `choose`.

    Returns:
        ``(T, H)`` in the dtype of ``x``: ``out`` if given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids out of range, unsorted or repeated, unknown names.

    On CUDA nothing waits for the device, so ids are not checked there (see `CHECK_IDS_ON_GPU`): ``triton`` reads the nearest
    neuron for an id out of range, and unsorted or repeated ids are only slower. A CUDA graph may capture the call once a
    call of the same layout has run.
    """
    if torch.compiler.is_compiling():  # one opaque node in the graph
        y = _op(x, gate, up, down_t, ids, rows, id_offsets, activation, init, kernel)
        return y if out is None else out.copy_(y)
    tensors = (x, gate, up, down_t) if init is None else (x, gate, up, down_t, init)
    name = choose(kernel, x, grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    bounds, offsets = _check(x, gate, up, down_t, ids, rows, id_offsets, activation, init, out)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = ids.reshape(-1)
    if name != "native" and (CHECK_IDS_ON_GPU or not ids.is_cuda):  # native checks them itself
        _check_ids(flat, offsets, gate.shape[0])
    _ops(name).sparse_ffn(x, gate, up, down_t, flat, bounds, offsets, activation, init, out)
    return out


@torch.library.custom_op("fastfill::sparse_ffn", mutates_args=())
def _op(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    id_offsets: Tensor | None,
    activation: str,
    init: Tensor | None,
    kernel: str,
) -> Tensor:
    """`sparse_ffn` as a torch operator: no gradient, a new output."""
    return sparse_ffn(
        x, gate, up, down_t, ids, rows=rows, id_offsets=id_offsets, activation=activation, init=init, kernel=kernel
    )


@_op.register_fake
def _(x, gate, up, down_t, ids, rows, id_offsets, activation, init, kernel):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    id_offsets: Tensor | None,
    activation: str,
    init: Tensor | None,
    out: Tensor | None,
) -> tuple[list[int], list[int]]:
    """Raise ValueError for what does not fit together; else the boundaries of the blocks in x and in flat ids."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: there are {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point (T, H), not {x.dtype} {list(x.shape)}")
    n_tokens, hidden = x.shape
    for label, w in (("gate", gate), ("up", up), ("down_t", down_t)):
        if w.dim() != 2 or w.shape[1] != hidden or w.shape != gate.shape:
            raise ValueError(f"{label} must be (F, {hidden}) like gate, not {list(w.shape)} (gate: {list(gate.shape)})")
    for label, t in (("init", init), ("out", out)):
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{label} must be {list(x.shape)} like x, not {list(t.shape)}")
    for label, t in (("gate", gate), ("up", up), ("down_t", down_t), ("init", init), ("out", out)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{label} is {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}")
    for label, w in (("gate", gate), ("up", up), ("down_t", down_t)):
        if hidden > 1 and w.stride(1) != 1:  # a copy per call would cost more than the op
            raise ValueError(f"the rows of {label} must be contiguous: make {label}.contiguous() once, ahead")
    if ids.device != x.device:
        raise ValueError(f"ids are on {ids.device}, but x is on {x.device}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, not {ids.dtype}")
    if ids.dim() == 2 and id_offsets is None:
        n, k = ids.shape
        offsets = list(range(0, n * k + 1, k)) if k else [0] * (n + 1)
    elif ids.dim() == 1 and id_offsets is not None:
        offsets = _boundaries("id_offsets", id_offsets, None, ids.numel())
        n = len(offsets) - 1
    else:
        raise ValueError("ids must be (N, K) without id_offsets, or 1-D with id_offsets")
    if rows is not None:
        bounds = _boundaries("rows", rows, n, n_tokens)
    elif n == 0 or n_tokens % n:
        raise ValueError(f"{n_tokens} tokens do not make {n} equal blocks: give rows")
    else:
        bounds = [i * (n_tokens // n) for i in range(n + 1)]
    return bounds, offsets
