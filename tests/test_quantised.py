"""Which quantised checkpoints are read, and that all others are named."""

import copy
from types import SimpleNamespace

import pytest
from conftest import one_sentence
from test_quantise_script import quantise

from fastfill import eight_bits, quantised
from fastfill.errors import UserError


def document(weights=None, activations=None, **changes):
    """What llm-compressor writes for W8A8 with dynamic activations, changed."""
    made = copy.deepcopy(quantise.scheme())
    group = made["config_groups"]["group_0"]
    group["weights"] |= weights or {}
    group["input_activations"] = activations and {**group["input_activations"], **activations}
    return {**made, **changes}


def test_w8a8_with_dynamic_activations_is_read():
    quantised.check(quantise.scheme())


EIGHT = {"num_bits": 8}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "None"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq', 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, "'awq', 4 bits"),
        ({"quant_method": "fp8"}, "'fp8'"),
        (document({"type": "float"}, {"type": "float"}), "weights fp8 static per channel, activations fp8 dynamic per token"),
        (document({"num_bits": 4, "strategy": "group", "group_size": 128}, None), "weights int4 static per group"),
        (document(None, None), "activations as they are"),
        (document(None, {"symmetric": False}), "activations int8 asymmetric dynamic per token"),
        (document(None, {"dynamic": False, "strategy": "tensor"}), "activations int8 static per tensor"),
        (document({"symmetric": False}, EIGHT), "weights int8 asymmetric static per channel"),
        (document({"strategy": "tensor"}, EIGHT), "weights int8 static per tensor"),
        (document(None, EIGHT, format="pack-quantized"), "format 'pack-quantized'"),
        (document(None, EIGHT, kv_cache_scheme={"num_bits": 8}), "a kv_cache_scheme"),
        (document(None, EIGHT, transform_config={"config_groups": {}}), "a transform_config"),
        (document(None, EIGHT, config_groups={}), "without config_groups"),
    ],
)
def test_all_else_is_named(found, words):
    with pytest.raises(UserError, match="take the floating-point model") as refused:
        quantised.check(found)
    assert words in one_sentence(refused.value)


def test_a_scheme_is_dumped_once():
    """Every sparse call asks for it. Another part on the same scheme, and another status, count at once."""
    dumped = []

    class Part:
        def __init__(self, **fields):
            self.fields = fields

        def model_dump(self, mode):
            dumped.append(mode)
            return self.fields

    group = quantise.scheme()["config_groups"]["group_0"]
    weights, inputs = Part(**group["weights"]), Part(**group["input_activations"])
    scheme = SimpleNamespace(weights=weights, input_activations=inputs, output_activations=None)
    linear = SimpleNamespace(quantization_scheme=scheme, quantization_status="compressed")
    assert [eight_bits.problem(linear) for _ in range(5)] == [None] * 5 and len(dumped) == 2
    linear.quantization_status = "frozen"
    assert "not rounded to yet" in eight_bits.problem(linear) and len(dumped) == 2
    scheme.weights = Part(**group["weights"] | {"num_bits": 4})
    assert "weights int4" in eight_bits.problem(linear)
    scheme.weights = weights
    linear.quantization_status = "decompressed"
    assert eight_bits.problem(linear) is None
