"""The tasks of `fastfill evaluate`: options of the command -> data, read and checked -> a function of the attached model.

Data comes before the model, so that a mistake in an option is told at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastfill import context, data, files, machine, reading
from fastfill.artifact import Artifact
from fastfill.attachment import Attachment
from fastfill.config import PrefillConfig, check_integer, check_sparsity
from fastfill.data import Document
from fastfill.errors import UserError
from fastfill.lab import longbench, pareto, peers, perplexity, picks, recall, resume, ruler, runner
from fastfill.lab.baselines import BASELINES, LEARNED
from fastfill.lab.example import Example, identity
from fastfill.lab.resume import Store
from fastfill.models import LoadedModel

Task = Callable[[Attachment, LoadedModel], dict[str, Any]]
Score = Callable[[Attachment, LoadedModel, list[tuple[str, torch.Tensor]], Store], dict[str, Any]]
RULER_EXAMPLES = 10  # of each task and length, unless --limit says otherwise
SUITE_EXAMPLES = 100  # of each set of the suite
SUITE_RULER = (*ruler.NEEDLES, "vt")  # what the suite takes of `ruler`, unless --datasets says otherwise

ANSWERS = ("longbench", "ruler", "suite")
READINGS = ("perplexity", "peers", "pareto")
# Option -> its default and the tasks that take it; the others refuse it.
OWNED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "tokens": (2048, (*READINGS, "recall", "picks")),
    "continuation": (256, READINGS),
    "datasets": (None, ANSWERS),
    "lengths": ("1024,4096", ("ruler", "suite")),
    "haystack": (None, ("ruler", "suite")),
    "max_prompt_tokens": (None, ("longbench", "suite")),
    "max_new_tokens": (None, ANSWERS),
    "no_chat": (False, ANSWERS),
    "score": (None, ANSWERS),
    "minutes": (None, ANSWERS),
    "calibration": (None, ("peers",)),
    "sparsities": ("0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", ("pareto",)),
    "methods": ("learned,oracle,static", ("pareto",)),
    "prompt_tokens": (2048, ("pareto",)),
    "repeats": (3, ("pareto",)),
}


def prepare(options: argparse.Namespace, artifact: Artifact) -> Task:
    """Read and check what the task needs. Raises UserError for options or data that do not fit."""
    _owned(options)
    for name in ("limit", "max_prompt_tokens", "max_new_tokens"):
        if getattr(options, name) is not None:
            check_integer("--" + name.replace("_", "-"), getattr(options, name), 1)
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes must be more than 0, not {options.minutes:g}.")
    if options.score not in (None, "answers", *(runner.SCORES if options.engine == "transformers" else ())):
        raise UserError(f"--score {options.score} reads inside the model; it needs --engine transformers.")
    if options.record and options.task != "perplexity":
        raise UserError("--record stores perplexities; use it with --task perplexity.")
    changed = any(getattr(options, field.name, None) is not None for field in dataclasses.fields(PrefillConfig))
    if options.record and (changed or options.predictor != LEARNED or options.no_compensator):
        raise UserError("--record stores what the artifact scores as it is; leave out what changes that.")
    if options.record and artifact.folder:
        files.check_file(artifact.folder / "config.json")
    if options.out:
        files.check_file(Path(options.out) / resume.PREDICTIONS)
    if options.task not in ("ruler", "picks") and not options.data:
        raise UserError(f"--task {options.task} needs --data FILE.")
    return TASKS[options.task](options, artifact)


def _owned(options: argparse.Namespace) -> None:
    """Put defaults where an option was not given (None, or False of a switch); refuse those of other tasks."""
    for name, (default, owners) in OWNED.items():
        given = getattr(options, name)
        if given is None or given is False:
            setattr(options, name, default)
        elif options.task not in owners:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is an option of --task {', '.join(owners)}; leave it out for --task {options.task}.")


def _calibrated_on(sources: set[str], artifact: Artifact) -> int:
    shared = len(sources & set(artifact.calibration.get("document_rows", [])))
    if shared:
        print(f"fastfill: warning: {shared} of these documents were calibrated on; this is not held-out.", file=sys.stderr)
    return shared


def _documents(
    options: argparse.Namespace,
    artifact: Artifact,
    score: Score,
    apart: Sequence[Document] = (),
    **more: Any,
) -> Task:
    """A task over the first tokens of documents. apart: text that must not be among them."""
    check_integer("--tokens", options.tokens, 2)
    documents = data.load_documents(options.data)
    other = {document.text for document in apart}
    for document in documents:
        if document.text in other:
            raise UserError(f"{document.source} is evaluated on; thresholds must come from other text (--calibration).")

    def run(attachment: Attachment, loaded: LoadedModel) -> dict[str, Any]:
        if options.tokens > _positions(loaded):
            raise UserError(f"--tokens {options.tokens} is more than the {_positions(loaded)} that the model holds.")
        rows = data.first_tokens(loaded.tokenizer, documents, options.tokens, options.limit)
        shared = _calibrated_on({source for source, _ in rows}, artifact)
        texts = [[source, data.digest(ids)] for source, ids in rows]
        store = Store(options.out, resume.settings(options.task, attachment, artifact, texts, **more))
        scores = score(attachment, loaded, rows, store)
        return {**scores, "calibrated_on": shared, "sources": [source for source, _ in rows]}

    return run


def _perplexity(options: argparse.Namespace, artifact: Artifact) -> Task:
    check_integer("--continuation", options.continuation, 2)

    def score(attachment: Attachment, _: LoadedModel, rows: list[tuple[str, torch.Tensor]], store: Store) -> dict[str, Any]:
        return perplexity.evaluate(attachment, rows, continuation=options.continuation, store=store, seed=options.seed)

    return _documents(options, artifact, score, continuation=options.continuation)


def _recall(options: argparse.Namespace, artifact: Artifact) -> Task:
    return _documents(options, artifact, lambda attachment, _, rows, store: recall.evaluate(attachment, rows, store))


def _peers(options: argparse.Namespace, artifact: Artifact) -> Task:
    check_integer("--continuation", options.continuation, 2)
    if options.predictor != LEARNED or options.no_compensator:
        raise UserError("--task peers compares all predictors, with and without compensator; leave those options out.")
    other = data.load_documents(options.calibration) if options.calibration else [data.demo_document()]

    def score(
        attachment: Attachment, loaded: LoadedModel, rows: list[tuple[str, torch.Tensor]], store: Store
    ) -> dict[str, Any]:
        if not peers.Cost.of(attachment, options.tokens).sparse or not attachment.config.sparsity:
            raise UserError("--task peers needs a sparsity above 0 and documents long enough to be sparse (--tokens).")
        length = min(peers.SEQUENCE_LENGTH, options.tokens)
        sequences = data.sequences(loaded.tokenizer, other, length, options.seed)[: peers.SEQUENCES]
        found = peers.evaluate(
            attachment, artifact, rows, sequences, continuation=options.continuation, store=store, seed=options.seed
        )
        return {**found, "calibration": [document.source for document in other]}

    texts = resume.digest([document.text for document in other])
    more = {"continuation": options.continuation, "calibration": texts, "seed": options.seed}
    return _documents(options, artifact, score, other, **more)


def _pareto(options: argparse.Namespace, artifact: Artifact) -> Task:
    for name in ("continuation", "prompt_tokens"):
        check_integer("--" + name.replace("_", "-"), getattr(options, name), 2)
    check_integer("--repeats", options.repeats, 1)
    try:
        sparsities = [float(sparsity) for sparsity in options.sparsities.split(",")]
    except ValueError as error:
        raise UserError(f"--sparsities must be numbers separated by commas, not {options.sparsities!r}.") from error
    for sparsity in sparsities:
        check_sparsity(sparsity)
    methods = _names(options.methods) or []
    unknown = [name for name in methods if name not in (LEARNED, *BASELINES)]
    if unknown or not methods or len({*methods}) < len(methods) or len({*sparsities}) < len(sparsities):
        raise UserError(f"--methods and --sparsities name each once; the methods are {', '.join((LEARNED, *BASELINES))}.")
    if options.predictor != LEARNED:
        raise UserError("--task pareto takes its predictors from --methods; leave --predictor out.")

    def score(
        attachment: Attachment, loaded: LoadedModel, rows: list[tuple[str, torch.Tensor]], store: Store
    ) -> dict[str, Any]:
        if options.prompt_tokens >= _positions(loaded) or not peers.Cost.of(attachment, options.prompt_tokens).sparse:
            raise UserError(f"--prompt-tokens {options.prompt_tokens} is too short to be sparse, or more than the model holds.")
        return pareto.evaluate(
            attachment,
            artifact,
            rows,
            sparsities=sparsities,
            methods=methods,
            prompt_tokens=options.prompt_tokens,
            repeats=options.repeats,
            compensator=not options.no_compensator,
            continuation=options.continuation,
            store=store,
            seed=options.seed,
        )

    more = {name: getattr(options, name) for name in ("continuation", "prompt_tokens", "repeats", "seed")}
    # Times of two machines are not one result.
    more |= {"cpu": machine.describe()["cpu"], "threads": options.threads or torch.get_num_threads()}
    return _documents(options, artifact, score, **more)


def _picks(options: argparse.Namespace, artifact: Artifact) -> Task:
    check_integer("--tokens", options.tokens, 2)
    if options.limit is not None or options.out:
        raise UserError("--task picks reads one document, the first; leave --limit and --out out.")
    document = data.load_documents(options.data)[0] if options.data else data.demo_document()

    def run(attachment: Attachment, loaded: LoadedModel) -> dict[str, Any]:
        ids = torch.tensor(data.encode(loaded.tokenizer, document, options.tokens)[: min(options.tokens, _positions(loaded))])
        return picks.evaluate(attachment, (document.source, ids))

    return run


def _longbench(options: argparse.Namespace, artifact: Artifact) -> Task:
    rows = longbench.read(options.data, _names(options.datasets), options.limit)
    shared = _calibrated_on({row.source for row in rows}, artifact)

    def run(attachment: Attachment, loaded: LoadedModel) -> dict[str, Any]:
        made = _longbench_examples(options, loaded, rows)
        result = _answers(options, artifact, attachment, loaded, made, **longbench.chinese(rows))
        return {**longbench.named_metrics(result, rows), "calibrated_on": shared}

    return run


def _ruler(options: argparse.Namespace, artifact: Artifact) -> Task:
    rows = longbench.read(options.data) if options.data else []
    examples = _ruler_examples(options, rows, options.limit or RULER_EXAMPLES, _names(options.datasets))

    def run(attachment: Attachment, loaded: LoadedModel) -> dict[str, Any]:
        return _answers(options, artifact, attachment, loaded, examples(loaded))

    return run


def _suite(options: argparse.Namespace, artifact: Artifact) -> Task:
    """Rows in LongBench's format, and needles and variables beside them: one run, one table, one mean."""
    named, count = _names(options.datasets), options.limit or SUITE_EXAMPLES
    made = [name for name in ruler.TASKS if name != "qa"]  # its questions are in the rows
    hidden = [name for name in named or SUITE_RULER if name in made]
    others = [name for name in named or () if name not in made]
    rows = longbench.read(options.data, others, count) if others or not named else []
    shared = _calibrated_on({row.source for row in rows}, artifact)
    examples = _ruler_examples(options, [], count, hidden)

    def run(attachment: Attachment, loaded: LoadedModel) -> dict[str, Any]:
        both = [*_longbench_examples(options, loaded, rows), *(examples(loaded) if hidden else [])]
        result = _answers(options, artifact, attachment, loaded, both, **longbench.chinese(rows))
        return {**longbench.named_metrics(result, rows), "calibrated_on": shared}

    return run


