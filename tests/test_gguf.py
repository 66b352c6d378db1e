"""GGUF files: what is in them is what is loaded, and what cannot be loaded so is refused by its name."""

import random
import shutil

import gguf as library
import numpy as np
import pytest
import torch
from conftest import logits, one_sentence, tiny_model
from gguf_tiny import BOS, EOS, EOT, VOCABULARY, alphabet, write

from fastfill import gguf, models
from fastfill.errors import UserError
from fastfill.gguf_config import config_of
from fastfill.gguf_tokenizer import SPLITS, tokenizer_of

WORDS = np.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path, dtype="fp32"):
    return models.load(str(path), dtype)


def refused(path):
    with pytest.raises(UserError) as error:
        load(path)
    assert path.name in str(error.value)
    return one_sentence(error).replace(str(path.parent), "")  # the folder has the words of the test's name


def same_logits(a, b):
    ids = torch.tensor(WORDS)
    return torch.equal(logits(a, ids), logits(b, ids))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_a_float_file_is_the_model_it_was_made_from(tmp_path, family, tied):
    own = {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]} if family == "smollm3" else {}
    source = write(tmp_path / "m.gguf", family, tie_word_embeddings=tied, **own)
    loaded = load(tmp_path / "m.gguf").model
    assert same_logits(loaded, source)
    assert loaded.config.tie_word_embeddings == tied
    assert loaded.config.model_type == family
    assert loaded.generation_config.eos_token_id == EOS


