"""Each task by the command and from Python: the same numbers, tables of 80 columns, runs that go on; what does not fit."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from conftest import LAYERS, tiny_artifact, tiny_text, user_error

from fastfill import attach, cli, models
from fastfill.errors import UserError
from fastfill.lab import metrics, ruler, tasks
from fastfill.lab.tasks import TASKS, Task
from fastfill.lab.tasks.base import option

HEAD = {"task", "engine", "model", "dtype", "predictor", "compensator", "sparsity", "block_size", "dense_head", "min_tokens"}
PREFILL = {"dense_tail", "weights", "dense_weights", "upper_share", "reread", "attention"}
HEAD |= {*PREFILL, "attention_by", "packed", "kernel", "kernel_reason", "expected_gain", "machine"}
READ, DOCUMENTS = {"sparse_tokens", "dense_tokens"}, {"documents", "resumed", "calibrated_on", "sources"}
READING = {f"{prefix}{key}" for prefix in ("", "cont_") for key in ("ppl_dense", "ppl_sparse", "ppl_ratio", "kl", "tokens")}
READING |= {"top1_agreement", "cont_top1_agreement", "ppl_ratio_interval", "cont_ppl_ratio_interval", "no_context_ppl"}
READING |= {"context_kept", "curve"}
ANSWERS = {
    *["datasets", "average", "likelihood", "seed", "score", "planned", "resumed", "examples", "same_answers", "cut_prompts"]
}
ANSWERS |= {"batch", "prompt_tokens", "max_prompt_tokens", "max_new_tokens", "chat"}
TABLE = {"rows", "prompt_tokens", "ppl_dense", "cont_ppl_dense", "no_context_ppl", "tokens", "cont_tokens"}
KEYS = {  # of the document that is stored, which others read
    "perplexity": READING | READ | DOCUMENTS,
    "longbench": ANSWERS | READ | {"calibrated_on", "chinese_words"},
    "ruler": ANSWERS | READ,
    "suite": ANSWERS | READ | {"calibrated_on"},
    "recall": {"layers", "held", "held_oracle", "recovery", "recall"} | READ | DOCUMENTS,
    "picks": {"layers", "neurons", "blocks", "kept", "share", "overlap", "always", "never", "maps", "document", "tokens"}
    | READ,
    "peers": TABLE | DOCUMENTS | {"calibration", "calibration_tokens"},
    "pareto": TABLE | DOCUMENTS | {"repeats"},
}
SHARED = {"fastfill", "task", "model", "artifact", "dtype", "device", "sparsity", "block_size", "dense_head", "min_tokens"}
SHARED |= {*PREFILL, "attention_by", "packed", "kept", "kernel", "predictor", "compensator", "items"}
SETTINGS = {  # beside SHARED: what two runs of a task must share to be one; another set would refuse runs of before
    "perplexity": {"continuation"},
    "longbench": {"score", "chinese_words"},
    "ruler": {"score"},
    "suite": {"score"},
    "recall": set(),
    "peers": {"continuation", "calibration", "seed"},
    "pareto": {"continuation", "prompt_tokens", "repeats", "seed", "cpu", "threads"},
}
NEEDLES = [f"{task}@300-450" for task in (*ruler.NEEDLES, "vt")]


def row(dataset, index, **changes):
    made = {"input": "w9 ?", "context": tiny_text(60, seed=index), "answers": [f"w{index + 20}"], "dataset": dataset}
    return {**made, "_id": f"{dataset}-{index}", **changes}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Text to evaluate on, other text, and rows; the folder that commands are given in."""
    lines = {
        "text.jsonl": [{"text": tiny_text(160, seed=s)} for s in range(3)],
        "other.jsonl": [{"text": tiny_text(200, seed=9)}],
        "rows.jsonl": [
            row(name, i) for name, count in (("hotpotqa", 3), ("lcc:made", 2), ("dureader", 1)) for i in range(count)
        ],
    }
    for name, documents in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(document) + "\n" for document in documents))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(model_folder, artifact_folder):
    return ["evaluate", str(model_folder), "--artifact", str(artifact_folder), "--dtype", "fp32", "--json"]


