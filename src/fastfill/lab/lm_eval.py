"""A model class for EleutherAI's lm-evaluation-harness, so that its tasks run with a sparse prefill.

    python -m fastfill.lab.lm_eval --model fastfill --model_args pretrained=MODEL,artifact=DIR --tasks lambada_openai

is the harness's own command with the model `fastfill` known to it; a program imports this module. The arguments of
the harness's `hf` model work too, but for `softmax_dtype` and `mixed_precision_dtype`, which are refused. `sparsity=0` is the
dense model on the same path.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from fastfill import artifact as artifacts
from fastfill import config as cfg
from fastfill import kv_cache, models
from fastfill.attachment import attach
from fastfill.config import PREFILL_FIELDS
from fastfill.engines import transformers as engine
from fastfill.errors import UserError
from fastfill.families import Head
from fastfill.lab.baselines import named
from fastfill.lab.perplexity import CHUNK

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    missing = "The evaluation harness is not installed; run: pip install 'fastfill[lm-eval]'."
    if __name__ == "__main__":
        sys.exit(f"fastfill: {missing}")
    raise UserError(missing) from error

from tqdm import tqdm  # the harness brings it, and its bars look alike

# (context and continuation as text or None, ids of the context, ids of the continuation)
Request = tuple[Any, list[int], list[int]]


@register_model("fastfill")
class FastfillLM(HFLM):
    """The harness's Hugging Face model with an artifact on it.

    pretrained: as for `fastfill` commands. artifact: a folder. kwargs: fields of `PrefillConfig`, and what the harness's takes.
    """

    def __init__(
        self,
        pretrained: str,
        artifact: str,
        predictor: str = "learned",
        compensator: bool = True,
        kernel: str = "auto",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ):
        for name in ("softmax_dtype", "mixed_precision_dtype"):
            if kwargs.get(name) is not None:
                raise UserError(f"{name} is not supported: log-likelihoods are computed in fp32 from the model's own dtype.")
        learned = artifacts.load(artifact)  # before the model, which takes longer
        prefill = learned.prefill.with_(**{name: kwargs.pop(name) for name in PREFILL_FIELDS if name in kwargs})
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(
            pretrained=models.resolve(pretrained), device=device, dtype=dtype or models.default_dtype(device), **kwargs
        )
        self.model.generation_config = engine.greedy(self.model)  # what a task does not ask for is greedy
        self.artifact = artifact
        self.attachment = attach(
            self.model,
            learned,
            prefill,
            predictor=named(predictor),
            compensator=compensator,
            kernel=kernel,
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of each request, one at a time.

        As in use: the context is prefilled sparsely, once for all requests that share it; the continuation is teacher-forced
        densely on its cache. Rolling requests (perplexity of a whole text) have no context: sparse tokens are scored.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], len(requests[i][2])))
        known: list[int] | None = None
        first, cache = torch.empty(0), None
        for index in tqdm(order, desc="log-likelihoods", disable=disable_tqdm):
            text, context, continuation = requests[index]
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"A request has {len(context)} tokens of context and {len(continuation)} of continuation; both need one or "
                    f"more, and the continuation no more than the {self.max_length} that the model holds."
                )
            inputs = (context + continuation)[-(self.max_length + 1) : -1]  # cut from the left, as the harness does
            part = len(inputs) - len(continuation) + 1
            if text is None:
                states = self._read(inputs)[0][-len(continuation) :]
            else:
                if inputs[:part] != known:
                    known = inputs[:part]
                    states, cache = self._read(known)
                    first = states[-1:].clone()  # not a view that holds the whole context
                states = first
                if len(continuation) > 1:
                    with self.attachment.dense():
                        states = torch.cat([first, self._read(inputs[part:], copy.deepcopy(cache))[0]])
            results[index] = self._score(states, continuation)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, results[index])
        return results

    @torch.no_grad()
    def _read(self, ids: list[int], cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Last hidden states (T, H) of ids behind what is in the cache, and the cache. Logits of a long context would take
        far more memory than the model, and only those of the continuation count."""
        rows = torch.tensor([ids], device=self.model.device)
        base = self.model.base_model
        out = base(input_ids=rows, **kv_cache.given(base, cache))
        return out.last_hidden_state[0], kv_cache.left(out)

    @torch.no_grad()
    def _score(self, states: torch.Tensor, targets: list[int]) -> tuple[float, bool]:
        """(log-likelihood in fp32 of the targets (T,), whether each is the likeliest) after last hidden states (T, H). The
        logits of CHUNK positions are in memory at a time."""
        head, total, greedy = Head(self.model), 0.0, True
        for hidden, wanted in zip(states.split(CHUNK), torch.tensor(targets, device=states.device).split(CHUNK), strict=True):
            logits = head(hidden[None])[0].float()  # (CHUNK, V)
            total += float((logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1)).sum(dtype=torch.float64))
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
        return total, greedy

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's result file."""
        stats = self.attachment.stats
        return {
            **super().get_model_info(),
            "artifact": str(self.artifact),
            **cfg.to_dict(self.attachment.config),
            "sparse_tokens": stats.sparse_tokens,
            "dense_tokens": stats.dense_tokens,
        }


def main() -> None:
    """The harness's command, with the model `fastfill`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"fastfill: {error}", file=sys.stderr)
        sys.exit(2)
