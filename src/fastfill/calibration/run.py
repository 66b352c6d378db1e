"""The whole recipe on one page: text -> per-layer fits -> schedule -> end-to-end distillation -> artifact."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastfill import artifact as artifacts
from fastfill import config as cfg
from fastfill import context, data, eight_bits, families, machine, partner
from fastfill import tensors as stored
from fastfill.artifact import Artifact
from fastfill.attachment import check_detached
from fastfill.calibration import capture, corpus, fit, further
from fastfill.calibration import limit as limits
from fastfill.calibration.checkpoint import Checkpoint
from fastfill.calibration.distill import TRAINED, Distiller, Teacher
from fastfill.calibration.importance import sensitivity, token_mixing
from fastfill.calibration.student import StudentFFN, Weights
from fastfill.calibration.team import Team, join
from fastfill.config import CalibrationConfig, PrefillConfig
from fastfill.errors import UserError
from fastfill.progress import stage
from fastfill.schedule import allocate

SAVE_EVERY_S = 60.0
FIT_SHARE = 0.3  # of a budget in minutes; a guess, not measured
LEFT_OUT = ".left-out"  # behind the name of an artifact: the folder of a distillation that did not help
CLOSED_FORM_TOKENS = 32768  # more does not move a solution with H + 1 unknowns an output


@dataclass(frozen=True)
class Job:
    """What every stage needs. tokens: (S, T) sequences, all of them in every process of a team. aside: how many of the last
    tell whether the distillation helped. ranks: inner widths of predictor and compensator."""

    model: Any
    anatomy: families.Anatomy
    tokens: torch.Tensor
    aside: int
    prefill: PrefillConfig
    config: CalibrationConfig
    ranks: dict[str, int]
    checkpoint: Checkpoint
    team: Team


def calibrate(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str | data.Document],
    out: str | Path,
    *,
    prefill: PrefillConfig | None = None,
    config: CalibrationConfig | None = None,
    name: str | None = None,
    resume: bool = False,
    start: Artifact | str | Path | None = None,
    allow_finetuned: bool = False,
) -> Artifact:
    """Learn an artifact for `model` from text and write it to the folder `out`.

    documents: texts, or `data.load_documents(...)`. name: how the artifact names its base model. resume: continue from the
    checkpoint that an interrupted run left beside `out`; the result is the same as without the interruption. start: an artifact
    of the same model, or its folder, whose weights are distilled further in place of new fits; its settings, ranks and schedule
    stay. allow_finetuned: of a model that was fine-tuned since, too.

    In a process that `accelerate launch` started, all processes calibrate together; the result is that of one process to
    rounding. A compressed-tensors checkpoint in eight bits is calibrated as the floating-point model of its int8 values and
    scales: rounding activations has no gradient. On CUDA matrix products are in bf16 (autocast), whatever the model's dtype.

    Raises UserError if the model is not supported, the text is too short, or `out` cannot be written.
    """
    config = config or CalibrationConfig()
    out, left_out = Path(os.path.abspath(out)), left_out_of(out, start)
    if start is not None:
        start = start if isinstance(start, Artifact) else artifacts.load(start)
        prefill = further.settings(start, prefill, config)
    prefill = prefill or PrefillConfig()
    cfg.check_integer("sequence_length", config.sequence_length, prefill.first_sparse + prefill.block_size)
    if out in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{out} holds the folder you are in and cannot be replaced; name a folder of its own.")
    team = join(next(model.parameters()).device)
    if config.batch % team.size:
        raise UserError(f"{team.size} processes cannot share a batch of {config.batch}; give --batch a multiple of them.")
    texts = [d if isinstance(d, data.Document) else data.Document(d, f"text#{i}") for i, d in enumerate(documents)]
    anatomy = families.dissect(model)
    check_detached(anatomy)
    if config.schedule == "token-mixing" and len(anatomy.attentions) < len(anatomy.layers):
        raise UserError(
            "The schedule token-mixing needs attention in every layer, and this model has some without; leave it out."
        )
    if anatomy.packed:
        raise UserError("Calibration needs weights in floating point; load the GGUF file without --packed.")
    if anatomy.ffns[0].scales:
        raise UserError(
            "Calibration needs weights in floating point, and torchao has put these in int8: calibrate the model before "
            "quantize_; the artifact serves both."
        )
    limit = context.positions(model.config)
    if limit and config.sequence_length > limit:
        raise UserError(f"sequence_length {config.sequence_length} is more than the {limit} tokens that the model holds.")
    for note in start.check_partner(anatomy, allow_finetuned) if start else ():
        warnings.warn(note, stacklevel=2)
    text = corpus.read(tokenizer, texts, config, start)
    tokens = text.tokens
    if start is not None and config.steps and not text.aside and not team.rank:
        print(
            "fastfill: warning: nothing tells whether more steps help: that takes eight sequences, some of them of documents "
            "that the artifact has not learned from.",
            file=sys.stderr,
        )
    name = name or getattr(model.config, "_name_or_path", "") or anatomy.model_type
    base_model = artifacts.describe_model(anatomy, name)
    ranks = start.ranks if start else _ranks(config, anatomy)
    settings = {
        "base_model": {key: base_model[key] for key in artifacts.BASE_KEYS},
        "prefill": cfg.to_dict(prefill),
        "config": cfg.to_dict(config),
        "dtype": str(anatomy.ffns[0].gate.dtype),
        "text": data.digest(tokens),
        "threads": torch.get_num_threads(),  # the bits depend on it
        **({"start": further.identity(start)} if start else {}),
    }
    if team.rank:
        team.total(0)  # the others begin when the first one has found the checkpoint in order
    checkpoint = Checkpoint(out, settings, resume, write=team.rank == 0)
    if not team.rank:
        team.total(0)
    job = Job(model, anatomy, tokens, text.aside, prefill, config, ranks, checkpoint, team)
    begin = time.monotonic() - (checkpoint.json("seconds") or 0.0)

    with _precision(anatomy.ffns[0].gate.device), eight_bits.unrounded(model):
        if start is None:
            job = _with_fit_tokens(job)
            weights, shares, teacher = _fit_layers(job)
            importances = _importance(job, weights)
        else:
            weights, importances = further.weights(start), start.layer_importance
            shares = start.calibration.get("importance_held", [])
            teacher = Teacher(model, anatomy, tokens[:0], tokens[:0])
        checkpoint.put_json("seconds", time.monotonic() - begin)
        kept = allocate(importances, prefill.sparsity, anatomy.intermediate)
        learned, losses, judged = _distill(job, weights, kept, teacher, begin)

    record = {
        "config": {**cfg.to_dict(config), "fit_tokens": job.config.fit_tokens},
        "documents": sorted({d.source.split("#")[0] for d in texts}),
        "document_rows": [d.source for d in texts],
        "document_digests": sorted({d.digest() for d in texts}),
        "sequences": len(tokens),
        "passages": text.passages,
        "text": settings["text"],
        "seconds": round(time.monotonic() - begin, 1),
        "loss_aside": judged,
        "importance_held": shares,
        "processes": team.size,
        "machine": machine.describe(),
    }
    result = Artifact(base_model, prefill, ranks, importances, {}, record, samples=partner.samples(anatomy))
    if judged and not judged[1] < judged[0]:
        if team.rank == 0:
            lost = _narrow(_filled(result, learned, losses, start))
            try:
                artifacts.save(lost, left_out, readme=lost.card())
                kept_in = f"What it has learned is in {left_out}."
            except UserError as error:
                kept_in = f"What it has learned is lost: {error}"
            print(
                "fastfill: warning: the distillation made the loss of text set aside worse "
                f"({judged[0]:.3f} -> {judged[1]:.3f} nats) and was left out; use lower rates "
                f"(--compensator-lr, --predictor-lr). {kept_in}",
                file=sys.stderr,
            )
        learned, losses = weights, []
    result = _filled(result, learned, losses, start)
    if config.max_loss is not None and team.rank == 0:
        result = limits.within(model, result, text.held_out, config.answer, config.max_loss)
    result = _narrow(result)
    if team.rank == 0:
        artifacts.save(result, out, readme=result.card())
    checkpoint.remove()
    return result


def left_out_of(out: str | Path, start: Artifact | str | Path | None) -> Path:
    """Where a distillation that does not help is kept. Raises UserError if that is the folder to start from."""
    folder = Path(os.path.abspath(out) + LEFT_OUT)
    if isinstance(start, (str, Path)) and Path(os.path.abspath(start)) == folder:
        raise UserError(f"{folder} is where a distillation that does not help is kept, this one too; rename it first.")
    return folder


def _filled(result: Artifact, weights: list[Weights], losses: list[float], start: Artifact | None) -> Artifact:
    """With what was learned, and the steps that it took."""
    config = result.calibration["config"] | {"steps": len(losses)}
    record = result.calibration | {
        "config": config,
        "tokens_distilled": len(losses) * config["batch"] * config["sequence_length"],
        "loss_first": _mean(losses[:20]),
        "loss_last": _mean(losses[-20:]),
    }
    if start is not None:
        record = further.record(start.calibration, record)
    tensors = {
        f"layers.{i}.{key}": value.detach().to("cpu", torch.float32 if value.dim() == 2 else torch.bfloat16)
        for i, layer in enumerate(weights)
        for key, value in layer.items()
    }
    return dataclasses.replace(result, tensors=tensors, calibration=record)


def _narrow(artifact: Artifact) -> Artifact:
    """As it is stored: vectors in bf16, matrices in eight bits, rounded once."""
    return dataclasses.replace(artifact, tensors=stored.narrow(artifact.tensors))


def _precision(device: torch.device) -> torch.autocast:
    """bf16 products on CUDA. Nothing is cached: the weights that are cast change at every step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def _with_fit_tokens(job: Job) -> Job:
    """The job with as many fit tokens as its budget allows. A sequence costs twice its dense prefill: once to capture its
    activations, once to fit to them."""
    config, tokens = job.config, job.tokens
    if config.minutes is None:
        return job
    found = job.checkpoint.json("fit_tokens")
    if found is None:
        seconds = [_seconds(lambda: job.anatomy.base(input_ids=_first(job), use_cache=False)) for _ in range(2)][-1]
        (slowest,) = job.team.total(seconds / job.team.size)
        affordable = int(FIT_SHARE * config.minutes * 60 * job.team.size / (2 * slowest))
        found = min(config.fit_tokens, max(job.team.size, affordable) * tokens.shape[1])
        job.checkpoint.put_json("fit_tokens", found)
    return dataclasses.replace(job, config=dataclasses.replace(config, fit_tokens=found))


