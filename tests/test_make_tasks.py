"""The rows that benchmarks/make_tasks.py makes: LongBench's format, the answer in the text, the same for the same seed."""

import json
import re

import pytest
from conftest import script

from fastfill.lab import longbench

make_tasks = script("make_tasks")
ARTICLES, PARAGRAPHS = 5, 9


def squad_document():
    """Articles whose paragraphs each hold a name that no other has; one question can be answered and one cannot."""
    data = []
    for a in range(ARTICLES):
        paragraphs = []
        for p in range(PARAGRAPHS):
            name = f"Name{a}x{p}"
            text = f"The keeper is {name}. " + f"Filler {a} {p} of the article. " * 12
            good = {"id": f"{a}-{p}", "question": f"Who keeps {a} {p}?", "answers": [{"text": name}, {"text": name}]}
            bad = {"id": f"{a}-{p}-no", "question": "Who else?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": text, "qas": [{**good, "is_impossible": False}, bad]})
        data.append({"title": f"Title_{a}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": data}


@pytest.fixture
def squad_file(tmp_path):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(squad_document()))
    return file


@pytest.fixture
def modules(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(4):
        lines = [f"def function_{i}_{j}(argument):\n    return other(argument, {j})\n" for j in range(80)]
        doc = f'"""Module {i}: many functions that call\nanother one with a number.\n\nMore about it.\n"""\n\n'
        (folder / f"module{i}.py").write_text("# a comment\n" + doc + "".join(lines))
    (folder / "short.py").write_text("x = 1\n")
    return sorted(folder.glob("*.py"))


@pytest.fixture
def made(squad_file, modules):
    return make_tasks.build(make_tasks.load_squad(squad_file), modules, 6, (3000, 3000), 0)


def test_every_row_is_longbench(made, tmp_path, tokenizer):
    assert set(made) == {"multifieldqa_en", "hotpotqa", "triviaqa", "passage_retrieval_en", "lcc", "gov_report"}
    for dataset, rows in made.items():
        assert len(rows) == (4 if dataset in ("lcc", "gov_report") else 6) and len({row["_id"] for row in rows}) == len(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{dataset}-made.jsonl").write_text(text)
    read = longbench.read([str(f) for f in sorted(tmp_path.glob("*-made.jsonl"))])
    assert {row.label for row in read} == {f"{dataset}:made" for dataset in made} and len(read) == 32
    for row in read:
        assert longbench.score(row, row.fields["answers"][0]) == 1
        assert len(row.fields.get("context", "")) <= 3000 + 200 and len(longbench.prompt_of(row)) < 5000
    assert len(longbench.examples(tokenizer, read, 100_000)) == 32


def test_many_documents(made):
    places = set()
    for row in made["hotpotqa"]:
        (name,) = row["answers"]
        found = re.findall(r"Passage (\d+):\nTitle (\d)\nThe keeper is (\w+)\.", row["context"])
        assert [number for number, _, _ in found] == [str(i) for i in range(1, len(found) + 1)] and len(found) > 4
        places.add([held for _, _, held in found].index(name))
        assert all(held == name or article != name[4] for _, article, held in found)
    assert len(places) > 1


def test_code(made, modules):
    sources = {file.stem: file.read_text() for file in modules}
    for row in made["lcc"]:
        stem, line = row["_id"].rsplit("-", 2)[1:]
        assert sources[stem].startswith(row["context"] + row["answers"][0] + "\n")
        assert row["context"].count("\n") == int(line) - 1 and 1500 <= len(row["context"]) <= 3000
        assert "(" in row["answers"][0] and row["input"] == ""


def test_the_seed_makes_them(squad_file, modules):
    squad = make_tasks.load_squad(squad_file)
    first, again, other = (make_tasks.build(squad, modules, 6, (2400, 3000), seed) for seed in (0, 0, 1))
    assert first == again and all(first[dataset] != other[dataset] for dataset in first)


def test_the_command(squad_file, tmp_path, capsys, monkeypatch, modules):
    monkeypatch.setattr(make_tasks, "library_files", lambda: modules)
    out = tmp_path / "out"
    assert make_tasks.main(["--squad", str(squad_file), "--out", str(out), "--rows", "2", "--characters", "3000"]) == 0
    assert len(list(out.glob("*-made.jsonl"))) == 6 and "hotpotqa" in capsys.readouterr().out
    for text in ("{", "{}", '{"data": [1]}', '{"data": []}'):
        squad_file.write_text(text)
        assert make_tasks.main(["--squad", str(squad_file), "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("make_tasks: ") and len(err.splitlines()) == 1
    for bad in (["--rows", "0"], ["--characters", "1999"], ["--characters", "4000-3000"], ["--characters", "1-2-3"]):
        with pytest.raises(SystemExit):
            make_tasks.main(["--out", str(out), *bad])
