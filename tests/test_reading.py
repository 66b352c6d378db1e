"""Text as people have it, and rows of JSON; what cannot be read is one sentence that begins with the name."""

import codecs
import gzip
import io
import json
import os
import threading
import time

import pytest
from conftest import one_sentence, user_error

from fastfill import data, reading
from fastfill.errors import LONGEST, UserError
from fastfill.lab import longbench

TEXT = "caf\u00e9 \u4e2d\u6587 \U0001f600\nline two\n"
ENCODED = {
    "utf-8": TEXT.encode(),
    "utf-8-sig": TEXT.encode("utf-8-sig"),
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32-le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf-32-be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    "windows line ends": TEXT.replace("\n", "\r\n").encode(),
    "old line ends": TEXT.replace("\n", "\r").encode(),
}
ROW = {"dataset": "hotpotqa", "context": "x", "input": "y", "answers": ["z"]}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", ENCODED)
def test_text_in_every_encoding(tmp_path, name, packed):
    file = tmp_path / "text"
    file.write_bytes(gzip.compress(ENCODED[name]) if packed else ENCODED[name])
    assert reading.text(file) == TEXT


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL", ".NdJson", ".json", ".jsonl.gz", ".json.gz", ".JSON.GZ"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_rows_under_every_name(tmp_path, suffix, encoding):
    rows = [{"text": f"one {TEXT}"}, {"text": "two\u2028still two"}]
    as_list = ".json" in suffix.lower() and "jsonl" not in suffix.lower() and "ndjson" not in suffix.lower()
    written = (
        json.dumps(rows, indent=1, ensure_ascii=False)
        if as_list
        else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    )
    content = written.encode(encoding)
    file = tmp_path / f"news{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.lower().endswith(".gz") else content)
    documents = data.load_documents([str(file)])
    assert [d.text for d in documents] == [row["text"] for row in rows]
    assert [d.source for d in documents] == [f"news{suffix}#0", f"news{suffix}#1"]
    assert [d.text for d in data.load_documents([f"{file}[1:]"])] == [rows[1]["text"]]


def test_json_of_one_object_and_of_lines(tmp_path):
    one, lines = tmp_path / "one.json", tmp_path / "lines.json"
    one.write_text(json.dumps({"text": "alone"}, indent=2))
    lines.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [d.text for d in data.load_documents([str(one), str(lines)])] == ["alone", "a", "b"]


def test_longbench_files_are_read_alike(tmp_path):
    for name in ("hotpotqa.JSONL", "qasper.jsonl.gz", "qasper_e.ndjson", "musique.json"):
        content = json.dumps({**ROW, "dataset": name.split(".")[0], "context": "cut \ud83d here"}).encode("utf-8-sig")
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = longbench.read([str(tmp_path), str(tmp_path / "musique.json")])
    assert sorted(row.label for row in rows) == ["hotpotqa", "musique", "qasper"]  # of a folder no _e beside the same dataset
    assert {row.fields["context"] for row in rows} == {"cut \ufffd here"}


def test_halves_of_surrogate_pairs_are_replaced(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "cut \\ud83d here, whole \\ud83d\\ude00"}\n')
    assert data.load_documents([str(file)])[0].text == "cut \ufffd here, whole \U0001f600"
    assert reading.whole({"\ud800": ["\udfff", 1, None]}) == {"\ufffd": ["\ufffd", 1, None]}


CHAT = [{"role": "user", "content": "w9 w10"}, {"role": "assistant", "content": [{"type": "text", "text": "w11"}]}]


def test_chats_go_through_the_template(tmp_path, tokenizer):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    (document,) = data.load_documents([str(file)])
    assert document.text == "w9 w10\n\nw11"
    expected = tokenizer("w5 w9 w10 w6 w5 w11 w6 w7", add_special_tokens=False)["input_ids"]
    assert data.encode(tokenizer, document) == expected
    bare = data.Document(document.text, "a")
    assert data.encode(tokenizer, bare) == tokenizer("w9 w10 w11")["input_ids"] != expected


def test_a_chat_that_the_template_refuses_is_one_sentence(tokenizer):
    class Strict:
        chat_template = "x"

        def apply_chat_template(self, *_args, **_kwargs):
            raise RuntimeError("roles must alternate\nand so on")

    with user_error(r"chat.jsonl#4 does not fit the model's chat template: roles must alternate"):
        data.encode(Strict(), data.Document("a", "chat.jsonl#4", (("user", "a"),)))


