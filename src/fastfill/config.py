"""Every knob once, with its unit and its default. Frozen; they round-trip through JSON and refuse unknown keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastfill.errors import UserError, quoted

SCHEMA_VERSION = 3  # 2: matrices may be in eight bits; 3: samples of the base model's weights
MAX_SPARSITY = 0.95
MOST = 2**31 - 1  # of whole numbers, where nothing else is said: tokens and ids are 32 bits wide in places
MAX_SEED = 2**32 - 1  # multiplied by 10,007 it still fits 64 bits, which is what generators take
MAX_PASSAGES = 0.9  # nine made sequences to one of running text
MAX_RATE = 1e30  # of learning rates and weights: fp32 ends at 3e38

Config = TypeVar("Config", bound="PrefillConfig | CalibrationConfig")


def _setting(default: Any, text: str, least: int = 0, most: int = MOST) -> Any:
    """A field with the words that every --help has of it, and the range of a whole number."""
    return field(default=default, metadata={"help": text, "range": (least, most)})


def _choice(text: str, *choices: str) -> Any:
    """A field of names, of which the first is the default."""
    return field(default=choices[0], metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class PrefillConfig:
    """What happens at run time. An artifact's settings hold in every engine; a field that is added here is a keyword of
    `attach`, an option of the commands, of vLLM and of lm-eval at once.

    sparsity: share of FFN neurons skipped, mean over layers; 0.0 is exactly dense.
    block_size: consecutive tokens of one sequence that share one selection. Blocks start at multiples of it,
        counted from the sequence's first token, so a prompt gives the same blocks however it is chunked.
    dense_head: first tokens of every sequence that stay dense; they hold the attention sink. A block is
        sparse only if all of it lies behind the head.
    min_tokens: prompts with fewer new tokens per sequence stay dense, short turns of a conversation among them; so do shorter
        calls that nobody declares part of a prompt (decode, speculative checks). An engine may begin later where sparse is
        slower, and says so.
    dense_tail: last tokens of every prompt that stay dense; they ask the question. A block is sparse only if all of it lies
        before the tail. Where nobody says where a prompt ends, a call's end counts (`fastfill.calls`). A cache keeps what was
        computed: in a conversation the tails of earlier prompts are dense, too.
    weights: "model" computes with the model's own. "int8" rounds those of the FFNs, and of the attention's projections, to
        eight bits, and their inputs on the way, for prompts with sparse blocks, dense head and tail included. On the CPU.
    dense_weights: the same choice for what is no such prompt: decode, short prompts. "int8" needs weights="int8".
    attention: "chunks" computes that of sparse prompts by torch's matrix products, a chunk of queries at a time
        (`fastfill.attention`); "model" as the model does; "auto" times both where an artifact is attached, on the CPU. In
        transformers.
    upper_share: share of a prompt's blocks that the upper third of the layers reads, those that its last tokens attend to; 1
        reads all (`fastfill.upper`). For prompts that end with their question, one at a time: what the cache holds then was
        chosen for that question. In transformers, with its sdpa attention.
    reread: share of a prompt's tokens behind the dense head that are read again with all neurons, those that its last token
        attends to; 0 reads none (`fastfill.reread`). For prompts one at a time. In transformers, with its sdpa attention.
    """

    sparsity: float = _setting(0.5, f"share of FFN neurons skipped, 0 to {MAX_SPARSITY}")
    block_size: int = _setting(32, "tokens per selection", least=1, most=2**20)
    dense_head: int = _setting(64, "first tokens of a sequence that stay dense")
    min_tokens: int = _setting(256, "shorter prompts stay dense", least=1)
    dense_tail: int = _setting(64, "last tokens of a prompt that stay dense")
    weights: str = _choice("what sparse prompts are computed with", "model", "int8")
    dense_weights: str = _choice("what decode and short prompts are computed with", "model", "int8")
    attention: str = _choice("attention of sparse prompts, by chunks where that is faster", "auto", "model", "chunks")
    upper_share: float = _setting(1.0, "share of a prompt's blocks that the upper third of the layers reads")
    reread: float = _setting(0.0, "share of a prompt's tokens that are read again, with all neurons")

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if not is_number(self.upper_share) or not 0 < self.upper_share <= 1:
            raise UserError(f"upper_share must be more than 0 and at most 1, not {quoted(self.upper_share)}.")
        if not is_number(self.reread) or not 0 <= self.reread <= 1:
            raise UserError(f"reread must lie in [0, 1], not {quoted(self.reread)}.")
        if self.reread and self.upper_share < 1:
            raise UserError("reread needs all tokens in all layers, which upper_share below 1 leaves out; give one of the two.")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if type(item.default) is int:
                check_integer(item.name, value, *item.metadata["range"])
            if type(item.default) is str and value not in item.metadata["choices"]:
                raise UserError(f"{item.name} must be {' or '.join(item.metadata['choices'])}, not {quoted(value)}.")
        if self.dense_weights == "int8" and self.weights != "int8":
            raise UserError(
                'dense_weights="int8" needs weights="int8": the copy of the weights in eight bits is made for both.'
            )

    def with_(self, **fields: Any) -> PrefillConfig:
        """These settings with the given fields in place of their own; None leaves one as it is.

        Raises UserError for an unknown field, and for a value out of range.
        """
        if unknown := [name for name in fields if name not in PREFILL_FIELDS]:
            raise UserError(f"{quoted(unknown[0])} is no setting of the prefill; there are {', '.join(PREFILL_FIELDS)}.")
        return dataclasses.replace(self, **{name: value for name, value in fields.items() if value is not None})

    @property
    def first_sparse(self) -> int:
        """The first position that can be sparse: `dense_head`, up to a whole block."""
        return -(-self.dense_head // self.block_size) * self.block_size

    def sparse_end(self, prompt: int) -> int:
        """The position behind the last that can be sparse in a prompt of so many tokens: its tail, down to a whole block."""
        return (prompt - self.dense_tail) // self.block_size * self.block_size

    @property
    def shortest_prompt(self) -> int:
        """Tokens of the shortest prompt of which anything is sparse: one block between the dense head and the dense tail."""
        return max(self.min_tokens, self.first_sparse + self.block_size + self.dense_tail)


PREFILL_FIELDS = tuple(field.name for field in dataclasses.fields(PrefillConfig))


@dataclass(frozen=True)
class CalibrationConfig:
    """What `calibrate` learns, and for how long.

    minutes: a time budget. The recipe takes as many `fit_tokens` (at most those given here) and `steps` as fit into it on
        this machine, and the artifact records them; loading model and text is not counted.
    max_loss: `1%`, a share of the context's worth, or `0.02`, a KL in nats: at the end the artifact's sparsity becomes
        the highest that keeps the loss of what follows a prompt within it, on sequences set aside.
    predictor_rank, linear_rank, silu_rank: inner widths; None takes the default for the model's size
        (`default_ranks`: at most 8 % of the dense FFN's FLOPs at H = 576, 4 % at H >= 2048).
    fit_tokens: tokens on which predictors and the closed-form compensators are fitted, layer by layer.
    fit_epochs, fit_batch (tokens), fit_lr: Adam on the predictors' cross-entropy.
    schedule: "sensitivity" (measured loss per layer), "token-mixing" (attention) or "uniform".
    schedule_tokens: tokens on which the schedule is measured.
    steps: end-to-end distillation steps, each of `batch` sequences of `sequence_length` tokens; 0 skips the stage. Several
        processes share the batch: it must be a multiple of their number.
    answer, answer_weight: share of each of these sequences, at its end, that is teacher-forced densely after the sparse
        rest, as an answer is; its weight in the loss.
    passages: share of the sequences that are numbered passages of the text with questions behind them
        (`fastfill.calibration.passages`).
    loss_stride: of the tokens before the answer every n-th is scored against the dense model, others at each step; of the
        tokens on which the schedule is measured too.
    compensator_lr, predictor_lr: peak rates of AdamW, cosine to a tenth, times the standard deviation of each tensor.
    """

    minutes: float | None = None
    max_loss: str | None = None
    predictor_rank: int | None = None
    linear_rank: int | None = None
    silu_rank: int | None = None
    fit_tokens: int = 131072
    fit_epochs: int = 1
    fit_batch: int = 1024
    fit_lr: float = 5e-3
    schedule: str = "sensitivity"
    schedule_tokens: int = 4096
    steps: int = 300
    batch: int = 1
    sequence_length: int = 1024
    answer: float = 0.25
    answer_weight: float = 3.0
    passages: float = 0.0
    loss_stride: int = 4
    compensator_lr: float = 5e-3
    predictor_lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in ("sensitivity", "token-mixing", "uniform"):
            raise UserError(f"schedule must be sensitivity, token-mixing or uniform, not {quoted(self.schedule)}.")
        for name in ("fit_tokens", "fit_epochs", "fit_batch", "schedule_tokens", "batch", "loss_stride"):
            check_integer(name, getattr(self, name), 1)
        check_integer("steps", self.steps, 0)
        check_integer("sequence_length", self.sequence_length, 2)
        check_integer("seed", self.seed, 0, MAX_SEED)
        for name in ("minutes", "fit_lr", "compensator_lr", "predictor_lr"):
            value = getattr(self, name)
            if name == "minutes" and value is None:
                continue
            if not is_number(value) or not 0 < value <= MAX_RATE:
                raise UserError(f"{name} must be a positive number of at most {MAX_RATE:g}, not {quoted(value)}.")
        for name, most in (("answer", 1), ("passages", MAX_PASSAGES), ("answer_weight", MAX_RATE)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < most:
                raise UserError(f"{name} must be a number of at least 0 and below {most:g}, not {quoted(value)}.")
        if self.max_loss is not None and not isinstance(self.max_loss, str):
            raise UserError(f"max_loss must be text such as 1% or 0.02, not {quoted(self.max_loss)}.")
        for name in ("predictor_rank", "linear_rank", "silu_rank"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1 if name == "predictor_rank" else 0)


def default_ranks(hidden_size: int) -> tuple[int, int, int]:
    """(predictor, linear, SiLU) ranks for a hidden size: 64/32/32 at H <= 1024, growing with H. Ours.

    Costs r_p (H + F) + 2 H (r_l + r_s) multiply-adds a token beside 3 H F of the dense FFN.
    """
    base = max(64, hidden_size // 24 // 16 * 16)  # H / 24: 2.9 % where F = 2.7 H (Llama 2), less where F is larger
    return base, base // 2, base // 2


def is_number(value: Any) -> bool:
    """A finite int or float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def check_sparsity(value: Any) -> None:
    if not is_number(value) or not 0 <= value <= MAX_SPARSITY:
        raise UserError(f"sparsity must lie in [0, {MAX_SPARSITY}] (the share of FFN neurons skipped), not {quoted(value)}.")


def check_integer(name: str, value: Any, least: int, most: int = MOST) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {quoted(value)}.")
    if value > most:
        raise UserError(f"{name} must be a whole number of at most {most}, not {quoted(value)}.")


def to_dict(config: PrefillConfig | CalibrationConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(kind: type[Config], values: Any, where: str) -> Config:
    """Build a configuration from JSON; a field that it lacks, since it is older than the field, has its default. Raises
    UserError on an unknown key, or a value out of range; `where` names the file."""
    check_keys(values, set(), where, optional=frozenset(field.name for field in dataclasses.fields(kind)))
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def filled(kind: type[Config], found: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """found: settings that were stored; with the defaults of those fields that `now` has and they, being older, lack."""
    return {**{name: value for name, value in to_dict(kind()).items() if name in now}, **found}


def check_keys(values: Any, known: set[str], where: str, optional: frozenset[str] = frozenset()) -> None:
    """Raise UserError unless `values` is a JSON object with the known keys, all of them but the optional ones."""
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a JSON object.")
    unknown, missing = sorted(set(values) - known - optional), sorted(known - set(values))
    if unknown:
        names = ", ".join(quoted(name).strip("'") for name in unknown[:3])
        raise UserError(f"{where} has unknown key(s) {names}; this version knows {', '.join(sorted(known | optional))}.")
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; calibrate again or restore the file.")
