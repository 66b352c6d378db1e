"""Scores of one answer against one reference, 0 to 1, as LongBench and RULER define them. Pure functions of text.

Each LongBench metric takes (prediction, reference, classes); classes is used by `classification` alone.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PIECES = re.compile(r"[a-z0-9]+|\S", re.IGNORECASE)
# Punctuation as LongBench's `normalize_zh_answer` lists it: ASCII, its full-width forms but the stop, and these ranges.
_MARKS = {*string.punctuation, *(chr(ord(mark) + 0xFEE0) for mark in string.punctuation if mark != ".")}
for _first, _last in (
    *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011)),
    *((0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF5F, 0xFF64)),
):
    _MARKS.update(map(chr, range(_first, _last + 1)))
_CODE_MARKS = ("`", "#", "//")  # a line with one of them is a comment or a fence, not the completion


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the tokens, counted with multiplicity."""
    same = (Counter(prediction) & Counter(reference)).total()
    return 2 * same / (len(prediction) + len(reference)) if same else 0.0


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    return _f1(normalize(prediction).split(), normalize(reference).split())


def _longest_common(a: Sequence[str], b: Sequence[str]) -> set[str]:
    """The words of one longest common subsequence; among equals the one that goes furthest in `b`."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        above, row = table[i - 1], table[i]
        for j, y in enumerate(b, 1):
            row[j] = above[j - 1] + 1 if x == y else max(above[j], row[j - 1])
    words, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            words.add(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Summary-level ROUGE-L F1 as LongBench takes it (the definition of PyPI's `rouge` 1.0.1).

    Sentences end at full stops; words are split at blanks, case and punctuation kept. Of every pair of sentences the longest
    common subsequence is taken; recall and precision are the *different* words in any of them, over those of either text. A
    sentence of blanks alone, such as what follows the last full stop, counts there as one empty word.
    """
    texts = [[part.split() or [""] for part in text.split(".") if part] for text in (prediction, reference)]
    mine, theirs = ({word for sentence in sentences for word in sentence} for sentences in texts)
    if not mine or not theirs:
        return 0.0
    common: set[str] = set()
    for wanted in texts[1]:
        for given in texts[0]:
            common |= _longest_common(wanted, given)
    return 2 * len(common) / (len(mine) + len(theirs))


def chinese_splitter() -> str:
    """How Chinese text is cut into words here: "jieba", as LongBench does, or "characters" where jieba is not installed."""
    return "jieba" if importlib.util.find_spec("jieba") else "characters"


def chinese_words(text: str) -> list[str]:
    """Words by jieba if it is installed; else every character is a word, but a run of Latin letters or digits is one."""
    if chinese_splitter() == "jieba":
        import jieba

        return [word for word in jieba.cut(text) if word.strip()]
    return _PIECES.findall(text)


def qa_f1_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """`qa_f1` over Chinese words, without the marks that LongBench takes out: of the brackets of titles the closing one only,
    so that the opening one is a word there and here."""

    def words(text: str) -> list[str]:
        bare = ("".join(c for c in word.lower() if c not in _MARKS and not c.isspace()) for word in chinese_words(text))
        return [word for word in bare if word]

    return _f1(words(prediction), words(reference))


def rouge_l_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 / n if the right class is one of the n classes that the answer names; a class that is only a part of the right one's
    name does not count."""
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the paragraph's; reference: 'Paragraph 7'."""
    return _share_of_numbers(prediction, re.findall(r"Paragraph (\d+)", reference)[0])


def retrieval_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    return _share_of_numbers(prediction, re.findall(r"段落(\d+)", reference)[0])


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the right one; reference: '7'."""
    return _share_of_numbers(prediction, str(reference))


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Matching characters, 2 M / T in whole percent, of the first line that is neither comment nor fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _CODE_MARKS)), "")
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER: share of the references that occur in the answer, whatever their case."""
    low = prediction.lower()
    return sum(reference.lower() in low for reference in references) / len(references)


def match_any(prediction: str, references: Sequence[str]) -> float:
    """RULER's question answering: 1 if any of the references occurs in the answer."""
    return float(match_all(prediction, references) > 0)
