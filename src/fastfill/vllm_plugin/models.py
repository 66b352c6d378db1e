"""vLLM's models with a sparse prefill. START HERE: `SparsePrefill.forward`.

A step that reads no prompt sparsely (decode, short prompts, requests that are switched off) runs vLLM's own model, compiled
and captured as ever. A step that does runs a second view of the same modules, in which each FFN is one opaque op.
"""

from __future__ import annotations

import copy
import functools
import time
import types
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.models.registry import ModelRegistry
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op

from fastfill import artifact as artifacts
from fastfill import families, kernels
from fastfill.attachment import Stats
from fastfill.blocks import Plan
from fastfill.calls import NOT_RUN
from fastfill.clocks import clocked
from fastfill.errors import UserError
from fastfill.families import Family
from fastfill.ffn import FFN
from fastfill.kernels.int8 import Scales
from fastfill.sparse_ffn import AllNeurons, SparseFFN, current_plan
from fastfill.vllm_plugin import MODELS, attention, metrics, requests, settings, steps
from fastfill.vllm_plugin.steps import Batch
from fastfill.vllm_plugin.weights import Checkpoint

logger = init_logger("vllm.fastfill")
LOG_SECONDS = 10.0


class Layer:
    """One FFN as the op finds it. stock: vLLM's module, or None if the sparse one does all. family: its names. ffn: the
    sparse one, or None until the weights are there. ranks: processes that share its neurons. all_neurons: dense tokens by
    the sparse kernel too."""

    def __init__(self, stock: nn.Module, family: Family, ranks: int):
        self.stock: Any = stock
        self.family = family
        self.ffn: SparseFFN | None = None
        self.ranks = ranks
        self.all_neurons = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (T, H), the tokens of all requests of the step -> (T, H)."""
        if self.stock is not None and (self.ffn is None or (current_plan.get() is None and not self.all_neurons)):
            return self.stock.forward(x)
        assert self.ffn is not None
        y = self.ffn(x[None])[0]
        return y if self.ranks == 1 else tensor_model_parallel_all_reduce(y)

    @property
    def linears(self) -> list[Any]:
        """Of vLLM's module: gate and up in one, and down."""
        return self.family.linears(self.stock) if self.stock else []

    @property
    def extra_bytes(self) -> int:
        """Memory beside what stock vLLM holds for this FFN."""
        if self.ffn is None:
            return 0
        weights = [self.ffn.ffn.gate, self.ffn.ffn.up, self.ffn.down_t, *(self.ffn.ffn.scales or ())]
        added = {tensor.data_ptr(): tensor for tensor in (*self.ffn.tensors, *weights)}
        if self.stock is None:  # ours are in place of vLLM's
            here = {tensor.data_ptr() for tensor in weights}
        else:  # vLLM on a CPU packs the weights into a layout of its own; the plain ones then stay for us alone
            held = {parameter.untyped_storage().data_ptr() for parameter in self.stock.parameters()}
            here = {address for address, tensor in added.items() if tensor.untyped_storage().data_ptr() in held}
        return sum(tensor.nbytes for address, tensor in added.items() if address not in here)


