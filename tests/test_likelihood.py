"""The likelihood of the right answer: a plain forward's log-softmax where nothing is sparse, and decoding's where it is."""

import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import BLOCK, FAMILIES, RECURRENT, logits, tiny_artifact, tiny_model, token_ids

from fastfill import attach
from fastfill.engines import transformers as engine
from fastfill.engines.transformers import TransformersEngine
from fastfill.lab import likelihood, metrics, runner
from fastfill.lab.example import Example

T = 45  # a prompt; blocks at 8..39 are sparse
LENGTHS = (1, 2, 5, likelihood.CHUNK + 6)


def example(*golds, tokens=T, new=6, seed=0):
    score = functools.partial(metrics.match_all, references=["w9"])
    return Example("set", "0", token_ids(1, tokens, seed=seed), new, score, ("w9",), golds=golds)


def gold(length, seed=1):
    return token_ids(length, seed=seed)


def read(attachment, tokenizer, one, *score):
    return runner.answers(TransformersEngine(attachment, "tiny"), tokenizer, [one], *score)[0]


def forced(model, prompt, answer, off=0):
    """The answer's log-likelihood by one forward over prompt and answer. off: mistakes the slice by so many tokens."""
    known = F.log_softmax(logits(model, torch.cat([prompt, answer[None]], 1))[0], -1)
    first = prompt.shape[1] - 1 + off
    return float(known[first : first + len(answer)].gather(1, answer[:, None]).sum())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("length", LENGTHS)
def test_without_sparsity_it_is_a_plain_forwards_log_softmax(tokenizer, family, length):
    model, answer = tiny_model(family, dtype=torch.float64), gold(length)
    with attach(model, tiny_artifact(model), sparsity=0.0) as attachment:
        row = read(attachment, tokenizer, example(answer), "likelihood")
    want = -forced(model, example().ids, answer)
    # Sums of fewer than 100 terms per value, each to 2**-53, through three layers of order one: far below 1e-10.
    assert row["nll_dense"] == pytest.approx(want, rel=1e-10)
    assert row["nll_sparse"] == row["nll_dense"] and row["kl"] == 0  # to the bit: the same code, all of it dense
    assert row["gold_tokens"] == row["same_tokens"] == length and row["same_first"] and row["sparse_tokens"] == 0
    for off in (-1, 1) if length > 1 else (-1,):
        assert abs(-forced(model, example().ids, answer[: length - (off > 0)], off) - want) > 0.01  # one token off shows


@pytest.mark.parametrize("length", LENGTHS)
def test_a_sparse_prompt_then_token_by_token_as_decoding(exact_model, tokenizer, length):
    """However long the answer is: at least one here is longer than `min_tokens`, and dense all the same."""
    model, answer = exact_model, gold(length)
    prompt = example().ids
    with attach(model, tiny_artifact(model)) as attachment:
        row = read(attachment, tokenizer, example(answer), "likelihood")
        assert (row["sparse_tokens"], row["dense_tokens"]) == (4 * BLOCK, T - 4 * BLOCK)
        with torch.no_grad():
            out = model(input_ids=prompt, use_cache=True)
            want = 0.0
            for token in answer:
                want -= float(F.log_softmax(out.logits[0, -1], -1)[token])
                out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
    assert row["nll_sparse"] == pytest.approx(want, rel=1e-10)
    assert row["nll_dense"] == pytest.approx(-forced(model, prompt, answer), rel=1e-10)
    assert abs(row["nll_sparse"] - row["nll_dense"]) > 1e-4 and row["kl"] > 1e-4


def test_of_several_answers_the_one_most_likely_after_the_dense_prompt(exact_model, tokenizer):
    """Sparse takes the same one, also where it would prefer another."""
    model, plain, differs = exact_model, tiny_model(dtype=torch.float64), 0
    with attach(model, tiny_artifact(model)) as attachment:
        for seed in range(20):
            one = example(gold(3, seed=50 + seed), gold(3, seed=90 + seed), seed=seed)
            row = read(attachment, tokenizer, one, "likelihood")
            dense = [-forced(plain, one.ids, answer) for answer in one.golds]
            rows = [read(attachment, tokenizer, example(answer, seed=seed), "likelihood") for answer in one.golds]
            best = dense.index(min(dense))
            assert row["gold"] == tokenizer.decode(one.golds[best]) and row["nll_dense"] == pytest.approx(dense[best], rel=1e-9)
            assert row["nll_sparse"] == rows[best]["nll_sparse"]
            sparse = [each["nll_sparse"] for each in rows]
            differs += sparse.index(min(sparse)) != best
    assert differs


