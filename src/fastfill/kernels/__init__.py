"""The ops of a sparse FFN layer, in the order they run: `block_scores`, `top_k`, `compensate`, `sparse_ffn`.

Three kernels compute each: ``native`` (C++, CPU), ``triton`` (CUDA) and ``torch`` (also the reference). Which of them runs
is decided in `choose` and nowhere else.
"""

import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from . import contract, cpu, int8, torch_ref
from .contract import Bounds
from .contract import check_ids as _check_ids
from .int8 import Scales

__all__ = [
    "ACTIVATIONS", "Bounds", "Kernel", "Scales", "available", "block_scores", "choose", "compensate", "describe", "release",
    "resolve", "rounded", "scratch_bytes", "sparse_ffn", "top_k",
]  # fmt: skip

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
    problem: str | None = None if x is None else _module(name).problem(x)
    return problem


@functools.cache
def _triton_missing() -> str | None:
    """Why Triton cannot be used, or None. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastfill[gpu]')"
    return None


@functools.cache
def _module(name: str) -> ModuleType:
    """Where a kernel's ops are, and `problem`: why they cannot run on a tensor. Triton's is imported on first use."""
    return {"native": cpu, "torch": torch_ref}.get(name) or importlib.import_module(".gpu", __name__)


def _ops(kernel: "str | Kernel", *tensors: Tensor | None) -> ModuleType:
    """Where the ops are that run on these tensors, which are checked to have one type and one device."""
    x, grad = tensors[0], _wants_gradient(tensors)
    if isinstance(kernel, str):
        return _module(choose(kernel, x, grad))
    if grad:
        return torch_ref
    if problem := kernel.ops.problem(x):  # pointers of another device would be read
        raise ValueError(f"kernel {kernel.name!r} cannot run: {problem}")
    return kernel.ops


def _name(kernel: "str | Kernel", *tensors: Tensor | None) -> str:
    """The same as torch's operators are told it."""
    if isinstance(kernel, str):
        return kernel
    return "torch" if _wants_gradient(tensors) else kernel.name


