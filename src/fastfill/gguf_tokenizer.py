"""GGUF metadata -> tokenizer. Built here, because how text is split and what is added to it must be what the file says.

Two kinds: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama"). Defaults where a key is absent are those of llama.cpp
(llama-vocab.cpp), as are the names of the ways to split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastfill.errors import UserError, quoted, reason

# How text is split before merges: regular expressions of the models' own tokenizer.json, by llama.cpp's names.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "a.x-4.0", "mellum"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# A word that is a token is taken whole, and BOS is added unless the file says otherwise.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}
_OWN_SPLIT = {"qwen2": "qwen2", "qwen3": "qwen2"}  # files from before there was a name for it

# Keys that change nothing here: other templates, tokens of fill-in-the-middle, statistics.
_WITHOUT_EFFECT = {
    "tokenizer.chat_templates",
    "tokenizer.huggingface.json",
    "tokenizer.ggml.token_type_count",
    *(f"tokenizer.ggml.{key}_token_id" for key in ("seperator", "mask", "cls", "prefix", "suffix", "middle")),
    *(f"tokenizer.ggml.fim_{key}_token_id" for key in ("pre", "suf", "mid", "pad", "rep", "sep")),
}
_READ = {
    "tokenizer.chat_template",
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "scores", "merges")),
    *(f"tokenizer.ggml.{key}" for key in ("add_bos_token", "add_eos_token", "add_space_prefix")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "eot", "eom", "unknown", "padding")),
}
_NEUTRAL = {"tokenizer.ggml.add_sep_token": False, "tokenizer.ggml.remove_extra_whitespaces": False}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"


class _Vocabulary:
    """The vocabulary of a file, with types and lengths checked."""

    def __init__(self, metadata: dict[str, Any], name: str, most: int):
        self.metadata, self.name = metadata, name
        for key, value in metadata.items():
            known = key in _READ or key in _WITHOUT_EFFECT or key.startswith("tokenizer.chat_template.")
            if key.startswith("tokenizer.") and not known and not (key in _NEUTRAL and _NEUTRAL[key] == value):
                raise UserError(f"{name} has {quoted(key)}, which changes how text is read and cannot be converted.")
        self.kind = self.text("model")
        if self.kind not in ("gpt2", "llama"):
            raise UserError(f"{name} has a tokenizer of kind {quoted(self.kind)}; 'gpt2' and 'llama' can be read.")
        self.tokens = self.texts("tokens", most)
        if not self.tokens or len(set(self.tokens)) != len(self.tokens):
            raise UserError(f"{name} has no tokens, or one twice, in tokenizer.ggml.tokens.")
        self.types = self.numbers("token_type", _NORMAL)

    def text(self, key: str) -> str | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.name} has no text in tokenizer.ggml.{key}.")
        return value

    def texts(self, key: str, most: int | None = None) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list):
            raise UserError(f"{self.name} has no tokenizer.ggml.{key}, without which text cannot be read; convert it again.")
        if most is not None and len(value) > most:
            raise UserError(f"{self.name} has {len(value)} tokens and embeddings for {most}.")
        return value

    def numbers(self, key: str, default: float | None = None) -> np.ndarray:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None and default is not None:
            return np.full(len(self.tokens), default)
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise UserError(f"{self.name} has no tokenizer.ggml.{key} for each of its {len(self.tokens)} tokens.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise UserError(f"{self.name} has tokenizer.ggml.{key} = {quoted(value)}, neither true nor false.")
        return value


def special_ids(metadata: dict[str, Any], name: str) -> dict[str, int]:
    """Ids of the tokens with a task, by llama.cpp's names: bos, eos, eot, eom, unknown, padding; those that there are."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    ids = {"bos": 1, "eos": 2, "unknown": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    for key in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            ids[key] = value
    for key, value in ids.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise UserError(f"{name} has tokenizer.ggml.{key}_token_id = {quoted(value)}, which is none of its {count} tokens.")
    return ids


