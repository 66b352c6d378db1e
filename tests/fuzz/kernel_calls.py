"""The sparse FFN op with random problems, well and badly formed, on every kernel and instruction set of this machine."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
from test_kernels import ACTS, BIASES, KERNELS, excess, problem

from fastfill import kernels
from fuzz import bed

NAMES = ("x", "gate", "up", "down_t", "ids", "rows", "id_offsets", *BIASES, "init")
NUMBERS = (0, -1, 1, 2**31 - 1, -(2**31), 2**62)


def world(_: Path) -> bed.World:
    def case(rng: random.Random) -> tuple[str, int, bed.Act]:
        kernel, isa = rng.choice(KERNELS)
        os.environ.pop(kernels.cpu.ISA_VARIABLE, None)
        if isa:
            os.environ[kernels.cpu.ISA_VARIABLE] = isa
        blocks = rng.randrange(5)
        neurons, hidden = rng.choice((1, 7, 16, 33, 96, 130)), rng.choice((1, 3, 16, 31, 32, 64, 100))
        lengths = [rng.choice((0, 1, 5, 8, 16, 33)) for _ in range(blocks)]
        kept = [rng.randrange(neurons + 1) for _ in range(blocks)]
        dtype = rng.choice((torch.float32, torch.bfloat16))
        given: dict[str, Any] = problem(
            lengths or [0], kept or [0], hidden, neurons, dtype, rng.randrange(2**31), rng.random() < 0.7, True
        )
        given |= {name: None for name in BIASES if rng.random() < 0.5}
        activation = rng.choice(sorted(ACTS))
        what = "well formed"
        if rng.random() < 0.3:
            what = _strided(rng, given)
        if rng.random() < 0.6:
            what = f"{what}, {_spoil(rng, given)}"
        size = sum(t.numel() * t.element_size() for t in given.values() if isinstance(t, torch.Tensor))
        return f"{kernel} {isa} {str(dtype)[6:]}: {what}", size, lambda: _call(given, activation, kernel)

    return case


def _call(given: dict[str, Any], activation: str, kernel: str) -> tuple[str, str]:
    before = {name: given[name].clone() if isinstance(given[name], torch.Tensor) else None for name in NAMES}
    try:
        y = kernels.sparse_ffn(**given, activation=activation, kernel=kernel)
    except ValueError as error:
        return "refused", bed.check_sentence(str(error))
    for name, tensor in before.items():
        if tensor is not None and given[name] is not given.get("out") and not torch.equal(given[name], tensor):
            raise bed.Fault("changed", f"{name} was written to")
    worst = excess(y, _whole(before), activation, kernel)
    if not worst <= 1:
        raise bed.Fault("wrong", f"{worst:.3g} times the bound of the error")
    return "right", f"{worst:.2f} of the bound"


def _whole(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with what the op takes for those that are left out."""
    blocks = len(given["id_offsets"]) - 1
    rows = given["rows"] if given["rows"] is not None else torch.arange(blocks + 1) * (len(given["x"]) // max(1, blocks))
    return {**given, "rows": rows}


def _strided(rng: random.Random, given: dict[str, Any]) -> str:
    """The same values lying otherwise in memory."""
    name = rng.choice([name for name in ("x", "gate", "up", "down_t", "ids", *BIASES) if given[name] is not None])
    tensor, kind = given[name], rng.choice(("rows apart", "columns apart", "shifted", "transposed"))
    if tensor.dim() == 1 and kind in ("rows apart", "transposed"):
        kind = "shifted"
    if kind == "rows apart":
        wide = tensor.new_zeros(tensor.shape[0], tensor.shape[1] + rng.randrange(1, 9))
        wide[:, : tensor.shape[1]] = tensor
        given[name] = wide[:, : tensor.shape[1]]
    elif kind == "columns apart":
        wide = tensor.new_zeros(*tensor.shape, 2)
        wide[..., 0] = tensor
        given[name] = wide[..., 0]
    elif kind == "shifted":
        flat = tensor.new_zeros(tensor.numel() + 1)
        flat[1:] = tensor.reshape(-1)
        given[name] = flat[1:].view(tensor.shape)
    else:
        given[name] = tensor.t().contiguous().t()
    return f"{name} {kind}"


def _spoil(rng: random.Random, given: dict[str, Any]) -> str:
    """One argument made another: still a right call, or one that must be refused."""
    kind = rng.choice(("out", "out is init", "int32", "number", "shape", "type", "no rows", "order", "overlap", "expanded"))
    x, ids = given["x"], given["ids"]
    name = rng.choice([name for name in NAMES[:-1] if given[name] is not None])
    tensor = given[name]
    if kind == "out":
        given["out"] = torch.full_like(x, float("nan"))
    elif kind == "out is init" and given["init"] is not None:
        given["out"] = given["init"]
    elif kind == "int32":
        given["ids"] = ids.to(torch.int32)
    elif kind == "number":
        name = rng.choice(("ids", "rows", "id_offsets"))
        given[name] = given[name].clone()
        if given[name].numel():
            given[name][rng.randrange(given[name].numel())] = rng.choice(NUMBERS)
    elif kind == "shape":
        given[name] = rng.choice(
            (tensor[None], tensor.reshape(-1)[: max(0, tensor.numel() - 1)], torch.cat([tensor, tensor[:1]]))
        )
    elif kind == "type":
        given[name] = tensor.to(rng.choice((torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64)))
    elif kind == "no rows":
        given["rows"] = None
    elif kind == "order":
        given["ids"] = ids.flip(0)
    elif kind == "overlap":
        shared = torch.cat([x, x[:1]])
        given["x"], given["out"] = shared[: len(x)], shared[len(shared) - len(x) :]
    elif kind == "expanded":
        given["out"] = x.new_zeros(1, x.shape[1]).expand(x.shape)
    return f"{kind} {name}"
