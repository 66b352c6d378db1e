"""LongBench's files, prompts, truncation and rules."""

import json

import pytest
import torch
from conftest import tiny_text, user_error

from fastfill.engines import transformers as engine
from fastfill.errors import UserError
from fastfill.lab import longbench, metrics


def fields(dataset="hotpotqa", index=0, **changes):
    own = {"passage_retrieval_en": ["Paragraph 3"], "passage_retrieval_zh": ["段落3"], "passage_count": ["7"]}
    answers = own.get(dataset, ["w9", "w10 w11"])
    row = {
        "input": tiny_text(5, seed=90 + index),
        "context": tiny_text(80, seed=index),
        "answers": answers,
        "length": 85,
        "dataset": dataset,
        "language": "en",
        "all_classes": ["w9", "w10"] if dataset in ("trec", "lsht") else None,
        "_id": f"{dataset}-{index}",
    }
    return {**row, **changes}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(dataset="hotpotqa", **changes):
    return longbench.Row(dataset, dataset, "f#0", fields(dataset, **changes))


def whole_prompt(dataset="hotpotqa", **changes):
    """A row as in MiniLongBench."""
    wanted = ("answers", "dataset", "language", "all_classes", "_id")
    row = {key: value for key, value in fields(dataset).items() if key in wanted}
    return longbench.Row(dataset, dataset, "f#0", {**row, "prompt": tiny_text(60, seed=4), **changes})


def test_files_folders_slices_limits_and_suffixes(tmp_path):
    write(tmp_path / "hotpotqa.jsonl", [fields(index=i) for i in range(5)])
    write(tmp_path / "lcc_e.jsonl", [fields("lcc_e", i) for i in range(2)])
    write(tmp_path / "made.jsonl", [fields("trec:made", 0, all_classes=["w9"])])
    write(tmp_path / "lsht.jsonl", [fields("lsht", 0)])
    rows = longbench.read([str(tmp_path)])
    assert [row.label for row in rows] == ["hotpotqa"] * 5 + ["lcc_e"] * 2 + ["trec:made"]  # lsht is Chinese
    assert [row.dataset for row in rows][-3:] == ["lcc", "lcc", "trec"]
    sliced = longbench.read([f"{tmp_path}/hotpotqa.jsonl[1:4]"], limit=2)
    assert [row.source for row in sliced] == ["hotpotqa.jsonl#1", "hotpotqa.jsonl#2"]
    assert [row.label for row in longbench.read([str(tmp_path)], ["lsht", "trec"])] == ["lsht", "trec:made"]


def test_longbench_e_is_another_set(tmp_path):
    """data.zip has qasper.jsonl and qasper_e.jsonl, in which rows (and what they call themselves) are partly the same."""
    write(tmp_path / "qasper.jsonl", [fields("qasper", i) for i in range(3)])
    write(tmp_path / "qasper_e.jsonl", [fields("qasper", i) for i in range(2)])
    write(tmp_path / "lcc_e.jsonl", [fields("lcc", 0)])
    rows = longbench.read([str(tmp_path)])
    assert [row.label for row in rows] == ["lcc_e", "qasper", "qasper", "qasper"]
    named = longbench.read([str(tmp_path / "qasper_e.jsonl"), str(tmp_path / "qasper.jsonl")])
    assert [row.label for row in named] == ["qasper_e"] * 2 + ["qasper"] * 3
    assert {row.dataset for row in named} == {"qasper"}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        (json.dumps({**fields(), "dataset": "colours"}), "no LongBench dataset"),
        (json.dumps({**fields(), "answers": "w9"}), "a list of texts `answers`"),
        (json.dumps({**fields(), "answers": []}), "a list of texts `answers`"),
        (json.dumps({k: v for k, v in fields().items() if k != "context"}), "needs `context`"),
        (json.dumps({**fields("trec"), "all_classes": None}), "all_classes"),
        (json.dumps({**fields(), "prompt": 3}), "or a `prompt`"),
        (json.dumps({**fields(), "prompt": " "}), "or a `prompt`"),
        (json.dumps({**fields(), "max_new_tokens": 0}), "`max_new_tokens` must be"),
        (json.dumps({**fields(), "max_new_tokens": "8"}), "`max_new_tokens` must be"),
        (json.dumps({**fields(), "dataset": "hotpotqa:\x1b[31m"}), "no LongBench dataset"),
        (json.dumps({**fields(), "dataset": "x" * 999}), "no LongBench dataset"),
        (json.dumps({**fields("passage_retrieval_en"), "answers": ["3"]}), "Paragraph 7"),
        ("", "no rows of the wanted datasets"),
        (json.dumps(fields("lsht")), "no rows of the wanted datasets"),
    ],
)
def test_bad_rows_are_a_sentence(tmp_path, content, words):
    (tmp_path / "hotpotqa.jsonl").write_text(content, encoding="utf-8")
    with user_error(words.replace("[", r"\[")):
        longbench.read([str(tmp_path / "hotpotqa.jsonl")])