def test_biases_of_a_llama_are_loaded(tmp_path):
    model = tiny_model("llama", vocab_size=VOCABULARY, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    write(tmp_path / "m.gguf", model=model)
    assert same_logits(load(tmp_path / "m.gguf").model, model)


def test_heads_of_a_size_of_their_own(tmp_path):
    model = tiny_model("qwen3", vocab_size=VOCABULARY, head_dim=16)
    write(tmp_path / "m.gguf", "qwen3", model=model, kv=[("add_value_length", 16)])
    assert "attention.value_length" in refused(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", "qwen3", model=model, kv=[("add_uint32", "qwen3.attention.key_length", 16)], without=["x"])
    assert same_logits(load(tmp_path / "m.gguf").model, model)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_blocks_are_unpacked_to_bf16_and_floats_stay(tmp_path, kind):
    kind = library.GGMLQuantizationType[kind]
    source = write(tmp_path / "m.gguf", quantised=kind)
    values = source.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = torch.from_numpy(library.dequantize(library.quantize(values, kind), kind))
    if kind.name not in ("F16", "BF16"):
        expected = expected.bfloat16().float()
    loaded = load(tmp_path / "m.gguf").model
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, expected)
    assert torch.equal(loaded.model.norm.weight, source.model.norm.weight)


def test_large_tensors_are_unpacked_in_pieces_and_written_in_shards(tmp_path, monkeypatch):
    source = write(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf, "_ROWS", 100)
    monkeypatch.setattr(gguf, "_SHARD", 20_000)
    assert same_logits(load(tmp_path / "m.gguf").model, source)
    assert len(list(models.Path(models.resolve(str(tmp_path / "m.gguf"))).glob("*.safetensors"))) > 3


# Tensors


ODD = {name: np.zeros(32, np.float32) for name in ("blk.0.attn_q.bias", "blk.0.ffn_norm.bias", "blk.7.ffn_up.weight", "v.x")}
ODD |= {"rope_factors_long.weight": np.zeros(32, np.float32), "blk.1.ffn_up.weight": np.zeros((32, 96), np.float32)}


@pytest.mark.parametrize("name", ODD)
def test_a_tensor_too_many_or_of_another_shape_is_named(tmp_path, name):
    write(tmp_path / "m.gguf", extra={name: ODD[name]})
    message = refused(tmp_path / "m.gguf")
    assert name in message or "tensors are missing" in message  # one bias asks for the others


@pytest.mark.parametrize("gone", ["blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_q.bias"])
def test_a_tensor_that_is_missing_is_named(tmp_path, gone):
    family = "qwen2" if gone.endswith("bias") else "llama"
    write(tmp_path / "m.gguf", family, skip=[gone])
    message = refused(tmp_path / "m.gguf")
    assert "tensors are missing" in message or f"it has no tensor {gone!r}" in message


def test_values_that_are_not_finite_are_refused(tmp_path, cache):
    write(tmp_path / "m.gguf", extra={"blk.1.ffn_norm.weight": np.full(32, np.nan, np.float32)})
    assert "blk.1.ffn_norm.weight" in refused(tmp_path / "m.gguf")
    assert not list(cache.glob("m-*")) and not list(cache.glob("*.partial"))


def test_a_split_model_is_joined_from_any_part(tmp_path):
    source = write(tmp_path / "m.gguf", split=10)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    for part in (parts[0], parts[2]):
        assert same_logits(load(part).model, source)


def test_a_split_model_without_one_part_is_refused(tmp_path):
    write(tmp_path / "m.gguf", split=10)
    first, second, third = sorted(tmp_path.glob("m-*.gguf"))
    second.rename(tmp_path / "elsewhere")
    assert second.name in refused(first)
    shutil.copy(third, second)
    assert "does not fit its name" in refused(first)
    shutil.copy(first, tmp_path / "alone.gguf")
    assert "does not fit its name" in refused(tmp_path / "alone.gguf")


# Positions


def rope_of(model):
    return model.model.rotary_emb.inv_freq, model.model.rotary_emb.attention_scaling


YARN = [("add_rope_scaling_type", library.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]
ORIGINAL = ("add_rope_scaling_orig_ctx_len", 128)
READ = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("kv", "parameters"),
    [
        ([*YARN, ORIGINAL], READ),
        (YARN, READ | {"original_max_position_embeddings": 512}),
        (
            [*YARN, ORIGINAL, ("add_rope_scaling_attn_factors", 0.5), ("add_rope_scaling_yarn_beta_fast", 16.0)],
            READ | {"beta_fast": 16.0, "attention_factor": 0.5 * (0.1 * np.log(4) + 1)},
        ),
        ([("add_rope_scaling_factor", 2.0)], {"rope_type": "linear", "factor": 2.0}),
        ([("add_float32", "qwen2.rope.scale_linear", 2.0)], {"rope_type": "linear", "factor": 2.0}),
        ([("add_rope_scaling_type", library.RopeScalingType.NONE)], {"rope_type": "default"}),
    ],
)
def test_scaled_positions_are_converted(tmp_path, kv, parameters):
    plain = write(tmp_path / "m.gguf", "qwen2", kv=kv)
    expected = tiny_model("qwen2", vocab_size=VOCABULARY, rope_parameters={"rope_theta": 10000.0, **parameters})
    expected.load_state_dict(plain.state_dict())
    loaded = load(tmp_path / "m.gguf").model
    (found, scale), (wanted, wanted_scale) = rope_of(loaded), rope_of(expected)
    # fp32 and a handful of operations on numbers that the file has in fp32: 8 eps.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert scale == pytest.approx(wanted_scale, rel=1e-6)
    assert parameters["rope_type"] == "default" or not same_logits(loaded, plain)


def llama3(head, base, factor, original, low=1.0, high=4.0):
    """The tensor rope_freqs as llama.cpp's converter computes it, one frequency after the other."""
    found = []
    for i in range(0, head, 2):
        length = 2 * np.pi * base ** (i / head)
        if length < original / high:
            found.append(1.0)
        elif length > original / low:
            found.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama_3s_frequencies_are_converted(tmp_path):
    shape = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 128}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    source = tiny_model(vocab_size=VOCABULARY, rope_parameters=rope, **shape)
    freqs = llama3(64, 500000.0, 8.0, 8192)
    assert len(set(freqs.tolist())) > 4  # some in between
    write(tmp_path / "m.gguf", model=source, extra={"rope_freqs.weight": freqs})
    loaded = load(tmp_path / "m.gguf").model
    torch.testing.assert_close(rope_of(loaded)[0], rope_of(source)[0], rtol=1e-5, atol=0)
    assert loaded.config.rope_parameters["rope_type"] == "llama3"
    write(tmp_path / "other.gguf", model=source, extra={"rope_freqs.weight": llama3(64, 500000.0, 8.0, 4096)})
    assert "rope_freqs.weight" in refused(tmp_path / "other.gguf")
    known = [("add_rope_scaling_orig_ctx_len", 4096)]
    write(tmp_path / "other.gguf", model=source, extra={"rope_freqs.weight": llama3(64, 500000.0, 8.0, 4096)}, kv=known)
    assert load(tmp_path / "other.gguf").model.config.rope_parameters["original_max_position_embeddings"] == 4096


