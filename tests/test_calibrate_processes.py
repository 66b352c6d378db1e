"""Calibration in several processes: the same as in one, to rounding."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import PREFILL, tiny_text
from test_calibrate import CONFIG, KILLS, Killed, change

import fastfill
from fastfill import artifact as artifacts
from fastfill import cli
from fastfill.calibration import corpus, run
from fastfill.calibration.team import Team
from fastfill.errors import UserError

pytest.importorskip("accelerate")
BATCH = change(batch=2, steps=6, compensator_lr=5e-2)  # so that other text is seen in the result


def test_shares():
    """Five things among two and three: all of them once, in order."""
    for size in (1, 2, 3, 7):
        parts = [list(range(5))[Team(rank, size).share(5)] for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(5)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Team().place(7) == (0, 7) and Team().total(2, 3) == [2, 3]


@pytest.fixture
def words(model_folder, tmp_path):
    """The command without --out and --processes."""
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": tiny_text(256, seed=s)}) + "\n" for s in range(6)))
    words = ["calibrate", str(model_folder), "--data", str(data), "--dtype", "fp32", "--threads", "1", "--json"]
    for config in (PREFILL, BATCH):
        for name, value in vars(config).items():
            words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    return words


def command(words, *more):
    done = subprocess.run([sys.executable, "-m", "fastfill.cli", *words, *map(str, more)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def distance(one, two, part=""):
    """The largest relative difference of a tensor, in norm. part: of those whose name has it."""
    pairs = [(one.tensors[k].double(), two.tensors[k].double()) for k in one.tensors if part in k]
    return max(float((a - b).norm() / a.norm().clamp_min(1e-9)) for a, b in pairs)


def test_two_processes_equal_one_also_when_resumed(words, tmp_path, monkeypatch):
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    one = artifacts.load(tmp_path / "one")
    code, out, err = command(words, "--out", tmp_path / "two", "--processes", 2)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["out"] == str(tmp_path / "two")
    two = artifacts.load(tmp_path / "two")
    assert two.calibration["processes"] == 2 and two.calibration["text"] == one.calibration["text"]
    assert two.calibration["tokens_distilled"] == 2 * 6 * 64
    assert two.layer_importance == pytest.approx(one.layer_importance, rel=1e-3)
    for mine, theirs in zip(two.calibration["importance_held"], one.calibration["importance_held"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert distance(one, two) < 0.01  # stored in bf16: 2^-9 a number; Adam turns rounding of tiny gradients into steps

    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        KILLS["in the middle of distillation"](patch)
        with pytest.raises(Killed):
            cli.main([*words, "--out", str(tmp_path / "three")])
    code, _, err = command(words, "--out", tmp_path / "three", "--processes", 2, "--resume")
    assert code == 0, err
    three = artifacts.load(tmp_path / "three")
    assert distance(one, three) < 0.01
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "text.jsonl", "three", "two"]

    words[words.index("--batch") + 1] = "1"  # half of the text of each step is another result
    monkeypatch.setattr(corpus, "ASIDE", 0)  # whether so few steps help on text set aside is chance
    assert cli.main([*words, "--out", str(tmp_path / "half")]) == 0
    half = artifacts.load(tmp_path / "half")
    assert distance(one, half) > 0.03 and half.calibration["tokens_distilled"] == 6 * 64


def test_one_sentence_where_processes_cannot_share(words, tmp_path, model, tokenizer, monkeypatch, capsys):
    code, out, err = command(words, "--out", tmp_path / "a", "--processes", 4)
    assert code == 2 and out == "" and not (tmp_path / "a").exists()
    assert err.strip() == "fastfill: 4 processes cannot share a batch of 2; give --batch a multiple of them."
    assert cli.main([*words, "--out", str(tmp_path / "a"), "--processes", "0"]) == 2
    assert "--processes must be a whole number" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path / "a"), "--processes", "99", "--device", "cuda"]) == 2
    assert "too few for --processes 99" in capsys.readouterr().err
    monkeypatch.setattr(run, "join", lambda _device: Team(0, 2))
    with pytest.raises(UserError, match="2 processes cannot share a batch of 1"):
        fastfill.calibrate(model, tokenizer, [tiny_text(256)], tmp_path / "a", prefill=PREFILL, config=CONFIG)


def test_bf16_products(model, tokenizer, tmp_path, monkeypatch):
    """As on CUDA, on an fp32 model: close to fp32, and not the same."""
    texts = [tiny_text(256, seed=s) for s in range(4)]
    monkeypatch.setattr(corpus, "ASIDE", 0)
    found = {}
    for on in (False, True):
        precision = torch.autocast("cpu", torch.bfloat16, enabled=on, cache_enabled=False)
        monkeypatch.setattr(run, "_precision", lambda _device, precision=precision: precision)
        found[on] = fastfill.calibrate(model, tokenizer, texts, tmp_path / str(on), prefill=PREFILL, config=CONFIG)
    losses = [a.calibration["loss_last"] for a in found.values()]
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[0] != losses[1]
    assert 0 < distance(found[False], found[True], "predictor") < 0.2
