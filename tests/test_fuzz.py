"""A short stretch of the fuzzer, the same every time, and that it finds what it is for. `make fuzz` runs for longer."""

import random

import pytest
from fuzz import artifacts as fuzzed
from fuzz import bed, misbehaving

from fastfill import artifact as artifacts
from fastfill import schema
from fastfill.errors import UserError

CASES = {"artifacts": 100, "kernel_calls": 150, "gguf_files": 12, "commands": 14}


@pytest.mark.parametrize("kind", bed.KINDS)
def test_every_input_ends_in_a_right_result_or_a_sentence(kind):
    if kind == "gguf_files":
        pytest.importorskip("gguf")
    found = list(bed.outcomes(kind, seed=0, go_on=lambda number: number < CASES[kind]))
    bad = [outcome for outcome in found if outcome.verdict in bed.FAULTS]
    assert not bad, "\n\n".join(map(str, bad))
    assert len(found) == CASES[kind] and {"right", "refused"} <= bed.count(found).keys()


MUTANTS = {  # of the package -> the verdict that must come of it
    "no checksums": (artifacts, "_check_sums", lambda *_: None, "wrong"),
    "fields are not checked": (schema, "_check_fields", lambda *_: None, "traceback"),
    "messages quote all": (UserError, "__init__", lambda self, words: ValueError.__init__(self, words + "x" * 1000), "words"),
    "inspect shows what attach refuses": (fuzzed, "inspect", lambda _: None, "disagree"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_of_each_kind_is_found(tmp_path, monkeypatch, name):
    owner, attribute, mutant, verdict = MUTANTS[name]
    world = bed.world_of("artifacts", tmp_path)
    monkeypatch.setattr(owner, attribute, mutant)
    assert any(bed.judge("artifacts", number, 0, world).verdict == verdict for number in range(200))


def test_a_worker_that_hangs_or_dies_is_replaced(monkeypatch):
    def ways(seed):
        return [random.Random(f"misbehaving-{seed}-{number}").choice(misbehaving.WAYS) for number in range(4)]

    seed = next(seed for seed in range(1000) if ways(seed) == ["right", "hang", "crash", "right"])

    def go_on(number):
        if number < 4:  # what hangs is not waited for, and a busy machine has time for the others
            monkeypatch.setattr(bed, "CASE_S", 2.0 if ways(seed)[number] == "hang" else 60.0)
        return number < 4

    assert [outcome.verdict for outcome in bed.outcomes("misbehaving", seed, go_on)] == ways(seed)
