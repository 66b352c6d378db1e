"""The tiny models of conftest as GGUF files, written by the package `gguf` as llama.cpp's converter writes them."""

import gguf
import numpy as np
from conftest import tiny_model

BOS, EOS, EOT = 257, 258, 259
VOCABULARY = 264


def alphabet():
    """The 256 characters that stand for bytes in byte-level BPE, in the order of the bytes."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in keep}
    rest = [byte for byte in range(256) if byte not in table]
    return [table.get(byte) or chr(256 + rest.index(byte)) for byte in range(256)]


def names(layers):
    """GGUF's names of the tensors -> those of transformers, written down here a second time."""
    found = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    parts |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
    parts |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for layer in range(layers):
        found |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in parts.items()}
    return found


def permuted(values, heads):
    """Rows of q and k as LLaMA's own code rotates them: neighbours instead of halves."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def tensors_of(model):
    config, state = model.config, {k: v.float().numpy() for k, v in model.state_dict().items()}
    found = {}
    for ours, theirs in names(config.num_hidden_layers).items():
        for end in (".weight", ".bias"):
            if theirs + end not in state or (ours == "output" and config.tie_word_embeddings):
                continue
            values = state[theirs + end]
            if config.model_type in ("llama", "smollm3") and ours.endswith(("attn_q", "attn_k")):
                values = permuted(values, config.num_attention_heads if ours.endswith("q") else config.num_key_value_heads)
            found[ours + end] = values
    return found


def write(
    path,
    family="llama",
    *,
    model=None,
    kv=(),
    without=(),
    skip=(),
    extra=(),
    quantised=None,
    tokenizer=True,
    split=0,
    **changes,
):
    """A GGUF file of a tiny model, which is given back.

    kv: (method of the writer, arguments). without: keys left out. skip, extra: tensors left out and put in. split: tensors in a
    part.
    """
    model = model or tiny_model(family, vocab_size=VOCABULARY, **changes)
    config = model.config
    writer = gguf.GGUFWriter(path, family, split_max_tensors=split)
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2" if family.startswith("qwen") else "gpt-2")
        writer.add_token_list([*alphabet(), "he", *(f"<x{i}>" for i in range(VOCABULARY - 257))])
        writer.add_token_types([1] * 257 + [3] * 5 + [4] * 2)
        writer.add_token_merges(["h e"])
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(EOS)
    for method, *arguments in kv:
        getattr(writer, method)(*arguments)
    for shard in writer.kv_data:
        for key in without:
            shard.pop(key, None)
    for name, values in {**tensors_of(model), **dict(extra)}.items():
        if name in skip:
            continue
        if quantised and values.ndim == 2:
            writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
