"""How many tokens a model holds, with the rope scalings that stretch it."""

import pytest
import transformers
from conftest import tiny_model, user_error

from fastfill import context
from fastfill.engines import transformers as engine
from fastfill.errors import UserError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "none": (None, 4096),
    "linear": ({"rope_type": "linear", "factor": 8.0}, 32768),
    "dynamic": ({"type": "dynamic", "factor": 2.0}, 8192),
    "yarn beside": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),  # as Qwen's pages add it
    "yarn inside": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
    "yarn of less": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 4096),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512} | LLAMA3, 4096),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_positions(name):
    scaling, expected = SCALINGS[name]
    assert context.positions(transformers.LlamaConfig(max_position_embeddings=4096, rope_scaling=scaling)) == expected


def test_positions_of_odd_configs():
    class Config:
        pass

    odd = Config()
    assert context.positions(odd) is None
    odd.max_position_embeddings = 100
    for rope in ("linear", {"type": "linear"}, {"type": "linear", "factor": "8"}, {"type": "linear", "factor": float("nan")}):
        odd.rope_scaling = rope
        assert context.positions(odd) == 100
    odd.max_position_embeddings = "many"
    assert context.positions(odd) is None


def test_long_text_is_refused_before_it_is_tokenized():
    model = tiny_model()  # of 512 tokens
    context.check_characters(model.config, "a" * 512 * 64)
    with user_error("The prompt has 32,769 characters, more than the 512 tokens"):
        context.check_characters(model.config, "a" * (512 * 64 + 1))


def test_a_stretched_model_takes_longer_prompts():
    import torch

    short = tiny_model()
    stretched = tiny_model(rope_scaling={"rope_type": "linear", "factor": 2.0})
    ids = torch.ones(1, 600, dtype=torch.long)
    engine.check_length(stretched, ids, 10)
    with pytest.raises(UserError, match="600 tokens"):
        engine.check_length(short, ids, 10)