def test_scoring_leaves_the_written_answer_as_it_was(exact_model, tokenizer):
    model = exact_model
    with attach(model, tiny_artifact(model)) as attachment:
        both = read(attachment, tokenizer, example(gold(7), gold(40, seed=3)))
        texts = read(attachment, tokenizer, example(gold(7), gold(40, seed=3)), "answers")
        alone = read(attachment, tokenizer, example(gold(7), gold(40, seed=3)), "likelihood")
        sparse = tokenizer.decode(engine.generate(model, example().ids, 6), skip_special_tokens=True)
    dense = tokenizer.decode(engine.generate(model, example().ids, 6), skip_special_tokens=True)
    assert (both["dense"], both["sparse"]) == (texts["dense"], texts["sparse"]) == (dense, sparse)
    assert both.items() >= alone.items()
    assert "nll_dense" not in texts and "dense" not in alone and "score_dense" not in alone


def written(model, tokens, most):
    """Answers to prompts of so many tokens, up to `most` ids each, written together."""
    return likelihood.write(model, [likelihood.read(model, example(tokens=each).ids) for each in tokens], most)


def test_writing_ends_with_the_sequence(model):
    whole = engine.generate(model, example().ids, 12).tolist()
    stop = whole.index(whole[5]) + 1
    for ends in (whole[5], [126, whole[5]]):
        model.generation_config.eos_token_id = ends
        assert written(model, [T], [12]) == [whole[:stop]]
    assert written(model, [T], [3]) == [whole[:3]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", *(name for name in RECURRENT if name in FAMILIES)])
def test_what_is_written_together_is_what_generate_writes(family):
    """Shorter prompts are padded, and what ends leaves the batch: in the middle, first, last. gemma3_text has windows, the last
    one states."""
    model, tokens = tiny_model(family, dtype=torch.float64), (45, 7, 30, 45, 64)
    alone = [engine.generate(model, example(tokens=each).ids, 12).tolist() for each in tokens]
    for most in ([12] * 5, [12, 3, 1, 7, 12], [1, 2, 3, 4, 5], [9, 9, 12, 1, 1]):
        assert written(model, tokens, most) == [ids[:limit] for ids, limit in zip(alone, most, strict=True)]
    model.generation_config.eos_token_id = end = alone[1][4]
    want = [ids[: ids.index(end) + 1] if end in ids else ids for ids in alone]
    assert len({*map(len, want)}) > 1 and written(model, tokens, [12] * 5) == want


def test_rotations_that_depend_on_the_longest_of_a_call_are_written_one_by_one():
    rope = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 9.0, 16.0]}
    model = tiny_model("phi3", dtype=torch.float64, rope_parameters=rope, original_max_position_embeddings=64)
    tokens = (30, 90, 50)
    assert written(model, tokens, [12] * 3) == [written(model, [each], [12])[0] for each in tokens]
    for kind, alike in (("default", True), ("llama3", True), ("longrope", False), ("dynamic", False)):
        for found in ({"rope_type": kind}, {"full_attention": {"rope_type": kind}, "sliding_attention": {}}):
            assert likelihood._rotates_alike(SimpleNamespace(rope_parameters=found)) == alike


@pytest.mark.parametrize("setting, count", [({"upper_share": 0.5}, "skipped_above"), ({"reread": 0.25}, "reread_tokens")])
def test_answers_are_those_that_are_written_one_by_one(exact_model, tokenizer, setting, count):
    """Of which upper layers read a part: their caches do not fit together, so one by one. That are read again: together."""
    made = [example(tokens=each) for each in (64, 80)]
    with attach(exact_model, tiny_artifact(exact_model), **setting) as attachment:
        attached = TransformersEngine(attachment, "tiny")
        together = runner.answers(attached, tokenizer, made, "answers")
        assert together == [row for one in made for row in runner.answers(attached, tokenizer, [one], "answers")]
        for one, row in zip(made, together, strict=True):
            ids = engine.generate(exact_model, one.ids, one.max_new_tokens)
            assert row[count] and row["sparse"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_logits_are_only_taken_where_they_are_needed(model, tokenizer):
    """Of a long prompt one row; of the answer at most CHUNK at a time."""
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _module, inputs, _out: rows.append(inputs[0].shape[:-1].numel()))
    with attach(model, tiny_artifact(model)) as attachment:
        read(attachment, tokenizer, example(gold(2 * likelihood.CHUNK + 1), tokens=300))
    assert max(rows) == likelihood.CHUNK
    assert sum(rows) == 2 * 6 + 3 * (2 * likelihood.CHUNK + 1)  # written twice; chosen, compared with both


