"""A model class for EleutherAI's lm-evaluation-harness, so that its tasks run with a sparse prefill.

    python -m fastfill.evaluate.lm_eval --model fastfill --model_args pretrained=MODEL,artifact=DIR --tasks lambada_openai

is the harness's own command with the model `fastfill` known to it; a program imports this module. All arguments of
the harness's `hf` model work too. `sparsity=0` is the dense model on the same path.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from fastfill import artifact as artifacts
from fastfill import models
from fastfill.attachment import attach
from fastfill.engines import transformers as engine
from fastfill.errors import UserError

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
    """The harness's Hugging Face model with an artifact on it. pretrained: as for `fastfill` commands. artifact: a folder."""

    def __init__(
        self,
        pretrained: str,
        artifact: str,
        sparsity: float | None = None,
        block_size: int | None = None,
        min_tokens: int | None = None,
        dense_tail: int | None = None,
        predictor: str = "learned",
        compensator: bool = True,
        kernel: str = "auto",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ):
        learned = artifacts.load(artifact)  # before the model, which takes longer
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(
            pretrained=models.resolve(pretrained), device=device, dtype=dtype or models.default_dtype(device), **kwargs
        )
        self.model.generation_config = engine.greedy(self.model)  # what a task does not ask for is greedy
        self.artifact = artifact
        self.attachment = attach(
            self.model,
            learned,
            sparsity=sparsity,
            block_size=block_size,
            min_tokens=min_tokens,
            dense_tail=dense_tail,
            predictor=predictor,
            compensator=compensator,
            kernel=kernel,
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of each request, one at a time.

        As in use: the context is read sparsely, the continuation densely from the cache that it left; a context that several
        requests share is read once. Rolling requests (perplexity of a whole text) have no context: the text is read sparsely.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], len(requests[i][2])))
        known: list[int] | None = None
        first, cache = torch.empty(0), None
        for index in tqdm(order, desc="log-likelihoods", disable=disable_tqdm):
            text, context, continuation = requests[index]
            inputs = (context + continuation)[-(self.max_length + 1) : -1]  # cut from the left, as the harness does
            part = len(inputs) - len(continuation) + 1
            if text is None:
                logits = self._read(inputs)[0][-len(continuation) :]
            else:
                if inputs[:part] != known:
                    known = inputs[:part]
                    logits, cache = self._read(known)
                    first = logits[-1:]
                logits = first
                if len(continuation) > 1:
                    with self.attachment.dense():
                        logits = torch.cat([first, self._read(inputs[part:], copy.deepcopy(cache))[0]])
            targets = torch.tensor(continuation, device=logits.device)
            chosen = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
            results[index] = float(chosen), bool((logits.argmax(-1) == targets).all())
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, results[index])
        return results

    @torch.no_grad()
    def _read(self, ids: list[int], cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits (T, V) in fp32 of ids behind what is in the cache, and the cache."""
        rows = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=rows, past_key_values=cache, use_cache=True)
        return out.logits[0].float(), out.past_key_values

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's result file."""
        config, stats = self.attachment.config, self.attachment.stats
        return {
            **super().get_model_info(),
            "artifact": str(self.artifact),
            "sparsity": config.sparsity,
            "block_size": config.block_size,
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