def _wants_gradient(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def scratch_bytes() -> int:
    """Bytes of scratch memory that the native kernels hold in this process: in use now, or kept for the next call.

    A buffer is as large as the largest call that it served, and there are as many as calls ran at once. Triton's scratch is
    torch's, and counted there.
    """
    return cpu.scratch_bytes()


def release() -> None:
    """Free the native kernels' scratch memory that no call is using. The next call allocates it again, which costs a few
    percent once."""
    cpu.release()


def describe() -> str:
    """Which kernel runs here, on which instruction set and with how many threads, and why; the memory that native kernels
    keep. For ``fastfill env``."""
    threads = f"{torch.get_num_threads()} threads (torch.get_num_threads())"
    if choose() == "native":
        threads += f", {cpu.threads_from()}"
    lines = [f"kernel {choose()}: {cpu.status()}", threads]
    if cpu.usable():
        lines.append(f"native scratch: {scratch_bytes() / 1e6:.0f} MB held by this process (kernels.release() frees it)")
    if torch.cuda.is_available():
        here = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        lines.append(
            f"on {torch.cuda.get_device_name()}: kernel {choose(x=here)} ({_problem('triton', here, False) or 'Triton'})"
        )
    return "\n".join(lines)


def block_scores(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, block_size: int, *, kernel: "str | Kernel" = "auto"
) -> Tensor:
    """What the predictor says of each block: ``softmax(w_out (w_in x_t) + bias)`` summed over its tokens t.

    Args:
        x: ``(T, H)``, the tokens of N blocks of ``block_size`` one after the other.
        w_in, w_out, bias: ``(r, H)``, ``(F, r)`` and ``(F,)``.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``, see `choose`; or a `Kernel`.

    Returns:
        ``(N, F)`` fp32. A token with NaN or +inf among its logits makes its block's scores NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if torch.compiler.is_compiling():  # one opaque node in the graph
        scores: Tensor = _block_scores_op(x, w_in, w_out, bias, block_size, _name(kernel, x, w_in, w_out, bias))
        return scores
    contract.check_low_rank(x, w_in, w_out, bias)
    if block_size < 1 or x.shape[0] % block_size:
        raise ValueError(f"{x.shape[0]} tokens do not make blocks of {block_size}")
    return _ops(kernel, x, w_in, w_out, bias).block_scores(x, w_in, w_out, bias, block_size)


def compensate(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, linear_rank: int, *, kernel: "str | Kernel" = "auto"
) -> Tensor:
    """What the compensator adds to each token: ``w_out a + bias`` with ``a = w_in x``, SiLU on ``a[linear_rank:]``.

    Args:
        x: ``(T, H)``.
        w_in, w_out, bias: ``(r, H)``, ``(H', r)`` and ``(H',)``.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``, see `choose`; or a `Kernel`.

    Returns:
        ``(T, H')`` in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if torch.compiler.is_compiling():
        y: Tensor = _compensate_op(x, w_in, w_out, bias, linear_rank, _name(kernel, x, w_in, w_out, bias))
        return y
    contract.check_low_rank(x, w_in, w_out, bias)
    if not 0 <= linear_rank <= w_in.shape[0]:
        raise ValueError(f"linear_rank must lie in 0 to {w_in.shape[0]}, the rows of w_in, not {linear_rank}")
    return _ops(kernel, x, w_in, w_out, bias).compensate(x, w_in, w_out, bias, linear_rank)


def top_k(scores: Tensor, kept: int, *, kernel: "str | Kernel" = "auto") -> Tensor:
    """The ids of the ``kept`` largest scores of each row, rising. Of equal scores the lowest ids are kept; 0 and -0 are
    equal; NaN counts as infinity.

    Args:
        scores: ``(N, F)``.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``, see `choose`; or a `Kernel`.

    Returns:
        ``(N, K)`` int32.

    Raises:
        ValueError: scores that are no floating point matrix, ``kept`` outside 0 to F, misaligned or negated views.
    """
    if torch.compiler.is_compiling():
        ids: Tensor = _top_k_op(scores, kept, _name(kernel))
        return ids
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be a floating point (N, F), not {scores.dtype} {list(scores.shape)}")
    if not 0 <= kept <= scores.shape[1]:
        raise ValueError(f"kept must lie in 0 to {scores.shape[1]}, the neurons of a row, not {kept}")
    contract.check_memory(scores=scores)
    return _ops(kernel, scores.detach()).top_k(scores, kept)


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


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, K) in eight bits, a scale per row: `int8.rounded`, by the native kernel where it runs. No gradient."""
    native = x.ndim == 2 and cpu.usable() and not x.is_neg() and cpu.problem(x) is None
    return cpu.rounded(x.detach()) if native else int8.rounded(x.detach())


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    *,
    rows: Tensor | Bounds | None = None,
    id_offsets: Tensor | Bounds | None = None,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    init: Tensor | None = None,
    out: Tensor | None = None,
    scales: Scales | None = None,
    kernel: "str | Kernel" = "auto",
) -> Tensor:
    """FFN of ``N`` blocks of tokens, each with the neurons it keeps: per block

    ``y = init + (act(x @ gate[ids].T + gate_bias[ids]) * (x @ up[ids].T + up_bias[ids])) @ down_t[ids]``, sums in fp32,
    result in the dtype of ``x``.

    Args:
        x: ``(T, H)``, the tokens of all blocks one after the other.
        gate, up, down_t: ``(F, H)`` weights, one row per neuron (``down_t`` is the down projection transposed).
        ids: ``(N, K)`` int32 or int64, sorted and unique within a row; or 1-D ``(S,)`` together with ``id_offsets``.
        rows: ``(N + 1,)`` int64 or int32 on the CPU, cumulative token boundaries of the blocks; or `Bounds`, checked
            once for many calls; None: N blocks of T / N tokens.
        id_offsets: the same of the blocks in 1-D ``ids``.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        gate_bias, up_bias: ``(F,)`` in the dtype of ``x``, or None.
        init: ``(T, H)`` added to the result (the compensator's output), or None.
        out: ``(T, H)`` to write into, each element in a place of its own; may be ``init`` itself, must not overlap anything
            else that is read. None: a new tensor.
        scales: of int8 weights, `int8.Scales`; x and h are then rounded to eight bits, see `int8`. On the CPU only.
        kernel: ``"auto"``, ``"native"``, ``"triton"`` or ``"torch"``, see `choose`; or a `Kernel`.

    Returns:
        ``(T, H)`` in the dtype of ``x``: ``out`` if given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids out of range, unsorted or repeated, unknown names, tensors
            that are misaligned or negated views, an ``out`` that overlaps itself or what is read.

    On CUDA nothing waits for the device, so ids are not checked there (see `CHECK_IDS_ON_GPU`): ``triton`` reads the nearest
    neuron for an id out of range, and unsorted or repeated ids are only slower. A CUDA graph may capture the call once a
    call of the same layout has run.
    """
    if torch.compiler.is_compiling():  # one opaque node in the graph
        rows, id_offsets = (torch.tensor(b) if isinstance(b, Bounds) else b for b in (rows, id_offsets))
        name = _name(kernel, x, gate, up, down_t, gate_bias, up_bias, init)
        factors = scales or (None, None, None)
        y = _op(x, gate, up, down_t, ids, rows, id_offsets, activation, gate_bias, up_bias, init, *factors, name)
        return y if out is None else out.copy_(y)
    ops = _ops(kernel, x, gate, up, down_t, gate_bias, up_bias, init, out)
    if scales and (x.device.type != "cpu" or _wants_gradient((x, gate_bias, up_bias, init))):
        raise ValueError("int8 weights run on the CPU and have no gradient: use torch.no_grad(), or the model's own weights")
    bounds, offsets = contract.check(
        x, gate, up, down_t, ids, rows, id_offsets, activation, gate_bias, up_bias, init, out, scales
    )  # fmt: skip
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = ids.reshape(-1)
    if ops is not cpu and (CHECK_IDS_ON_GPU or not ids.is_cuda):  # native checks them itself
        _check_ids(flat, offsets, gate.shape[0])
    more = {"scales": scales} if scales else {}
    ops.sparse_ffn(x, gate, up, down_t, flat, bounds, offsets, activation, gate_bias, up_bias, init, out, **more)
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
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    init: Tensor | None,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
    down_scale: Tensor | None,
    kernel: str,
) -> Tensor:
    """`sparse_ffn` as a torch operator: no gradient, a new output."""
    given = gate_scale is not None and up_scale is not None and down_scale is not None
    scales = Scales(gate_scale, up_scale, down_scale) if given else None  # type: ignore[arg-type]
    return sparse_ffn(
        x, gate, up, down_t, ids, rows=rows, id_offsets=id_offsets, activation=activation,
        gate_bias=gate_bias, up_bias=up_bias, init=init, scales=scales, kernel=kernel,
    )  # fmt: skip


@_op.register_fake
def _(x, *_others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Weights(Protocol):
    """What the op reads of an FFN; see `fastfill.ffn.FFN`."""

    @property
    def gate(self) -> Tensor: ...
    @property
    def up(self) -> Tensor: ...
    @property
    def activation(self) -> str: ...
    @property
    def gate_bias(self) -> Tensor | None: ...
    @property
    def up_bias(self) -> Tensor | None: ...
    @property
    def scales(self) -> Scales | None: ...


@dataclass(frozen=True)
class Kernel:
    """The ops of one implementation, chosen once: what a sparse FFN computes with, and what results record.

    name: "native", "triton" or "torch". reason: why this one, in a few words. expected_gain: time of the dense FFN over that
    of the sparse one where it was measured (`fastfill.choice`), None where it was not.

    Where a gradient is wanted, which native and Triton do not have, an op runs in torch.
    """

    name: str
    reason: str = ""
    expected_gain: float | None = None

    @property
    def ops(self) -> ModuleType:
        """Its module."""
        return _module(self.name)

    def block_scores(self, x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, block_size: int) -> Tensor:
        """See `fastfill.kernels.block_scores`; so for all."""
        return block_scores(x, w_in, w_out, bias, block_size, kernel=self)

    def top_k(self, scores: Tensor, kept: int) -> Tensor:
        return top_k(scores, kept, kernel=self)

    def compensate(self, x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, linear_rank: int) -> Tensor:
        return compensate(x, w_in, w_out, bias, linear_rank, kernel=self)

    def sparse_ffn(
        self,
        x: Tensor,
        ffn: Weights,
        down_t: Tensor,
        ids: Tensor,
        *,
        rows: Tensor | Bounds | None = None,
        id_offsets: Tensor | Bounds | None = None,
        init: Tensor | None = None,
    ) -> Tensor:
        """`init`, where it is given, is overwritten and is the result."""
        return sparse_ffn(
            x,
            ffn.gate,
            ffn.up,
            down_t,
            ids,
            rows=rows,
            id_offsets=id_offsets,
            activation=ffn.activation,
            gate_bias=ffn.gate_bias,
            up_bias=ffn.up_bias,
            init=init,
            out=init,
            scales=ffn.scales,
            kernel=self,
        )


def resolve(kernel: str, like: Tensor | None = None) -> Kernel:
    """The kernel that runs on tensors like this one, by `choose`. Raises ValueError as it does."""
    name = choose(kernel, like)
    if kernel != "auto":
        return Kernel(name, "asked for")
    wanted = "triton" if like is not None and like.is_cuda else "native"
    problem = _problem(wanted, like, False)
    return Kernel(name, f"{wanted} cannot run: {problem}" if problem else "the fastest there is here")