def _ffn(x: torch.Tensor, layer: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[layer](x)


def _ffn_fake(x: torch.Tensor, layer: str) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("fastfill", "FRAGMENT")
direct_register_custom_op("vllm_ffn", _ffn, fake_impl=_ffn_fake, target_lib=_library)


class OpaqueFFN(nn.Module):
    """Stands in for an FFN in the second view; to torch.compile it is one node. name: of its `Layer`."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastfill.vllm_ffn(x, self.name)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0})
class SparseView(nn.Module):
    """The second view of a stock model: everything shared with it, but for the FFNs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", stock: Any, family: Family, ffns: list[nn.Module]):
        super().__init__()
        stocks = getattr(stock, family.layers)
        layers = nn.ModuleList(_with(layer, {family.ffn: ffn}) for layer, ffn in zip(stocks, ffns, strict=True))
        self.view: Any = _with(stock, {family.layers: layers})

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.view.forward(input_ids, positions, intermediate_tensors, inputs_embeds)


def _with(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """The same module, with other children of these names. Parameters and all other children are shared."""
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone


class SparsePrefill:
    """Goes in front of a stock ...ForCausalLM."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        settings.check_version()
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        self._settings = settings.read(vllm_config)
        self._prefill = self._settings.prefill
        self._vllm_config = vllm_config
        self._config = vllm_config.model_config.hf_config
        self._family = families.of(self._config).fused
        self._layers: list[Layer] = []
        self._hidden: list[SparseView] = []  # in a list, so that it is no child: its weights are the stock model's
        self._warm = False
        self._loaded = False
        self._taken: tuple[Any, ...] = ()  # see `_state`
        self.stats = Stats()
        self.model_bytes = 0
        self.predictor_seconds = self._begin = 0.0
        self._metrics = metrics.counters() if get_tensor_model_parallel_rank() == 0 else None
        self._clocks: ExitStack | None = None
        self._seconds: dict[str, float] = {}
        self._all_neurons = False
        self._logged = (time.monotonic(), Stats())
        if self._prefill.sparsity == 0:
            return
        # What vLLM chose itself, or made of what was chosen, after the checks of `settings.configure`.
        settings.check_attention(attention.watch(vllm_config))
        settings.check_graphs(vllm_config)
        compilation = vllm_config.compilation_config
        ranks = get_tensor_model_parallel_world_size()
        self._layers = [Layer(ffn, self._family, ranks) for ffn in self._family.ffns(self.model)]
        names = [f"{prefix}fastfill.{i}" for i in range(len(self._layers))]
        compilation.static_forward_context.update(zip(names, self._layers, strict=True))
        with set_current_vllm_config(vllm_config), set_model_tag("fastfill"):
            ffns: list[nn.Module] = [OpaqueFFN(name) for name in names]
            self._hidden.append(SparseView(vllm_config=vllm_config, stock=self.model, family=self._family, ffns=ffns))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Raises UserError for weights that the artifact was not made for, and for any that come after the start."""
        if self._loaded and self._layers:
            # A reload takes the modules apart before it comes here; this puts back what they had.
            finalize_layerwise_reload(self, self._vllm_config.model_config)
            for module in self.modules():  # type: ignore[attr-defined]
                if hasattr(module, "scheme") and not hasattr(module, "weight"):
                    module.register_parameter("weight", None)  # packed in eight bits: vLLM puts back only what it has
            raise UserError(
                "The weights of a running engine cannot be replaced while an artifact is on: it was made for those that it "
                "began with; start again with the new checkpoint, or without the artifact."
            )
        checkpoint = Checkpoint(weights)
        loaded = super().load_weights(checkpoint)  # type: ignore[misc]
        if not self._loaded:
            self._take_weights(checkpoint)
        self._loaded = True
        return loaded

    def _take_weights(self, checkpoint: Checkpoint) -> None:
        """Check the weights, and keep what the sparse kernel reads: vLLM may repack and drop its own right after this."""
        artifact = artifacts.load(self._settings.artifact)
        checkpoint.check(artifact, self._settings.allow_finetuned)
        parts = [self._part(ffn) for ffn in self._family.ffns(self.model)]
        self.model_bytes = sum(p.numel() * p.element_size() for p in self.parameters())  # type: ignore[attr-defined]
        if not self._layers:
            return
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        like = parts[0].gate.new_empty(0, dtype=parts[0].dtype)
        kernel = kernels.resolve(self._settings.kernel, like)
        counts = artifact.kept(self._prefill.sparsity)
        for index, (layer, part, kept) in enumerate(zip(self._layers, parts, counts, strict=True)):
            if kept == artifact.base_model["intermediate_size"]:
                continue
            predictor = artifact.predictor(index, like)
            compensator = artifact.compensator(index, kept, like)
            if ranks > 1:
                kept = max(1, (rank + 1) * kept // ranks - rank * kept // ranks)
                predictor, compensator = predictor.shard(rank, ranks), compensator and compensator.shard(rank, ranks)
            down_t = part.down.t().contiguous()
            layer.ffn = SparseFFN(
                dense=AllNeurons(part, down_t, kernel),
                ffn=replace(part, down=down_t.t()),
                down_t=down_t,
                kept=kept,
                predictor=predictor,
                compensator=compensator,
                kernel=kernel,
                last=index + 1 == len(parts),
            )
            if part.gate.device.type == "cpu":  # elsewhere the host does not wait for it
                layer.ffn.taps.append(self._time)
            if self._settings.one_copy:
                layer.stock = None
                family, opaque = self._family, self._family.ffns(self._hidden[0].view)[index]
                setattr(family.layers_of(self.model)[index], family.ffn, opaque)  # in both views

    def _part(self, module: Any) -> FFN:
        """This rank's share of vLLM's FFN module as ours, its weights shared. Raises UserError where only a part is in eight
        bits."""
        ffn = self._family.read(module, families.activation_of(self._config), data=True)
        eight = [weight.dtype == torch.int8 for weight in (ffn.gate, ffn.up, ffn.down)]
        if any(eight) and not all(eight):
            raise UserError(
                "The checkpoint has one part of an FFN in eight bits and another not (its quantization_config says so, under "
                "`ignore` or `targets`); the sparse prefill reads FFNs that are one or the other as a whole."
            )
        if all(eight):
            found = (self._family.part(module, role, "weight_scale", data=True) for role in families.ROLES)
            scales = Scales(*(scale.float().reshape(-1) for scale in found if scale is not None))
            ffn = replace(ffn, scales=scales, compute=self._vllm_config.model_config.dtype)
        # What the ranks give is added: one of them adds down's bias.
        return ffn if get_tensor_model_parallel_rank() == 0 else replace(ffn, down_bias=None)

    def _time(self, step: str, _ffn: SparseFFN, _plan: Plan, _value: torch.Tensor | None) -> None:
        """A tap: adds up the seconds that the predictors take."""
        if step == "input":
            self._begin = time.perf_counter()
        elif step == "scores":
            self.predictor_seconds += time.perf_counter() - self._begin

    @property
    def extra_bytes(self) -> int:
        """Memory that the artifact adds in this process."""
        return sum(layer.extra_bytes for layer in self._layers)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        call = (input_ids, positions, intermediate_tensors, inputs_embeds)
        if self._clocks is not None:
            get_forward_context().skip_compiled = True  # no clock can be read inside a compiled model
        if not self._hidden:
            return self.model(*call)
        tokens = positions.shape[-1]
        metadata = _metadata()
        batch = attention.batch_of(metadata)
        self._taken = self._taken or self._state()  # not before vLLM has packed what it packs
        if metadata is None and not self._warm:  # vLLM's dummy run: compile now, not when the first prompt comes
            self._warm = True
            self._hidden[0](*call)
            logger.info(
                "fastfill: %.0f%% of the FFN neurons are skipped in prompts of %d tokens or more; %.0f MB more memory.",
                100 * self._prefill.sparsity,
                self._prefill.min_tokens,
                self.extra_bytes / 1e6,
            )
        if metadata is None:
            return self.model(*call)
        plan, reasons = self._plan(batch, tokens)
        output = self._run(call, plan, batch)
        sparse = plan.sparse_tokens if plan and plan.runs else 0  # what the op ran, not what was planned
        if plan and not sparse:
            reasons = {*reasons, NOT_RUN}
        self.stats.unread_tokens += sparse if plan and False in plan.runs else 0
        self._count(sparse, (batch.tokens if batch else tokens) - sparse, reasons)
        return output

    def _run(self, call: tuple[Any, ...], plan: Plan | None, batch: Batch | None) -> torch.Tensor | IntermediateTensors:
        """The stock model, or its second view where a part is sparse."""
        if plan is None and not (self._all_neurons and batch and batch.longest > 1):
            return self.model(*call)
        context, before = get_forward_context(), get_forward_context().cudagraph_runtime_mode
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE  # what was captured knows nothing of this step's selection
        token = current_plan.set(plan)
        try:
            return self._hidden[0](*call)
        finally:
            current_plan.reset(token)
            context.cudagraph_runtime_mode = before

    def start_clocks(self) -> None:
        attentions = self._family.attentions(self.model)
        views = (self.model, *(sparse.view for sparse in self._hidden))
        ffns = {ffn for view in views for ffn in self._family.ffns(view)}  # with one copy they are the same
        sparse = [layer.ffn for layer in self._layers if layer.ffn]
        device = next(attentions[0].parameters()).device
        self._clocks = ExitStack()
        self._seconds = self._clocks.enter_context(clocked(device, attentions, ffns, sparse))

    def stop_clocks(self) -> dict[str, float]:
        """Seconds by part since `start_clocks`."""
        assert self._clocks
        self._clocks.close()
        self._clocks = None
        return self._seconds

    def set_all_neurons(self, on: bool) -> None:
        """Whether steps that prefill run the sparse kernel for dense tokens too."""
        self._all_neurons = on
        for layer in self._layers:
            layer.all_neurons = on

    def _plan(self, batch: Batch | None, tokens: int) -> tuple[Plan | None, set[str]]:
        """Which rows of this step are to be sparse, and the reasons for which others are not."""
        asked = requests.of(self._vllm_config)
        plan, reasons = steps.plan(batch, asked.prompts, tokens, self._prefill, bool(asked.whole))
        if plan and self._state() != self._taken:
            return None, {*reasons, steps.NEW_WEIGHTS}
        return plan, reasons

    def _state(self) -> tuple[Any, ...]:
        """Something else as soon as anybody writes to the FFN weights of which the sparse kernel has its own form."""
        weights = (linear.weight for layer in self._layers for linear in layer.linears)
        return tuple((weight.data_ptr(), weight._version) for weight in weights if weight is not None)  # None: packed

    def _count(self, sparse: int, dense: int, reasons: set[str]) -> None:
        """Count the tokens of a step that has run."""
        stats = self.stats
        stats.sparse_tokens += sparse
        stats.dense_tokens += dense
        stats.sparse_calls += sparse > 0
        stats.dense_calls += sparse == 0
        for reason in reasons:
            if reason not in stats.dense_because:
                logger.warning("fastfill: a prompt that should be sparse is dense (%s); this is said once.", reason)
            stats.dense_because[reason] = stats.dense_because.get(reason, 0) + 1
        if self._metrics:
            self._metrics.set(stats, self._prefill.sparsity, self.predictor_seconds)
        then, logged = self._logged
        if stats.sparse_tokens > logged.sparse_tokens and time.monotonic() - then > LOG_SECONDS:
            logger.info(
                "fastfill: %d tokens prefilled sparsely, %d densely since the last line; predictors took %.1f s so far.",
                stats.sparse_tokens - logged.sparse_tokens,
                stats.dense_tokens - logged.dense_tokens,
                self.predictor_seconds,
            )
            self._logged = (time.monotonic(), replace(stats))


def _metadata() -> Any:
    """Where the requests of this step lie; None in dummy runs."""
    found = get_forward_context().attn_metadata if is_forward_context_available() else None
    if not found:
        return None
    return next(iter(found.values())) if isinstance(found, dict) else found


class WorkerExtension:
    """Methods that `LLM.collective_rpc` can call on vLLM's workers."""

    model_runner: Any

    def fastfill_stats(self) -> dict[str, Any]:
        """Sparse and dense tokens and steps so far, reasons for steps that should have been sparse and were not, seconds in
        predictors, and the memory of the weights and of what the artifact added, in this worker."""
        model = self.model_runner.get_model()
        names = ("predictor_seconds", "model_bytes", "extra_bytes")
        return {**vars(model.stats), **{name: getattr(model, name) for name in names}}

    def fastfill_start_clocks(self) -> None:
        self.model_runner.get_model().start_clocks()

    def fastfill_stop_clocks(self) -> dict[str, float]:
        return self.model_runner.get_model().stop_clocks()

    def fastfill_all_neurons(self, on: bool) -> None:
        self.model_runner.get_model().set_all_neurons(on)


@functools.cache
def __getattr__(name: str) -> type:
    """FastfillXForCausalLM: `SparsePrefill` in front of vLLM's XForCausalLM, for each in `MODELS`."""
    stock = {ours: stock for stock, ours in MODELS.items()}.get(name)
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bases = (SparsePrefill, ModelRegistry.models[stock].load_model_cls())
    return types.new_class(name, bases, exec_body=lambda body: body.update(__module__=__name__))
