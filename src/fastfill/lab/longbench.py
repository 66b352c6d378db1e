"""LongBench and MiniLongBench, from their JSONL files, with LongBench's prompts, truncation, answer lengths and metrics.

LongBench's own, to be comparable: prompts (`longbench_prompts.json`, MIT, (c) 2023 THU-KEG & Zhipu AI), answer lengths, which
datasets go without the chat template, how a prompt is cut and which part of an answer counts. The code is ours.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fastfill import context, reading
from fastfill.data import split_slice
from fastfill.engines import transformers as engine
from fastfill.errors import UserError
from fastfill.lab import likelihood, metrics
from fastfill.lab.example import Example

Metric = Callable[[str, str, Sequence[str]], float]


@dataclass(frozen=True)
class Rules:
    """max_new_tokens: answer length. chat: uses the chat template. first_line: only the answer's first line counts."""

    metric: Metric
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False
    chinese: bool = False


RULES = {
    "narrativeqa": Rules(metrics.qa_f1, 128),
    "qasper": Rules(metrics.qa_f1, 128),
    "multifieldqa_en": Rules(metrics.qa_f1, 64),
    "multifieldqa_zh": Rules(metrics.qa_f1_zh, 64, chinese=True),
    "hotpotqa": Rules(metrics.qa_f1, 32),
    "2wikimqa": Rules(metrics.qa_f1, 32),
    "musique": Rules(metrics.qa_f1, 32),
    "dureader": Rules(metrics.rouge_l_zh, 128, chinese=True),
    "gov_report": Rules(metrics.rouge_l, 512),
    "qmsum": Rules(metrics.rouge_l, 512),
    "multi_news": Rules(metrics.rouge_l, 512),
    "vcsum": Rules(metrics.rouge_l_zh, 512, chinese=True),
    "trec": Rules(metrics.classification, 64, chat=False, first_line=True),
    "triviaqa": Rules(metrics.qa_f1, 32, chat=False, first_line=True),
    "samsum": Rules(metrics.rouge_l, 128, chat=False, first_line=True),
    "lsht": Rules(metrics.classification, 64, chat=False, first_line=True, chinese=True),
    "passage_count": Rules(metrics.count, 32),
    "passage_retrieval_en": Rules(metrics.retrieval, 32),
    "passage_retrieval_zh": Rules(metrics.retrieval_zh, 32, chinese=True),
    "lcc": Rules(metrics.code_similarity, 64, chat=False),
    "repobench-p": Rules(metrics.code_similarity, 64, chat=False),
}
DEFAULT = tuple(name for name, rules in RULES.items() if not rules.chinese)
ALL = "all"  # in the place of a dataset's name


@dataclass(frozen=True)
class Row:
    """One line of a file. label: how results name the dataset; source: `file#row`.

    fields: `context` and `input` as in LongBench, or a whole `prompt` as in MiniLongBench; `answers`; `all_classes` where the
    metric needs them. Rows of other origin may ask for shorter answers by `max_new_tokens`.
    """

    dataset: str
    label: str
    source: str
    fields: dict[str, Any]


@functools.cache
def prompts() -> dict[str, str]:
    """LongBench's prompt of every dataset, with {context} and {input}."""
    text = (resources.files("fastfill.lab") / "longbench_prompts.json").read_text(encoding="utf-8")
    return json.loads(text)["prompts"]


