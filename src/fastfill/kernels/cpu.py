"""Binding of the native CPU kernel (under construction: not built yet)."""

from torch import Tensor


def usable() -> bool:
    """Whether the native kernel can run here."""
    return False


def status() -> str:
    """One line: usable or not, and why."""
    return "not built: the torch path is used"


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: list[int],
    id_offsets: list[int],
    activation: str,
    init: Tensor | None,
    out: Tensor,
) -> None:
    """As `torch_ref.sparse_ffn`."""
    raise NotImplementedError