TWO = {"data": ["text.jsonl[:2]"], "tokens": 64, "continuation": 16}
# Task -> words of the command, the same from Python, how many items are stored.
SAME = {
    "perplexity": (
        "--data text.jsonl --tokens 64 --continuation 16 --limit 2",
        tasks.Perplexity(data=["text.jsonl"], tokens=64, continuation=16, limit=2),
        2,
    ),
    "longbench": (
        "--data rows.jsonl --datasets hotpotqa,dureader --max-prompt-tokens 60 --max-new-tokens 3 --no-chat --limit 2",
        tasks.LongBench(
            data=["rows.jsonl"], datasets=["hotpotqa", "dureader"], max_prompt_tokens=60, max_new_tokens=3, chat=False, limit=2
        ),
        3,
    ),
    "ruler": (
        "--data rows.jsonl --lengths 256,300-400,256 --datasets niah_single,qa --limit 2 --max-new-tokens 3",
        tasks.Ruler(data=["rows.jsonl"], lengths=[256, (300, 400)], datasets=("niah_single", "qa"), limit=2, max_new_tokens=3),
        8,
    ),
    "suite": (
        "--data rows.jsonl --lengths 300-450 --limit 2 --max-new-tokens 3 --score both --seed 3 --minutes 9",
        tasks.Suite(data=["rows.jsonl"], lengths=[(300, 450)], limit=2, max_new_tokens=3, seed=3, minutes=9),
        4 + 2 * len(NEEDLES),
    ),
    "recall": ("--data text.jsonl --tokens 64", tasks.Recall(data=["text.jsonl"], tokens=64), 3),
    "picks": ("--data text.jsonl --tokens 64", tasks.Picks(data=["text.jsonl"], tokens=64), None),
    "peers": (
        "--data text.jsonl[:2] --tokens 64 --continuation 16 --calibration other.jsonl",
        tasks.Peers(**TWO, calibration=["other.jsonl"]),
        2 * 15,
    ),
    "pareto": (
        "--data text.jsonl[:2] --tokens 64 --continuation 16 --sparsities 0.2,0.6 --methods learned,static --prompt-tokens 64",
        tasks.Pareto(**TWO, sparsities=[0.2, 0.6], methods=["learned", "static"], prompt_tokens=64),
        2 * 4 + 2,
    ),
}


def untimed(result):
    """Without what two runs of one thing may have different."""
    drop = {"resumed", "ttft_s", "ttft_dense_s", "speedup"}
    rows = [{key: value for key, value in line.items() if key not in drop} for line in result.get("rows", ())]
    return {**{key: value for key, value in result.items() if key not in drop}, "rows": rows}


@pytest.mark.parametrize("name", TASKS)
def test_the_command_and_python_measure_the_same(name, folder, base, capsys, model, tokenizer):
    words, task, items = SAME[name]
    command = [*base, "--task", name, *words.split()]
    assert cli.main([*command, *(["--out", "out"] if items else [])]) == 0
    captured = capsys.readouterr()
    *table, document = captured.out.splitlines()
    result = json.loads(document)
    assert result.keys() == HEAD | KEYS[name] and result["task"] == name and max(map(len, table)) <= 80
    assert result.get("resumed", 0) == 0 and result.get("sparse_tokens", 1) > 0
    assert result.get("max_prompt_tokens") == getattr(task, "max_prompt_tokens", None)
    with attach(model, tiny_artifact(model)) as attached:
        found = task.run(attached, tokenizer)
        assert untimed({**found, "model": result["model"]}) == untimed(result)
        if items:  # a run of the command goes on from Python, and tells the same in a table
            assert json.loads((folder / "out" / "settings.json").read_text()).keys() == SHARED | SETTINGS[name]
            again = task.run(attached, tokenizer, out="out")
            assert again == {**result, "resumed": items, "model": "tiny"}
            again["model"] = result["model"]
            task.show(again)
            assert capsys.readouterr().out.splitlines() == table
            other = dataclasses.replace(task, limit=1)
            with pytest.raises(UserError, match="other settings"):
                other.run(attached, tokenizer, out="out")


