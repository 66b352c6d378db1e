"""Sequences of numbered passages with questions behind them, made of the calibration text. Ours.

In running text hardly a token depends on which of many like things it was. Prompts ask for that: the third document, the
function's line, item 12. Without such sequences half of the neurons lost the number of a passage where all else was kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from fastfill.errors import UserError

WORDS = 15, 60  # of a passage
MARKS = ("Passage {}: ", "[{}] ", "{}. ", "Section {}\n", "Document {}: ", "Item {} - ")  # how passages are numbered
QUOTE = 8, 16  # words of one that a question quotes
KEYWORDS = 6


def sequences(tokenizer: Any, texts: Sequence[str], length: int, count: int, answer: float, seed: int) -> torch.Tensor:
    """(count, length) token ids. The last `answer` share of each, and at times a little more, asks for passages before it, and
    has the right answers. Raises UserError where the text has too few words, or a sequence no room for a passage."""
    rng = random.Random(seed)
    words = [found for text in texts if len(found := text.split()) >= WORDS[1]]
    weights = [len(found) for found in words]
    rows: list[list[int]] = []
    tries = 10 * count if sum(weights) >= length else 0  # of less text it would be the same few words again and again
    while len(rows) < count and tries:
        tries -= 1
        text, passages, mark = _passages(tokenizer, words, weights, int(length * (1 - answer)), rng)
        ids: list[int] = []
        while len(passages) > 1 and len(ids) < length:
            for _ in range(8):
                text += _question(passages, mark, rng)
            ids = tokenizer(text, verbose=False)["input_ids"]
        rows += [ids[:length]] if ids else []
    if len(rows) < count:
        raise UserError(
            f"The data is too short to make sequences of numbered passages from it (--passages): that takes {length} words in "
            f"documents of at least {WORDS[1]}, and sequences that hold several passages; give longer text, or leave it out."
        )
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
    """By quotation or by keywords which number it is, if it can be no other; else by its number how a passage begins."""
    number = rng.randrange(len(passages))
    found, name = passages[number], mark.format(number + 1).strip().rstrip(":-").strip()
    size = min(rng.randint(*QUOTE), len(found))
    begin = rng.randrange(len(found) - size + 1)
    quoted = " ".join(found[begin : begin + size])
    # The longest words say most; of equal ones the order of a set differs from process to process.
    keywords = sorted(set(found), key=lambda word: (len(word), word))[-KEYWORDS:]
    kind = rng.random()
    if kind < 0.5 and sum(f" {quoted} " in f" {' '.join(other)} " for other in passages) == 1:
        return f'Which of them has the words "{quoted}"?\nAnswer: {name}\n\n'
    if 0.5 <= kind < 0.8 and sum(set(keywords) <= set(other) for other in passages) == 1:
        rng.shuffle(keywords)
        return f"Which of them is about {', '.join(keywords)}?\nAnswer: {name}\n\n"
    return f"How does {name} begin?\nAnswer: {' '.join(found[:size])}\n\n"