def test_pieces_change_nothing_and_only_what_is_needed_is_read(tokenizer, monkeypatch):
    text = " ".join(f"w{4 + i % 100}" for i in range(500))
    whole = data.encode(tokenizer, data.Document(text, "a"))
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 64)
    pieces = list(data._pieces(text))
    assert "".join(pieces) == text and len(pieces) > 20 and max(map(len, pieces)) <= 64
    assert data.encode(tokenizer, data.Document(text, "a")) == whole
    begin = data.encode(tokenizer, data.Document(text, "a"), 10)
    assert whole[:10] == begin[:10] and len(begin) < 64
    assert list(data._pieces("x" * 130)) == ["x" * 64, "x" * 64, "xx"]


BAD = {
    "nested.jsonl": (b"[" * 100_000 + b"]" * 100_000, "line 1 is not JSON that can be read .nested too deeply"),
    "digits.jsonl": (b'{"text": "a"}\n{"text": ' + b"1" * 6000 + b"}\n", "line 2 is not JSON .*a number of too"),
    "nested.json": (b'{"a":' * 50_000, "nested.json is not JSON that can be read .nested too deeply"),
    "scalar.json": (b"5", "row 1 has neither"),
    "mixed.json": (b'[{"text": "a"}, 5]', "row 2 has neither"),
    "cut.json": (b'[{"text": "a"},', "cut.json is not JSON"),
    "empty.txt": (b" \n\n", "holds no text"),
    "empty.jsonl": (b'\n{"text": "  "}\n', "holds no text"),
    "broken.jsonl": (b'{"text": "good"}\n{"text": ', "line 2 is not JSON"),
    "other.jsonl": (b'{"body": "x"}\n', "line 1 has neither"),
    "number.jsonl": (b'{"text": 5}\n', "line 1 has neither"),
    "missing.txt": (None, "cannot be read: No such file"),
    "missing.jsonl": (None, "cannot be read: No such file"),
    "roles.jsonl": (b'{"messages": [{"content": "a"}]}', "line 1 has neither"),
    "images.jsonl": (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1 has neither"),
    "latin.txt": ("caf\u00e9 ".encode("latin-1") * 50, "not UTF-8"),
    "bare16.txt": ("plain words ".encode("utf-16-le") * 50, "not UTF-8"),
    "odd16.txt": (codecs.BOM_UTF16_LE + b"abc", "not UTF-8"),
    "cut.txt.gz": (gzip.compress(TEXT.encode() * 100)[:-20], "cannot be read"),
    "flipped.txt.gz": (gzip.compress(b"a")[:-6] + b"\1\1\1\1\1\1", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_sentence(tmp_path, name):
    content, words = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        data.load_documents([str(tmp_path / name)])
    assert name in one_sentence(error)


def test_sizes_are_bounded_before_unpacking(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_bytes(b"a" * 1001)
    with pytest.raises(UserError, match=r"a.txt holds more than"):
        reading.text(file, most=1000)
    assert len(reading.text(file, most=1001)) == 1001
    monkeypatch.setattr(reading, "_LEAST_UNPACKED", 1 << 10)
    file.write_bytes(gzip.compress(b"a" * 10**6))  # a thousandth
    with pytest.raises(UserError, match=r"a.txt holds more than"):
        reading.text(file)


def test_standard_input(monkeypatch):
    class Stream:
        def __init__(self, content):
            self.buffer = io.BytesIO(content)

    monkeypatch.setattr("sys.stdin", Stream(TEXT.encode("utf-8-sig")))
    assert reading.text("-") == TEXT
    monkeypatch.setattr("sys.stdin", Stream(b"caf\xe9"))
    with pytest.raises(UserError, match=r"Standard input cannot be read: it is not UTF-8"):
        reading.text("-")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="Standard input is closed"):
        reading.text("-")


@pytest.mark.parametrize("name", ["a\0b.txt", "x" * 5000 + ".jsonl", "[" + "9" * 5000 + ":].txt"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError) as error:
        data.load_documents([name])
    assert len(one_sentence(error)) <= LONGEST


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_read_to_their_end_and_never_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert reading.text(pipe) == ""
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # so that the writer can open
    writer = os.open(pipe, os.O_WRONLY)
    thread = threading.Thread(target=lambda: (time.sleep(0.2), os.write(writer, b"late"), os.close(writer)))
    thread.start()
    assert reading.text(pipe) == "late"
    thread.join()
    os.close(reader)
