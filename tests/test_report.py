"""fastfill report: tables and captions hold the numbers of the results, and nothing in a file does harm."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import report_documents as documents
from conftest import one_sentence, snapshot, tiny_artifact, tiny_model, user_error

from fastfill import artifact as artifacts
from fastfill import cli
from fastfill.errors import UserError
from fastfill.lab import report
from fastfill.lab.report import layers, page, quality, runs, speed
from fastfill.lab.report.values import distinct, number

pytest.importorskip("matplotlib")
HARMFUL = "<script>alert('x')</script>\"'&]]>--><!-- \x00\x1b\ud800 $\\frac{1}"
BAD = (None, math.nan, "text", -1e300, 0)


def cells(table: Any, title: str) -> list[str]:
    return [row[list(table.columns).index(title)] for row in table.rows]


def test_ttft_table() -> None:
    document = documents.bench()
    rows, (table, others) = document["rows"], speed.ttft_tables([document])
    assert cells(table, "prompt tokens") == ["128", "256", "512", "1,024", "2,048", "4,096"]
    for title, key in (("sparse TTFT (s)", "ttft_sparse_s"), ("TTFT, all neurons kept (s)", "ttft_all_neurons_s")):
        assert [float(c) for c in cells(table, title)] == pytest.approx([row[key] for row in rows], rel=1e-3)  # 4 digits
    assert cells(table, "speed-up") == ["all dense", *(f"{row['speedup']:.2f}x" for row in rows[1:])]
    assert cells(table, "FFN time, all kept / dense") == ["0.9"] * 6
    assert others.rows[-1] == ["onnxruntime", "-", "skipped: not installed"]
    assert "onnxruntime" not in speed.ttft([document])  # nothing to draw


BENCH, PARETO, READINGS = documents.bench(), documents.pareto(), [documents.perplexity(name) for name in ("learned", "oracle")]
KERNEL, LOSS = documents.kernel(), READINGS[0]["curve"][1]["nll_sparse"]
ROWS = {  # of tables: (the first, which row, what it begins with)
    "split": (speed.split_tables(BENCH), 11, ["4,096 tokens, sparse"]),
    "demo": (speed.bars_tables(documents.demo()), 0, ["time to first token (s)", "3.201", "2.776"]),
    "curve": (quality.curve_tables(READINGS), 1, ["256 to 511", "2,048", "2.89", f"{LOSS:.4g}"]),
    "recall": (layers.recall_tables([documents.recall()]), 0, ["0", "1,243", "86.0%", "80.9%", "90.0%", "96.0%", "93.8%"]),
    "kernel": (speed.kernel_tables(KERNEL), 0, ["576 x 1,536, bfloat16, blocks of 16", f"{KERNEL[0]['speedup']:.2f}x"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_tables(name: str) -> None:
    tables, index, begin = ROWS[name]
    assert tables[0].rows[index][: len(begin)] == begin


def test_pareto_table_and_caption() -> None:
    (table,) = quality.pareto_tables(PARETO)
    assert cells(table, "strict ratio") == [f"{row['ppl_ratio']:.2f}x" for row in PARETO["rows"]]
    assert cells(table, "TTFT (s)")[2] == "-"  # the oracle has no speed of its own
    assert "At 50% sparsity and 1,024 tokens" in quality.pareto_caption(PARETO)


def test_ttft_caption_names_gain_and_losses() -> None:
    keys = ("prompt_tokens", "ttft_dense_s", "ttft_sparse_s", "speedup", "ceiling", "sparse_tokens")
    given = ((512, 0.4, 0.5, 0.8, 1.2, 448), (2048, 3.0, 2.5, 1.2, 1.25, 1984), (128, 0.1, 0.05, 2.0, 1.2, 0))
    rows = [dict(zip(keys, values, strict=True)) for values in given]
    # The prompt that stayed dense is no gain; a row without rounds counted its 64 dense tokens: 1 / (1 - 1984 / 2048 * 0.2).
    assert "2,048 tokens, 3.00 s to 2.50 s (1.20x, ceiling 1.24x); sparse is slower at 512." in speed.ttft_caption(
        [{"rows": rows}]
    )
    assert "slower at every length (at best 0.80x)" in speed.ttft_caption([{"rows": rows[:1]}])


@pytest.mark.parametrize("kind", ["peers", "selection"])
def test_rows_are_sorted_by_what_they_lose(kind: str) -> None:
    if kind == "peers":
        rows, (table,) = documents.peers()["rows"], quality.peers_tables(documents.peers())
        svg, shown = quality.peers(documents.peers()), cells(table, "strict ratio")
    else:
        rows = [documents.perplexity(name) for name in documents.PICKS_BY]
        (table,) = quality.selection_tables(rows)
        svg, shown = quality.selection(rows), cells(table, "ratio")
    assert ">dense<" not in svg  # it loses nothing, by definition
    assert kind != "peers" or "an oracle reaches 1.26x" in quality.peers_caption(documents.peers())  # apart from the others
    ratios = sorted(row["ppl_ratio"] for row in rows if row["ppl_ratio"] and row.get("method") != "dense")
    assert [cell for cell in shown if cell not in ("-", "1.00x")] == [f"{ratio:.2f}x" for ratio in ratios]


def test_a_row_on_other_text_says_which() -> None:
    news, code = [f"news.jsonl#{i}" for i in range(3)], ["pickle.py#0", "random.py#0"]
    texts = [("learned", news), ("static", news), ("learned", code)]
    rows = [{**documents.perplexity(name), "sources": sources} for name, sources in texts]
    told = quality.selection_caption(rows)
    assert "learned, pickle.py and 1 more" in told and "learned 1" in told and "news" not in told


def test_recovery_with_a_dataset_that_has_none() -> None:
    document = documents.recovery("longbench")
    svg = quality.recovery(document)
    assert svg.count("no recovery: the dense score is 0") == 1
    (table,) = quality.recovery_tables(document)
    assert table.rows[4] == ["lcc", "20", "0", "0", "-", "-"]
    assert table.rows[0] == ["narrativeqa", "20", "20", "19.6", "98.0%", "90.0% to 105.0%"]
    only = {**document, "datasets": document["datasets"][-1:]}
    assert "no recovery" in quality.recovery_caption(only) and "no recovery" in quality.recovery(only)


def test_picks_and_maps_by_hand() -> None:
    """Two layers of five neurons, three blocks that keep two."""
    bits = [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 1, 1, 0, 0]]
    blocks = [base64.b64encode(np.packbits(np.array(row, np.uint8)).tobytes()).decode() for row in bits]
    document = {"neurons": 5, "kept": [2, 2], "share": [[1.0, 0.5, 0.0]] * 2, "overlap": [0.5, 0.25], "blocks": 3}
    document["maps"] = [{"layer": 1, "blocks": blocks}]
    np.testing.assert_array_equal(layers.picked(blocks, 5), np.array(bits, bool))
    assert layers.maps_tables(document)[0].rows == [["1", "3", "2", "2", "1", "4"]]
    assert layers.picks_tables(document)[0].rows[1] == ["1", "2", "33.3%", "33.3%", "25.0%", "40.0%"]
    for broken in ([*blocks[:1], "AAAA"], ["?"], [3], None):
        with user_error("neuron map"):
            layers.maps({**document, "maps": [{"layer": 0, "blocks": broken}]})


def drawn(found: list[dict[str, Any]]) -> tuple[list[page.Drawn], list[str]]:
    return page.figures([runs.Run(runs._kind(document, "test"), "test.json", document) for document in found])


def test_every_colour_is_a_variable_and_every_id_is_the_figures_own() -> None:
    figures, missing = drawn(documents.everything())
    assert (
        not missing and len({figure.name for figure in figures}) == len(figures) == len(page.FIGURES) + 1
    )  # two benches split
    seen: set[str] = set()
    for figure in figures:
        root = ElementTree.fromstring(figure.svg)
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", figure.svg), figure.name  # colours are variables: two schemes
        assert root.get("role") == "img" and root[0].tag.endswith("title") and root[1].tag.endswith("desc")
        assert root.get("aria-labelledby") == f"{root[0].get('id')} {root[1].get('id')}"
        assert root[1].text == figure.caption
        ids = {e.get("id") for e in root.iter() if e.get("id")}
        assert len(ids) == sum(e.get("id") is not None for e in root.iter()) and not ids & seen
        assert set(re.findall(r"url\(#([^)]+)\)", figure.svg)) <= ids, figure.name
        seen |= ids


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:12])
def test_no_number_crashes_it(bad: Any) -> None:
    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, key) for v in value]
        return bad if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("neurons",) else value

    figures, missing = drawn([spoil(document) for document in documents.one_of_each()])
    assert not missing
    for figure in figures:
        words = [figure.caption, *(cell for table in figure.tables for row in table.rows for cell in row)]
        assert not re.search(r"\b(nan|inf|None)\b", " ".join(words)), figure.name
        assert not re.search(r"[\s\"](nan|inf)\b", re.sub("<image[^>]*>", "", figure.svg)), figure.name


def test_what_is_a_number() -> None:
    assert [number(value) for value in (3, -0.5, 0)] == [3.0, -0.5, 0.0]
    assert all(math.isnan(number(value)) for value in (None, math.nan, math.inf, -math.inf, "3", True, [], 10**400))


@pytest.mark.parametrize("seed", range(3))
def test_holes_anywhere_are_refused_or_left_out(seed: int) -> None:
    """A third of all values are missing: a page, or one sentence."""
    rng = random.Random(seed)

    def holes(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: holes(v) for k, v in value.items() if k == "task" or rng.random() > 0.3}
        if isinstance(value, list):
            return [holes(v) for v in value if rng.random() > 0.1]
        return value

    ends = set()
    for document in documents.one_of_each():
        try:
            figures, missing = drawn([holes(document)])
            assert figures or missing
            ends.add("drawn")
        except UserError as error:
            one_sentence(error)
            ends.add("refused")
    assert ends == {"drawn", "refused"}  # both ways were taken


class Tags(HTMLParser):
    def __init__(self, content: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    def harm(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: harm(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return value if key == "blocks" else [harm(v) for v in value]
        return HARMFUL if isinstance(value, str) and key not in ("task", "method", "predictor") else value

    found = [harm(document) for document in documents.everything()]
    for document in found:
        for row in document.get("rows", []):
            row["method"] = HARMFUL + str(row.get("method", ""))
    file = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in found))
    report.write([file], tmp_path / "report.html", tmp_path / "svg")
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags(content).found
    assert [tag for tag, _ in tags].count("script") == 1 and "img" not in [tag for tag, _ in tags]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(" in content
    for svg in (tmp_path / "svg").iterdir():
        assert not [e for e in ElementTree.parse(svg).iter() if e.tag.endswith("script")]


def test_page_has_its_parts_in_order(tmp_path: Path) -> None:
    store(tmp_path / "all.jsonl", *documents.everything())
    report.write([tmp_path / "all.jsonl"], tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags(content).found
    names = [tag for tag, _ in tags]
    assert names.count("figure") == names.count("figcaption") == names.count("svg") == len(page.FIGURES) + 1
    assert names.count("table") == names.count("caption") > names.count("figure")
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags if tag == "th")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"] for tag, a in tags if tag == "a"} <= {f"#{name}" for name in ids}
    assert "SmolLM2-135M-Instruct" in content and "AMD EPYC, 2 threads" in content and "not recorded" in content  # the date
    assert "1.16x (ceiling 1.16x; 50% of the FFN neurons skipped, native kernel)" in content
    assert "http" not in re.sub(r'xmlns="http://www.w3.org/2000/svg"|http-equiv', "", content)
    assert "not in these runs" not in content


def test_missing_figures_are_named(tmp_path: Path) -> None:
    plain = documents.bench()
    for row in plain["rows"]:
        del row["split_dense"]
    store(tmp_path / "bench.json", plain)
    store(tmp_path / "dense.json", {**documents.perplexity(), "curve": []})
    result = report.write([tmp_path / "bench.json", tmp_path / "dense.json"], tmp_path / "report.html", tmp_path / "svg")
    assert result["figures"] == ["ttft", "selection"] and result["runs"] == 2
    assert {"Where the time goes", "Loss along the prompt", "Sparsity by layer"} < set(result["missing"])
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"not in these runs: {'; '.join(result['missing'])}" in content
    assert sorted(file.name for file in (tmp_path / "svg").iterdir()) == ["selection.svg", "ttft.svg"]


def store(file: Path, *found: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(document) + "\n" for document in found))


def test_command_reads_folders_and_artifacts_and_is_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results" / "eval").mkdir(parents=True)
    (tmp_path / "results" / "eval" / "predictions.jsonl").write_text('{"key": "0/a"}\n')  # of a run that can be resumed
    store(tmp_path / "results" / "b.jsonl", documents.pareto(), documents.picks(4, 96, 5))
    store(tmp_path / "results" / "eval" / "a.json", documents.bench())
    (tmp_path / "results" / "notes.txt").write_text("not a result")
    artifacts.save(tiny_artifact(tiny_model()), tmp_path / "tiny")
    names = [str(tmp_path / "results"), str(tmp_path / "tiny")]
    names += ["--out", str(tmp_path / "one.html"), "--svg", str(tmp_path / "svg")]
    assert cli.main(["report", *names, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["figures"] == ["ttft", "split", "quality", "sparsity", "picks", "maps"] and result["runs"] == 4
    first = snapshot(tmp_path / "svg"), (tmp_path / "one.html").read_bytes()
    assert b"tiny" in first[1]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(report.__file__).parents[3]), *sys.path])
    subprocess.run([sys.executable, "-m", "fastfill.cli", "report", *names], check=True, env=environment, capture_output=True)
    assert (snapshot(tmp_path / "svg"), (tmp_path / "one.html").read_bytes()) == first
    assert not list(tmp_path.rglob(".*"))  # nothing half-written


def test_stored_results_of_the_project_make_a_page(tmp_path: Path) -> None:
    result = report.write([Path(__file__).parents[1] / "benchmarks" / "results", "default"], tmp_path / "report.html")
    assert {"ttft", "demo", "selection", "curve", "sparsity", "kernel"} <= set(result["figures"])


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"task": "chess", "model": "m"}', "task 'chess'"),
        ('{"text": "hello", "new_tokens": 3}', "no result"),
        ('{"task": "bench", "rows": []}', "no result"),
        ('{"repeats": 5, "rows": [1]}', "damaged"),
        ('{"task": "picks", "share": 3}', "damaged"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON .it is nested"),
        ("", "no results"),
    ],
)
def test_what_is_no_result_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(content)
    with user_error(words):
        report.write([tmp_path / "odd.json"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    with user_error("does not exist"):
        runs.read([tmp_path / "nothing"])
    with user_error("holds no"):
        runs.read([tmp_path])
    store(tmp_path / "all.json", documents.pareto())
    (tmp_path / "file").write_text("")
    with user_error("could not be written"):
        report.write([tmp_path / "all.json"], tmp_path / "file" / "report.html")


def test_files_that_others_wrote(tmp_path: Path) -> None:
    """A byte order mark is none of the text; U+2028 ends no line of JSON; a pipe is not waited for."""
    line = json.dumps({**documents.demo(), "question": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "all.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\n".encode())
    assert [run.kind for run in runs.read([tmp_path / "all.jsonl"])] == ["demo", "demo"]
    os.mkfifo(tmp_path / "pipe.json")
    with user_error(r"cannot be read .it is not a regular file"):
        runs.read([tmp_path / "pipe.json"])


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with user_error(r"fastfill\[report\]"):
        quality.pareto(documents.pareto())


def test_names_tell_documents_apart() -> None:
    assert distinct([{"kernel": "native"}, {"kernel": "torch"}], ("kernel", "model")) == ["native kernel", "torch kernel"]
    assert distinct([{"kernel": "native"}], ("kernel",)) == [""]
    assert distinct([{"file": "a"}, {"file": "b"}, {"file": "b"}], ("kernel",)) == ["a", "b (1)", "b (2)"]
    texts = [{"sources": ["news.jsonl#0", "news.jsonl#7"]}, {"sources": ["code/a.py#0", "b.py#0", "c.py#0"]}, {}]
    assert distinct(texts, ("sources",)) == ["news.jsonl", "a.py and 2 more", ""]