def _longbench_examples(options: argparse.Namespace, loaded: LoadedModel, rows: Sequence[longbench.Row]) -> list[Example]:
    return longbench.examples(
        loaded.tokenizer,
        rows,
        _positions(loaded),
        max_prompt_tokens=options.max_prompt_tokens,
        max_new_tokens=options.max_new_tokens,
        chat=not options.no_chat,
    )


def _ruler_examples(
    options: argparse.Namespace, rows: Sequence[longbench.Row], count: int, names: Sequence[str] | None
) -> Callable[[LoadedModel], list[Example]]:
    lengths = _lengths(options.lengths)
    haystack = reading.text(options.haystack) if options.haystack else None

    def examples(loaded: LoadedModel) -> list[Example]:
        return ruler.examples(
            loaded.tokenizer,
            _positions(loaded),
            tasks=names,
            lengths=lengths,
            count=count,
            seed=options.seed,
            rows=[row.fields for row in rows],
            haystack=haystack,
            chat=not options.no_chat,
            max_new_tokens=options.max_new_tokens,
        )

    return examples


def _lengths(text: str) -> list[int | tuple[int, int]]:
    """'1024,2048-4096' -> [1024, (2048, 4096)], each once."""
    found: list[int | tuple[int, int]] = []
    for part in text.split(","):
        try:
            ends = [int(end) for end in part.split("-")]
        except ValueError as error:
            raise UserError(
                f"--lengths must be numbers separated by commas, or ranges such as 1024-4096, not {text[:60]!r}."
            ) from error
        for end in ends:
            check_integer("each length", end, 1)
        if len(ends) > 2 or ends[0] > ends[-1]:
            raise UserError(f"--lengths: a range goes from its shorter to its longer end, not {part[:60]!r}.")
        length = ends[0] if ends[0] == ends[-1] else (ends[0], ends[1])
        found += [length] if length not in found else []
    return found


