"""Put an artifact on a loaded model: swap the forward of each FFN instance, and restore it bit for bit."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from fastfill import artifact as artifacts
from fastfill import attended, attention, choice, compiling, families, kv_cache, partner, projections, upper
from fastfill.artifact import Artifact
from fastfill.attention import Attention
from fastfill.blocks import Plan
from fastfill.calls import Calls, GenerateHook, Prompt, Stats
from fastfill.compensator import Compensator
from fastfill.config import PrefillConfig, check_integer
from fastfill.errors import UserError, quoted
from fastfill.follow import Follower, follow
from fastfill.kernels import Kernel
from fastfill.predictor import Maker, Predictor
from fastfill.projections import Projection
from fastfill.sparse_ffn import as_loaded, current_plan, in_call
from fastfill.swap import StandIn, Swaps
from fastfill.unread import Readers, is_transformers

__all__ = ["Attachment", "Stats", "attach", "check_detached", "detach"]

MARK = "_fastfill"  # the attribute of an attached base model that holds its Attachment
CHECKPOINT = "_gradient_checkpointing_func"  # what transformers calls on a layer to compute it again in the backward pass
_attaching = threading.Lock()


class Attachment:
    """A model with an artifact on it. Use it in a `with` statement, or call `detach()` yourself.

    config: the settings in force. kept: neurons kept per layer. stats: sparse and dense tokens so far.
    extra_bytes: memory that attaching added (transposed down weights, predictors, compensators, weights in eight bits).

    The FFN's weights are followed: they may be trained, loaded, merged, cast or moved while attached. Copies and pickles of the
    model are detached.
    """

    def __init__(
        self,
        model: Any,
        anatomy: families.Anatomy,
        artifact: Artifact,
        config: PrefillConfig,
        followers: list[Follower],
        before: partner.Samples,
        gains: bool = True,
    ):
        self.model, self.config = model, config
        self.ffns = [follower.ffn for follower in followers]
        self.kept = [ffn.kept for ffn in self.ffns]
        self._anatomy, self._artifact, self._followers = anatomy, artifact, followers
        eight = config.weights == "int8"
        self.projections: list[Projection] = (
            projections.of(anatomy.attentions, config.dense_weights == "int8", anatomy.eight_bits) if eight else []
        )
        thins = any(ffn.kept < anatomy.intermediate for ffn in self.ffns)  # False at sparsity 0: all of it is dense
        self._thins = thins and gains
        parameters = list(inspect.signature(anatomy.base.forward).parameters)
        kv_cache.check(parameters)
        # The setting that reads what a prompt's end attends to, and the value that leaves it out.
        asks = ("upper_share", "it at 1") if config.upper_share < 1 else ("reread", "it at 0") if config.reread else None
        if asks and len(anatomy.attentions) < len(anatomy.layers):
            raise UserError(f"{asks[0]} needs attention in every layer, and this model has some without; leave {asks[1]}.")
        own = attended.own_cache(anatomy.base.config) if asks else None
        if config.reread and not attended.is_plain(own):
            raise UserError("reread needs full attention in every layer, and this model has windows; leave it at 0.")
        self._calls = Calls(config, parameters, len(anatomy.layers), thins, gains, own)
        self.stats = self._calls.stats
        like = torch.empty(0, dtype=self.ffns[0].ffn.dtype, device=self.ffns[0].ffn.gate.device)
        self._attention = Attention(anatomy.base.config, config.attention, asks, like)
        self._readers = Readers(families.causal_of(model), anatomy)
        self._lock = threading.RLock()
        self._swaps = Swaps()
        self._attached = False
        self._open: set[object] = set()  # calls that are running now
        self._before, self._known = before, True  # samples of the weights, and whether these are still those

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The FFN modules, layer by layer."""
        return [ffn.module for ffn in self._anatomy.ffns]

    @property
    def artifact(self) -> Artifact:
        return self._artifact

    @property
    def choices(self) -> dict[str, Any]:
        """What results depend on beside `config`, and why this kernel runs."""
        first = self.ffns[0]
        return {
            "kernel": first.kernel.name,
            "kernel_reason": first.kernel.reason,
            "expected_gain": first.kernel.expected_gain,
            "predictor": type(first.predictor).__name__,
            "compensator": first.compensator is not None,
            "packed": self._anatomy.packed,
            "attention_by": self._attention.told(self._attached) if self._thins else "model (no call is sparse)",
        }

    @property
    def extra_bytes(self) -> int:
        learned = [tensor for name, tensor in self._artifact.tensors.items() if ".stats." not in name]  # kept to be cast anew
        held = [*learned, *(tensor for ffn in self.ffns for tensor in ffn.tensors)]
        eight = sum(projection.nbytes for projection in self.projections)
        return eight + sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    def refresh(self) -> None:
        """Use the model's current FFN weights.

        Changes are detected, with one exception: writing some entries of a weight through `weight.data`, as in
        `weight.data[:, 3] = 0`. Raises UserError if the weights cannot be followed (an adapter was put on an FFN).
        """
        with self._lock:
            for follower in self._followers:
                follower.renew()
            for projection in self.projections:
                projection.renew()
            self._check_partner()

    def _follow(self) -> None:
        """Before a call that computes with what was made of the weights. One without a plan may be a decode step, for which the
        samples would take too long."""
        sparse = current_plan.get() is not None
        if not sparse and (self.config.dense_weights != "int8" or as_loaded.get()):
            return
        with self._lock:
            for projection in self.projections:
                if projection.stale(samples=sparse):
                    projection.renew()
            if follow(self._followers, samples=sparse):
                self._check_partner()

    def _check_partner(self) -> None:
        """Warn once when the FFNs are no longer those that the artifact was put on."""
        if self._known and not partner.same(self._before, partner.inside(self._anatomy)):
            self._known = False
            warnings.warn(
                "The FFN weights have changed since the artifact was attached, and are followed; it was learned for those "
                "before: measure the quality, or make an artifact for the new ones with `fastfill calibrate`.",
                stacklevel=2,
            )

    def _swap(self) -> None:
        with self._lock:
            try:
                for part, sparse in zip(self._anatomy.ffns, self.ffns, strict=True):
                    sparse.on = True
                    self._swaps.put(part.module, "forward", sparse)
                for projection in self.projections:
                    projection.on = True
                    self._swaps.put(projection.linear, "forward", projection)
                compiling.ready()
                base = self._anatomy.base
                # With upper_share some layers could not be traced, and what is left would be compiled in pieces.
                decodes = self.config.dense_weights != "int8" and self.config.upper_share == 1
                self._swaps.put(base, "forward", StandIn(base.forward, self._call, decodes))
                self._swaps.put(base, MARK, self)
                self._attention.put(self._swaps)
                if self.config.upper_share < 1:
                    layers = self._anatomy.layers
                    for index, layer in list(enumerate(layers))[upper.first_upper(len(layers)) :]:
                        self._swaps.put(layer, "forward", StandIn(layer.forward, functools.partial(upper.run_layer, index)))
                causal = families.causal_of(self.model)
                if is_transformers(causal.forward) and "logits_to_keep" in inspect.signature(causal.forward).parameters:
                    self._swaps.put(causal, "forward", StandIn(causal.forward, self._call_causal, decodes=True))
                if hasattr(causal, "get_compiled_call"):
                    self._swaps.put(causal, "get_compiled_call", StandIn(causal.get_compiled_call, self._compiled))
                head = families.head_of(self.model)
                if head is not None:
                    self._swaps.put(head, "forward", StandIn(head.forward, _as_matrix, decodes=True))
                if hasattr(self.model, "generate"):
                    self._swaps.put(self.model, "generate", GenerateHook(self.model.generate, self._calls))
                self._attached = True
            except BaseException:  # an interrupt too
                self.detach()
                raise

    def detach(self) -> None:
        """Restore the model. Safe to call twice. Calls of other threads end as they began; the last of them restores
        the FFNs."""
        with self._lock:
            self._attached = False
            self._restore()

    def _restore(self) -> None:
        if not self._attached and not self._open:
            for sparse in self.ffns:
                sparse.on = False  # somebody may have put theirs on top of it
            for projection in self.projections:
                projection.on = False
            self._swaps.undo()
            self._attention.end()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the model is detached

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, this thread's calls are dense, whatever their length, and computed with the model's own weights."""
        before = as_loaded.set(True)
        try:
            with self._calls.saying(dense=True):
                yield
        finally:
            as_loaded.reset(before)

    def prompt(self, end: int) -> AbstractContextManager[None]:
        """Inside, this thread reads one prompt, and its first `end` columns are it: read it in as many pieces as you like, one
        behind the other through a cache, or again and again without; what lies behind it is dense.

        end: tokens, those in the cache and left padding included: what `attention_mask.shape[1]` is at the prompt's end.
        `model.generate` says this by itself. The rule in full: `fastfill.calls`. Raises UserError for what is no such number.
        """
        check_integer("end", end, 1)
        return self._calls.saying(prompt=Prompt(end, given=True))

    def watched(self) -> AbstractContextManager[None]:
        """Inside, this thread's calls compute what nobody reads, too: the last layer's FFN on sparse tokens."""
        return self._calls.saying(whole=True)

    def _call_causal(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the causal LM: it says how many logits are read of it (`generate` reads one)."""
        with self._calls.saying(read=self._readers.logits(kwargs)):
            return forward(*args, **kwargs)

    def _compiled(self, get: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `generate` calls for decode steps, of which it compiles them."""
        compiled = get(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._calls.decoding(compiled, args, kwargs) if self._attached else compiled(*args, **kwargs)

        return call

    def _call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the base model."""
        with self._planned(None) as attached:
            if not attached:
                return forward(*args, **kwargs)
            done = False
            try:
                self._calls.before(args, kwargs)
                self._follow()
                if torch.is_grad_enabled():
                    self._carry_plans()
                output = forward(*args, **kwargs)
                self._calls.reread(forward, output)
                done = True
                return output
            finally:  # also after Ctrl-C, where torch runs no hooks
                self._calls.after(done)

    @contextmanager
    def _planned(self, plan: Plan | None) -> Iterator[bool]:
        """Inside, a call runs with this plan, and detaching waits for its end. Gives False, and does nothing, if the artifact
        is not on the model any more."""
        call = object()
        try:
            with self._lock:
                attached = self._attached
                if attached:
                    self._open.add(call)
            if not attached:
                yield False
                return
            before = current_plan.set(plan), in_call.set(True), attention.wanted.set(self._attention.chunks)
            try:
                yield True
            finally:
                current_plan.reset(before[0])
                in_call.reset(before[1])
                attention.wanted.reset(before[2])
        finally:
            with self._lock:
                self._open.discard(call)
                self._restore()

    def _carry_plans(self) -> None:
        """Let the layers' gradient checkpointing take the plan along. It may have been switched on at any time."""
        with self._lock:
            for module in self._anatomy.base.modules():
                checkpoint = vars(module).get(CHECKPOINT)
                if checkpoint is not None and not isinstance(checkpoint, StandIn):
                    self._swaps.put(module, CHECKPOINT, StandIn(checkpoint, self._checkpoint))

    def _checkpoint(self, checkpoint: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan, run = current_plan.get(), args[0]

        def planned(*args: Any, **kwargs: Any) -> Any:
            with self._planned(plan) as attached:
                if plan is not None and not attached:
                    raise UserError(
                        "The backward pass of a sparse call with gradient checkpointing came after detach; call backward() "
                        "while the artifact is attached."
                    )
                return run(*args, **kwargs)

        return checkpoint(planned, *args[1:], **kwargs)


def _as_matrix(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The head's rows as a matrix. Of a batch of one cut out of more tokens, as `generate` gives a prompt's last, torch 2.13
    copies the whole weight in bf16: 0.43 s for 151,936 x 896 (Zen 5, 2 threads), 9 ms as a matrix."""
    x = args[0] if args else None
    if not isinstance(x, torch.Tensor) or x.ndim != 3:
        return forward(*args, **kwargs)
    return forward(x.reshape(-1, x.shape[-1]), *args[1:], **kwargs).unflatten(0, x.shape[:-1])


def check_detached(anatomy: families.Anatomy) -> None:
    """Raise UserError if an artifact is on the model."""
    if attached_to(anatomy.base) is not None:
        raise UserError(
            "This model is already attached; detach it first (leave the `with`, call detach(), or fastfill.detach(model))."
        )


def attached_to(base: Any) -> Attachment | None:
    """What is attached to a base model."""
    return getattr(base, "__dict__", {}).get(MARK)


def detach(model: Any) -> bool:
    """Detach whatever artifact is on the model, where the `Attachment` is lost. Returns whether there was one."""
    attachment = attached_to(families.base_of(model))
    if attachment is not None:
        attachment.detach()
    return attachment is not None


def attach(
    model: Any,
    artifact: Artifact | str | Path,
    prefill: PrefillConfig | None = None,
    *,
    predictor: Maker | None = None,
    compensator: bool = True,
    kernel: str | Kernel = "auto",
    allow_finetuned: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **fields: Any,
) -> Attachment:
    """Make a loaded `transformers` model prefill prompts with a sparse FFN.

    prefill: settings in place of the artifact's. fields: of `PrefillConfig` (sparsity=0.3, dense_head=0, ...), in place of
    those of `prefill` or of the artifact; None leaves one. predictor: makes another in place of the learned one
    (`fastfill.lab.baselines.named("oracle")`). compensator: False omits the correction. kernel: a name (see
    `fastfill.kernels`), or what `kernels.resolve` gave. Decode steps and short calls stay dense.

    Where kernel is "auto" and neither `prefill` nor `min_tokens` is given, one layer is timed, dense and sparse
    (`fastfill.choice`; remembered): the faster kernel runs, `min_tokens` is raised to the shortest prompt that gains, and
    where none gains a warning says so and all stays dense. Move the model to its device and dtype before.

    allow_finetuned: accept a model that was fine-tuned since (`fastfill.partner`). revision, cache_dir: of an artifact on the
    Hugging Face hub, which is named 'org/name'.

    The sparse prompts of a model that comes in eight bits (`fastfill.eight_bits`) are computed with its own int8 values and
    scales, whatever `weights` says; other calls run as they do without fastfill. So are those of a model whose FFNs are packed
    (`fastfill.packed`), with int8 rows that are unpacked for each call.

    Raises UserError for a model or an artifact that does not fit, or a model that is attached already. Warns if the FFNs were
    requantised, or what is outside them (embeddings, attention, norms, unmerged adapters) is not what the artifact was learned
    with.
    """
    with torch.inference_mode(False):
        if not isinstance(artifact, Artifact):
            artifact = artifacts.load(artifact, revision, cache_dir)
    anatomy = families.dissect(model)
    check_detached(anatomy)
    layers = partner.sample_layers(anatomy)
    notes = artifact.check_partner(anatomy, allow_finetuned, layers)
    if predictor is not None and not callable(predictor):
        raise UserError(f"predictor must be made by fastfill.lab.baselines.named(...), not {quoted(predictor)}.")
    if not isinstance(prefill, PrefillConfig | None):
        raise UserError(f"prefill must be a fastfill.PrefillConfig, not {quoted(prefill)}; a field alone is sparsity=0.3, say.")
    here = anatomy.ffns[0].gate.device.type
    if (anatomy.eight_bits or anatomy.packed) and here == "cpu":  # elsewhere there is no op for them
        fields["weights"] = "int8"
    config = (prefill or artifact.prefill).with_(**fields)

    def follower(layer: int, part: families.ModuleFFN, kept: int) -> Follower:
        def learned(like: torch.Tensor) -> tuple[Predictor, Compensator | None]:
            correction = artifact.compensator(layer, kept, like) if compensator else None
            if predictor is None:
                return artifact.predictor(layer, like), correction
            baseline = predictor(part, layer, artifact.statistics(layer, like), artifact.ranks["predictor"])
            return baseline, correction

        rounds = part.rows is not None or not anatomy.eight_bits  # a layer that was left in floating point stays so
        own = config if rounds else config.with_(weights="model", dense_weights="model")
        return Follower(part, kept, learned, kernel, own)

    counts = artifact.kept(config.sparsity)
    followers = [follower(layer, part, kept) for layer, (part, kept) in enumerate(zip(anatomy.ffns, counts, strict=True))]
    followers[-1].ffn.last = True
    chosen = None
    if kernel == "auto" and prefill is None and fields.get("min_tokens") is None:
        chosen = choice.choose([layer.ffn for layer in followers], config)
    if chosen:
        for layer in followers:
            layer.choose(chosen.kernel)
        config = config.with_(min_tokens=max(config.min_tokens, chosen.first or 0))
        notes = notes if chosen.first else [*notes, chosen.warning]
    gains = not chosen or chosen.first is not None
    attachment = Attachment(model, anatomy, artifact, config, followers, partner.runs_of(layers), gains)
    with _attaching:  # of two threads that got this far, one finds the other's artifact
        check_detached(anatomy)
        attachment._swap()
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return attachment