def test_bad_names_are_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, datasets, words in [
        (tmp_path / "none.jsonl", None, "cannot be read"),
        (tmp_path / "empty", None, "no .jsonl files"),
        (tmp_path / "empty", ["colours"], "has no dataset 'colours'"),
        (write(tmp_path / "a.jsonl", [fields()]), ["lcc"], "no rows of lcc; it has hotpotqa"),
    ]:
        with user_error(words):
            longbench.read([str(source)], datasets)


def test_braces_in_the_text_stay(tokenizer):
    row = one(context="{input} {context} {x}", input="{context}")
    prompt = longbench._fill("c: {context} q: {input}", row.fields)
    assert prompt == "c: {input} {context} {x} q: {context}"


def test_truncation_keeps_both_ends(tokenizer):
    text = " ".join(f"w{i}" for i in range(10, 60))
    short, cut = longbench.cut_middle(tokenizer, text, 21)  # halves of 10, as in LongBench
    assert cut and short.replace("w50", " w50", 1).split() == [f"w{i}" for i in [*range(10, 20), *range(50, 60)]]
    assert longbench.cut_middle(tokenizer, text, 50) == (text, False)


class Letters:
    """Every character is a token, and nothing changes on the way back."""

    chat_template = None

    def __call__(self, text, return_tensors=None, **_):
        ids = [ord(letter) for letter in text]
        return {"input_ids": ids if return_tensors is None else torch.tensor([ids])}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("tokens", [2, 100, 1536, 1537, 2048, 8192])
def test_the_cut_is_exact(tokens):
    """LongBench: the first and the last int(N / 2) tokens of the whole prompt, wording and all."""
    text = "".join(chr(200 + i % 5000) for i in range(9000))
    for row in (whole_prompt("lcc", prompt=text), one("lcc", context=text)):
        whole = longbench.prompt_of(row)
        ids, cut = longbench.encode(Letters(), row, tokens)
        half = int(tokens / 2)
        assert cut and "".join(map(chr, ids[0].tolist())) == whole[:half] + whole[-half:]
    row = whole_prompt("lcc", prompt=text[:tokens])
    ids, cut = longbench.encode(Letters(), row, tokens)
    assert not cut and ids.shape[1] == tokens


@pytest.mark.parametrize("dataset, chat", [("hotpotqa", True), ("lcc", False)])
def test_prompts_fit_and_use_the_chat_template_where_longbench_does(tokenizer, dataset, chat):
    row = one(dataset)
    whole, cut = longbench.encode(tokenizer, row, 500)
    text = longbench._fill(longbench.prompts()[dataset], row.fields)
    assert not cut and torch.equal(whole, engine.encode(tokenizer, text, chat))
    assert torch.equal(longbench.encode(tokenizer, row, 500, chat=False)[0], engine.encode(tokenizer, text, False))
    short, cut = longbench.encode(tokenizer, row, 60)
    assert cut and 10 < short.shape[1] <= 60  # this tokenizer drops its many unknown words where it decodes
    template = tokenizer("w5")["input_ids"][-1]
    assert (short[0, 0] == template) == chat  # the template is never cut
    with pytest.raises(UserError, match="cannot be cut to 1 tokens"):
        longbench.encode(tokenizer, row, 1)


