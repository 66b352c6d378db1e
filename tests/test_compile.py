"""`torch.compile` of an attached model: decode steps are stock transformers' graph, prompts are sparse, and all is counted."""

from dataclasses import asdict

import pytest
import torch
from conftest import SINGLE, tiny_artifact, tiny_model, token_ids
from transformers import CompileConfig

from fastfill import attach

PROMPT, NEW, TAIL = 47, 4, 12
OLD = not hasattr(torch._dynamo.config, "recompile_limit")  # torch 2.6, which cuts stock transformers' graph, too


class Graphs:
    """A backend that runs each graph as it is. sizes: the nodes of each."""

    def __init__(self):
        self.sizes = []

    def __call__(self, graph, _example):
        self.sizes.append(len(graph.graph.nodes))
        return graph.forward

    def __deepcopy__(self, _memo):  # `generate` copies its settings
        return self


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generate(model, graphs=None):
    """The answer; with a backend, each decode step is compiled."""
    how = {"disable_compile": True}
    if graphs:
        compiled = CompileConfig(backend=graphs, mode=None)
        compiled._compile_all_devices = True  # transformers compiles by itself on GPUs alone
        how = {"compile_config": compiled}
    ids = token_ids(2, PROMPT)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **how)


def test_decode_steps_of_generate_are_the_graph_of_stock_transformers():
    model = tiny_model("qwen2")
    artifact, stock, ours = tiny_artifact(model), Graphs(), Graphs()
    plain = generate(model, stock)
    with attach(model, artifact, dense_tail=TAIL) as attached:
        eager = generate(model)
        once = asdict(attached.stats)
        assert torch.equal(generate(model, ours), eager) and not torch.equal(eager, plain)
        assert once["dense_calls"] == NEW - 1 and once["sparse_calls"] == 1
        for name, value in asdict(attached.stats).items():
            assert value == 2 * once[name] if isinstance(value, int) else not value
        assert ours.sizes and (OLD or ours.sizes == stock.sizes)
    torch._dynamo.reset()
    assert torch.equal(generate(model, again := Graphs()), plain) and again.sizes == stock.sizes


@pytest.mark.skipif(OLD, reason="torch 2.6 compiles eight of them")
def test_every_attachment_is_compiled():
    model = tiny_model("qwen2")
    artifact, graphs, known = tiny_artifact(model), Graphs(), []
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            with attach(model, artifact, dense_tail=TAIL):
                generate(model, graphs)
            known.append(len(graphs.sizes))
    assert 0 < known[0] < known[1] < known[2]


def test_what_generate_calls_serves_others_too():
    model, ids = tiny_model("qwen2"), token_ids(2, 1)
    with attach(model, tiny_artifact(model)) as attached:
        call = model.get_compiled_call(CompileConfig(backend=Graphs(), mode=None))
        (logits, *_) = call(input_ids=ids, return_dict=False)
        assert logits.shape[:2] == (2, 1) and attached.stats.dense_tokens == 2
    call(input_ids=ids)
    assert attached.stats.dense_tokens == 2


EIGHT_BITS = {"weights": "int8", "dense_weights": "int8"}
UPPER = {"upper_share": 0.5}
AGAIN = {"reread": 0.5}


def test_decode_steps_in_eight_bits_run_as_they_do_uncompiled():
    model, graphs = tiny_model("qwen2"), Graphs()
    with attach(model, tiny_artifact(model), dense_tail=TAIL, **EIGHT_BITS) as attached:
        eager = generate(model)
        once = asdict(attached.stats)
        assert torch.equal(generate(model, graphs), eager)
        assert attached.stats.dense_calls == 2 * once["dense_calls"]
        assert attached.stats.sparse_tokens == 2 * once["sparse_tokens"] > 0


@pytest.mark.parametrize("settings", [{}, EIGHT_BITS, UPPER, AGAIN])
def test_a_model_that_is_compiled_in_place_gives_the_same_answer(settings):
    answers, graphs, ids = [], Graphs(), token_ids(1, PROMPT)
    for compiled in (False, True):
        model = tiny_model("qwen2")
        with attach(model, tiny_artifact(model), dense_tail=TAIL, **settings) as attached:
            if compiled:
                model.compile(backend=graphs)
            answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False))
            assert attached.stats.sparse_tokens == 24
            assert not attached.stats.whole_because and not attached.stats.once_because
            assert (attached.stats.reread_tokens > 0) == (settings == AGAIN)
    assert torch.equal(*answers) and graphs.sizes


def whole(model, graphs):
    return torch.compile(model, backend=graphs)


def base(model, graphs):
    model.model.compile(backend=graphs)
    return model


def layers(model, graphs):
    for layer in model.model.layers:
        layer.compile(backend=graphs)
    return model


@pytest.mark.parametrize(
    ("compiled", "settings"),
    [(whole, {}), (whole, EIGHT_BITS), (base, UPPER), (layers, {}), (layers, EIGHT_BITS), (layers, UPPER), (layers, AGAIN)],
)
@torch.no_grad()
def test_prompts_of_compiled_models_are_sparse(compiled, settings):
    ids = token_ids(1, PROMPT)
    results, counts = [], []
    for compile_it in (None, compiled):
        model = tiny_model("qwen2")
        with attach(model, tiny_artifact(model), dense_tail=TAIL, **settings) as attached:
            run = compile_it(model, Graphs()) if compile_it else model
            with attached.prompt(end=PROMPT):
                results.append([run(ids, logits_to_keep=1, use_cache=True).logits, run(ids[:, :1]).logits])
            assert attached.stats.sparse_tokens == 24
            counts.append((attached.stats.skipped_above, attached.stats.reread_tokens))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, **SINGLE)
    assert counts[0] == counts[1] and [count > 0 for count in counts[0]] == [settings == UPPER, settings == AGAIN]


def test_training_of_a_compiled_model_has_the_same_gradient():
    ids, results = token_ids(1, PROMPT), []
    for compile_it in (None, whole):
        model = tiny_model("qwen2")
        with attach(model, tiny_artifact(model), dense_tail=TAIL) as attached:
            run = compile_it(model, Graphs()) if compile_it else model
            run(ids, labels=ids).loss.backward()
            assert attached.stats.sparse_tokens == 24
        results.append([p.grad for p in model.parameters()])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, **SINGLE)
