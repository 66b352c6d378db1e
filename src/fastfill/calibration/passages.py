"""Sequences of numbered passages with questions behind them, made of the calibration text. Ours.

In running text hardly a token depends on which of many like things it was. Prompts ask for that: the third document, the
function's line, item 12. Without such sequences half of the neurons lost the number of a passage where all else was kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from fastfill.data import Document

WORDS = 15, 60  # of a passage
MARKS = ("Passage {}: ", "[{}] ", "{}. ", "Section {}\n", "Document {}: ", "Item {} - ")  # how passages are numbered
QUOTE = 8, 16  # words of one that a question quotes
KEYWORDS = 6


def sequences(tokenizer: Any, documents: Sequence[Document], length: int, count: int, answer: float, seed: int) -> torch.Tensor:
    """(count, length) token ids. The last `answer` share of each, and at times a little more, asks for passages before it, and
    has the right answers. Fewer, down to none, where the text has too few words."""
    rng = random.Random(seed)
    words = [document.text.split() for document in documents]
    words = [found for found in words if len(found) >= WORDS[1]]
    rows: list[list[int]] = []
    if sum(map(len, words)) < length:  # it would be the same few words again and again
        return torch.empty(0, length, dtype=torch.long)
    weights = [len(found) for found in words]
    for _ in range(count):
        text, passages, mark = _passages(tokenizer, words, weights, int(length * (1 - answer)), rng)
        ids: list[int] = []
        while passages and len(ids) < length:
            for _ in range(8):
                text += _question(passages, mark, rng)
            ids = tokenizer(text, verbose=False)["input_ids"]
        rows += [ids[:length]] if passages else []
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


def _passages(
    tokenizer: Any, words: list[list[str]], weights: list[int], tokens: int, rng: random.Random
) -> tuple[str, list[list[str]], str]:
    """Numbered passages of at most so many tokens: their text, their words, the mark before each."""
    mark, text, passages, used = rng.choice(MARKS), "", list[list[str]](), 0
    while True:
        (source,) = rng.choices(words, weights)
        size = rng.randint(*WORDS)
        begin = rng.randrange(len(source) - size + 1)
        more = mark.format(len(passages) + 1) + " ".join(source[begin : begin + size]) + "\n\n"
        used += len(tokenizer(more, verbose=False)["input_ids"])
        if used > tokens:
            return text, passages, mark
        text, passages = text + more, [*passages, source[begin : begin + size]]


def _question(passages: list[list[str]], mark: str, rng: random.Random) -> str:
    """By quotation or by keywords which number it is, or by its number how a passage begins."""
    number = rng.randrange(len(passages))
    found, name = passages[number], mark.format(number + 1).strip().rstrip(":-").strip()
    size = min(rng.randint(*QUOTE), len(found))
    begin = rng.randrange(len(found) - size + 1)
    kind = rng.random()
    if kind < 0.5:
        return f'Which of them has the words "{" ".join(found[begin : begin + size])}"?\nAnswer: {name}\n\n'
    if kind < 0.8:
        keywords = sorted(set(found), key=len)[-KEYWORDS:]  # the longest words say most
        rng.shuffle(keywords)
        return f"Which of them is about {', '.join(keywords)}?\nAnswer: {name}\n\n"
    return f"How does {name} begin?\nAnswer: {' '.join(found[:size])}\n\n"
