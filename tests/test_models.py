"""Loading by name: exactly the weights of the model, or one sentence that names what is wrong."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    logits,
    one_sentence,
    tiny_artifact,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    token_ids,
    user_error,
)
from safetensors.torch import load_file, save_file

from fastfill import attach, models
from fastfill.engines import transformers as engine
from fastfill.errors import UserError


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def refused(folder):
    with pytest.raises(UserError) as error:
        models.load(str(folder), "fp32")
    text = one_sentence(error)
    assert str(folder) in text and "\x1b" not in text and len(text) < 500
    return text.replace(str(folder.parent), "")  # that has the words of the test's name


def weights(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.skipif("qwen3_5_text" not in FAMILIES, reason="this transformers does not know Qwen3.5")
def test_a_checkpoint_with_vision_gives_its_text_model(tmp_path):
    """As Qwen3.5's are."""
    text = {name: value for name, value in tiny_config("qwen3_5_text").to_dict().items() if name != "model_type"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": text["hidden_size"]}
    config = transformers.AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, ids = models.load(str(tmp_path), "fp32").model, token_ids(1, 45)
    assert model.config.model_type == "qwen3_5_text" and torch.equal(logits(model, ids), logits(whole, ids))
    with attach(model, tiny_artifact(model)) as attached:
        logits(model, ids)
        assert attached.stats.sparse_tokens == 32


def test_tensors_that_are_missing_are_named(folder):
    weights(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"})
    assert "missing: 'model.layers.1.mlp.up_proj.weight'" in refused(folder)


def test_foreign_prefixes_are_refused(folder):
    weights(folder, lambda tensors: {f"wrapped.{k}": v for k, v in tensors.items()})
    text = refused(folder)
    assert "missing" in text and "wrapped." in text


def test_tensors_left_over_and_of_another_shape_are_named(folder):
    weights(folder, lambda tensors: {**tensors, "model.layers.0.mlp.up_proj.bias": torch.zeros(96)})
    assert "without a place in the model: 'model.layers.0.mlp.up_proj.bias'" in refused(folder)
    weights(folder, lambda t: {k: v for k, v in t.items() if "bias" not in k} | {"model.norm.weight": torch.zeros(31)})
    assert "of another shape: 'model.norm.weight'" in refused(folder)


@pytest.mark.parametrize("index", [True, False], ids=["in the index", "in no index"])
def test_a_shard_that_is_left_out_is_refused(tmp_path, index):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    models.load(str(tmp_path), "fp32")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    path = tmp_path / "model.safetensors.index.json"
    if not index:
        document = json.loads(path.read_text())
        document["weight_map"] = {k: v for k, v in document["weight_map"].items() if v != gone.name}
        path.write_text(json.dumps(document))
    text = refused(tmp_path)
    assert "missing" in text or gone.name in text


def test_tied_embeddings_are_fine(tmp_path):
    source = tiny_model(tie_word_embeddings=True)
    source.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = models.load(str(tmp_path), "fp32").model
    assert torch.equal(model.lm_head.weight, source.model.embed_tokens.weight)


BROKEN = {
    "no JSON": ("config.json", lambda f: (f / "config.json").write_text("{not json")),
    "a list": ("config.json", lambda f: (f / "config.json").write_text("[1]")),
    "deep": ("config.json", lambda f: (f / "config.json").write_text("[" * 100_000)),
    "no config": ("config.json", lambda f: (f / "config.json").unlink()),
    "no tokenizer": ("tokenizer", lambda f: (f / "tokenizer.json").unlink()),
    "half a tokenizer": ("tokenizer", lambda f: (f / "tokenizer.json").write_text("{")),
    "no weights": ("safetensors", lambda f: (f / "model.safetensors").unlink()),
    "half the weights": ("model.safetensors", lambda f: cut(f / "model.safetensors", 0.5)),
    "half a header": ("model.safetensors", lambda f: cut(f / "model.safetensors", 0.01)),
    "empty weights": ("model.safetensors", lambda f: (f / "model.safetensors").write_bytes(b"")),
    "another size": ("another shape", lambda f: config(f, hidden_size=64)),
    "a list of sizes": ("config.json", lambda f: config(f, hidden_size=[32, 32])),
    "a word": ("config.json", lambda f: config(f, num_attention_heads="four")),
    "no heads": ("config.json", lambda f: config(f, num_attention_heads=0)),
    "more layers": ("missing", lambda f: config(f, num_hidden_layers=5)),
    "fewer layers": ("without a place", lambda f: config(f, num_hidden_layers=2)),
    # Of sizes that do no harm where the check fails: it is made before the memory is taken.
    "a hundred layers": ("100 layers", lambda f: config(f, num_hidden_layers=100)),
    "far larger": ("parameters", lambda f: config(f, hidden_size=2048)),
    "an unknown family": ("config.json", lambda f: config(f, model_type="no\x1b[31mpe")),
    "an unknown rope": ("nope", lambda f: config(f, rope_parameters={"rope_type": "nope"})),
    "no generation": ("generation_config.json", lambda f: (f / "generation_config.json").write_text("{")),
}


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_sentence(folder, kind):
    words, damage = BROKEN[kind]
    damage(folder)
    assert words in refused(folder)


def test_folders_that_are_none(tmp_path):
    assert "config.json" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "no model folder" in refused(tmp_path / "model.safetensors")
    assert "no model folder" in refused(tmp_path / "missing")


def test_a_tokenizer_of_another_model_is_refused(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    assert "ids up to 128" in refused(folder)


def test_a_lack_of_memory_is_not_blamed_on_the_file(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="allocate") as error:
        models.load(str(folder), "fp32")
    assert not isinstance(error.value, UserError)


def test_a_device_without_values_is_refused():
    with pytest.raises(UserError, match="meta"):
        models.check_device("meta")


@pytest.mark.parametrize("bars", [True, False])
def test_loading_leaves_the_log_of_transformers_as_it_was(folder, bars):
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        hub_before = hub.are_progress_bars_disabled()
        models.load(str(folder), "fp32")
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() == bars
        config(folder, num_hidden_layers=5)
        refused(folder)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() == bars
        assert hub.are_progress_bars_disabled() == hub_before
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


def test_chat_without_a_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template") as error:
        engine.encode(tokenizer, "w5", chat=True)
    assert "--chat" in one_sentence(error)
    assert engine.encode(tokenizer, "w5", chat=False).shape == (1, 1)


@pytest.mark.parametrize("template", ["{{ raise_exception('one\ntwo') }}", "{% for", "{{ 1 / 0 }}", "{{ messages.x.y }}"])
def test_a_template_that_fails_is_one_sentence(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with user_error("chat template"):
        engine.encode(tokenizer, "w5", chat=True)
