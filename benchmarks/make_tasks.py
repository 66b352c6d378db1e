"""Build rows in LongBench's format from a SQuAD 2.0 file and from the Python standard library's source, with a seed.

    python benchmarks/make_tasks.py --squad dev-v2.0.json --out tasks [--rows 50] [--characters 5500-13000] [--seed 0]
    fastfill evaluate default --artifact default --task suite --data tasks --out run

They are not LongBench: each follows the rules of a LongBench dataset (prompt, answer length, metric) on other text, and is
named `DATASET:made` so that no result can be taken for the official one.

- multifieldqa_en: a question, and a whole article up to --characters.
- hotpotqa: a question, and the paragraph that answers it among paragraphs of other articles.
- triviaqa: a paragraph and its question, after solved examples from other articles.
- passage_retrieval_en: the beginnings of 30 paragraphs; to which of them do these questions and answers belong?
- lcc: the next line of a module of the standard library (the files depend on the Python version, which is in each `_id`).
- gov_report: a module of the standard library without its docstring; what is it for? The docstring's first paragraph is the
  right answer. The prompt is ours, and answers have 64 tokens.

A length such as 5500-13000 is drawn for each row: with 4 characters a token, prompts of about 1,000 to 4,000 tokens.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import platform
import random
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PARAGRAPHS = 30  # LongBench's prompt for passage retrieval names this number
SUMMARY_TOKENS = 64
LONGEST_MODULE = 100_000  # characters that are parsed
SUMMARY_PROMPT = (
    "You are given the source code of a Python module, without its documentation. Write a summary of what the module is for, "
    "in one or two sentences.\n\nSource code:\n{source}\n\nNow, write the summary in one or two sentences. Do not output any "
    "code.\n\nSummary:"
)


@dataclass(frozen=True)
class Question:
    """An answerable question; article and paragraph say where its answer is."""

    id: str
    text: str
    answers: tuple[str, ...]
    article: int
    paragraph: int


@dataclass(frozen=True)
class Squad:
    titles: list[str]
    paragraphs: list[list[str]]  # by article
    questions: list[Question]

    def others(self, article: int) -> list[tuple[str, str]]:
        """(title, paragraph) of all other articles."""
        pairs = zip(self.titles, self.paragraphs, strict=True)
        return [(title, text) for i, (title, texts) in enumerate(pairs) if i != article for text in texts]


def load_squad(file: Path) -> Squad:
    """Raises ValueError for a file that is not SQuAD, or has too little in it."""
    try:
        articles = json.loads(file.read_text(encoding="utf-8"))["data"]
        titles = [article["title"].replace("_", " ") for article in articles]
        paragraphs = [[paragraph["context"].strip() for paragraph in article["paragraphs"]] for article in articles]
        questions = [
            Question(qa["id"], qa["question"].strip(), tuple(dict.fromkeys(a["text"] for a in qa["answers"])), i, j)
            for i, article in enumerate(articles)
            for j, paragraph in enumerate(article["paragraphs"])
            for qa in paragraph["qas"]
            if not qa.get("is_impossible") and qa["answers"]
        ]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as JSON") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not in SQuAD's format") from error
    if len(articles) < 2 or not questions:
        raise ValueError(f"{file} has fewer than two articles, or no question with an answer")
    return Squad(titles, paragraphs, questions)


def _row(dataset: str, name: str, context: str, text: str, answers: Sequence[str]) -> Row:
    """LongBench's fields; `length` is in words, as there."""
    return {
        "input": text,
        "context": context,
        "answers": list(answers),
        "length": len(f"{context} {text}".split()),
        "dataset": f"{dataset}:made",
        "language": "python" if dataset == "lcc" else "en",
        "all_classes": None,
        "_id": f"made-{dataset}-{name}",
    }


def _fill(first: str, more: Sequence[str], characters: int, joint: str) -> list[str]:
    """`first` and as many of `more`, in order, as fit into `characters` together."""
    parts, size = [first], len(first)
    for part in more:
        if size + len(joint) + len(part) > characters:
            break
        parts.append(part)
        size += len(joint) + len(part)
    return parts


def single_document(squad: Squad, question: Question, characters: int, rng: random.Random) -> Row:
    """The article around the paragraph that answers: as much before and after as fits, the rest left out."""
    texts = squad.paragraphs[question.article]
    first = last = question.paragraph
    size = len(texts[first])
    while True:
        room = [i for i in (first - 1, last + 1) if 0 <= i < len(texts) and size + 2 + len(texts[i]) <= characters]
        if not room:
            break
        index = rng.choice(room)
        first, last, size = min(first, index), max(last, index), size + 2 + len(texts[index])
    context = "\n\n".join(texts[first : last + 1])
    return _row("multifieldqa_en", question.id, context, question.text, question.answers)


