"""The made tasks: solvable by reading, of the asked length, the same for the same seed."""

import random
import re

import pytest
import torch
from conftest import user_error

from fastfill.errors import UserError
from fastfill.lab import ruler

ROWS = [{"input": f"q{i} ?", "answers": [f"a{i}"], "context": f"context number {i} says a{i} ."} for i in range(4)]


def rng():
    return random.Random(5)


@pytest.mark.parametrize(
    "task, numbers", [("niah_single", 1), ("niah_multikey", 1), ("niah_multivalue", 4), ("niah_multiquery", 4)]
)
@pytest.mark.parametrize("filler", [[ruler.NOISE], ["One two.", "Three four."]], ids=["noise", "text"])
def test_needles_can_be_found(task, numbers, filler):
    prompt, begin, answers = ruler.needles(rng(), 30, filler, *ruler.NEEDLES[task])
    held = re.findall(r"One of the special magic numbers for ([a-z-]+) is: (\d{7})\.", prompt)
    asked = prompt.rsplit(" for ", 1)[1].split(" mentioned")[0]
    wanted = re.findall(r"[a-z]+-[a-z]+", asked)
    assert len(held) == {"niah_single": 1}.get(task, 4) and len(answers) == numbers
    assert sorted(answers) == sorted(number for name, number in held if name in wanted)
    assert answers == sorted(
        answers, key=lambda number: (wanted.index(dict((n, k) for k, n in held)[number]), prompt.index(number))
    )
    assert asked in begin and prompt.count(filler[0]) == (30 if len(filler) == 1 else 15)
    assert ("is the special magic number for" in prompt) == (numbers == 1)


def test_variables_can_be_tracked():
    prompt, _, answers = ruler.variables(rng(), 30, [ruler.NOISE])
    lines = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", prompt)
    (value,) = re.findall(r"assigned the value (\d{5}) in", prompt)
    known, found = {value}, []
    for name, source in lines:  # in the order of the text
        if source in known:
            known.add(name)
            found.append(name)
    assert found == answers and len(answers) == len(set(answers)) == ruler.HOPS + 1


@pytest.mark.parametrize("size, often, seldom, most", [(10, 3, 1, 1), (50, 6, 1, 1), (200, 30, 3, 3), (1000, 30, 3, 8)])
def test_common_words_can_be_counted(size, often, seldom, most):
    prompt, _, answers = ruler.common_words(rng(), size, often, seldom)
    words = re.findall(r"\d+\. ([a-z]+)", prompt)
    counts = {word: words.count(word) for word in set(words)}
    assert sorted(word for word, n in counts.items() if n == often) == sorted(answers) and len(answers) == ruler.COMMON
    assert max(n for word, n in counts.items() if word not in answers) == most < often
    assert len(words) == 10 * often + size * seldom and answers == sorted(answers, key=words.index)


def test_no_word_is_a_part_of_another():
    assert len(set(ruler.NOUNS)) == len(ruler.NOUNS) > 400
    assert not [a for a in ruler.NOUNS for b in ruler.NOUNS if a != b and a in b]


def test_the_question_has_its_document_among_others():
    prompt, begin, answers = ruler.question(rng(), 6, ROWS)
    documents = re.findall(r"Document \d+:\n(.+)", prompt)
    (row,) = [row for row in ROWS if f"Question: {row['input']}" in prompt]
    assert len(documents) == 7 and documents.count(row["context"]) == 1 and answers == row["answers"] and begin == " Answer:"


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [512, 900])
def test_prompts_fill_the_length_and_leave_room_for_the_answer(tokenizer, task, length):
    made = ruler.examples(tokenizer, 1000, tasks=[task], lengths=[length], count=3, rows=ROWS)
    assert [example.key for example in made] == [f"{task}@{length}/{i}" for i in range(3)]
    for example in made:
        used = example.ids.shape[1] + example.max_new_tokens
        assert length - 40 <= used <= length  # a unit of filler is at most 20 words here
        assert example.score(" ".join(example.answers).upper()) == 1 and example.score("") == 0
    assert len({tuple(example.answers) for example in made}) == 3 or task == "qa"


def test_the_seed_makes_them(tokenizer):
    def made(seed, **more):
        return ruler.examples(tokenizer, 600, lengths=[512], count=2, seed=seed, **more)

    first, again, other = made(0), made(0), made(1)
    assert all(torch.equal(a.ids, b.ids) and a.answers == b.answers for a, b in zip(first, again, strict=True))
    assert all(a.answers != b.answers for a, b in zip(first, other, strict=True))
    # One task's examples do not depend on which others are made, nor on how many.
    (alone,) = ruler.examples(tokenizer, 600, tasks=["vt"], lengths=[512], count=1)
    assert alone.answers == next(e for e in first if e.dataset == "vt@512").answers


