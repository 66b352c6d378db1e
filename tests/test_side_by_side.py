"""What the page shows, without the page: the two answers and their picks, one question at a time, stopped at any moment."""

import threading

import pytest
import torch
from conftest import BLOCK, LAYERS, logits, tiny_artifact, tiny_model, tiny_text, tiny_tokenizer, token_ids, user_error

from fastfill import attach
from fastfill.engines import transformers as engine
from fastfill.engines.transformers import TransformersEngine
from fastfill.lab import demo, picks, side_by_side
from fastfill.lab.side_by_side import Comparison, Run

DOCUMENT, QUESTION, NEW = tiny_text(90), "w9 w10", 6
SECONDS = 60  # no wait is longer; without a bug all are short


@pytest.fixture
def comparison(model):
    with attach(model, tiny_artifact(model)) as attachment:
        made = Comparison(TransformersEngine(attachment, "tiny", tiny_tokenizer()), NEW)
        yield made
        made.close()


class Gate:
    """Holds the next forward of the model until `open` is set, and says that it is there."""

    def __init__(self, model):
        self.reached, self.open = threading.Event(), threading.Event()
        self.hook = model.model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.reached.set()
        assert self.open.wait(SECONDS)
        self.hook.remove()


def last(run):
    return list(run.states())[-1]


def test_both_answers_and_the_picks(model, comparison):
    attachment, tokenizer = comparison.engine.attachment, comparison.engine.tokenizer
    ids = demo.prompt(comparison.engine, DOCUMENT, QUESTION, NEW)
    states = list(comparison.ask(DOCUMENT, QUESTION).states())
    end = states[-1]
    with attachment.dense():
        dense = engine.generate(model, ids, NEW)
    with picks.watch(attachment) as seen:
        sparse = engine.generate(model, ids, NEW)
    assert end.dense == tokenizer.decode(dense) and end.sparse == tokenizer.decode(sparse) and end.dense != end.sparse
    assert (end.status, end.prompt_tokens) == ("Done.", ids.shape[1])
    assert end.sparse_tokens == ids.shape[1] // BLOCK * BLOCK - BLOCK
    assert end.ttft_dense_s > 0 and end.ttft_sparse_s > 0
    assert end.picks == picks.summarize(attachment, seen, range(LAYERS)) and len(end.picks["maps"]) == LAYERS
    assert all(not ffn.taps for ffn in attachment.ffns)
    assert not any(module._forward_pre_hooks for module in attachment.modules)


def test_a_second_question_waits(model, comparison):
    gate = Gate(model)
    first = comparison.ask(DOCUMENT, QUESTION)
    assert gate.reached.wait(SECONDS)
    second = comparison.ask(DOCUMENT, "w11")
    third = comparison.ask(DOCUMENT, "w12")
    assert second.state.status == third.state.status == "Waiting for the answer in another tab."
    third.stop()
    assert last(third).status == "Stopped."
    gate.open.set()
    assert last(first).status == last(second).status == "Done."
    assert comparison.ask(DOCUMENT, QUESTION).state.status == "Starting."


def test_stop_in_the_middle_of_the_prefill(model, comparison):
    layers = []
    hooks = [module.register_forward_hook(lambda *_: layers.append(1)) for module in comparison.engine.attachment.modules]
    gate = Gate(model)
    run = comparison.ask(DOCUMENT, QUESTION)
    assert gate.reached.wait(SECONDS)
    run.stop()
    gate.open.set()
    end = last(run)
    assert (end.status, end.dense, end.ttft_dense_s) == ("Stopped.", "", None) and not layers
    for hook in hooks:
        hook.remove()
    assert last(comparison.ask(DOCUMENT, QUESTION)).status == "Done."  # nothing was left behind


def test_a_reader_that_goes_away_stops_the_run(model, comparison):
    gate = Gate(model)
    run = comparison.ask(DOCUMENT, QUESTION)
    states = run.states()
    next(states)
    states.close()  # what happens to the generator of a closed tab
    assert run.stopped.is_set()
    gate.open.set()
    assert last(comparison.ask(DOCUMENT, QUESTION)).status == "Done."


def test_stop_keeps_what_was_written(comparison, monkeypatch):
    show = Run.show

    def after_two(self, **changes):
        show(self, **changes)
        if len(self.state.dense.split()) == 2:
            self.stopped.set()

    monkeypatch.setattr(Run, "show", after_two)
    end = last(comparison.ask(DOCUMENT, QUESTION))
    assert end.status == "Stopped." and len(end.dense.split()) == 2 and end.ttft_dense_s and end.ttft_sparse_s is None


def test_an_error_in_the_model_is_raised_where_it_is_read(model, comparison, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(picks, "summarize", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            last(comparison.ask(DOCUMENT, QUESTION))
    assert last(comparison.ask(DOCUMENT, QUESTION)).status == "Done."
    before = logits(model, token_ids(1, 40))
    comparison.engine.attachment.detach()
    assert not torch.equal(before, logits(model, token_ids(1, 40)))  # the answers above were still sparse


TOO_LONG = r"The prompt has 606 tokens and the answer up to 6, more than the 512"  # 600, "Question:", 2, 3 of the template


@pytest.mark.parametrize("document, words", [(" \n", "no document"), (tiny_text(600), TOO_LONG)])
def test_documents_that_cannot_be_read(comparison, document, words):
    with user_error(words):
        comparison.ask(document, QUESTION)


def test_what_stays_dense_says_so(model):
    for settings, words in ({"min_tokens": 400}, "under 400 tokens"), ({"sparsity": 0.0}, "the sparsity is 0"):
        with attach(model, tiny_artifact(model), **settings) as attachment:
            made = Comparison(TransformersEngine(attachment, "tiny", tiny_tokenizer()), NEW)
            end = last(made.ask(DOCUMENT, QUESTION))
            made.close()
        assert end.status.startswith("Done. Both runs were dense") and words in end.status
        assert (end.sparse_tokens, end.picks, end.dense) == (0, None, end.sparse)


def test_a_huge_document_is_refused_before_it_is_tokenized(comparison, monkeypatch):
    monkeypatch.setattr(engine, "encode", None)
    with user_error(r"The document has 60,0\d\d characters, more than the 512 tokens"):
        comparison.ask("w9 " * 20_000, QUESTION)


def test_so_many_may_wait():
    model = tiny_model()
    with attach(model, tiny_artifact(model)) as attachment:
        made = Comparison(TransformersEngine(attachment, "tiny", tiny_tokenizer()), NEW)
        gate = Gate(model)
        runs = [made.ask(DOCUMENT, QUESTION) for _ in range(side_by_side.MOST_RUNS)]
        assert gate.reached.wait(SECONDS)
        with user_error("questions are waiting"):
            made.ask(DOCUMENT, QUESTION)
        runs[-1].stop()
        assert last(runs[-1]).status == "Stopped."
        again = made.ask(DOCUMENT, QUESTION)  # its place is free
        gate.open.set()
        made.close()
        assert last(again).status in ("Stopped.", "Done.")