def test_what_tasks_say(folder, base, capsys):
    """Beside the numbers, which the tests of each measurement check."""

    def measured(name, *more):
        assert cli.main([*base, "--task", name, *more]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]), captured

    short = ["--data", "rows.jsonl", "--limit", "1", "--max-new-tokens", "2"]
    result, captured = measured("longbench", *short, "--datasets", "all")
    assert [(line["dataset"], line["metric"]) for line in result["datasets"]] == [
        *(("hotpotqa", "qa_f1"), ("lcc:made", "code_similarity"), ("dureader", "rouge_l_zh"))
    ]
    assert result["chinese_words"] == metrics.chinese_splitter()
    assert ("jieba" in captured.err) == (metrics.chinese_splitter() == "characters")
    result, _ = measured("suite", *short, "--lengths", "300-450")
    assert [line["dataset"] for line in result["datasets"]] == ["hotpotqa", "lcc:made", *NEEDLES]
    for sets, names in (("vt", ["vt@300"]), ("lcc", ["lcc:made"])):
        result, _ = measured("suite", *short, "--lengths", "300", "--datasets", sets)
        assert [line["dataset"] for line in result["datasets"]] == names
    result, captured = measured("longbench", *short, "--max-prompt-tokens", "15")
    assert result["sparse_tokens"] == 0 and "all prompts stayed dense, as those under 16 tokens do" in captured.err
    whole, bare = (measured("longbench", *short, "--datasets", "hotpotqa", *more)[0] for more in ([], ["--no-chat"]))
    assert (whole["chat"], bare["chat"]) == (True, False) and whole["prompt_tokens"] == bare["prompt_tokens"] + 3
    sets = ["--datasets", "niah_single,vt"]
    made = [measured("ruler", *short[2:], "--lengths", "300", *sets, "--seed", seed, "--out", f"made{seed}") for seed in "01"]
    assert [result["seed"] for result, _ in made] == [0, 1]
    first, second = (json.loads((folder / f"made{seed}" / "settings.json").read_text())["items"] for seed in "01")
    assert first != second
    result, _ = measured("picks")
    assert (result["document"], result["tokens"]) == ("demo_document.txt", 512)  # all that the model holds
    common = ["--data", "text.jsonl", "--limit", "1", "--tokens", "64", "--continuation", "16"]
    assert tasks.Peers(data=["text.jsonl"]).read()[1][0].source == "demo_document.txt"
    plain = ["--sparsities", "0.5", "--methods", "static", "--prompt-tokens", "64"]
    found = [measured("pareto", *common, *plain, *more)[0] for more in ([], ["--no-compensator"])]
    assert [result["compensator"] for result in found] == [True, False] and found[0]["repeats"] == 3
    assert [line["method"] for line in found[0]["rows"]] == ["dense", "static"] and found[0]["rows"][1] != found[1]["rows"][1]


def test_items_may_be_given(folder, model, tokenizer):
    """In the place of files: the rows of one."""
    rows = [row("hotpotqa", i) for i in range(2)]
    with attach(model, tiny_artifact(model)) as attached:
        task = tasks.LongBench(max_new_tokens=2, score="likelihood")
        found = task.run(attached, tokenizer, rows)
        assert [line["examples"] for line in found["datasets"]] == [2] and found["likelihood"]["loss"] != 0
        with pytest.raises(UserError, match="Row 1 is not a JSON object"):
            task.run(attached, tokenizer, [rows[0], "x"])
        with pytest.raises(UserError, match="--task longbench needs --data FILE"):
            task.run(attached, tokenizer)


