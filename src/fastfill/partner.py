"""Is a model the one that an artifact was learned for? The partner rule, by samples of the weights.

An artifact stores entries of its base model: of every FFN matrix 16 runs of 32 along the input dimension, which begin at
multiples of 32, so that a run is a whole block of GGUF's formats (or two of 16); of all else in the base model 4 such runs a
layer (`sample`). A model that is loaded later is sampled at the same places and judged, tensor by tensor (`compare`):

same        equal once both are rounded to bf16, or both to fp16.
rounded     what rounding to a grid explains. If b is a rounded to steps s, |b - a| <= s/2, except for values outside the grid's
            range, which are cut to its ends; if both were rounded from one original, |b - a| <= (s_a + s_b)/2. To that comes
            2^-8 |a|, two roundings to bf16. Entries at an end of their block are left out. Of the others at most EXCESS of a
            tensor and EXCESS_ALL of the model may lie beyond that bound. The differences must also be as large as rounding
            makes them: errors that are uniform over a step are s / 4 in the mean, and LEAST s is asked for; smaller ones are
            a change of weights that were on the grid before, of which those up to EIGHT_BITS cannot be told from int8 made of
            them. A step s gives the relative distance s / (sqrt(12) sigma), 8.8 % at 4 bits (Q4_0), 15.4 % at 3 (Q3_K), and
            two grids add in squares; ROUNDED_MOST is the limit.
fine-tuned  further than that, and less than ANOTHER_FROM away. A change of relative size e takes those entries over the bound
            that are nearer to it than the change, the share 0.8 e sigma / s where errors are uniform over s. Measured on
            low-rank changes, EXCESS_ALL is crossed from e = 0.1 % on without a grid (24 % of the entries) and in Q8_0, 0.2 % in
            int8 per channel, 1 % in Q5_0 and Q4_0, 3 % in Q4_K; a smaller one hides in a rounding that is larger.
another     independent weights of like size are sqrt(2) away, of another size at least 1; ANOTHER_FROM is half of that.

The step of weights in eight bits is known, their scale (`widened`). Else it is the period of a block's values.
exp(2 pi i v / s), averaged over the n values v of a block, is 1 in length if all lie on a grid of step s, and about
1 / sqrt(n) if they do not (`period`). A tensor has a grid if half of its blocks show one: of those in Q8_0, Q6_K, Q5_0, Q5_K,
Q4_0, Q4_1, Q4_K, int8 per channel and int4 by groups 98 % and more do, of those in bf16 0.1 %. Formats of 4 bits and uneven
steps (IQ4) have the gaps between a block's values in place of steps.
Formats whose errors go beyond half a step (GPTQ), 8-bit floats (2.7 % away), and what was rounded to 5 or 6 bits after it was
on a coarser grid read as fine-tuned.

Artifacts of schema 1 and 2 have no samples. They are judged by fingerprints alone: same or another.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastfill import eight_bits, families
from fastfill.errors import UserError
from fastfill.ffn import FFN
from fastfill.kernels import Scales

SAME, ROUNDED, FINETUNED, ANOTHER = "same", "requantised or rounded", "fine-tuned", "another model"
RUN = 32  # entries
RUNS, RUNS_OUTSIDE, RUNS_ONCE = 16, 4, 64  # of an FFN's matrix, of another tensor of a layer, of one that is there once
# Measured on llama.cpp's quantisation: at most 0.25 % of a tensor and 0.06 % of all; with an importance matrix, which trades
# some entries for others, 1.1 % and 0.38 %.
EXCESS, EXCESS_ALL = 0.02, 0.005
ROUNDED_MOST = 0.2
LEAST = 0.15
EIGHT_BITS = 0.015  # int8 per channel of rows that reach to r sigma is r / (127 sqrt(12)) away: measured 0.7 to 1.3 %
ANOTHER_FROM = 0.5
CLEAR = {16: 0.85, 32: 0.75}  # block -> `period`'s clearness from which it is one. By chance: exp(-n clear^2) a step tried
OUTSIDE = "outside."
ROLES = ("gate", "up", "down")

Samples = dict[str, torch.Tensor]  # role -> (layers, runs, entries)


class Sample(NamedTuple):
    """Of one weight (R, C). rows: (8, C), for fingerprints. runs: (runs, RUN). steps: (runs, 1), of the grid that each run was
    rounded to, where it is known."""

    rows: torch.Tensor
    runs: torch.Tensor
    steps: torch.Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """kind: one of the four. distance: |b - a| / |a|, root mean square over tensors; NaN where there are only fingerprints."""

    kind: str
    distance: float = math.nan


# --- sampling -------------------------------------------------------------------------------------------------------------


def sample(weight: torch.Tensor) -> Sample:
    """What is looked at of an FFN's weight (R, C), on the CPU."""
    return take(tuple(weight.shape), lambda row, columns: weight[row, columns])