# Metadata that would change results


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("add_uint32", "llama.attention.sliding_window", 64),
        ("add_float32", "llama.logit_scale", 0.5),
        ("add_float32", "llama.embedding_scale", 12.0),
        ("add_float32", "llama.residual_scale", 0.2),
        ("add_float32", "llama.attention.scale", 0.5),
        ("add_float32", "llama.final_logit_softcapping", 30.0),
        ("add_float32", "llama.attn_logit_softcapping", 50.0),
        ("add_float32", "llama.attention.clamp_kqv", 8.0),
        ("add_uint32", "llama.expert_count", 8),
        ("add_bool", "llama.attention.causal", False),
        ("add_uint32", "llama.rope.dimension_count", 4),
        ("add_string", "llama.rope.scaling.type", "longrope"),
        ("add_float32", "llama.rope.scaling.yarn_ext_factor", 0.5),
        ("add_float32", "llama.rope.scaling.attn_factor", 2.0),
        ("add_uint32", "llama.vocab_size", 265),
        ("add_uint32", "llama.something_new", 1),
        ("add_array", "llama.attention.head_count_kv", [2, 2, 1]),
        ("add_array", "llama.feed_forward_length", [96, 96, 64]),
        ("add_string", "llama.block_count", "three"),
        ("add_uint32", "llama.block_count", 0),
        ("add_uint32", "llama.block_count", 1 << 30),
        ("add_float32", "llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("add_uint32", "llama.attention.head_count_kv", 3),
        ("add_string", "general.architecture", "gemma3"),
        ("add_string", "general.type", "adapter"),
        ("add_bool", "tokenizer.ggml.add_sep_token", True),
        ("add_bool", "tokenizer.ggml.remove_extra_whitespaces", True),
        ("add_string", "tokenizer.ggml.pre", "something-new"),
        ("add_string", "tokenizer.ggml.model", "bert"),
        ("add_uint32", "tokenizer.ggml.eos_token_id", 264),
        ("add_string", "tokenizer.ggml.something_new", "x"),
        ("add_uint32", "tokenizer.ggml.add_bos_token", 1),
    ],
)
def test_metadata_that_cannot_be_converted_is_refused_by_name(tmp_path, method, key, value):
    write(tmp_path / "m.gguf", kv=[(method, key, value)], without=[])
    words = {"general.architecture": "gemma3", "general.type": "adapter", "tokenizer.ggml.model": "bert"}
    words |= {"llama.block_count": "layers"} if value == 1 << 30 else {}
    assert words.get(key, key) in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("key", ["context_length", "embedding_length", "block_count", "attention.layer_norm_rms_epsilon"])
def test_a_key_that_is_needed_is_named(tmp_path, key):
    write(tmp_path / "m.gguf", without=[f"llama.{key}"])
    assert f"llama.{key}" in refused(tmp_path / "m.gguf")


def test_metadata_that_changes_nothing_is_accepted(tmp_path):
    kv = [
        ("add_uint32", "llama.attention.sliding_window", 512),
        ("add_float32", "llama.attention.scale", 8**-0.5),
        ("add_float32", "llama.logit_scale", 1.0),
        ("add_uint32", "llama.expert_count", 0),
        ("add_array", "llama.attention.head_count_kv", [2, 2, 2]),
        ("add_uint32", "llama.rope.dimension_count", 8),
        ("add_string", "quantize.imatrix.file", "x"),
        ("add_uint32", "tokenizer.ggml.fim_pre_token_id", 3),
    ]
    source = write(tmp_path / "m.gguf", kv=kv)
    assert same_logits(load(tmp_path / "m.gguf").model, source)


# Text


def test_control_tokens_are_whole_and_the_template_is_kept(tmp_path):
    kv = [("add_eot_token_id", EOT), ("add_chat_template", "{{ messages[0]['content'] }}<x2>"), ("add_pad_token_id", EOS)]
    write(tmp_path / "m.gguf", kv=kv)
    loaded = load(tmp_path / "m.gguf")
    tokenizer = loaded.tokenizer
    assert tokenizer("he<x1>e<x6>")["input_ids"] == [256, EOS, ord("e") - 0, 263]
    assert tokenizer.decode([256, 263, EOS], skip_special_tokens=True) == "he<x6>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "he<x2>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, EOS)
    assert loaded.model.generation_config.eos_token_id == [EOS, EOT]  # both end an answer
    text = "Häßlich 日本 e\u0301 \n\n\t x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("pre", "kv", "expected"),
    [
        ("gpt-2", [], (False, False)),
        ("llama-bpe", [], (True, False)),  # llama.cpp's default for it
        ("llama-bpe", [("add_add_bos_token", False)], (False, False)),
        ("gpt-2", [("add_add_bos_token", True), ("add_add_eos_token", True)], (True, True)),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, pre, kv, expected):
    write(tmp_path / "m.gguf", kv=[("add_tokenizer_pre", pre), *kv])
    ids = load(tmp_path / "m.gguf").tokenizer("he")["input_ids"]
    assert ids == [BOS] * expected[0] + [256] + [EOS] * expected[1]


def pieces(pre, text):
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    metadata |= {"tokenizer.ggml.tokens": [*alphabet(), "he"], "tokenizer.ggml.merges": ["h e"]}
    metadata |= {"tokenizer.ggml.add_bos_token": False}
    core = tokenizer_of(metadata, "m.gguf", 300).backend_tokenizer
    return [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(text)]


