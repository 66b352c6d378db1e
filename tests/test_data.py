import json

import pytest
import torch
from conftest import tiny_text, user_error

from fastfill import data
from fastfill.errors import UserError


@pytest.fixture
def news(tmp_path):
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(10, 20)]
    file = tmp_path / "news.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file


def texts(*sources):
    return [d.text for d in data.load_documents([str(s) for s in sources])]


@pytest.mark.parametrize(
    "window, rows", [("[2:5]", [2, 3, 4]), ("[8:]", [8, 9]), ("[:2]", [0, 1]), ("[-2:]", [8, 9]), ("[:]", list(range(10)))]
)
def test_a_slice_of_documents(news, window, rows):
    assert [d.source for d in data.load_documents([f"{news}{window}"])] == [f"news.jsonl#{i}" for i in rows]


def test_rows_of_longbench(tmp_path):
    file = tmp_path / "bench.jsonl"
    file.write_text(
        json.dumps({"context": "the text", "input": "a question"}) + "\n" + json.dumps({"context": "bare", "input": ""})
    )
    assert texts(file) == ["the text\n\na question", "bare"]


def test_txt_is_cut_into_documents_at_line_ends(tmp_path):
    file = tmp_path / "book.txt"
    lines = [f"line {i} " + "x" * 90 + "\n" for i in range(300)]
    file.write_text("".join(lines))
    documents = data.load_documents([str(file)])
    assert "".join(d.text for d in documents) == "".join(lines)
    assert len(documents) == 3 and all(d.text.endswith("\n") for d in documents)
    assert all(data.TXT_DOCUMENT_CHARACTERS <= len(d.text) < data.TXT_DOCUMENT_CHARACTERS + 100 for d in documents[:-1])


def test_several_sources_in_order(news, tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    assert texts(tmp_path / "a.txt", f"{news}[:1]") == ["alpha", "w10 w11 w12"]


def test_a_name_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with user_error("There is no file|could not be loaded"):
        data.load_documents(["no_such_dataset"])


def test_a_slice_with_nothing_in_it(news):
    with pytest.raises(UserError, match="holds no text"):
        data.load_documents([f"{news}[50:]"])


def test_a_slice_without_numbers_is_part_of_the_name(news):
    with pytest.raises(UserError, match="cannot be read"):
        data.load_documents([f"{news}[-:5].jsonl"])
    assert data.split_slice("a[-:5]") == ("a[-:5]", slice(None))


def documents_of(*counts):
    return [data.Document(tiny_text(n, seed=n), f"doc#{n}") for n in counts]


def test_sequences_cover_whole_documents_and_shuffle_by_seed(tokenizer):
    documents = documents_of(100, 64, 31)
    found, owners = data.sequences(tokenizer, documents, 32, seed=0)
    expected = [
        tokenizer(d.text)["input_ids"][i : i + 32]
        for d, starts in zip(documents, ((0, 32, 64), (0, 32), ()), strict=True)
        for i in starts
    ]
    assert found.dtype == torch.long and sorted(found.tolist()) == sorted(expected)
    assert torch.equal(found, data.sequences(tokenizer, documents, 32, seed=0)[0])
    assert found.tolist() != data.sequences(tokenizer, documents, 32, seed=1)[0].tolist()
    for row, document in zip(found.tolist(), owners, strict=True):
        assert any(tokenizer(document.text)["input_ids"][i : i + 32] == row for i in (0, 32, 64))


def test_data_too_short_for_calibration(tokenizer):
    with user_error(r"too short: no document has 65 tokens"):
        data.sequences(tokenizer, documents_of(64, 10), 65, seed=0)


def test_first_tokens(tokenizer):
    documents = documents_of(40, 10, 50, 60)
    found = data.first_tokens(tokenizer, documents, 32, None)
    assert [source for source, _ in found] == ["doc#40", "doc#50", "doc#60"]
    assert found[0][1].tolist() == tokenizer(documents[0].text)["input_ids"][:32]
    assert len(data.first_tokens(tokenizer, documents, 32, 2)) == 2
    with pytest.raises(UserError, match="no document has 61 tokens"):
        data.first_tokens(tokenizer, documents, 61, None)


def test_digest_names_the_tokens():
    one = torch.arange(12).view(3, 4)
    assert data.digest(one) == data.digest(one.int()) == data.digest(one.T.contiguous().T)
    assert data.digest(one) != data.digest(one.flip(0))