def test_examples_leave_room_for_the_answer(tokenizer):
    (example,) = longbench.examples(tokenizer, [one()], 100)
    assert example.max_new_tokens == 32 and example.ids.shape[1] <= 68 and example.cut
    (example,) = longbench.examples(tokenizer, [one()], 500, max_prompt_tokens=40, max_new_tokens=8)
    assert example.max_new_tokens == 8 and example.ids.shape[1] <= 40
    with pytest.raises(UserError, match="twice"):
        longbench.examples(tokenizer, [one(), one()], 500)


@pytest.mark.parametrize("dataset", longbench.RULES)
def test_whole_prompts_are_taken_as_they_are(tmp_path, tokenizer, dataset):
    row = whole_prompt(dataset)
    (read,) = longbench.read([str(write(tmp_path / "mini.jsonl", [row.fields]))], [longbench.ALL])
    assert (read.dataset, read.label, read.fields) == (dataset, dataset, row.fields)
    (example,) = longbench.examples(tokenizer, [read], 1000)
    chat = longbench.RULES[dataset].chat
    assert torch.equal(example.ids, engine.encode(tokenizer, row.fields["prompt"], chat)) and example.name == f"{dataset}-0"
    assert example.score(row.fields["answers"][0]) == pytest.approx(1)


def test_the_right_answers_tokens(tokenizer):
    """As they follow the prompt, no more than an answer may have, whatever is written."""
    (example,) = longbench.examples(tokenizer, [one(answers=["w9 w10", "w11", "w9 w10"])], 500, max_new_tokens=1)
    assert [gold.tolist() for gold in example.golds] == [[9, 10], [11]] and example.max_new_tokens == 1
    long = one("hotpotqa", answers=[tiny_text(40)])
    (example,) = longbench.examples(tokenizer, [long], 500)
    assert len(example.golds[0]) == example.max_new_tokens == 32
    (example,) = longbench.examples(tokenizer, [one("multi_news", max_new_tokens=7, answers=[tiny_text(40)])], 500)
    assert len(example.golds[0]) == example.max_new_tokens == 7
    (example,) = longbench.examples(Letters(), [whole_prompt("trec", prompt="Question: x\nType:", answers=["City"])], 500)
    assert "".join(map(chr, example.golds[0].tolist())) == " City"
    (example,) = longbench.examples(Letters(), [one("lcc", answers=["    return x"])], 500)
    assert "".join(map(chr, example.golds[0].tolist())) == "    return x"


def test_the_answer_fits_behind_the_prompt():
    """Also where the written one is kept short: the right one is read to its end."""
    (example,) = longbench.examples(Letters(), [one(answers=[tiny_text(40)])], 100, max_new_tokens=1, chat=False)
    assert (example.ids.shape[1], len(example.golds[0]), example.max_new_tokens) == (100 - 32, 32, 1)


def test_the_best_reference_counts():
    assert longbench.score(one(answers=["blue", "red sky"]), "Red") == pytest.approx(2 / 3)


def test_only_the_first_line_of_few_shot_answers_counts():
    text = "\n\nParis\nQuestion: and more"
    assert longbench.score(one("triviaqa", answers=["Paris"]), text) == 1
    assert longbench.score(one("hotpotqa", answers=["Paris"]), text) == pytest.approx(2 / 5)
    assert longbench.score(one("trec", answers=["City"], all_classes=["City", "Town"]), "City\nTown") == 1


@pytest.mark.parametrize("dataset", longbench.RULES)
def test_the_reference_itself_scores_one(dataset, monkeypatch):
    monkeypatch.setattr(metrics, "chinese_splitter", lambda: "characters")
    row = one(dataset)
    assert longbench.score(row, row.fields["answers"][0]) == pytest.approx(1)
    assert longbench.score(row, "") == 0