def test_text_is_split_as_the_name_says():
    assert pieces("gpt-2", "ab 1234") == ["ab", "Ġ1234"]
    assert pieces("smollm", "ab 1234") == ["ab", "Ġ", "1", "2", "3", "4"]
    assert pieces("llama-bpe", "ab 1234") == ["ab", "Ġ", "123", "4"]
    assert pieces("qwen2", "ab 1234") == ["ab", "Ġ", "1", "2", "3", "4"]
    assert pieces("tekken", "aB1") == ["a", "B", "1"]
    assert pieces("gpt-2", "aB1") == ["aB", "1"]
    assert set(SPLITS) > {"llama-bpe", "qwen2", "smollm", "tekken"}


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab"]
    types = [2, 3, 3, *[6] * 256, *[1] * 8]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -3.0, -2.0, -4.0, -5.0]
    kv = [("add_tokenizer_model", "llama"), ("add_token_list", tokens)]
    kv += [("add_token_types", types), ("add_token_scores", scores)]
    gone = [f"tokenizer.ggml.{key}" for key in ("pre", "merges", "bos_token_id", "eos_token_id")]
    write(tmp_path / "m.gguf", kv=kv, without=gone, model=tiny_model(vocab_size=len(tokens)))
    loaded = load(tmp_path / "m.gguf")

    def read(text):
        return loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer(text)["input_ids"])

    assert read("ab") == ["<s>", "▁ab"]
    assert read("abc") == ["<s>", "▁a", "bc"]  # bc has the best score of all
    assert read("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert loaded.tokenizer.decode(loaded.tokenizer("ab é c")["input_ids"], skip_special_tokens=True) == "ab é c"
    assert loaded.model.config.bos_token_id == 1 and loaded.model.config.eos_token_id == 2  # llama.cpp's defaults
    kv.append(("add_add_space_prefix", False))
    write(tmp_path / "m.gguf", kv=kv, without=gone, model=tiny_model(vocab_size=len(tokens)))
    loaded = load(tmp_path / "m.gguf")
    assert read("ab") == ["<s>", "ab"]


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    tokens = [*alphabet(), "he", *(f"<x{i}>" for i in range(VOCABULARY - 257))]
    for words, kv in {
        "merges": [("add_token_merges", ["h eee"])],
        "embeddings": [("add_token_list", [*tokens, "more"])],
        "twice": [("add_token_list", [*tokens[:-1], tokens[0]])],
        "token_type": [("add_token_types", [1])],
    }.items():
        write(tmp_path / "m.gguf", kv=kv)
        assert words in refused(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", without=["tokenizer.ggml.merges"])
    assert "tokenizer.ggml.merges" in refused(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", tokenizer=False)
    assert "tokenizer" in refused(tmp_path / "m.gguf")


# Damage


def test_a_file_cut_anywhere_is_incomplete(tmp_path):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (30, 100, 3000, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "part.gguf").write_bytes(whole[:size])
        assert "is incomplete" in refused(tmp_path / "part.gguf")
    for start in (b"", b"PK\3\4" + whole[4:]):
        (tmp_path / "part.gguf").write_bytes(start)
        assert "not a GGUF file" in refused(tmp_path / "part.gguf")


def test_tensors_out_of_their_place_are_refused(tmp_path):
    """Two tensors of one shape whose offsets are swapped: all else fits."""
    write(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    places = []
    for name in (b"blk.0.ffn_gate.weight", b"blk.0.ffn_up.weight"):
        places.append(data.index(name) + len(name) + 4 + 2 * 8 + 4)  # after dimensions and type
    (a, b), size = places, 8
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    (tmp_path / "m.gguf").write_bytes(data)
    assert "is not where it should be" in refused(tmp_path / "m.gguf")


def test_damaged_headers_are_refused_in_a_sentence_or_read_right(tmp_path):
    """Bytes of the header changed at random: never another kind of error, never more memory than the file asks for."""
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    start = next(iter(gguf.read(tmp_path / "m.gguf").tensors.values())).start
    rng, refusals = random.Random(0), 0
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 8))):
            changed[rng.randrange(min(start, len(whole)))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        (tmp_path / "x.gguf").write_bytes(changed)
        try:
            model = gguf.read(tmp_path / "x.gguf")
            config, _ = config_of(model, "x.gguf")
            tokenizer_of(model.metadata, "x.gguf", config.vocab_size)
            gguf._wanted(config, model.tensors, "x.gguf")
        except UserError as error:
            one_sentence(error)
            refusals += 1
    assert refusals > 40


def test_a_name_in_a_file_never_reaches_the_terminal_raw(tmp_path):
    write(tmp_path / "m.gguf", extra={"\x1b[31m" + "x" * 30: np.zeros(4, np.float32)})
    assert "\x1b" not in refused(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", kv=[("add_uint32", "llama.\x1b[31m" + "x" * 500, 4)])
    message = refused(tmp_path / "m.gguf")
    assert "\x1b" not in message and len(message) < 400