def take(shape: tuple[int, ...], read: Callable[[int, slice], torch.Tensor]) -> Sample:
    """`sample`, of a weight that need not be in memory. read: (row, columns) -> those entries, one-dimensional."""
    rows = [read(row, slice(0, shape[1])) for row in sampled_rows(shape[0])]
    return Sample(torch.stack(rows).cpu(), torch.stack([read(*place) for place in places(shape, RUNS)]).cpu())


def widened(found: Sample, scale: torch.Tensor) -> Sample:
    """The values that a sample of a weight in eight bits (R, C) stands for, in fp32. scale: of its rows, (R,) or (R, 1)."""
    scale = scale.float().reshape(-1, 1).cpu()
    steps = _steps(found, scale)
    return Sample(found.rows * scale[list(sampled_rows(len(scale)))], found.runs * steps, steps)


def stepped(found: Sample, scale: torch.Tensor) -> Sample:
    """A sample of a weight (R, C) whose rows are known to be rounded to steps of `scale`, (R,) or (R, 1)."""
    return found._replace(steps=_steps(found, scale))


def _steps(found: Sample, scale: torch.Tensor) -> torch.Tensor:
    """The scales of the rows that the runs lie in, (runs, 1)."""
    scale = scale.float().reshape(-1, 1).cpu()
    return scale[[row for row, _ in places((len(scale), found.rows.shape[1]), RUNS)]]


