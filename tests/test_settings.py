"""The one path of a setting: a field of `PrefillConfig`, a new one too, can be set wherever a user sets anything."""

import dataclasses
from types import SimpleNamespace

import pytest
from conftest import PREFILL, tiny_artifact, tiny_text, user_error

from fastfill import artifact as artifacts
from fastfill import attach, cli
from fastfill.config import PrefillConfig
from fastfill.engines import transformers as engine
from fastfill.errors import UserError
from fastfill.lab.published import Attacher
from fastfill.vllm_plugin import settings as vllm

OTHER = {  # a value for each field that is neither the default nor PREFILL's
    field.name: field.metadata["choices"][1]
    if "choices" in field.metadata
    else {float: lambda value: value / 2, int: lambda value: value + 67}[type(field.default)](field.default)
    for field in dataclasses.fields(PrefillConfig)
}
COMMANDS = {
    "demo": ("demo", "MODEL", "--artifact", "ARTIFACT"),
    "calibrate": ("calibrate", "MODEL", "--data", "TEXT", "--out", "OUT"),
    "generate": ("generate", "MODEL", "--artifact", "ARTIFACT", "--prompt-file", "TEXT"),
    "bench": ("bench", "MODEL", "--artifact", "ARTIFACT"),
    "bench in vllm": ("bench", "MODEL", "--artifact", "ARTIFACT", "--engine", "vllm"),
    "evaluate": ("evaluate", "MODEL", "--artifact", "ARTIFACT", "--data", "TEXT"),
    "serve": ("serve", "MODEL", "--artifact", "ARTIFACT"),
}
SINKS = ("attachment.attach", "calibration.calibrate", "engines.transformers.load", "engines.vllm.load", "engines.vllm.serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_every_field(command, monkeypatch, model_folder, artifact_folder, tmp_path):
    """What arrives where the command hands its settings to."""

    def sink(*_args, prefill=None, **given):
        arrived.append(dataclasses.asdict(prefill) if prefill else {name: given[name] for name in OTHER})
        raise UserError("That is all.")

    arrived = []
    for place in SINKS:
        monkeypatch.setattr(f"fastfill.{place}", sink)
    (tmp_path / "text.txt").write_text(tiny_text(160))
    names = {"MODEL": model_folder, "ARTIFACT": artifact_folder, "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    line = [str(names.get(word, word)) for word in COMMANDS[command]]
    for name, value in OTHER.items():
        option = "--sparse-block-size" if (command, name) == ("serve", "block_size") else f"--{name.replace('_', '-')}"
        line += [option, str(value)]
    assert cli.main(line) == 2
    assert arrived == [OTHER]


@pytest.mark.parametrize("command", sorted({line[0] for line in COMMANDS.values()}))
def test_help_has_every_field_in_the_same_words(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    default = "(default: {})" if command == "calibrate" else "(default: the artifact's)"
    for field in dataclasses.fields(PrefillConfig):
        assert f"{field.metadata['help']} {default.format(field.default)}" in text


def test_the_artifacts_settings_a_whole_and_fields_over_both(model):
    artifact, whole = tiny_artifact(model), PrefillConfig(**OTHER)
    for given, wanted in (
        ({}, PREFILL),
        ({"prefill": whole}, whole),
        (OTHER, whole),
        ({"sparsity": 0.25, "dense_head": None}, dataclasses.replace(PREFILL, sparsity=0.25)),
        ({"prefill": whole, "dense_head": 0}, dataclasses.replace(whole, dense_head=0)),
    ):
        with attach(model, artifact, **given) as attachment:
            assert attachment.config == wanted


def test_a_method_is_measured_with_all_settings_of_the_attachment(model):
    artifact = tiny_artifact(model)
    again = Attacher(attach(model, artifact, **OTHER), artifact)
    with again("learned", True, 0.3) as attachment:
        assert attachment.config == PrefillConfig(**{**OTHER, "sparsity": 0.3})


def test_engines_take_every_field(model_folder, artifact_folder):
    artifact, whole = artifacts.load(artifact_folder), PrefillConfig(**OTHER)
    with engine.load(str(model_folder), artifact, dtype="fp32", device="cpu", kernel="torch", **OTHER) as made:
        assert made.config == whole
    document = vllm.overrides("llama", artifact_folder, **OTHER, kernel=None)["fastfill"]
    assert document == {"artifact": str(artifact_folder), **OTHER}
    assert vllm.Settings.of(document).prefill == whole == vllm.in_force(artifact, OTHER)


def test_vllm_changes_nothing_of_an_artifact_but_from_where_on_prompts_are_sparse():
    for least, wanted in ((96, vllm.MIN_TOKENS), (700, 700)):
        mine = PrefillConfig(**{**OTHER, "min_tokens": least})
        artifact = SimpleNamespace(prefill=mine)
        assert vllm.in_force(artifact, {}) == dataclasses.replace(mine, min_tokens=wanted)
        assert vllm.in_force(artifact, {"min_tokens": None}) == vllm.in_force(artifact, {})
        assert vllm.in_force(artifact, {"min_tokens": 20}) == dataclasses.replace(mine, min_tokens=20)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"sparsty": 0.3}, r"'sparsty' is no setting of the prefill; there are sparsity, block_size, dense_head, min_tokens"),
        ({"prefill": 0.3}, r"prefill must be a fastfill.PrefillConfig, not 0.3"),
        ({"sparsity": 0.96}, r"sparsity must lie in \[0, 0.95\]"),
        ({"weights": "int4"}, "weights must be model or int8, not 'int4'"),
        ({"dense_weights": "int8"}, 'dense_weights="int8" needs weights="int8"'),
        ({"dense_head": -1}, r"dense_head must be a whole number of at least 0"),
        ({"kernel": "fast"}, "native, triton, torch"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_touched(model, given, words):
    with user_error(words):
        attach(model, tiny_artifact(model), **given)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not model.model._forward_pre_hooks


def test_vllm_refuses_wrong_settings_before_it_starts(artifact_folder):
    for given, words in (({"sparsty": 0.3}, "unknown setting.* sparsty"), ({"dense_tail": -1}, "dense_tail must be")):
        with user_error(words):
            vllm.overrides("llama", artifact_folder, **given)
