"""One question on one document, answered dense and then sparse, told step by step: what `fastfill demo --web` shows."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastfill.attachment import Attachment
from fastfill.engines.transformers import TransformersEngine
from fastfill.errors import UserError
from fastfill.lab import demo, picks

MOST_RUNS = 8  # that run or wait


@dataclass(frozen=True)
class State:
    """What the page shows at one moment. Seconds; None: not yet. picks: `evaluate.picks.summarize` with all maps."""

    status: str
    prompt_tokens: int = 0
    dense: str = ""
    sparse: str = ""
    ttft_dense_s: float | None = None
    ttft_sparse_s: float | None = None
    sparse_tokens: int = 0
    picks: dict[str, Any] | None = None


class Stopped(Exception):
    """Raised inside the model when the user presses Stop."""


class Run:
    """One question. `states()` gives what there is to show until the end; `stop()` ends it within a layer's time."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.future: Future[None] | None = None
        self.state = State("")
        self._error: Exception | None = None
        self._ended = False
        self._changed = threading.Condition()

    def show(self, **changes: Any) -> None:
        with self._changed:
            self.state = dataclasses.replace(self.state, **changes)
            self._changed.notify_all()

    def end(self, error: Exception | None = None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def stop(self) -> None:
        self.stopped.set()
        if self.future and self.future.cancel():  # it was still waiting for its turn
            self.show(status="Stopped.")
            self.end()

    def states(self) -> Iterator[State]:
        """The newest state each time, older ones are left out; raises what went wrong. A reader that goes away ends the run."""
        shown = None
        try:
            while True:
                with self._changed:
                    while self.state is shown and not self._ended:
                        self._changed.wait()
                    newest = self.state
                if newest is shown:
                    break
                shown = newest
                yield newest
        finally:
            self.stop()
        if self._error:
            raise self._error


class Comparison:
    """Answers questions about documents, dense and then sparse, one question at a time, in one thread."""

    def __init__(self, engine: TransformersEngine, max_new_tokens: int):
        self.engine, self.max_new_tokens = engine, max_new_tokens
        self._pool = ThreadPoolExecutor(1)
        self._runs: set[Run] = set()
        self._asking = threading.Lock()
        self._warm = 0  # tokens of the longest prompt so far

    def ask(self, document: str, question: str) -> Run:
        """Begin, or wait for the turn. Raises UserError for a document that is empty or that the model cannot hold, or if too
        many wait."""
        if not document.strip():
            raise UserError("There is no document; paste one first.")
        document, question = demo.fill_in(document, question.strip())
        with self._asking:  # one prompt is tokenized at a time, too
            if len(self._runs) >= MOST_RUNS:
                raise UserError(f"{MOST_RUNS} questions are waiting for their answers already; ask again later.")
            ids = demo.prompt(self.engine, document, question, self.max_new_tokens)
            return self._begin(ids)

    def _begin(self, ids: torch.Tensor) -> Run:
        run = Run()
        run.show(status="Waiting for the answer in another tab." if self._runs else "Starting.", prompt_tokens=ids.shape[1])
        self._runs.add(run)
        run.future = self._pool.submit(self._work, run, ids)
        run.future.add_done_callback(lambda _: self._runs.discard(run))  # also if it never began
        return run

    def close(self) -> None:
        """Stop everything."""
        for run in list(self._runs):
            run.stop()
        self._pool.shutdown()

    def _work(self, run: Run, ids: torch.Tensor) -> None:
        failed = None
        try:
            with _stoppable(self.engine.attachment, run.stopped):
                self._compare(run, ids)
        except Stopped:
            run.show(status="Stopped.")
        except Exception as error:  # raised by states(), in the thread that reads them
            failed = error
        self._runs.discard(run)
        run.end(failed)

    def _compare(self, run: Run, ids: torch.Tensor) -> None:
        engine, attachment = self.engine, self.engine.attachment
        tokens = ids.shape[1]

        def answer(kind: str) -> None:
            new: list[int] = []

            def receive(token: int, seconds: float) -> None:
                if not new:
                    run.show(**{f"ttft_{kind}_s": seconds, "status": f"Decoding the {kind} answer."})
                new.append(token)
                text = engine.tokenizer.decode(new, skip_special_tokens=True).strip()
                run.show(**{kind: text.rstrip("\ufffd")})  # a character whose last bytes are still to come

            run.show(status=f"Prefilling {tokens:,} tokens, {'all densely' if kind == 'dense' else 'sparsely'}.")
            engine.generate(ids, self.max_new_tokens, receive)

        if tokens > self._warm:  # the first time at a length is slower: fresh memory
            run.show(status=f"Warming up: {tokens:,} tokens are prefilled densely, then sparsely, untimed.")
            with engine.dense():
                engine.prefill(ids)
            engine.prefill(ids)
            self._warm = tokens
        with engine.dense():
            answer("dense")
        before = engine.stats.sparse_tokens
        with picks.watch(attachment) as seen:
            answer("sparse")
        sparse_tokens = engine.stats.sparse_tokens - before
        if not sparse_tokens:
            config = engine.config
            reason = f"prompts under {config.shortest_prompt} tokens stay so." if config.sparsity else "the sparsity is 0."
            run.show(status=f"Done. Both runs were dense: {reason}")
            return
        found = picks.summarize(attachment, seen, range(len(attachment.ffns)))
        run.show(status="Done.", sparse_tokens=sparse_tokens, picks=found)


@contextmanager
def _stoppable(attachment: Attachment, stopped: threading.Event) -> Iterator[None]:
    """Every FFN first looks whether it is still wanted; so a long prefill ends within one layer."""

    def look(*_: Any) -> None:
        if stopped.is_set():
            raise Stopped

    hooks = [module.register_forward_pre_hook(look) for module in attachment.modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