def tokenizer_of(metadata: dict[str, Any], name: str, most: int) -> Any:
    """The tokenizer of a GGUF file, as `transformers` has it. most: tokens that there are embeddings for.

    Raises UserError, naming the key, for metadata that cannot be converted without a change of ids.
    """
    import transformers
    from tokenizers import AddedToken, processors

    vocabulary = _Vocabulary(metadata, name, most)
    ids = special_ids(metadata, name)
    core, add_bos = (_byte_level if vocabulary.kind == "gpt2" else _sentencepiece)(vocabulary, ids)
    for types, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [vocabulary.tokens[i] for i in np.flatnonzero(vocabulary.types == types)]
        add = core.add_special_tokens if special else core.add_tokens
        add([AddedToken(token, normalized=False, special=special) for token in found if token])
    around = []
    for key, default in (("bos", add_bos), ("eos", False)):
        wanted = vocabulary.flag(f"add_{key}_token", default)
        if wanted and key not in ids:
            raise UserError(f"{name} asks for a {key.upper()} token on every text and does not name one.")
        around.append(vocabulary.tokens[ids[key]] if wanted else None)
    before, after = around
    core.post_processor = processors.TemplateProcessing(
        single=[*([before] if before else []), "$A", *([after] if after else [])],
        special_tokens=[(token, core.token_to_id(token)) for token in {before, after} if token],
    )
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{name} has no text in tokenizer.chat_template.")
    named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        **{theirs: vocabulary.tokens[ids[ours]] for ours, theirs in named.items() if ours in ids},
    )
    tokenizer.chat_template = template
    return tokenizer


def _byte_level(vocabulary: _Vocabulary, ids: dict[str, int]) -> tuple[Any, bool]:
    """Byte-level BPE, and whether BOS is added by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = vocabulary.text("pre") or _OWN_SPLIT.get(vocabulary.metadata["general.architecture"])
    if pre not in SPLITS:
        raise UserError(
            f"{vocabulary.name} has tokenizer.ggml.pre = {quoted(pre)}; how that splits text is not known here. Known: "
            f"{', '.join(SPLITS)}."
        )
    merges = [tuple(merge.split(" ")) for merge in vocabulary.texts("merges")]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{vocabulary.name} has tokenizer.ggml.merges that are not two pieces each.")
    whole = pre in _WHOLE_WORDS
    core = Tokenizer(_model(models.BPE, vocabulary, merges, ignore_merges=whole))
    if SPLITS[pre] == (_QWEN2,):
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]),
            pre_tokenizers.ByteLevel(vocabulary.flag("add_space_prefix", False), use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core, whole


def _sentencepiece(vocabulary: _Vocabulary, ids: dict[str, int]) -> tuple[Any, bool]:
    """SentencePiece's BPE: of two neighbours whose union is a token, those with the best score merge first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = vocabulary.numbers("scores")
    place = {token: i for i, token in enumerate(vocabulary.tokens)}
    pairs = []
    for token, i in place.items():
        if vocabulary.types[i] in (_NORMAL, _USER_DEFINED):
            cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            pairs += [(-scores[i], place[a], place[b], a, b) for a, b in cuts if a in place and b in place]
    merges = [(a, b) for *_, a, b in sorted(pairs)]
    unknown = vocabulary.tokens[ids["unknown"]]
    core = Tokenizer(_model(models.BPE, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = vocabulary.flag("add_space_prefix", True)
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return core, True


def _model(kind: Any, vocabulary: _Vocabulary, merges: Sequence[tuple[str, ...]], **settings: Any) -> Any:
    try:
        return kind({token: i for i, token in enumerate(vocabulary.tokens)}, merges, **settings)
    except Exception as error:  # raised in Rust, as a plain Exception: a merge of pieces that are no tokens
        raise UserError(
            f"{vocabulary.name} has tokenizer.ggml.merges that do not fit its tokens: {reason(error, 80)}."
        ) from error


def save(tokenizer: Any, folder: Path, name: str) -> None:
    """Write the tokenizer into a folder that has its config.json.

    Raises UserError if transformers loads another one from there: for some families it does not take tokenizer.json at its word
    and puts in the splitting that it knows.
    """
    import transformers

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    none = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"))  # said, or a family's own would be put in
    path.write_text(json.dumps({**none, **json.loads(path.read_text(encoding="utf-8"))}, indent=2), encoding="utf-8")
    written, loaded = (_parts(t) for t in (tokenizer, transformers.AutoTokenizer.from_pretrained(folder)))
    if changed := [key for key in written if written[key] != loaded.get(key)]:
        raise UserError(
            f"{name} has a tokenizer that transformers {transformers.__version__} would load with another {changed[0]}; this "
            "file cannot be used."
        )


def _parts(tokenizer: Any) -> dict[str, Any]:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"] = {key: value or None for key, value in parts["model"].items()}
    return parts