def many_documents(squad: Squad, question: Question, characters: int, rng: random.Random) -> Row:
    """The paragraph that answers, and paragraphs of other articles, shuffled and numbered."""
    others = [f"{title}\n{text}" for title, text in squad.others(question.article)]
    rng.shuffle(others)
    gold = f"{squad.titles[question.article]}\n{squad.paragraphs[question.article][question.paragraph]}"
    passages = _fill(gold, others, characters - 16, "\n\nPassage 99:\n")
    rng.shuffle(passages)
    context = "\n\n".join(f"Passage {i}:\n{passage}" for i, passage in enumerate(passages, 1))
    return _row("hotpotqa", question.id, context, question.text, question.answers)


def few_shot(squad: Squad, question: Question, characters: int, rng: random.Random) -> Row:
    """Solved examples from other articles, then the question in the same form, its answer open."""

    def show(one: Question) -> str:
        return f"Passage:\n{squad.paragraphs[one.article][one.paragraph]}\nQuestion:\n{one.text}\nAnswer:\n"

    others = [one for one in squad.questions if one.article != question.article]
    solved = [f"{show(one)}{one.answers[0]}" for one in rng.sample(others, min(len(others), 200))]
    if len(solved[0]) > characters:
        solved = sorted(solved, key=len)
    examples = _fill(solved[0], solved[1:], characters, "\n\n")
    return _row("triviaqa", question.id, "\n\n".join(examples), show(question), question.answers)


def retrieval(squad: Squad, question: Question, characters: int, rng: random.Random) -> Row:
    """The beginnings of thirty paragraphs; questions and answers from one of them."""
    texts = squad.paragraphs[question.article]
    gold = texts[question.paragraph]
    pool = [text for text in texts if text != gold] + [text for _, text in squad.others(question.article)]
    chosen = [gold, *rng.sample(sorted(set(pool)), PARAGRAPHS - 1)]
    rng.shuffle(chosen)
    shown = [_beginning(text, characters) for text in chosen]
    context = "\n\n".join(f"Paragraph {i}: {text}" for i, text in enumerate(shown, 1))
    here = [
        q
        for q in squad.questions
        if (q.article, q.paragraph) == (question.article, question.paragraph) and q.answers[0] in _beginning(gold, characters)
    ]
    facts = " ".join(f"{q.text} {q.answers[0]}." for q in here)
    return _row("passage_retrieval_en", question.id, context, facts, [f"Paragraph {chosen.index(gold) + 1}"])


def _beginning(text: str, characters: int) -> str:
    """What a paragraph may show of itself so that thirty of them fit."""
    room = characters // PARAGRAPHS - 16
    return text if len(text) <= room else text[:room].rsplit(" ", 1)[0]


def code(files: Sequence[Path], count: int, characters: Callable[[], int], rng: random.Random) -> list[Row]:
    """The next line of `count` modules, each cut where a line of code with something to guess follows."""
    rows: list[Row] = []
    for file in rng.sample(files, len(files)):
        if len(rows) == count:
            break
        text = _source(file)
        if text is None:
            continue
        lines, most = text.splitlines(keepends=True), characters()
        ends, size = [], 0
        for number, line in enumerate(lines):
            if 3 * most // 4 <= size <= most and _worth(line):
                ends.append(number)
            size += len(line)
        if ends:
            end = rng.choice(ends)
            name = f"{_name(file)}-{end + 1}"
            rows.append(_row("lcc", name, "".join(lines[:end]), "", [lines[end].strip("\n")]))
    return rows


def summaries(files: Sequence[Path], count: int, characters: Callable[[], int], rng: random.Random) -> list[Row]:
    """`count` modules without their docstrings, whose first paragraph is the answer; long ones are cut at a line's end."""
    rows: list[Row] = []
    for file in rng.sample(files, len(files)):
        if len(rows) == count:
            break
        text, most = _source(file) or "", characters()
        parts = _without_docstring(text) if 3 * most // 4 <= len(text) <= LONGEST_MODULE else None
        if parts is None:
            continue
        source, summary = parts
        if len(source) < 3 * most // 4 or not 40 <= len(summary) <= 400:
            continue
        if len(source) > most:
            source = source[: source.rindex("\n", 0, most) + 1]
        row = _row("gov_report", _name(file), source, "", [summary])
        prompt = SUMMARY_PROMPT.replace("{source}", row.pop("context"))
        rows.append({**row, "prompt": prompt, "max_new_tokens": SUMMARY_TOKENS})
    return rows


