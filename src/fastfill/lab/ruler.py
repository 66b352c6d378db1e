"""Tasks in the manner of RULER (arXiv 2404.06654), made with a seed to any prompt length: needles, variables, words, questions.

The prompts' wording and the scoring are RULER's (github.com/NVIDIA/RULER, Apache-2.0, (c) NVIDIA); the code is ours, and so is
`ruler_words.txt` (RULER takes its words from packages). The filler is RULER's "noise" sentences or the user's text.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import string
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import torch

from fastfill.engines import transformers as engine
from fastfill.errors import UserError
from fastfill.lab import likelihood, metrics
from fastfill.lab.example import Example

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLES = {  # keys in the text, values of each, keys asked for
    "niah_single": (1, 1, 1),
    "niah_multikey": (4, 1, 1),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 4),
}
TASKS = (*NEEDLES, "vt", "cwe", "qa")
NEW_TOKENS = {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "qa": 32}
HOPS = 4  # of a variable's chain
COMMON = 10  # words that appear more often than the others

# (adjectives, nouns); no noun is a part of another, because a word is looked for as a part of the answer
_WORDS = (resources.files("fastfill.lab") / "ruler_words.txt").read_text(encoding="utf-8").split("\n\n")
ADJECTIVES, NOUNS = (part.split() for part in _WORDS)

# Question, the words that the answer begins with, and the answers.
Problem = tuple[str, str, list[str]]


def examples(
    tokenizer: Any,
    positions: int,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int | tuple[int, int]] = (1024, 4096),
    count: int = 10,
    seed: int = 0,
    rows: Sequence[dict[str, Any]] = (),
    haystack: str | None = None,
    chat: bool = True,
    max_new_tokens: int | None = None,
) -> list[Example]:
    """`count` examples of each task at each length; prompt and answer together take at most `length` tokens.

    lengths: a pair is a range, from which each example draws its own length.
    tasks: default all, qa only if there are rows. positions: how many tokens the model can hold. rows: LongBench-like, for qa:
    `input`, `answers` and the `context` that answers it; the contexts of other rows are the distractors. haystack: text to hide
    things in instead of RULER's noise.

    Raises UserError for an unknown task, qa without rows, or a length too small for a task or too large for the model.
    """
    rows = [row for row in rows if "context" in row]  # a whole prompt does not say what its documents are
    tasks = list(tasks or [task for task in TASKS if task != "qa" or rows])
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"There is no task {task!r}; there are {', '.join(TASKS)}.")
    if "qa" in tasks and len({row["context"] for row in rows}) < 2:
        raise UserError(
            "The task qa needs --data with rows that have `input`, `answers` and at least two different `context`s."
        )
    filler = sentences(haystack) if haystack else [NOISE]
    made = []
    for wanted in lengths:
        low, high = (wanted, wanted) if isinstance(wanted, int) else wanted
        if high > positions:
            raise UserError(f"The model holds {positions} tokens, fewer than the length {high}; leave it out.")
        at = str(low) if low == high else f"{low}-{high}"
        for task in tasks:
            new = NEW_TOKENS[task]
            for index in range(count):
                name = f"{seed}/{task}/{at}/{index}"
                length = random.Random(f"{name}/length").randint(low, high)
                build = _builder(task, filler, rows, length, name)
                ids, begin, answers = _largest(tokenizer, build, length - new, chat, f"{task} at {length} tokens")
                match = metrics.match_any if task == "qa" else metrics.match_all
                made.append(
                    Example(
                        dataset=f"{task}@{at}",
                        name=str(index),
                        ids=ids,
                        max_new_tokens=new if max_new_tokens is None else min(new, max_new_tokens),
                        score=functools.partial(match, references=answers),
                        answers=tuple(answers),
                        golds=likelihood.answer_ids(tokenizer, written(task, answers), begin, new),
                    )
                )
    return made


def written(task: str, answers: Sequence[str]) -> list[str]:
    """The forms of the right answer as it would be written: a solved example's where RULER shows one, else a list."""
    if task == "qa":
        return list(answers)
    return [{"vt": " ".join, "cwe": _numbered}.get(task, _listed)(answers)]


def sentences(text: str) -> list[str]:
    found = [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]
    if not found:
        raise UserError("The haystack is empty; give a text of some sentences.")
    return found


def _builder(
    task: str, filler: Sequence[str], rows: Sequence[dict[str, Any]], length: int, seed: str
) -> Callable[[int], Problem]:
    """Amount of filler -> problem; the same seed and amount give the same problem."""

    def build(size: int) -> Problem:
        rng = random.Random(f"{seed}/{size}")
        if task in NEEDLES:
            return needles(rng, size, filler, *NEEDLES[task])
        if task == "vt":
            example = variables(rng, 4, [NOISE], letters=3)
            return _after(example, " ".join(example[2]), variables(rng, size, filler))
        if task == "cwe":
            few = length < 4096
            example = common_words(rng, 10, *((3, 1) if few else (10, 3)))
            shown = _numbered(example[2])
            return _after(example, shown, common_words(rng, size, *((6, 1) if few else (30, 3))))
        return question(rng, size, rows)

    return build