def sampled_rows(rows: int) -> range:
    """The rows of a weight that go into the fingerprint."""
    return range(0, rows, max(1, rows // 8))[:8]


def places(shape: tuple[int, ...], most: int) -> list[tuple[int, slice]]:
    """Where the runs of a weight (R, C) lie: down its diagonal."""
    rows, columns = shape
    width = min(RUN, columns)
    blocks = columns // width
    runs = min(most, rows * blocks)
    firsts = [width * (blocks * i // runs) for i in range(runs)]
    return [(rows * i // runs, slice(first, first + width)) for i, first in enumerate(firsts)]


def samples(anatomy: families.Anatomy) -> Samples:
    """What an artifact stores of its base model."""
    return {**inside(anatomy), **{OUTSIDE + name: found for name, found in outside(anatomy).items()}}


def inside(anatomy: families.Anatomy) -> Samples:
    """Of the FFNs alone."""
    return runs_of(sample_layers(anatomy))


def outside(anatomy: families.Anatomy) -> Samples:
    """Name -> runs of all that is not a matrix of an FFN: embeddings, attention, norms, biases, adapters. Not the head."""
    found: dict[str, list[torch.Tensor]] = {}
    weights = _outside(anatomy)
    roles = {name: re.sub(r"(^|\.)\d+\.", r"\1*.", name) for name in weights}
    for name, weight in weights.items():
        if weight.device.type != "meta" and type(weight.data) is torch.Tensor and weight.is_floating_point() and weight.numel():
            flat = weight.detach().reshape(-1, weight.shape[-1] if weight.dim() else 1)
            most = RUNS_ONCE if roles[name] == name else RUNS_OUTSIDE
            runs = torch.stack([flat[place] for place in places(tuple(flat.shape), most)])
            found.setdefault(roles[name], []).append(runs.cpu())
    alike = {name: runs for name, runs in found.items() if len({one.shape for one in runs}) == 1}
    return {name: torch.stack(runs) for name, runs in alike.items()}


def _outside(anatomy: families.Anatomy) -> dict[str, torch.Tensor]:
    inside = {id(weight) for ffn in anatomy.ffns for weight in ffn.module.parameters() if weight.dim() > 1}
    weights = {name: weight for name, weight in anatomy.base.named_parameters() if id(weight) not in inside}
    return {name: eight_bits.wide(weight) for name, weight in weights.items() if not name.endswith(eight_bits.BESIDE)}


def sample_layers(anatomy: families.Anatomy) -> list[list[Sample]]:
    """`sample` of gate, up and down of each layer."""
    return [_sampled(ffn.read(), ffn.rows) for ffn in anatomy.ffns]


def _sampled(ffn: FFN, scales: Scales | None) -> list[Sample]:
    """scales: of the int8 rows that the weights stand for, if they do. Packed ones are those of the model
    that the file is unpacked to."""
    ffn = ffn.wide(torch.bfloat16)
    found = [sample(weight) for weight in (ffn.gate, ffn.up, ffn.down)]
    if scales is None:
        return found
    return [(widened if ffn.scales else stepped)(one, by) for one, by in zip(found, scales, strict=True)]


def runs_of(layers: Iterable[list[Sample]]) -> Samples:
    """Of FFNs that were sampled."""
    found = list(layers)
    return {role: torch.stack([layer[i].runs for layer in found]) for i, role in enumerate(ROLES)}


def _steps_of(layers: Iterable[list[Sample]]) -> Samples:
    """Role -> (layers, runs, 1): `Sample.steps`, NaN where they are not known."""

    def steps(one: Sample) -> torch.Tensor:
        return torch.full((len(one.runs), 1), torch.nan) if one.steps is None else one.steps

    found = list(layers)
    return {role: torch.stack([steps(layer[i]) for layer in found]) for i, role in enumerate(ROLES)}


def run_shapes(base_model: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """The shapes of an artifact's samples of gate, up and down."""
    hidden, neurons = base_model["hidden_size"], base_model["intermediate_size"]
    found = {}
    for role, shape in (("gate", (neurons, hidden)), ("up", (neurons, hidden)), ("down", (hidden, neurons))):
        width = min(RUN, shape[1])
        found[role] = (base_model["layers"], min(RUNS, shape[0] * (shape[1] // width)), width)
    return found


# --- the rule -------------------------------------------------------------------------------------------------------------


def judge(base_model: dict[str, Any], known: Samples, layers: Iterable[list[Sample]]) -> Verdict:
    """What a model's FFNs are to an artifact. known: its samples, empty in older ones. layers: `sample` of gate, up, down."""
    if known:
        layers = list(layers)
        return compare({role: known[role] for role in ROLES}, runs_of(layers), _steps_of(layers))
    rows = ([one.rows for one in layer] for layer in layers)
    found = fingerprints_of(base_model["hidden_size"], base_model["intermediate_size"], base_model["layers"], rows)
    prints = {"bf16": base_model["fingerprint"], **base_model.get("fingerprints", {})}
    return Verdict(SAME if any(prints.get(name) == value for name, value in found.items()) else ANOTHER)


def check(base_model: dict[str, Any], known: Samples, layers: Iterable[list[Sample]], allow_finetuned: bool) -> list[str]:
    """`judge`; raises UserError for another model, and for a fine-tuned one unless that is allowed. Returns what to warn of."""
    verdict = judge(base_model, known, layers)
    name, distance = base_model["name"], f"{verdict.distance:.2%}"
    if verdict.kind == SAME:
        return []
    if verdict.kind == ROUNDED:
        return [
            f"The model's FFNs are those that the artifact was learned for ({name}), requantised or rounded ({distance} "
            "apart): measure the quality, or make an artifact for this precision with `fastfill calibrate`."
        ]
    if verdict.kind == ANOTHER:
        raise UserError(wrong_partner(name, "same shapes, other weights"))
    if allow_finetuned:
        return [
            f"The model's FFNs are a fine-tuned kind of those that the artifact was learned for ({name}; {distance} apart): "
            "measure the quality, or make an artifact for this model with `fastfill calibrate`."
        ]
    raise UserError(
        f"The model's FFNs are {distance} away from those that the artifact was learned for ({name}), more than rounding "
        "explains, as after fine-tuning; make an artifact for this model with `fastfill calibrate`, or accept it with "
        "allow_finetuned=True (--allow-finetuned) and measure the quality."
    )


def check_model(
    base_model: dict[str, Any],
    known: Samples,
    anatomy: families.Anatomy,
    allow_finetuned: bool,
    layers: list[list[Sample]] | None = None,
) -> list[str]:
    """`check`, of a loaded model; raises UserError for one of other shapes, too. layers: `sample_layers` of it, where they are
    there."""
    mine = (base_model["hidden_size"], base_model["intermediate_size"], base_model["layers"])
    theirs = (anatomy.hidden, anatomy.intermediate, len(anatomy.ffns))
    if mine != theirs:
        raise UserError(wrong_partner(base_model["name"], f"shapes {mine} against {theirs}"))
    layers = layers or sample_layers(anatomy)
    old = not known and "fingerprints" not in base_model
    if old and anatomy.ffns[0].dtype == torch.float16 and judge(base_model, known, layers).kind != SAME:
        raise UserError("This artifact does not know its model in fp16, for it is too old; load it in bf16 or fp32.")
    return check(base_model, known, layers, allow_finetuned)


def notes(base_model: dict[str, Any], known: Samples, anatomy: families.Anatomy, requantised: bool = False) -> list[str]:
    """What a user should know who puts the artifact on this model: one sentence each, for what differs outside the FFNs.

    requantised: the FFNs are, which was said; what is as near as rounding may be, is not worth another sentence then.
    """
    prints = base_model.get("fingerprints", {})
    if known:
        mine = {name.removeprefix(OUTSIDE): runs for name, runs in known.items() if name.startswith(OUTSIDE)}
        found = outside(anatomy)
        verdict = compare(mine, found)
        like = verdict.kind in (SAME, ROUNDED) or (requantised and verdict.distance <= ROUNDED_MOST)
    else:
        like = any(prints.get(f"outside_{name}") == value for name, value in fingerprints_outside(anatomy).items())
    if like:
        return []
    if anatomy.adapters:
        return [
            f"The model has adapters on {', '.join(anatomy.adapters)}; the artifact was learned without them: measure the "
            "quality, or merge them (with peft: merge_and_unload()) and calibrate the merged model."
        ]
    if known or prints:
        return [
            "The model's embeddings, attention or norms are not those that the artifact was learned with: measure the quality, "
            "or make an artifact for this model with `fastfill calibrate`."
        ]
    return []  # an artifact of the first days: it cannot be told


def wrong_partner(name: str, why: str) -> str:
    return (
        f"This artifact belongs to another model ({name}; {why}); "
        "load that model, or make an artifact for this one with `fastfill calibrate`."
    )


def compare(known: Samples, found: Samples, steps: Samples | None = None) -> Verdict:
    """The worst verdict over all tensors. Names and shapes that differ are another model's. steps: of what was found, (L, runs,
    1), NaN where they are not known."""
    if known.keys() != found.keys() or any(known[name].shape != found[name].shape for name in known):
        return Verdict(ANOTHER)
    squares, tensors, beyond, judged, rounded = 0.0, 0, 0.0, 0.0, True
    if same(known, found):
        return Verdict(SAME, 0.0)
    for name in known:
        a, b = known[name].float(), found[name].float()
        away = _distance(a, b)
        squares, tensors = squares + float(away.square().sum()), tensors + len(away)
        other = (~_equal(known[name], found[name])).nonzero()[:, 0]
        if not len(other) or not rounded:
            continue
        over, of = _beyond(a[other], b[other], steps[name][other] if steps else None)
        beyond, judged = beyond + float(over.sum()), judged + float(of.sum())
        rounded = bool(((over <= EXCESS * of) & (away[other] <= ROUNDED_MOST)).all())
    distance = math.sqrt(squares / max(tensors, 1))
    if rounded and beyond <= EXCESS_ALL * judged:
        return Verdict(ROUNDED, distance)
    return Verdict(FINETUNED if distance < ANOTHER_FROM else ANOTHER, distance)


def same(known: Samples, found: Samples) -> bool:
    return all(bool(_equal(known[name], found[name]).all()) for name in known)


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(L, runs, entries) twice -> (L,): equal under one of ROUNDINGS. NaN is equal to itself."""
    pairs = [(a.to(dtype), b.to(dtype)) for dtype in ROUNDINGS.values()]
    return torch.stack([((x == y) | (x.isnan() & y.isnan())).flatten(1).all(1) for x, y in pairs]).any(0)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(L, runs, entries) twice -> (L,): relative; at most 1 where a is zero."""
    difference, size = (b - a).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1)
    return difference / torch.where(size > 0, size, difference.clamp_min(1e-30))


def _beyond(a: torch.Tensor, b: torch.Tensor, steps: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, runs, entries) twice -> (L,) twice: entries further apart than rounding explains, all of them if it explains nothing,
    and of how many. The best of four explanations: a was rounded from b, b from a, both from one original, or one to eight
    bits after it was on the coarser grid, which still shows. steps: of b, see `compare`."""
    (step_a, inner_a), (step_b, inner_b) = _grid(a), _grid(b)
    if steps is not None:
        step_b, inner_b = torch.where(steps.isnan(), step_b, steps), inner_b | ~steps.isnan()
    looked_at, apart, none = inner_a & inner_b, (b - a).abs(), torch.zeros_like(a)
    of = looked_at.flatten(1).sum(1)

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * looked_at).flatten(1).sum(1)

    best = of
    for s, t in ((step_a, none), (none, step_b), (step_a, step_b)):
        bound = 1.05 * (s + t) / 2 + a.abs() / 256 + 2.0**-24  # the step is known to 5 %; fp16 ends at 2^-24
        over = total((apart > bound).float())
        step = torch.hypot(s, t)
        # Without a grid not one may be beyond: there no value is cut to an end, or traded for others.
        large = total((apart / step.clamp_min(1e-30)).clamp_max(1.0)) >= LEAST * of
        fits = torch.where(step.flatten(1).amax(1) > 0, large, over == 0)
        best = torch.minimum(best, torch.where(fits, over, of).long())
    both = (step_a.flatten(1).amax(1) > 0) & (step_b.flatten(1).amax(1) > 0)
    return torch.where(both & (_distance(a, b) <= EIGHT_BITS), 0, best), of


def _grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, runs, entries) -> the step that each entry was rounded to, 0 without a grid, and whether it can be judged: it lies
    in a block whose step is known, and not at an end of it."""
    steps, known = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    if x.shape[-1] % 16:
        return steps, ~known
    for block, clear in CLEAR.items():
        if x.shape[-1] % block == 0:
            step, clearness = period(x.reshape(-1, block))
            step, fits = (one[:, None].expand(-1, block).reshape(x.shape) for one in (step, clearness > clear))
            steps, known = torch.where(fits & ~known, step, steps), known | fits
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    ends = (blocks == blocks.amin(-1, keepdim=True)) | (blocks == blocks.amax(-1, keepdim=True))
    inner = known & ~ends.reshape(x.shape)
    gaps, few = _gaps(x)
    steps = torch.where(few & (gaps > 1.5 * steps), gaps, steps)
    gridded = (known.float().flatten(1).mean(1) >= 0.5)[:, None, None]
    return steps * gridded, inner | ~gridded


def _gaps(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., entries) -> the larger of the gaps to the next values of its block, 0 at the ends, and whether the block has at
    most 16 values, as 4 bits give."""
    apart = x[..., None, :] - x[..., :, None]
    above = torch.where(apart > 0, apart, torch.inf).amin(-1)
    below = torch.where(apart < 0, -apart, torch.inf).amin(-1)
    gaps = torch.maximum(above, below)
    few = (x.sort(-1).values.diff(dim=-1) > 0).sum(-1, keepdim=True) < 16
    return torch.where(gaps.isinf(), 0.0, gaps), few.expand(x.shape)


def period(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of values (N, n) -> the step of the grid they lie on (N,), and how clearly they do, 0 to 1 (N,).

    Tried are steps of 0.012 to 1.5 standard deviations: int8 has 0.018, Q2_K 1.1. Of steps that are clear alike the largest is
    taken, since half of it fits too.
    """
    x = x - x.gather(1, x.abs().argmin(1, keepdim=True))  # a grid may begin anywhere; the smallest value is the most exact
    sigma = x.std(1, unbiased=False, keepdim=True).clamp_min(1e-30)
    fine = 1 / 32  # between the frequencies tried: values of +-2 sigma turn by less than 0.2 rad off the peak
    first, last = int(1 / 1.5 / fine), int(1 / 0.012 / fine)
    turn = torch.polar(torch.ones_like(x), 2 * math.pi * fine * x / sigma)
    phase, clear = turn**first, x.new_empty(last - first, len(x))
    for i in range(last - first):
        clear[i] = phase.mean(1).abs()
        phase = phase * turn
    at = (clear >= clear.amax(0) - 0.1).int().argmax(0)
    for _ in range(20):  # up to the peak
        higher = (at + 1).clamp(max=len(clear) - 1)
        at = torch.where(clear.gather(0, higher[None])[0] > clear.gather(0, at[None])[0], higher, at)
    return sigma[:, 0] / ((at + first) * fine), clear.gather(0, at[None])[0]


# --- fingerprints ---------------------------------------------------------------------------------------------------------

# What a weight may have been rounded to before it is compared. bf16 is coarser than fp32 and nearly everywhere than fp16, but
# fp16 rounds what is below 6e-5 where bf16 does not: a bf16 checkpoint loaded in fp16 is known by the second alone.
ROUNDINGS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fingerprints(anatomy: families.Anatomy) -> dict[str, str]:
    """SHA-256 over the shapes and a sample of every FFN's weights (8 rows each), rounded to each of ROUNDINGS: 'bf16', 'fp16'.

    Rounding makes it the same whether a checkpoint is loaded in fp32 or bf16; the sample keeps it fast at any size.
    """
    rows = ([one.rows for one in layer] for layer in sample_layers(anatomy))
    return fingerprints_of(anatomy.hidden, anatomy.intermediate, len(anatomy.ffns), rows)


def fingerprints_outside(anatomy: families.Anatomy) -> dict[str, str]:
    """As `fingerprints`, over all else that the base model has: embeddings, attentions, norms, adapters. Not the head."""
    inside = {id(weight) for ffn in anatomy.ffns for weight in ffn.module.parameters()}
    found = [weight.detach() for weight in anatomy.base.parameters() if id(weight) not in inside]
    shapes = " ".join("x".join(map(str, weight.shape)) for weight in found)
    there = (weight for weight in found if weight.device.type != "meta" and type(weight.data) is torch.Tensor)
    return _digests(shapes, (w[list(sampled_rows(w.shape[0]))] if w.dim() > 1 else w for w in there))


def fingerprints_of(hidden: int, intermediate: int, layers: int, rows: Iterable[Iterable[torch.Tensor]]) -> dict[str, str]:
    """`fingerprints` from the sampled rows of gate, up and down, layer by layer."""
    return _digests(f"{hidden}x{intermediate}x{layers}", (weight for weights in rows for weight in weights))


def _digests(shapes: str, weights: Iterable[torch.Tensor]) -> dict[str, str]:
    digests = {name: hashlib.sha256(shapes.encode()) for name in ROUNDINGS}
    for weight in weights:
        for name, dtype in ROUNDINGS.items():
            digests[name].update(weight.to(dtype).reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}
