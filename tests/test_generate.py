"""Our own `generate` is greedy by construction: what a checkpoint's generation_config asks for changes nothing."""

import pytest
import torch
from conftest import FAMILIES, logits, tiny_artifact, tiny_model, token_ids
from transformers import GenerationConfig

from fastfill import attach
from fastfill.engines import transformers as engine

NEW = 12


def by_hand(model, ids):
    """The likeliest next token, again and again, without a cache."""
    row = ids
    for _ in range(NEW):
        row = torch.cat([row, logits(model, row)[:, -1].argmax(-1, keepdim=True)], 1)
    return row[0, ids.shape[1] :]


def leaks(answer):
    """Settings of a generation_config, each of which changes the answer, its form or the way to it."""
    first = int(answer[0])
    return [
        {"repetition_penalty": 1.3},
        {"encoder_repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 5.0},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.5},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"suppress_tokens": [first]},
        {"begin_suppress_tokens": [first]},
        {"bad_words_ids": [[first]]},
        {"sequence_bias": [[[first], -50.0]]},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": [1, 50.0], "eos_token_id": None},
        {"guidance_scale": 3.0},
        {"max_time": 1e-9},
        {"stop_strings": ["w"]},
        {"max_length": 3},
        {"min_length": 500},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 3},
        {"token_healing": True},
        {"watermarking_config": {"bias": 20.0}},
        {"penalty_alpha": 0.6, "top_k": 4},
    ]


@pytest.mark.parametrize("which", range(len(leaks([0]))), ids=lambda i: ",".join(leaks([0])[i]))
def test_nothing_of_the_checkpoints_settings_leaks(which):
    model, ids = tiny_model(dtype=torch.float64), token_ids(1, 40)
    wanted = by_hand(model, ids)
    setting = leaks(wanted)[which]
    for key, value in setting.items():
        setattr(model.generation_config, key, value)
    before = model.generation_config.to_dict()
    assert torch.equal(engine.generate(model, ids, NEW), wanted)
    seen = []
    assert torch.equal(engine.generate(model, ids, NEW, lambda token, seconds: seen.append(token)), wanted)
    assert seen == wanted.tolist()
    assert model.generation_config.to_dict() == before and "generate" not in vars(model)


@pytest.mark.parametrize("eos", ["one", "several"])
def test_end_tokens_of_the_checkpoint_still_end_it(eos):
    model, ids = tiny_model(dtype=torch.float64), token_ids(1, 40)
    answer = by_hand(model, ids)
    last = int(answer[4])
    stop = answer.tolist().index(last) + 1
    model.generation_config.eos_token_id = last if eos == "one" else [127, last]
    assert engine.generate(model, ids, NEW).tolist() == answer[:stop].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["model", "generation", "both"])
def test_with_a_cache_whatever_the_checkpoint_says(family, where):
    """A checkpoint trained with gradient checkpointing says use_cache: false. Only its prompt is sparse."""
    model, ids = tiny_model(family, dtype=torch.float64), token_ids(1, 45)
    with attach(model, tiny_artifact(model)) as attachment:
        wanted = engine.generate(model, ids, NEW)
        assert (attachment.stats.sparse_tokens, attachment.stats.dense_tokens) == (32, 13 + NEW - 1)
        if where != "generation":
            model.config.use_cache = False
        if where != "model":
            model.generation_config.use_cache = False
        assert torch.equal(engine.generate(model, ids, NEW), wanted)
        assert (attachment.stats.sparse_tokens, attachment.stats.dense_tokens) == (64, 2 * (13 + NEW - 1))


def test_generation_settings_in_the_models_own_config(exact_model):
    """Old checkpoints have them in config.json, which transformers refuses."""
    model, ids = exact_model, token_ids(1, 40)
    wanted = by_hand(model, ids)
    model.config.repetition_penalty = 1.3
    assert torch.equal(engine.generate(model, ids, NEW), wanted)


def test_a_greedy_configuration_has_the_special_tokens_only(model):
    model.generation_config = GenerationConfig(
        eos_token_id=[5, 6], bos_token_id=1, repetition_penalty=1.2, top_k=3, do_sample=True, max_length=9
    )
    found = engine.greedy(model, max_new_tokens=3).to_diff_dict()
    found.pop("transformers_version", None)
    plain = {"eos_token_id": [5, 6], "bos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 3}
    assert {key: value for key, value in found.items() if key not in ("do_sample", "num_beams", "use_cache")} == plain