def _largest(
    tokenizer: Any, build: Callable[[int], Problem], most: int, chat: bool, what: str
) -> tuple[torch.Tensor, str, list[str]]:
    """The problem with the most filler whose prompt takes at most `most` tokens: ids (1, T), how the answer begins, answers."""

    def made(size: int) -> tuple[torch.Tensor, str, list[str]] | None:
        prompt, begin, answers = build(size)
        ids = torch.cat(
            [
                engine.encode(tokenizer, prompt, chat),
                tokenizer(begin, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"],
            ],
            dim=1,
        )
        return (ids, begin, answers) if ids.shape[1] <= most else None

    best, low, high = made(1), 1, 2
    if best is None:
        raise UserError(f"There is no room for {what}; give greater --lengths.")
    while (found := made(high)) is not None:
        best, low, high = found, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = made(middle)
        if found is None:
            high = middle
        else:
            best, low = found, middle
    return best


def _after(example: Problem, answer: str, problem: Problem) -> Problem:
    """RULER shows a small solved example first where the form of the answer is not plain."""
    return f"{example[0]}{example[1]} {answer}\n\n{problem[0]}", problem[1], problem[2]


def _hide(rng: random.Random, things: Sequence[str], filler: Sequence[str], size: int, joint: str) -> str:
    """`size` sentences of filler (over and over if need be), the things in order at random places between them."""
    start = rng.randrange(len(filler))
    parts = [filler[(start + i) % len(filler)] for i in range(size)]
    for place, thing in sorted(zip(sorted(rng.choices(range(size + 1), k=len(things))), things, strict=True), reverse=True):
        parts.insert(place, thing)
    return joint.join(parts)


def needles(rng: random.Random, size: int, filler: Sequence[str], keys: int, values: int, asked: int) -> Problem:
    """Needle in a haystack: find the numbers that belong to the keys asked for."""
    names = [
        f"{adjective}-{noun}" for adjective, noun in zip(rng.sample(ADJECTIVES, keys), rng.sample(NOUNS, keys), strict=True)
    ]
    held = [(name, str(rng.randrange(10**6, 10**7))) for name in names for _ in range(values)]
    rng.shuffle(held)
    lines = [f"One of the special magic numbers for {name} is: {number}." for name, number in held]
    context = _hide(rng, lines, filler, size, "\n" if len(filler) == 1 else " ")
    chosen = rng.sample(names, asked)
    query = _listed(chosen)
    answers = [number for name in chosen for owner, number in held if owner == name]  # as asked, then as in the text
    if len(answers) == 1:
        return (
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the number afterwards.\n{context}\n"
            f"What is the special magic number for {query} mentioned in the provided text?",
            f" The special magic number for {query} mentioned in the provided text is",
            answers,
        )
    return (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the numbers afterwards.\n{context}\n"
        f"What are all the special magic numbers for {query} mentioned in the provided text?",
        f" The special magic numbers for {query} mentioned in the provided text are",
        answers,
    )


def variables(rng: random.Random, size: int, filler: Sequence[str], letters: int = 5) -> Problem:
    """Variable tracking: a value, and a chain of variables that each take it from the one before."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = rng.randrange(10_000, 100_000)
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names))]
    context = _hide(rng, lines, filler, size, "\n" if len(filler) == 1 else " ")
    return (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are assigned "
        f"the value {value}, they are: ",
        names,
    )


def common_words(rng: random.Random, size: int, often: int, seldom: int) -> Problem:
    """Common words: ten words appear `often` times, the others `seldom` times (more, evenly, where our list of words is too
    short for `size` different ones)."""
    words = rng.sample(NOUNS, len(NOUNS))
    common, others = words[:COMMON], words[COMMON:]
    entries = common * often + [others[i % min(size, len(others))] for i in range(size * seldom)]
    rng.shuffle(entries)
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
        f"most often.\n{_numbered(entries)}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        sorted(common, key=entries.index),
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def question(rng: random.Random, size: int, rows: Sequence[dict[str, Any]]) -> Problem:
    """Question answering: the document that answers among `size` distractors, which come again if there are too few."""
    row = rng.choice(rows)
    others = sorted({other["context"] for other in rows} - {row["context"]})
    rng.shuffle(others)
    documents = [row["context"], *(others[i % len(others)] for i in range(size))]
    rng.shuffle(documents)
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
    task = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    return (
        f"{task}\n\nThe following are given documents.\n\n{context}\n\n{task}\n\nQuestion: {row['input']}",
        " Answer:",
        list(row["answers"]),
    )
