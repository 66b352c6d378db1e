"""The embedded default model, SmolLM2-135M-Instruct: the same identities, and prediction is worth something on real text."""

import pathlib

import pytest
import torch
from conftest import logits

from fastfill import artifact as artifacts
from fastfill import attach, data, families, models
from fastfill.artifact import Artifact
from fastfill.calibration import capture
from fastfill.calibration.fit import statistics
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.lab import perplexity
from fastfill.lab.baselines import named

pytestmark = pytest.mark.real
TOKENS = 600
STRICT_KL, CONTINUATION_KL = 0.45187, 0.03790  # nats a token: the shipped artifact on the demo's first 1,280 tokens
SHIPPED = pathlib.Path(__file__).parent.parent / "artifacts" / artifacts.DEFAULT_ARTIFACT


@pytest.fixture(scope="module")
def loaded():
    try:
        models.embedded_gguf()
    except UserError as error:  # the only reason to skip; anything else that goes wrong is a failure
        pytest.skip(str(error))
    return models.load("default", "fp32")


@pytest.fixture(scope="module")
def document(loaded):
    """The demo's document: the same on every machine, and surely not calibrated on."""
    return loaded.tokenizer(data.demo_document().text, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def ids(document):
    return document[:, :TOKENS]


@pytest.fixture(scope="module")
def dense(loaded, ids):
    return logits(loaded.model, ids)


@pytest.fixture(scope="module")
def bare(loaded, ids):
    """An artifact without anything learned: true statistics of a few tokens, for the baselines; no compensator."""
    anatomy = families.dissect(loaded.model)
    ranks = {"predictor": 64, "linear": 0, "silu": 0}
    base = artifacts.describe_model(anatomy, loaded.name)
    tensors = {name: torch.zeros(shape) for name, shape in artifacts.shapes(base, ranks).items()}
    hidden, calls = capture.embed(anatomy, ids[:, :128])
    for layer, inputs, activations in capture.stream_ffns(anatomy, hidden, calls):
        for name, value in statistics(inputs.flatten(0, 1), activations.flatten(0, 1), anatomy.ffns[layer]).items():
            tensors[f"layers.{layer}.stats.{name}"] = value
    return Artifact(base, PrefillConfig(0.5, 64, 64, 256), ranks, [1.0] * len(anatomy.ffns), tensors)


def mean_kl(loaded, artifact, ids, dense, **settings):
    """Mean KL (nats) of the tokens that were read sparsely."""
    with attach(loaded.model, artifact, **settings) as attachment:
        sparse = logits(loaded.model, ids)
        head = -(-attachment.config.dense_head // attachment.config.block_size) * attachment.config.block_size
        stop = (TOKENS - attachment.config.dense_tail) // attachment.config.block_size * attachment.config.block_size
        assert attachment.stats.sparse_tokens == stop - head > 0
    a, b = dense[:, head:stop].log_softmax(-1), sparse[:, head:stop].log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_it_is_the_model_it_should_be(loaded, ids, dense):
    config = loaded.model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 576, 30)
    loss = torch.nn.functional.cross_entropy(dense[0, :-1], ids[0, 1:])
    assert float(loss) < 4  # a model whose weights were mixed up says ln 49152 = 10.8 or worse


def test_sparsity_zero_is_dense_bit_for_bit(loaded, ids, dense, bare):
    with attach(loaded.model, bare, sparsity=0.0):
        assert torch.equal(logits(loaded.model, ids), dense)


def test_the_oracle_is_far_better_than_random_and_detach_is_clean(loaded, ids, dense, bare):
    cost = {name: mean_kl(loaded, bare, ids, dense, predictor=named(name)) for name in ("oracle", "static", "random")}
    assert cost["oracle"] < cost["static"] < cost["random"]
    assert cost["oracle"] < 0.2 * cost["random"]
    assert torch.equal(logits(loaded.model, ids), dense)


def test_the_shipped_artifact_beats_the_baselines(loaded, ids, dense):
    artifact = artifacts.load(SHIPPED)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 25e6
    assert artifact.flops()["predictor"] + artifact.flops()["compensator"] <= 0.08
    assert sum(artifact.kept()) == round((1 - artifact.prefill.sparsity) * 30 * 1536)
    cost = {name: mean_kl(loaded, artifact, ids, dense, predictor=named(name)) for name in ("learned", "static", "random")}
    bare = mean_kl(loaded, artifact, ids, dense, compensator=False)
    assert cost["learned"] < cost["static"] and cost["learned"] < cost["random"]
    assert cost["learned"] < bare


def test_the_shipped_artifact_is_as_good_as_it_was(loaded, document):
    """Absolute, in fp32. A new artifact brings new numbers here, and the reason if they are worse.

    5 %: bf16, which rounds 2^16 times coarser than this, moves the two by 0.7 % and 2.5 %, another kernel by less than
    0.003 %. So every machine stays within, and a regression of 10 % does not: 54 % sparsity instead of 50 % fails.
    """
    with attach(loaded.model, artifacts.load(SHIPPED)) as attachment:
        found = perplexity.evaluate(attachment, [("demo", document[0, :1280])])
    assert found["tokens"] == 1280 - 64 - 64 and found["cont_tokens"] == 255
    assert found["kl"] < 1.05 * STRICT_KL and found["cont_kl"] < 1.05 * CONTINUATION_KL