def _steps(job: Job, trainer: Distiller, begin: float, aside: int) -> int:
    """How many steps there are: those asked for, or what is left of the budget. At its end the sequences set aside are judged
    once more, each in less than the time of a step's."""
    config, checkpoint = job.config, job.checkpoint
    if config.minutes is None:
        return config.steps
    found = checkpoint.json("steps")
    if found is None:
        seconds = [_seconds(lambda: trainer.rehearse(job.tokens[: config.batch])) for _ in range(2)][-1]
        (slowest, gone) = job.team.total(seconds / job.team.size, (time.monotonic() - begin) / job.team.size)
        found = max(1, int((config.minutes * 60 - gone) / slowest) - -(-aside // config.batch))
        checkpoint.put_json("steps", found)
    return found


def _first(job: Job) -> torch.Tensor:
    return job.tokens[:1].to(job.anatomy.ffns[0].gate.device)


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.monotonic()
    with torch.no_grad():
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - begin


def _ranks(config: CalibrationConfig, anatomy: families.Anatomy) -> dict[str, int]:
    asked = (config.predictor_rank, config.linear_rank, config.silu_rank)
    ranks = [a if a is not None else d for a, d in zip(asked, cfg.default_ranks(anatomy.hidden), strict=True)]
    limits = (min(anatomy.hidden, anatomy.intermediate), anatomy.hidden, anatomy.hidden)
    return dict(zip(("predictor", "linear", "silu"), map(min, ranks, limits), strict=True))


def _fit_layers(job: Job) -> tuple[list[Weights], list[list[float]], Teacher]:
    """Layer by layer: statistics, predictor, closed-form compensator. Shares: importance held per layer, [learned, oracle]. The
    teacher knows the text that was used here, unless a checkpoint made that needless."""
    anatomy, tokens, config, ranks, checkpoint = job.anatomy, job.tokens, job.config, job.ranks, job.checkpoint
    team = job.team
    block, head = job.prefill.block_size, job.prefill.first_sparse
    rows = tokens[: max(1, config.fit_tokens // tokens.shape[1])]
    uniform = allocate([1.0] * len(anatomy.ffns), job.prefill.sparsity, anatomy.intermediate)
    if len(rows) < team.size:
        raise UserError(f"{team.size} processes cannot share {len(rows)} sequences to fit on; give more text or --fit-tokens.")
    all_weights: list[Weights] = []
    shares: list[list[float]] = []
    done = [checkpoint.tensors(f"layer-{i}") for i in range(len(anatomy.ffns))]
    if all(found is not None for found in done):
        everything = [found for found in done if found is not None]
        layers = [{k: v for k, v in found.items() if k != "shares"} for found in everything]
        return layers, [_shares(found) for found in everything], Teacher(job.model, anatomy, tokens[:0], tokens[:0])
    usable = (tokens.shape[1] - head) // block * block
    mine = rows[team.share(len(rows))]
    ticks = config.fit_epochs * -(-len(rows) * usable // config.fit_batch)
    hidden, calls = capture.embed(anatomy, mine)
    with stage("predictors", ticks * len(anatomy.ffns)) as bar:
        for layer, inputs, activations in capture.stream_ffns(anatomy, hidden, calls, slice(head, head + usable)):
            ffn, kept, found = anatomy.ffns[layer], uniform[layer], done[layer]
            if found is None:
                x, h = inputs.flatten(0, 1), activations.flatten(0, 1)
                before, _ = team.place(len(x))  # tokens that other processes have before ours
                stats = fit.statistics(x, h, ffn, team)
                seed = config.seed * 10_007 + layer
                predictor = fit.fit_predictor(x, h, ffn, stats["importance"], ranks["predictor"], config, seed, bar.step, team)
                part = slice(max(0, CLOSED_FORM_TOKENS // block * block - before))
                inner = ranks["linear"], ranks["silu"]
                compensator = fit.fit_compensator(x[part], h[part], ffn, predictor, kept, block, *inner, seed, team)
                parts = {"stats": stats, "predictor": predictor, "compensator": compensator}
                found = {f"{part}.{k}": v for part, values in parts.items() for k, v in values.items()}
                part = slice(max(0, 64 * block - before))
                found["shares"] = torch.tensor(fit.captured_share(x[part], h[part], ffn, predictor, kept, block, team))
                checkpoint.put_tensors(f"layer-{layer}", found)
            else:
                bar.step(ticks)
            shares.append(_shares(found))
            all_weights.append({k: v for k, v in found.items() if k != "shares"})
    return all_weights, shares, Teacher(job.model, anatomy, mine, hidden)


def _shares(found: Weights) -> list[float]:
    return [round(share, 4) for share in found["shares"].tolist()]


def _importance(job: Job, weights: list[Weights]) -> list[float]:
    found = job.checkpoint.json("importance")
    if found is not None:
        return found
    layers, sparsity = len(job.anatomy.ffns), job.prefill.sparsity
    rows = job.tokens[-max(1, job.config.schedule_tokens // job.tokens.shape[1]) :]
    if job.config.schedule == "uniform" or sparsity == 0:
        values = [1.0] * layers
    elif job.config.schedule == "token-mixing":
        mixing = token_mixing(job.model, job.anatomy, rows, job.team)
        values = [m**2 for m in mixing]  # the schedule's root undoes it: s_l = c / m_l
    else:
        uniform = allocate([1.0] * layers, sparsity, job.anatomy.intermediate)
        values = sensitivity(job.model, job.anatomy, _students(job, weights, uniform), rows, job.config.loss_stride, job.team)
    job.checkpoint.put_json("importance", values)
    return values


def _students(job: Job, weights: list[Weights], kept: list[int], answer: float = 0.0) -> list[StudentFFN]:
    device = job.anatomy.ffns[0].gate.device
    for layer in weights:
        layer.update({key: value.to(device) for key, value in layer.items() if not value.requires_grad})
    block, head = job.prefill.block_size, job.prefill.first_sparse
    return [
        StudentFFN(ffn, w, k, job.ranks["linear"], block, head, answer)
        for ffn, w, k in zip(job.anatomy.ffns, weights, kept, strict=True)
    ]


def _distill(
    job: Job, weights: list[Weights], kept: list[int], teacher: Teacher, begin: float
) -> tuple[list[Weights], list[float], list[float]]:
    """The end-to-end stage. Sequences come in their shuffled order, and repeat when they run out; the last ones are set aside
    (the schedule was measured on some of them, and the fits may have seen them). Returns what was learned, the losses of its
    steps, and those of the text set aside before and after."""
    config, checkpoint = job.config, job.checkpoint
    if config.steps == 0 or min(kept) == job.anatomy.intermediate:  # nothing to train, or nothing skipped
        return weights, [], []
    training = len(job.tokens) - job.aside
    tokens, aside = job.tokens[:training], job.tokens[training:]
    students = _students(job, weights, kept, config.answer)
    trainer = Distiller(job.model, job.anatomy, students, config, job.prefill.first_sparse, teacher, job.team)
    judged: list[float] = checkpoint.json("aside") or ([round(trainer.judge(aside), 4)] if len(aside) else [])
    checkpoint.put_json("aside", judged)
    trainer.config = config = dataclasses.replace(config, steps=_steps(job, trainer, begin, len(aside)))
    saved = checkpoint.tensors("distill")
    if saved is not None:
        trainer.load(saved)
    last_save = time.monotonic()
    with stage("distillation", config.steps, trainer.step_done) as bar:
        while trainer.step_done < config.steps:
            rows = torch.arange(config.batch) + trainer.step_done * config.batch
            trainer.step(tokens[rows % len(tokens)])
            bar.step(note=f"loss {_mean(trainer.losses[-20:]):.3f} nats")
            if time.monotonic() - last_save > SAVE_EVERY_S:
                checkpoint.put_tensors("distill", trainer.state())
                checkpoint.put_json("seconds", time.monotonic() - begin)
                last_save = time.monotonic()
    checkpoint.put_tensors("distill", trainer.state())
    judged += [round(trainer.judge(aside), 4)] if len(aside) else []
    learned = [
        layer | {name: student.weights[name].detach() for name in TRAINED}
        for layer, student in zip(weights, trainer.students, strict=True)
    ]
    return learned, trainer.losses, judged


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