def test_documents_that_were_calibrated_on_are_told(folder, model, tokenizer, capsys):
    artifact = tiny_artifact(model)
    artifact.calibration = {"document_rows": ["text.jsonl#0", "rows.jsonl#1"]}
    with attach(model, artifact) as attached:
        for task, counted in (
            (tasks.Recall(data=["text.jsonl"], tokens=64), 1),
            (tasks.Recall(data=["text.jsonl[1:]"], tokens=64), 0),
            (tasks.LongBench(data=["rows.jsonl"], limit=2, max_new_tokens=1), 1),
        ):
            assert task.run(attached, tokenizer)["calibrated_on"] == counted
            assert (f"{counted} of these documents were calibrated on" in capsys.readouterr().err) == bool(counted)


# --- options ------------------------------------------------------------------------------------------------------------

TEXT = "--data text.jsonl --tokens 64 --continuation 16"


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("perplexity --data text.jsonl --tokens 513", "--tokens 513 is more than the 512 that the model holds"),
        ("perplexity", "--task perplexity needs --data FILE"),
        ("perplexity --data text.jsonl --tokens 1", "--tokens must be a whole number of at least 2"),
        ("perplexity --data text.jsonl --continuation 1", "--continuation must be a whole number of at least 2"),
        ("perplexity --data text.jsonl --limit 0", "--limit must be"),
        ("perplexity --no-chat", "--no-chat is an option of --task longbench, ruler, suite; leave it out"),
        ("perplexity --record --dense-tail 8", "--record stores what the artifact scores as it is"),
        ("perplexity --record --predictor static", "--record stores what the artifact scores as it is"),
        ("perplexity --record --no-compensator", "--record stores what the artifact scores as it is"),
        ("perplexity --data text.jsonl --engine vllm", "looks inside the model; it needs --engine transformers"),
        ("longbench", "--task longbench needs --data FILE"),
        ("longbench --record --data rows.jsonl", "--record stores perplexities"),
        ("longbench --data rows.jsonl --max-new-tokens 0", "--max-new-tokens must be"),
        ("longbench --data rows.jsonl --max-prompt-tokens 0", "--max-prompt-tokens must be"),
        ("longbench --data rows.jsonl --datasets colours", "no dataset 'colours'"),
        ("longbench --data rows.jsonl --minutes 0", "--minutes must be more than 0, not 0."),
        ("longbench --lengths x", "--lengths is an option of --task ruler, suite; leave it out for --task longbench."),
        ("longbench --data rows.jsonl --engine vllm --score both", "--score both looks inside the model"),
        ("longbench --data rows.jsonl --engine vllm --predictor static", "--predictor and --no-compensator need --engine"),
        ("ruler --lengths x", "--lengths must be numbers separated by commas, or ranges such as 1024-4096, not 'x'."),
        ("ruler --lengths 0", "each length must be"),
        ("ruler --lengths 512-256", "--lengths: a range goes from its shorter to its longer end, not '512-256'."),
        ("ruler --lengths 1024", "holds 512 tokens"),
        ("ruler --haystack none.txt", "cannot be read"),
        ("suite --datasets vt", "--task suite needs --data FILE"),
        ("picks --limit 1", "--task picks takes one document, the first; leave --limit and --out out."),
        ("picks --out out", "--task picks takes one document, the first; leave --limit and --out out."),
        ("peers --predictor oracle", "compares all predictors"),
        ("peers --calibration missing.txt " + TEXT, "cannot be read"),
        ("peers --calibration text.jsonl[:1] " + TEXT, "text.jsonl#0 is evaluated on; thresholds must come from other text"),
        ("peers --sparsity 0 " + TEXT, "--task peers needs a sparsity above 0"),
        ("pareto --sparsities much", "--sparsities must be numbers separated by commas, not 'much'."),
        ("pareto --sparsities 0.99", "sparsity must lie in"),
        ("pareto --sparsities 0.5,0.5", "name each once"),
        ("pareto --methods psychic", "the methods are learned, oracle, static, first-block, low-rank, random."),
        ("pareto --methods ,", "the methods are learned"),
        ("pareto --predictor oracle", "--task pareto takes its predictors from --methods"),
        ("pareto --prompt-tokens 10 " + TEXT, "too short to be sparse"),
        ("pareto --prompt-tokens 512 " + TEXT, "more than the model holds"),
        ("pareto --repeats 0", "--repeats must be"),
    ],
)
def test_options_that_do_not_fit(capsys, monkeypatch, folder, base, words, sentence):
    if not any(word in sentence for word in ("model holds", "512 tokens", "too short", "above 0", "--engine vllm")):
        monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it could be told before the model was loaded"))
    assert cli.main([*base, "--task", *words.split()]) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
    assert not (folder / "out").exists()