def read(sources: Sequence[str], datasets: Sequence[str] | None = None, limit: int | None = None) -> list[Row]:
    """Rows of the wanted datasets (default: the 16 English and code ones; ALL: all 21), at most `limit` of each.

    sources: .jsonl files (or what else `reading.rows` reads), a slice such as [20:100] may follow, or folders of them. A
    dataset is what a row's `dataset` says: a LongBench name, also with `_e` (LongBench-E; so are all rows of a file
    NAME_e.jsonl, which folders leave out beside a NAME.jsonl), or with a suffix after a colon, which keeps the rules and is
    listed apart.

    Raises UserError for what cannot be read, an unknown dataset, a row without its fields, or nothing left to do.
    """
    named = [name for name in datasets or () if name != ALL]
    wanted = list(RULES) if ALL in (datasets or ()) else named or list(DEFAULT)
    for name in named:
        if name not in RULES:
            raise UserError(f"LongBench has no dataset {name[:40]!r}; it has {', '.join(RULES)}.")
    rows: dict[str, list[Row]] = {}
    for source in sources:
        for row in _file_rows(source):
            group = rows.setdefault(row.label, [])
            if row.dataset in wanted and (limit is None or len(group) < limit):
                group.append(row)
    missing = [name for name in named if not any(row.dataset == name for group in rows.values() for row in group)]
    if missing:
        raise UserError(f"The data has no rows of {', '.join(missing)}; it has {', '.join(rows) or 'none at all'}.")
    found = [row for group in rows.values() for row in group]
    if not found:
        raise UserError(f"The data has no rows of the wanted datasets; name them by --datasets, it has {', '.join(rows)}.")
    return found


def _file_rows(source: str) -> list[Row]:
    name, window = split_slice(source)
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if reading.kind(file) == "lines")
        stems = {reading.stem(file) for file in files}  # LongBench's data.zip has both sets, and some rows are in both
        files = [file for file in files if not (stem := reading.stem(file)).endswith("_e") or stem[:-2] not in stems]
        if not files:
            raise UserError(f"The folder {name} has no .jsonl files; unpack LongBench's data.zip into it.")
        return [row for file in files for row in _parse(file)][window]
    return _parse(path)[window]


def _parse(path: Path) -> list[Row]:
    stem = reading.stem(path)
    return [check(fields, where, f"{path.name}#{index}", stem) for where, index, fields in reading.rows(path)]


