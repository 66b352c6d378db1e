"""Sequences of numbered passages: every answer in them is right."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import tiny_text, user_error

from fastfill.calibration import passages

DOCUMENTS = [tiny_text(400, seed=s) for s in range(4)]
NUMBER = r"(?:Passage |\[|Section |Document |Item )?(\d+)[\].]?"


class Words:
    """A tokenizer that loses nothing: a token is a word with the space behind it."""

    def __init__(self):
        self.known = []

    def __call__(self, text, verbose=True):
        words = re.findall(r"\S+\s*|\s+", text)
        self.known += [word for word in words if word not in self.known]
        return {"input_ids": [self.known.index(word) for word in words]}

    def decode(self, ids):
        return "".join(self.known[i] for i in ids)


def texts(length=600, count=30, answer=0.25, seed=0):
    words = Words()
    rows = passages.sequences(words, DOCUMENTS, length, count, answer, seed)
    assert rows.shape == (count, length) and rows.dtype == torch.long
    return [words.decode(row) for row in rows.tolist()]


def parts(text):
    """number -> words of the passage, and the questions with their answers, the last one left out: it may be cut."""
    begin = min(found.start() for found in re.finditer(r"\n\n(?:Which of them|How does)", text))
    found = {}
    for part in text[:begin].split("\n\n"):
        number, words = re.fullmatch(NUMBER + r"(?: -|:)?\s(.*)", part).groups()
        found[int(number)] = words.split()
    return found, re.findall(r"((?:Which of them|How does) .*?)\nAnswer: (.*?)\n\n", text[begin:])


def number(text):
    return int(re.fullmatch(NUMBER, text)[1])


def test_every_answer_is_right():
    kinds = set()
    for text in texts():
        found, asked = parts(text)
        assert list(found) == list(range(1, len(found) + 1)) and len(found) > 3 and len(asked) > 2
        for question, answer in asked:
            if quoted := re.fullmatch(r'Which of them has the words "(.*)"\?', question):
                assert [n for n, words in found.items() if f" {quoted[1]} " in f" {' '.join(words)} "] == [number(answer)]
            elif about := re.fullmatch(r"Which of them is about (.*)\?", question):
                assert [n for n, words in found.items() if set(about[1].split(", ")) <= set(words)] == [number(answer)]
            else:
                of = number(re.fullmatch(r"How does (.*) begin\?", question)[1])
                assert found[of][: len(answer.split())] == answer.split()
            kinds.add(question[:16])
    assert {"Which of them ha", "Which of them is"} < kinds


def test_what_asks_is_the_answers_share_and_little_more():
    for share in (0.25, 0.5):
        words = Words()
        for row in passages.sequences(words, DOCUMENTS, 600, 20, share, 0).tolist():
            before = re.split(r"(?:Which of them|How does)", words.decode(row))[0]
            tokens = len(words(before)["input_ids"])
            assert 600 * (1 - share) - passages.WORDS[1] - 3 <= tokens <= 600 * (1 - share)


def test_the_seed_alone_decides():
    assert texts(seed=1) == texts(seed=1) != texts(seed=2)


def test_every_process_makes_the_same():
    """A checkpoint is resumed by another process, and several share the work."""
    code = "import sys, test_passages; sys.stdout.write(''.join(test_passages.texts(count=5)))"
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1] and "Which of them is about" in found[0]


@pytest.mark.parametrize("documents", [[], DOCUMENTS[:1], ["a few words"] * 500], ids=["none", "one", "short"])
def test_too_little_text_is_refused(documents):
    with user_error("too short to make sequences of numbered passages"):
        passages.sequences(Words(), documents, 600, 5, 0.25, 0)


def test_a_sequence_without_room_is_refused():
    with user_error("sequences that hold several passages"):
        passages.sequences(Words(), DOCUMENTS, 24, 5, 0.25, 0)