def _without_docstring(text: str) -> tuple[str, str] | None:
    """A module's source without its docstring and what stands before it, and the docstring's first paragraph as one line."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    docstring = ast.get_docstring(tree)
    if not docstring or not tree.body[0].end_lineno:
        return None
    after = text.splitlines(keepends=True)[tree.body[0].end_lineno :]
    return "".join(after).lstrip("\n"), " ".join(docstring.split("\n\n")[0].split())


def _source(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _name(file: Path) -> str:
    root = Path(sysconfig.get_path("stdlib"))
    inside = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
    return f"{platform.python_version()}-{'.'.join(inside.with_suffix('').parts)}"


def _worth(line: str) -> bool:
    text = line.strip()
    return 12 <= len(text) <= 100 and not any(mark in text for mark in ("#", "`", "//", '"""', "'''")) and "(" in text


def library_files() -> list[Path]:
    """Modules of the standard library, sorted, without tests, tables of encodings and what is installed beside it, and without
    modules and packages a to c: the shipped artifact was calibrated on them."""
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        top = Path(folder) == root
        folders[:] = [name for name in folders if name not in apart and not (top and name[0] in "abc")]
        found += [Path(folder) / name for name in files if name.endswith(".py") and not (top and name[0] in "abc")]
    return sorted(found)


MAKERS: dict[str, Callable[[Squad, Question, int, random.Random], Row]] = {
    "multifieldqa_en": single_document,
    "hotpotqa": many_documents,
    "triviaqa": few_shot,
    "passage_retrieval_en": retrieval,
}


def build(
    squad: Squad | None, files: Sequence[Path], count: int, characters: tuple[int, int], seed: int
) -> dict[str, list[Row]]:
    """Rows by dataset. characters: shortest and longest context, drawn for each row. The same arguments give the same rows, and
    a dataset's rows do not depend on the other datasets."""

    def lengths(dataset: str) -> Callable[[], int]:
        return functools.partial(random.Random(f"{seed}/{dataset}/characters").randint, *characters)

    made = {}
    for dataset, maker in MAKERS.items() if squad else ():
        rng, length = random.Random(f"{seed}/{dataset}"), lengths(dataset)
        assert squad is not None
        questions = squad.questions
        if dataset == "passage_retrieval_en":
            if len({text for texts in squad.paragraphs for text in texts}) < PARAGRAPHS:
                continue
            shown = {(i, j): _beginning(t, characters[0]) for i, ts in enumerate(squad.paragraphs) for j, t in enumerate(ts)}
            questions = [q for q in questions if q.answers[0] in shown[q.article, q.paragraph]]
            first = {(q.article, q.paragraph): q for q in reversed(questions)}  # one question a paragraph
            questions = [q for q in questions if first[q.article, q.paragraph] is q]
        if dataset == "multifieldqa_en":
            questions = [q for q in questions if len(squad.paragraphs[q.article][q.paragraph]) <= characters[0]]
        chosen = rng.sample(questions, min(count, len(questions)))
        made[dataset] = [maker(squad, question, length(), rng) for question in chosen]
    for dataset, of_code in (("lcc", code), ("gov_report", summaries)):
        made[dataset] = of_code(files, count, lengths(dataset), random.Random(f"{seed}/{dataset}"))
    return made


def _characters(text: str) -> tuple[int, int]:
    """'8000' or '5500-13000'."""
    ends = [int(end) for end in text.split("-")]
    if len(ends) > 2 or not 2000 <= ends[0] <= ends[-1]:
        raise ValueError
    return ends[0], ends[-1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build rows in LongBench's format.")
    parser.add_argument("--squad", type=Path, help="SQuAD 2.0 JSON file (without it only code rows are made)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--rows", type=int, default=50, help="rows of each dataset (default: 50)")
    parser.add_argument(
        "--characters",
        type=_characters,
        default="8000",
        help="length of a context, at least 2000, or a range such as 5500-13000; about 4 a token (default: 8000)",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.rows < 1:
        parser.error("--rows must be at least 1")
    try:
        squad = load_squad(arguments.squad) if arguments.squad else None
        made = build(squad, library_files(), arguments.rows, arguments.characters, arguments.seed)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for dataset, rows in made.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (arguments.out / f"{dataset}-made.jsonl").write_text(text, encoding="utf-8")
            words = sum(row["length"] for row in rows) // max(1, len(rows))
            print(f"{dataset:22} {len(rows):4} rows, {words} words each on average")
    except (ValueError, OSError) as error:
        print(f"make_tasks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