def check(fields: Any, where: str, source: str, stem: str = "") -> Row:
    """A row of what JSON gave. where: names it in errors. stem: of its file, which names the dataset if the row does not.

    Raises UserError for what is not a row of a known dataset.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not a JSON object.")
    label = str(fields.get("dataset", stem))
    if stem == f"{label}_e":
        label = stem
    base = re.sub(r"_e$", "", label.split(":")[0])
    if base not in RULES or not label.isprintable() or len(label) > 60:
        raise UserError(f"{where} is of no LongBench dataset ({label[:60]!r}); it has {', '.join(RULES)}.")
    answers, classes = fields.get("answers"), fields.get("all_classes")
    good = all(isinstance(fields.get(name), str) for name in (("prompt",) if "prompt" in fields else ("context", "input")))
    good = good and bool(fields.get("prompt", "whole").strip())
    if not good or not _texts(answers) or not answers or not (classes is None or _texts(classes)):
        raise UserError(
            f"{where} is not a LongBench row: it needs `context` and `input`, or a `prompt`, and a list of texts `answers`."
        )
    most = fields.get("max_new_tokens", 1)
    if not isinstance(most, int) or most < 1:
        raise UserError(f"{where}: `max_new_tokens` must be a whole number of at least 1.")
    if RULES[base].metric is metrics.classification and not classes:
        raise UserError(f"{where} needs `all_classes`, the names of all classes.")
    if RULES[base].metric in (metrics.retrieval, metrics.retrieval_zh):
        for answer in answers:
            if not re.search(r"(?:Paragraph |段落)\d+", answer):
                raise UserError(f"{where} must have an answer such as 'Paragraph 7', not {answer[:60]!r}.")
    return Row(base, label, source, fields)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def score(row: Row, prediction: str) -> float:
    """Best over the reference answers, 0 to 1."""
    rules = RULES[row.dataset]
    if rules.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    classes = row.fields.get("all_classes") or ()
    return max(rules.metric(prediction, answer, classes) for answer in row.fields["answers"])


def cut_middle(tokenizer: Any, text: str, tokens: int) -> tuple[str, bool]:
    """Text of at most about `tokens` tokens, and whether it was cut: as in LongBench the first and the last half are kept."""
    keep = tokens * context.CHARACTERS_PER_TOKEN
    if len(text) > 2 * keep:  # what lies between is cut in any case: it need not be tokenized
        text = text[:keep] + text[len(text) - keep :]
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= tokens:
        return text, False
    half = tokens // 2
    parts = (ids[:half], ids[len(ids) - half :])
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts), True


def encode(tokenizer: Any, row: Row, most: int, chat: bool = True) -> tuple[torch.Tensor, bool]:
    """The whole prompt of a row as ids (1, T), T <= most, and whether it was cut.

    Truncated text may have a few tokens more than asked, and the chat template adds some: then it is cut again, shorter.
    """
    text = prompt_of(row)
    room = most
    while room > 1:
        short, cut = cut_middle(tokenizer, text, room)
        ids = engine.encode(tokenizer, short, chat and RULES[row.dataset].chat)
        if ids.shape[1] <= most:
            return ids, cut
        room -= max(1, ids.shape[1] - most)
    raise UserError(f"{row.source} cannot be cut to {most} tokens; allow longer prompts.")


def prompt_of(row: Row) -> str:
    """The whole prompt, uncut and without the chat template."""
    return row.fields["prompt"] if "prompt" in row.fields else _fill(prompts()[row.dataset], row.fields)


def _fill(prompt: str, fields: dict[str, Any]) -> str:
    """Fill in context and input at once, so that braces in one are not taken for the place of the other."""
    return re.sub(r"\{(context|input)\}", lambda match: fields[match[1]], prompt)


def examples(
    tokenizer: Any,
    rows: Sequence[Row],
    positions: int,
    *,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    chat: bool = True,
) -> list[Example]:
    """Rows as examples. positions: how many tokens the model can hold; prompt and answer must fit together.

    max_prompt_tokens: cut prompts to this (default: what leaves room for the answer). max_new_tokens: caps LongBench's own
    answer lengths, which saves time and is no longer comparable. chat: False for base models.
    """
    made = []
    for row in rows:
        rules = RULES[row.dataset]
        new = min(rules.max_new_tokens, row.fields.get("max_new_tokens", rules.max_new_tokens))
        room = positions - new  # for the right answer too, whatever is written
        ids, cut = encode(tokenizer, row, min(room, max_prompt_tokens or room), chat)
        made.append(
            Example(
                dataset=row.label,
                name=str(row.fields.get("_id") or row.source),
                ids=ids,
                max_new_tokens=new if max_new_tokens is None else min(new, max_new_tokens),
                score=functools.partial(score, row),
                answers=tuple(row.fields["answers"]),
                cut=cut,
                golds=likelihood.answer_ids(
                    tokenizer, row.fields["answers"], "" if chat and rules.chat else prompt_of(row), new
                ),
            )
        )
    names = [example.key for example in made]
    if len(set(names)) < len(names):  # ids are unique in the official files
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"The data has the row {twice} twice; give each file once.")
    if chinese(rows).get("chinese_words") == "characters":
        print(
            "fastfill: warning: jieba is not installed; Chinese scores are by character and not LongBench's.", file=sys.stderr
        )
    return made


def named_metrics(result: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """A result of `runner.run` on rows, with the metric of each dataset, and how Chinese was cut into words."""
    rules = {row.label: RULES[row.dataset] for row in rows}
    for line in result["datasets"]:
        if line["dataset"] in rules:
            line["metric"] = rules[line["dataset"]].metric.__name__
    return {**result, **chinese(rows)}


def chinese(rows: Sequence[Row]) -> dict[str, str]:
    """What the scores of Chinese rows depend on; nothing without such rows."""
    return {"chinese_words": metrics.chinese_splitter()} if any(RULES[row.dataset].chinese for row in rows) else {}
