"""Quality at equal arithmetic: ours, its baselines, and published methods on the same documents.

The published ones are re-implemented here from their papers' descriptions, for quality only: they compute densely and leave
out afterwards, and what they would save is counted. `METHODS` says in a line what differs from each paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastfill import blocks, cost, families
from fastfill.artifact import Artifact
from fastfill.attachment import Attachment, attach
from fastfill.config import MAX_SPARSITY, PrefillConfig
from fastfill.ffn import FFN
from fastfill.lab import flops, perplexity
from fastfill.lab.baselines import LEARNED, named
from fastfill.lab.resume import Store
from fastfill.progress import stage
from fastfill.sparse_ffn import current_plan
from fastfill.swap import swapped

DENSE, CATS, TEAL, POP = "dense", "gate-threshold", "input-threshold", "layer-drop"
SEQUENCES, SEQUENCE_LENGTH = 4, 1024  # of the calibration text, for thresholds


@dataclass(frozen=True)
class Method:
    """A row. published_as: the method whose description it follows. note: what it is, or what differs from the paper."""

    name: str
    note: str
    published_as: str | None = None


METHODS = (
    Method(LEARNED, "this package"),
    Method("oracle", "chooses by the true activations; the choice is not counted"),
    Method("static", "one set for all text, from the artifact's calibration"),
    Method("low-rank", "training-free truncated SVD of gate and up; both products counted"),
    Method(
        "first-block",
        "the paper's prompt chooses for decoding; here the first block chooses for all others, with our layer schedule",
        "GRIFFIN-like",
    ),
    Method("random", "any neurons, fixed seed"),
    Method(
        CATS,
        "the paper's is for decoding and may be fine-tuned; here prompt tokens, none, one share in all layers. Each token has "
        "neurons of its own, which matrix products of a prefill cannot use: quality only",
        "CATS-like",
    ),
    Method(
        TEAL,
        "the paper also thins attention's inputs, and allots shares greedily; here the FFN only, one share in all layers. Each "
        "token has inputs of its own, which matrix products of a prefill cannot use: quality only",
        "TEAL-like",
    ),
    Method(
        POP,
        "known to us by its abstract, which drops deep layers after an importance analysis; here the last ones, without. As "
        "many as bring prefill_flops nearest to ours, attention included. Dropped tokens predict nothing: no strict reading",
        "POP-like",
    ),
)
BLOCKWISE = (LEARNED, "oracle", "static", "low-rank", "first-block", "random")  # these can go with the compensator or without


# --- what a prefill costs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """FLOPs of a prefill of T tokens as `flops.prefill` counts them, as shares of the dense one's; the head is left out.

    config: the model's Hugging Face config. sparse: how many of the tokens are in sparse blocks.
    """

    config: Any
    tokens: int
    sparse: int

    @classmethod
    def of(cls, attachment: Attachment, tokens: int) -> Cost:
        plan = blocks.make_plan([(0, tokens, 0)], tokens, attachment.config)
        return cls(attachment.model.config, tokens, plan.sparse_tokens if plan else 0)

    def _dense(self, tokens: int) -> dict[str, int]:
        return {**flops.prefill(self.config, tokens), "head": 0}

    def attached(self, attachment: Attachment) -> float:
        """Of the FFNs, predictors and compensators included: an attached model."""
        parts = flops.prefill(self.config, self.tokens, self.sparse, cost.Cost.attached(attachment.ffns))
        return flops.ffn(parts) / flops.ffn(self._dense(self.tokens))

    def ffn_share(self, per_token: float) -> float:
        """Of the FFNs, if a sparse token costs `per_token` of a dense one; head and tail are dense."""
        return (self.sparse * per_token + self.tokens - self.sparse) / self.tokens

    def per_token(self, ffn_share: float) -> float:
        """The inverse of `ffn_share`."""
        return 1 - (1 - ffn_share) * self.tokens / self.sparse

    def whole_share(self, ffn_share: float) -> float:
        """Of all layers, if the FFNs cost `ffn_share` and the rest is untouched."""
        dense = self._dense(self.tokens)
        return 1 - (1 - ffn_share) * dense["ffn"] / sum(dense.values())

    def dropped(self, count: int) -> tuple[float, float]:
        """(of the FFNs, of all layers), if in `count` layers all tokens but the last have keys and values only."""
        dense, saved, share = self._dense(self.tokens), self._dense(self.tokens - 1), count / self.config.num_hidden_layers
        mixing = saved["projections"] * self.config.num_attention_heads
        mixing /= (
            self.config.num_attention_heads + self.config.num_key_value_heads
        )  # queries and output, without keys and values
        whole = saved["ffn"] + mixing + saved["attention"]
        return 1 - share * saved["ffn"] / dense["ffn"], 1 - share * whole / sum(dense.values())

    def layers_to_drop(self, whole_share: float) -> int:
        """How many layers come nearest to this share of all FLOPs."""
        counts = range(self.config.num_hidden_layers + 1)
        return min(counts, key=lambda count: abs(self.dropped(count)[1] - whole_share))

    def matched_sparsity(self, artifact: Artifact, name: str, compensator: bool, ffn_share: float) -> float:
        """The sparsity at which the FFNs of a blockwise method cost `ffn_share`, own predictor (for sparse tokens) and
        compensator (for all) counted; the nearest there is where that cannot be."""
        shares = artifact.flops()
        predictor = {LEARNED: shares["predictor"], "low-rank": 2 * shares["predictor"]}.get(name, 0.0)
        correction = shares["compensator"] * self.tokens / self.sparse if compensator else 0.0
        return min(max(1 - self.per_token(ffn_share) + predictor + correction, 0.0), MAX_SPARSITY)


def skipped(attachment: Attachment) -> float:
    """Share of neurons that an attached model skips."""
    return 1 - sum(attachment.kept) / (len(attachment.kept) * attachment.ffns[0].ffn.neurons)


# --- published methods, as contexts over an attached model --------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """One layer's thresholds: what is smaller counts as zero. gate: of |act(gate)|. input, hidden: of the FFN's input and of
    what enters `down`."""

    gate: float
    input: float
    hidden: float


def level(values: torch.Tensor, share: float) -> float:
    """The value below whose size `share` of the values lie (of equal ones none do)."""
    sizes = values.abs().flatten()
    below = int(share * sizes.numel())
    return float(sizes.kthvalue(below + 1).values) if below < sizes.numel() else float("inf")


@torch.no_grad()
def calibrate_levels(attachment: Attachment, sequences: torch.Tensor, gate_share: float, input_share: float) -> list[Levels]:
    """Thresholds per layer from sequences (S, T), run densely: `gate_share` of the gates fall below theirs, `input_share` of
    either input below theirs. The dense head is left out: no threshold applies to it."""
    found: list[Levels] = []
    head = attachment.config.first_sparse

    def look(part: FFN) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][:, head:]
            gate, up = part.halves(x)
            gate = part.act.run(gate)
            hidden = gate * up
            shares = ((gate, gate_share), (x, input_share), (hidden, input_share))
            found.append(Levels(*(level(values, share) for values, share in shares)))

        return before

    hooks = [part.module.register_forward_pre_hook(look(part)) for part in families.dissect(attachment.model).ffns]
    try:
        with attachment.dense():
            attachment.model.base_model(input_ids=sequences.to(attachment.model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


Rule = Callable[[torch.Tensor, FFN, Levels], tuple[torch.Tensor, int]]


def by_gate(x: torch.Tensor, ffn: FFN, levels: Levels) -> tuple[torch.Tensor, int]:
    """CATS-like: the gate is computed in full, up and down only where its activation is large. (T, H) -> output, and the
    multiply-adds that this takes."""
    gate, up = ffn.halves(x)
    gate = ffn.act.run(gate)
    kept = gate.abs() >= levels.gate
    return ffn.output((gate * up).where(kept, 0)), x.shape[1] * (gate.numel() + 2 * int(kept.sum()))


def by_input(x: torch.Tensor, ffn: FFN, levels: Levels) -> tuple[torch.Tensor, int]:
    """TEAL-like: small entries of the input of gate and up, and of the input of down, count as zero. (T, H) -> output, and the
    multiply-adds that this takes."""
    kept = x.abs() >= levels.input
    x = x.where(kept, 0)
    hidden = ffn.hidden(x)
    held = hidden.abs() >= levels.hidden
    used = 2 * ffn.neurons * int(kept.sum()) + x.shape[1] * int(held.sum())
    return ffn.output(hidden.where(held, 0)), used


@dataclass
class Tally:
    """Multiply-adds used and what dense would have taken, over sparse tokens."""

    used: int = 0
    dense: int = 0


@contextmanager
def thresholded(attachment: Attachment, rule: Rule, levels: Sequence[Levels], tally: Tally) -> Iterator[None]:
    """Inside, the tokens that the attachment would compute sparsely go through `rule` instead, token by token."""

    def forward(part: FFN, own: Levels, dense: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            plan = current_plan.get()
            if plan is None or x.shape[:-1] != (plan.batch, plan.tokens):
                return dense(x)
            flat, pieces = x.reshape(-1, x.shape[-1]), []
            for start, stop, sparse in plan.segments:
                if not sparse:
                    pieces.append(dense(flat[start:stop]))
                    continue
                out, used = rule(flat[start:stop], part, own)
                pieces.append(out)
                tally.used += used
            tally.dense += 3 * part.gate.numel() * plan.sparse_tokens
            plan.runs.append(True)
            return torch.cat(pieces).view_as(x)

        return run

    parts = families.dissect(attachment.model).ffns
    forwards = [forward(part, own, ffn.dense) for part, own, ffn in zip(parts, levels, attachment.ffns, strict=True)]
    with swapped(zip(attachment.modules, forwards, strict=True)):
        yield


@contextmanager
def dropped(attachment: Attachment, count: int) -> Iterator[None]:
    """POP-like. Inside, the last `count` layers pass a call's tokens on unchanged, but for the last one; keys and values, made
    from what is passed on, are in the cache. All FFNs are dense."""
    layers = families.dissect(attachment.model).layers
    layers = layers[len(layers) - count :]

    def forward(whole: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = whole(hidden, *args, **kwargs)
            return torch.cat([hidden[:, :-1], out[:, -1:]], dim=1)

        return run

    with attachment.dense(), swapped((layer, forward(layer.forward)) for layer in layers):
        yield


# --- the table ----------------------------------------------------------------------------------------------------------


class Attacher:
    """Attaches an artifact again with other choices, all else as it was."""

    def __init__(self, attachment: Attachment, artifact: Artifact):
        attachment.detach()
        self.model, self.artifact = attachment.model, artifact
        self.config: PrefillConfig = attachment.config
        self.kernel = attachment.ffns[0].kernel

    def __call__(self, predictor: str, compensator: bool, sparsity: float) -> Attachment:
        return attach(
            self.model,
            self.artifact,
            self.config,
            sparsity=sparsity,
            predictor=named(predictor),
            compensator=compensator,
            kernel=self.kernel,
        )


class Documents:
    """Documents [(source, ids (T,))], computed densely once, when first needed."""

    def __init__(self, documents: Sequence[tuple[str, torch.Tensor]], continuation: int):
        self.documents, self.continuation = documents, continuation
        self.readings: dict[int, perplexity.Reading] = {}

    def keys(self, method: str) -> list[str]:
        return [f"{method}/{index}/{source}" for index, (source, _) in enumerate(self.documents)]

    def reading(self, index: int, attachment: Attachment) -> perplexity.Reading:
        if index not in self.readings:
            self.readings[index] = perplexity.read_dense(attachment, *self.documents[index], self.continuation)
        return self.readings[index]


Sparse = Callable[[], AbstractContextManager[Any]]
Price = Callable[[], tuple[float, float, float]]  # share of the FFNs' multiply-adds, of all layers', sparsity


def evaluate(
    attachment: Attachment,
    artifact: Artifact,
    documents: Sequence[tuple[str, torch.Tensor]],
    calibration: torch.Tensor,
    *,
    continuation: int = 256,
    store: Store | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """One row per method at the arithmetic of ours (`attachment`, which is detached): quality as `perplexity.evaluate` has it.

    documents: [(source, ids (T,))], all of one length. calibration: (S, T) other text, for thresholds. Rows have `ffn_flops`,
    the share of the dense prefill FFNs' FLOPs, and `prefill_flops`, that of all layers; both are of a prompt of T
    tokens, dense head and tail, predictor and compensator counted. Blockwise methods match `ffn_flops` to a neuron, the
    others as well as they can.
    """
    store = store or Store(None, {})
    again, texts = Attacher(attachment, artifact), Documents(documents, continuation)
    config, tokens = attachment.config, len(documents[0][1])
    cost = Cost.of(attachment, tokens)
    budget = cost.attached(attachment)
    levels: list[Levels] = []

    @contextmanager
    def opened(name: str, compensator: bool) -> Iterator[tuple[Attachment, Sparse, Price]]:
        if name in BLOCKWISE:
            ours = name == LEARNED and compensator
            sparsity = config.sparsity if ours else cost.matched_sparsity(artifact, name, compensator, budget)
            with again(name, compensator, sparsity) as attached:
                share = cost.attached(attached)
                yield attached, nullcontext, lambda: (share, cost.whole_share(share), skipped(attached))
            return
        with again(LEARNED, True, config.sparsity) as attached:
            if name == POP:
                count = cost.layers_to_drop(cost.whole_share(budget))
                ffn, whole = cost.dropped(count)
                yield attached, lambda: dropped(attached, count), lambda: (ffn, whole, count / cost.config.num_hidden_layers)
                return
            if not levels:
                left = cost.per_token(budget)
                gate_share = min(max(1 - 1.5 * (left - 1 / 3), 0.0), MAX_SPARSITY)  # 1/3 for the gate, 2/3 for what it keeps
                levels.extend(calibrate_levels(attached, calibration, gate_share, max(1 - left, 0.0)))
            rule, tally = by_gate if name == CATS else by_input, Tally()

            def price() -> tuple[float, float, float]:
                per_token = tally.used / tally.dense if tally.dense else 1.0
                tally.used = tally.dense = 0  # the next document has its own
                share = cost.ffn_share(per_token)
                return share, cost.whole_share(share), 1.5 * (1 - per_token) if name == CATS else 1 - per_token

            yield attached, lambda: thresholded(attached, rule, levels, tally), price

    rows = [(method, with_it) for method in METHODS for with_it in ((True, False) if method.name in BLOCKWISE else (False,))]
    keys = {(method.name, with_it): texts.keys(method.name + "+" * with_it) for method, with_it in rows}
    resumed = sum(key in store for group in keys.values() for key in group)
    with stage("methods", sum(map(len, keys.values())), resumed) as bar:
        for (name, with_it), group in keys.items():
            missing = [index for index, key in enumerate(group) if key not in store]
            if not missing:
                continue
            with opened(name, with_it) as (attached, sparse, price):
                for index in missing:
                    sums = perplexity.read_sparse(attached, texts.reading(index, attached), sparse)
                    ffn, whole, sparsity = price()
                    store.add(group[index], {**sums, "ffn_flops": ffn, "prefill_flops": whole, "sparsity": sparsity})
                    bar.step(note=name)
    results = {choice: [store.rows[key] for key in group] for choice, group in keys.items()}
    ours = perplexity.summarize(results[LEARNED, True], seed)
    table = [dense_row(ours)]
    for method, with_it in rows:
        found = results[method.name, with_it]
        line = {"method": method.name, "published_as": method.published_as, "compensator": with_it, **_means(found)}
        scores = quality(perplexity.summarize(found, seed))
        if method.name == POP:
            scores.update(dict.fromkeys(STRICT))
        table.append({**line, **scores, "note": method.note})
    return {
        "rows": table,
        **{key: ours[key] for key in ("ppl_dense", "cont_ppl_dense", "no_context_ppl", "tokens", "cont_tokens")},
        "prompt_tokens": tokens,
        "documents": len(documents),
        "calibration_tokens": calibration.numel(),
        "resumed": resumed,
    }


STRICT = ("ppl_ratio", "kl", "top1_agreement", "ppl_ratio_interval")
QUALITY = (*STRICT, "cont_ppl_ratio", "cont_kl", "context_kept", "cont_ppl_ratio_interval")


def quality(summary: dict[str, Any]) -> dict[str, Any]:
    """What a row shows of `perplexity.summarize`."""
    return {key: summary[key] for key in QUALITY}


def dense_row(summary: dict[str, Any]) -> dict[str, Any]:
    """The dense model beside itself. summary: of any method, which tells whether the context is worth anything."""
    ones = {"ffn_flops": 1.0, "prefill_flops": 1.0, "ppl_ratio": 1.0, "cont_ppl_ratio": 1.0, "top1_agreement": 1.0}
    kept = None if summary["context_kept"] is None else 1.0
    line = {"method": DENSE, "published_as": None, "compensator": False, "sparsity": 0.0, **ones, "kl": 0.0, "cont_kl": 0.0}
    return {**line, "context_kept": kept, "ppl_ratio_interval": None, "cont_ppl_ratio_interval": None, "note": "the base model"}


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over documents of one length."""
    keys = ("sparsity", "ffn_flops", "prefill_flops")
    return {key: round(sum(row[key] for row in rows) / len(rows), 6) for key in keys}
