"""The model class for EleutherAI's harness. Skipped where the harness is not installed (the extra `lm-eval`)."""

import json
import shutil

import pytest
import torch
from conftest import logits, one_sentence, tiny_artifact, tiny_model, tiny_text, tiny_tokenizer
from test_settings import OTHER
from transformers import DynamicCache

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from fastfill import attach
from fastfill.config import PrefillConfig
from fastfill.engines import transformers as engine
from fastfill.errors import UserError
from fastfill.lab import lm_eval as ours
from fastfill.lab.lm_eval import FastfillLM

CONTEXTS = [tiny_text(45, seed=1), tiny_text(60, seed=2)]
ENDS = [" w9", " w10 w11 w12", " w13 w14"]


def made(folder, artifact, **more):
    return get_model("fastfill")(pretrained=str(folder), artifact=str(artifact), dtype="float32", device="cpu", **more)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def pairs():
    return instances("loglikelihood", [(context, end) for end in ENDS for context in CONTEXTS])


@pytest.fixture
def folder(model_folder):
    return model_folder


def test_it_is_registered():
    assert get_model("fastfill") is FastfillLM


def test_at_sparsity_zero_it_is_the_harness_s_own_model(folder, artifact_folder):
    sparse = made(folder, artifact_folder, sparsity=0.0)
    plain = get_model("hf")(pretrained=str(folder), dtype="float32", device="cpu")
    for (a, greedy_a), (b, greedy_b) in zip(sparse.loglikelihood(pairs()), plain.loglikelihood(pairs()), strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy_a == greedy_b  # fp32, other shapes of the same products
    text = instances("loglikelihood_rolling", [(CONTEXTS[1],)])
    assert sparse.loglikelihood_rolling(text) == pytest.approx(plain.loglikelihood_rolling(text), abs=1e-3)
    asked = instances("generate_until", [(c, {"until": ["w300"], "max_gen_toks": 5}) for c in CONTEXTS])
    assert sparse.generate_until(asked) == plain.generate_until(asked)


def test_context_sparse_continuation_dense(folder, artifact_folder):
    lm = made(folder, artifact_folder)
    found = lm.loglikelihood(pairs())
    stats = lm.attachment.stats
    # Each context once: 45 tokens have 4 sparse blocks of 8, 60 have 6; then twice 2 and twice 1 token of continuations.
    assert (stats.sparse_tokens, stats.dense_tokens) == (32 + 48, 13 + 12 + 2 * (2 + 1))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for request, (value, _) in zip(pairs(), found, strict=True):
        context, end = (tokenizer(text, return_tensors="pt")["input_ids"] for text in request.args)
        cache = DynamicCache(config=model.config)
        with attach(model, tiny_artifact(model)):
            rows = [logits(model, context, past_key_values=cache)[0, -1]]
        rows += [logits(model, token.view(1, 1), past_key_values=cache)[0, 0] for token in end[0, :-1]]
        expected = torch.stack(rows).log_softmax(-1).gather(1, end[0][:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-4)
    dense = made(folder, artifact_folder, sparsity=0.0).loglikelihood(pairs())
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(found, dense, strict=True))


def test_rolling_reads_the_text_itself_sparsely(folder, artifact_folder):
    lm = made(folder, artifact_folder)
    (value,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(CONTEXTS[1],)]))
    ids = tiny_tokenizer()(CONTEXTS[1])["input_ids"]
    model = tiny_model()
    with attach(model, tiny_artifact(model)):
        rows = logits(model, torch.tensor([[lm.prefix_token_id, *ids[:-1]]]))[0].log_softmax(-1)
    assert value == pytest.approx(float(rows[range(len(ids)), ids].sum()), abs=1e-3)
    assert lm.attachment.stats.sparse_tokens == 48


def test_logits_are_made_where_the_continuation_is_and_in_parts(folder, artifact_folder, monkeypatch):
    """One position for a word of an answer, whatever its context; of a whole text a few at a time, with the same sum."""
    lm, made_at_once = made(folder, artifact_folder), []
    text = instances("loglikelihood_rolling", [(CONTEXTS[1],)])
    (whole,) = lm.loglikelihood_rolling(text)
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, out: made_at_once.append(out.numel() // out.shape[-1]))
    lm.loglikelihood(pairs())
    assert sorted(made_at_once) == [1, 1, 2, 2, 3, 3]
    made_at_once.clear()
    monkeypatch.setattr(ours, "CHUNK", 7)
    (parts,) = lm.loglikelihood_rolling(text)
    assert made_at_once == [7] * 8 + [4]  # 60 tokens
    assert parts == pytest.approx(whole, abs=1e-4)  # fp32, other shapes of the same product


def test_a_likeliest_continuation_is_greedy_only_as_a_whole(folder, artifact_folder, monkeypatch):
    """Also where it is scored in parts: a wrong token in the first of them counts."""
    lm = made(folder, artifact_folder)
    context = tiny_tokenizer()(CONTEXTS[0])["input_ids"]
    best = engine.generate(lm.model, torch.tensor([context]), 4).tolist()
    monkeypatch.setattr(ours, "CHUNK", 2)
    wrong = [(best[0] + 1) % 100 + 4, *best[1:]]
    found = lm._loglikelihood_tokens([(("a", "b"), context, best), (("a", "c"), context, wrong)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]


def test_what_cannot_be_scored_or_would_be_ignored_is_refused(folder, artifact_folder):
    lm = made(folder, artifact_folder)
    for context, continuation in (([], [5]), ([5], []), ([5], [6] * (lm.max_length + 1))):
        with pytest.raises(UserError, match=r"of context and .* of continuation") as refused:
            lm._loglikelihood_tokens([(("a", "b"), context, continuation)], disable_tqdm=True)
        one_sentence(refused.value)
    lm._loglikelihood_tokens([(("a", "b"), [5], [6] * lm.max_length)], disable_tqdm=True)
    for name in ("softmax_dtype", "mixed_precision_dtype"):
        with pytest.raises(UserError, match=f"{name} is not supported"):
            made(folder, artifact_folder, **{name: "float16"})


def test_generation_is_ours(folder, artifact_folder):
    lm = made(folder, artifact_folder)
    asked = instances("generate_until", [(c, {"until": ["w300"], "max_gen_toks": 5}) for c in CONTEXTS])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with attach(model, tiny_artifact(model)):
        expected = [
            tokenizer.decode(engine.generate(model, engine.encode(tokenizer, c, chat=False), 5), skip_special_tokens=True)
            for c in CONTEXTS
        ]
    assert [text.strip() for text in lm.generate_until(asked)] == [text.strip() for text in expected]


def test_the_checkpoints_generation_settings_do_not_leak(folder, artifact_folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 5.0, "num_beams": 2}))
    asked = instances("generate_until", [(c, {"until": ["w300"], "max_gen_toks": 12}) for c in CONTEXTS])
    found = made(tmp_path / "model", artifact_folder).generate_until(asked)
    assert found == made(folder, artifact_folder).generate_until(asked)


def test_the_result_file_says_what_ran(folder, artifact_folder):
    lm = made(folder, artifact_folder, **OTHER)
    info = lm.get_model_info()
    assert OTHER.items() <= info.items() and info["artifact"] == str(artifact_folder)
    assert lm.attachment.config == PrefillConfig(**OTHER)