def test_options_from_python_are_checked_when_they_are_given(model, tokenizer):
    for make, sentence in [
        (lambda: tasks.Perplexity(data="held_out.txt"), "data must be a list, not the text 'held_out.txt'"),
        (lambda: tasks.Ruler(lengths="1024"), "lengths must be a list"),
        (lambda: tasks.Ruler(lengths=[(4, 3)]), "from its shorter to its longer end, not '4-3'"),
        (lambda: tasks.Ruler(limit=None), "--limit must be"),
        (lambda: tasks.LongBench(score="luck"), "The score 'luck' is not known; use one of both, likelihood, answers"),
        (lambda: tasks.LongBench(minutes="5"), "--minutes must be"),
        (lambda: tasks.Recall(seed=-1), "--seed must be"),
    ]:
        with user_error(sentence):
            make()
    vllm = SimpleNamespace(
        engine="vllm", artifact=tiny_artifact(model), choices={"predictor": "LearnedPredictor", "compensator": True}
    )
    with pytest.raises(UserError, match="--task recall looks inside the model"):
        tasks.Recall(data=["x"]).run(vllm, tokenizer)


def test_help_shows_the_options_of_the_task(capsys):
    def shown(*more):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", *more, "--help"])
        return capsys.readouterr().out

    everything = shown()
    assert all(f"  {name:12}{task.about}" in everything for name, task in TASKS.items())
    assert "--limit" in everything and "--tokens" not in everything and "--lengths" not in everything
    for name, task in TASKS.items():
        text = " ".join(shown("--task", name).split())
        for field in dataclasses.fields(task):
            assert field.metadata["help"] in text, field.name
        assert ("--lengths" in text) == (name in ("ruler", "suite")) and ("--tokens TOKENS" in text) == hasattr(task, "tokens")
    assert "(default: 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8)" in " ".join(shown("--task", "pareto").split())


def test_a_task_is_one_class(monkeypatch, folder, base, capsys):
    """All that a new one needs: the command, its help, its options and their refusal follow."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Words(Task):
        name = "words"
        about = "how many?"
        least: int = option(3, "letters of a word")

        def read(self):
            super().read()
            return [word for file in self.data for word in open(file).read().split()]

        def measure(self, engine, tokenizer, items, out):
            return {"layers": len(engine.cost.kept), "words": sum(len(word) >= self.least for word in items)}

        @staticmethod
        def show(result):
            print(f"{result['words']} words")

    monkeypatch.setitem(TASKS, "words", Words)
    (folder / "some.txt").write_text("a bb ccc dddd")
    assert cli.main([*base, "--task", "words", "--data", "some.txt", "--least", "2"]) == 0
    shown, document = capsys.readouterr().out.splitlines()
    assert shown == "3 words" and (json.loads(document)["layers"], json.loads(document)["words"]) == (LAYERS, 3)
    assert cli.main([*base, "--task", "recall", "--least", "2"]) == 2
    assert "--least is an option of --task words; leave it out for --task recall." in capsys.readouterr().err
