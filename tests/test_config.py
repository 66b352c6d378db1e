import json
import subprocess
import sys

import pytest

from fastfill import config as cfg
from fastfill.config import CalibrationConfig, PrefillConfig
from fastfill.errors import UserError


@pytest.mark.parametrize(
    "config", [PrefillConfig(0.25, 32, 7, 9), CalibrationConfig(predictor_rank=3, schedule="uniform", seed=4)]
)
def test_json_round_trip(config):
    assert cfg.from_dict(type(config), json.loads(json.dumps(cfg.to_dict(config))), "here") == config


@pytest.mark.parametrize("kind", [PrefillConfig, CalibrationConfig])
def test_unknown_key_is_an_error_that_names_it(kind):
    with pytest.raises(UserError, match=r"somewhere.*sparsty"):
        cfg.from_dict(kind, {"sparsty": 0.5}, "somewhere")
    with pytest.raises(UserError, match="JSON object"):
        cfg.from_dict(kind, [1], "somewhere")


@pytest.mark.parametrize("config", [PrefillConfig(0.25, 16, 7, 9, 5), CalibrationConfig(steps=3, seed=7)])
def test_a_field_that_an_older_file_lacks_has_its_default(config):
    values, defaults = cfg.to_dict(config), cfg.to_dict(type(config)())
    for name in values:
        older = {key: value for key, value in values.items() if key != name}
        assert cfg.to_dict(cfg.from_dict(type(config), older, "here")) == {**values, name: defaults[name]}


@pytest.mark.parametrize("value", [-0.01, 0.951, 1, 2.0, float("nan"), float("inf"), "0.5", None, True])
def test_sparsity_outside_the_range(value):
    with pytest.raises(UserError, match=r"sparsity must lie in \[0, 0.95\]"):
        PrefillConfig(sparsity=value)


@pytest.mark.parametrize("field, value", [("block_size", 0), ("block_size", -8), ("block_size", 8.0), ("block_size", True),
                                          ("dense_head", -1), ("dense_tail", -1), ("min_tokens", 0),
                                          ("min_tokens", "16")])  # fmt: skip
def test_prefill_integers(field, value):
    with pytest.raises(UserError, match=field):
        PrefillConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("schedule", "best"),
        ("fit_tokens", 0),
        ("fit_epochs", 0),
        ("fit_batch", -1),
        ("schedule_tokens", 0),
        ("steps", -1),
        ("sequence_length", 1),
        ("predictor_rank", 0),
        ("linear_rank", -1),
        ("silu_rank", 1.5),
        ("fit_lr", 0.0),
        ("compensator_lr", -1e-3),
        ("predictor_lr", float("nan")),
        ("answer", 1.0),
        ("answer", -0.1),
        ("answer_weight", float("inf")),
        ("answer_weight", "much"),
    ],
)
def test_calibration_values(field, value):
    with pytest.raises(UserError, match=field):
        CalibrationConfig(**{field: value})


# SmolLM2-135M; Llama 3.2 1B, TinyLlama, Qwen2.5 3B, Qwen3 4B, Llama 2 7B, Llama 3 8B
SIZES = [
    (576, 1536, 0.08),
    *((h, f, 0.04) for h, f in [(2048, 8192), (2048, 5632), (2048, 11008), (2560, 9728), (4096, 11008), (4096, 14336)]),
]


@pytest.mark.parametrize("hidden, intermediate, limit", SIZES)
def test_default_ranks_keep_the_promised_overhead(hidden, intermediate, limit):
    predictor, linear, silu = cfg.default_ranks(hidden)
    overhead = predictor * (hidden + intermediate) + 2 * hidden * (linear + silu)
    assert overhead <= limit * 3 * hidden * intermediate


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, fastfill; print([m for m in ('torch', 'transformers', 'triton', 'vllm') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"


def test_public_names_win_over_submodules_of_the_same_name():
    import fastfill
    import fastfill.calibration.run
    import fastfill.lab.speed  # brings in the other modules

    assert all(callable(getattr(fastfill, name)) for name in fastfill.__all__)
    code = "import fastfill, fastfill.lab.speed, fastfill.calibration.run as r; assert fastfill.calibrate is r.calibrate"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    with pytest.raises(AttributeError, match="nothing_here"):
        fastfill.nothing_here  # noqa: B018