def test_lengths_may_be_drawn_from_a_range(tokenizer):
    made = ruler.examples(tokenizer, 1000, tasks=["niah_single", "vt"], lengths=[(400, 900), 512], count=8)
    assert [e.dataset for e in made[::8]] == ["niah_single@400-900", "vt@400-900", "niah_single@512", "vt@512"]
    used = [e.ids.shape[1] + e.max_new_tokens for e in made[:16]]
    assert min(used) >= 360 and max(used) <= 900 and max(used) - min(used) > 200
    again = ruler.examples(tokenizer, 1000, tasks=["vt"], lengths=[(400, 900)], count=3)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(again, made[8:11], strict=True))
    with pytest.raises(UserError, match="fewer than the length 1100"):
        ruler.examples(tokenizer, 1000, lengths=[(400, 1100)])


def test_the_right_answer_as_it_would_be_written(tokenizer):
    assert ruler.written("niah_single", ["1"]) == ["1"]
    assert ruler.written("niah_multikey", ["1", "2", "3"]) == ["1, 2, and 3"]
    assert ruler.written("vt", ["A", "B"]) == ["A B"] and ruler.written("cwe", ["a", "b"]) == ["1. a 2. b"]
    assert ruler.written("qa", ["x", "y"]) == ["x", "y"]
    rows = [{**row, "answers": [f"w{i + 20}", f"w{i + 40}"]} for i, row in enumerate(ROWS)]
    (question,) = ruler.examples(tokenizer, 600, tasks=["qa"], lengths=[300], count=1, rows=rows)
    assert [tokenizer.decode(gold) for gold in question.golds] == list(question.answers)


def test_rows_of_whole_prompts_have_no_documents(tokenizer):
    whole = [{"prompt": "x", "answers": ["y"]}]
    assert {e.dataset for e in ruler.examples(tokenizer, 600, lengths=[512], count=1, rows=whole)} == {
        f"{task}@512" for task in ruler.TASKS if task != "qa"
    }
    with pytest.raises(UserError, match="qa needs --data"):
        ruler.examples(tokenizer, 600, tasks=["qa"], count=1, rows=whole)


def test_scores_are_shares_and_for_questions_any(tokenizer):
    (values,) = ruler.examples(tokenizer, 600, tasks=["niah_multivalue"], lengths=[512], count=1)
    assert values.score(f"They are {values.answers[0]} and {values.answers[2]}.") == 1 / 2
    rows = [{**row, "answers": [f"a{i}", f"b{i}"]} for i, row in enumerate(ROWS)]
    (question,) = ruler.examples(tokenizer, 600, tasks=["qa"], lengths=[512], count=1, rows=rows)
    assert question.score(question.answers[1]) == 1


def test_the_answer_begins_as_in_ruler(tokenizer):
    """The prefix stands behind the chat template's end."""
    (chat,) = ruler.examples(tokenizer, 600, tasks=["qa"], lengths=[300], count=1, rows=ROWS)
    (plain,) = ruler.examples(tokenizer, 600, tasks=["qa"], lengths=[300], count=1, rows=ROWS, chat=False)
    answer = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    turn = tokenizer("w6 w7", add_special_tokens=False)["input_ids"]
    assert chat.ids[0].tolist()[-3:] == [*turn, *answer] and plain.ids[0].tolist()[-1:] == answer
    assert plain.ids[0].tolist()[-3:-1] != turn


def test_the_users_text_hides_the_needles(tokenizer):
    text = " ".join(f"Sentence {i} of w{i}." for i in range(10, 40))
    (example,) = ruler.examples(tokenizer, 600, tasks=["niah_single"], lengths=[400], count=1, haystack=text)
    assert "w12." not in tokenizer.get_vocab() and len(ruler.sentences(text)) == 30 and example.ids.shape[1] <= 400 - 128
    with pytest.raises(UserError, match="haystack is empty"):
        ruler.sentences(" \n")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tasks": ["colours"]}, "no task 'colours'"),
        ({"tasks": ["qa"]}, "qa needs --data"),
        ({"tasks": ["qa"], "rows": ROWS[:1]}, "at least two different"),
        ({"lengths": [601]}, "holds 600 tokens"),
        ({"lengths": [150]}, "no room for niah_single at 150 tokens"),
    ],
)
def test_what_cannot_be_made_is_a_sentence(tokenizer, settings, words):
    with user_error(words):
        ruler.examples(tokenizer, 600, count=1, **settings)