def test_sums_by_hand():
    """Two tokens, three words. First: dense (1/2, 1/4, 1/4), sparse (1/4, 1/2, 1/4), right is word 0. Then both the same."""
    head = torch.nn.Identity()
    model = SimpleNamespace(get_output_embeddings=lambda: head, device="cpu", config=None)
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]], dtype=torch.float64).log()
    sparse = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]], dtype=torch.float64).log()
    answer = torch.tensor([0, 2])
    row = likelihood.compare(model, dense, sparse, answer)
    assert row["nll_dense"] == pytest.approx(-math.log(0.5) - math.log(0.1))
    assert row["nll_sparse"] == pytest.approx(-math.log(0.25) - math.log(0.1))
    # 1/2 ln 2 + 1/4 ln 1/2 = 1/4 ln 2; the other way around it would be the same, so a second, lopsided pair:
    assert row["kl"] == pytest.approx(0.25 * math.log(2))
    assert (row["gold_tokens"], row["same_tokens"], row["same_first"]) == (2, 1, False)
    assert likelihood.nats(model, dense, answer) == pytest.approx(row["nll_dense"])
    even, odd = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    row = likelihood.compare(model, even, odd, torch.tensor([0]))
    assert row["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)


def counts(tokens, dense, sparse, first=True):
    row = {"gold_tokens": tokens, "nll_dense": dense, "nll_sparse": sparse, "kl": 0.1 * tokens, "same_tokens": tokens - 1}
    return {**row, "same_first": first}


def test_summary_by_hand():
    # One set: 10 nats over 5 tokens dense, 12 sparse; the other: 3 over 1, and 3.3. Sets weigh the same.
    groups = [[counts(1, 4.0, 5.0), counts(4, 6.0, 7.0, first=False)], [counts(1, 3.0, 3.3)]]
    found = likelihood.summarize(groups)
    assert (found["dense"], found["sparse"], found["loss"]) == (2.5, 2.85, 0.35)
    assert (found["kl"], found["tokens"], found["examples"]) == (0.1, 6, 3)
    assert found["first_token_agreement"] == 0.75 and found["top1_agreement"] == 0.3
    assert likelihood.summarize([[], []]) is None and likelihood.summarize([groups[1]])["interval"] is None


def test_the_interval_of_the_loss_is_that_of_a_ratio_of_sums():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 9, (400,), generator=generator)
    dense = 2.0 * tokens + torch.randn(400, generator=generator)  # the examples' own spread cancels: they are paired
    extra = 0.2 * tokens + 0.2 * torch.randn(400, generator=generator)
    rows = [counts(int(t), float(d), float(d + e)) for t, d, e in zip(tokens, dense, extra, strict=True)]
    found = likelihood.summarize([rows], seed=3)
    low, high = found["interval"]
    assert low < 0.2 < high and found == likelihood.summarize([rows], seed=3)
    # Delta method: sd(e - 0.2 t) / sqrt(n) / mean(t) = 0.2 / 20 / 4.5 = 0.0022; by a fixed number of tokens it would be 0.005.
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20 / float(tokens.double().mean()), rel=0.2)


class Letters:
    """Every character is a token."""

    def __call__(self, text, **options):
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    "after, answer, written",
    [
        ("Answer:", "Paris", " Paris"),
        ("Answer: ", "Paris", "Paris"),
        ("Answer:\n", "Paris", "Paris"),
        ("", "Paris", "Paris"),  # behind a chat template
        ("code:", "\tx = 1", "\tx = 1"),
        ("code:\n", "    x", "    x"),
        ("\u7b54\u6848\uff1a", "\u6bb5\u843d7", "\u6bb5\u843d7"),
    ],
)
def test_an_answer_follows_its_prompt_as_it_would_be_written(after, answer, written):
    (ids,) = likelihood.answer_ids(Letters(), [answer], after, 99)
    assert "".join(map(chr, ids.tolist())) == written


class Pieces(Letters):
    """As SentencePiece: a text begins with a space, and a space with letters behind it is one token."""

    def __call__(self, text, **options):
        return {"input_ids": re.findall(r" ?\w+|.", f" {text}", re.DOTALL)}


def test_a_tokenizer_that_begins_with_a_space(monkeypatch):
    monkeypatch.setattr(torch, "tensor", lambda ids, dtype: ids)
    for after, tokens in (("Answer:", [" Paris", ","]), ("Answer:\n", ["Paris", ","]), ("Answer: ", [" Paris", ","])):
        assert likelihood.answer_ids(Pieces(), ["Paris,"], after, 9) == (tokens,), after
    assert Pieces()(" Paris")["input_ids"] == [" ", " Paris"]  # what the text alone would give


def test_answers_are_cut_and_none_comes_twice_or_empty():
    found = likelihood.answer_ids(Letters(), ["abcd", " ", "", "abc", "x"], "", 3)
    assert ["".join(map(chr, ids.tolist())) for ids in found] == ["abc", "x"]