def _answers(
    options: argparse.Namespace,
    artifact: Artifact,
    attachment: Attachment,
    loaded: LoadedModel,
    examples: list[Example],
    **more: Any,
) -> dict[str, Any]:
    score = options.score or ("both" if options.engine == "transformers" else "answers")
    settings = resume.settings(options.task, attachment, artifact, identity(examples), score=score, **more)
    store = Store(options.out, settings)
    result = runner.run(attachment, loaded.tokenizer, examples, store, seed=options.seed, score=score, minutes=options.minutes)
    if attachment.config.sparsity and not result["sparse_tokens"]:
        least = attachment.config.shortest_prompt
        print(f"fastfill: warning: all prompts stayed dense, as those under {least} tokens do.", file=sys.stderr)
    limits = {"max_prompt_tokens": options.max_prompt_tokens, "max_new_tokens": options.max_new_tokens}
    return {**result, **limits, "chat": not options.no_chat}


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def _positions(loaded: LoadedModel) -> int:
    return context.positions(loaded.model.config) or context.UNLIMITED


TASKS: dict[str, Callable[[argparse.Namespace, Artifact], Task]] = {
    "perplexity": _perplexity,
    "longbench": _longbench,
    "ruler": _ruler,
    "suite": _suite,
    "recall": _recall,
    "picks": _picks,
    "peers": _peers,
    "pareto": _pareto,
}
