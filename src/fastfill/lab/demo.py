"""The main job on one page: a long document and a question, dense and sparse, speed and quality side by side."""

from __future__ import annotations

from typing import Any

import torch

from fastfill import config as cfg
from fastfill import context, data, kernels, machine, reading, tables
from fastfill.engines import transformers
from fastfill.engines.transformers import TransformersEngine
from fastfill.errors import UserError
from fastfill.lab import perplexity, speed
from fastfill.progress import stage

QUESTION = "According to the report, what is the name of the ship and who was her captain?"


def fill_in(document: str | None, question: str | None) -> tuple[str, str]:
    """Defaults come with the package; a document of the user's gets a question that fits any."""
    question = question or (QUESTION if document is None else "What is this document about?")
    return (data.demo_document().text if document is None else document), question


def prompt(engine: TransformersEngine, document: str, question: str, max_new_tokens: int) -> torch.Tensor:
    """Document and question as one user turn -> ids (1, T). Raises UserError if the model cannot hold them and the answer."""
    text = reading.whole(f"{document.strip()}\n\nQuestion: {question}")
    context.check_characters(engine.shape, text, "The document")
    ids = transformers.encode(engine.tokenizer, text, chat=True)
    transformers.check_length(engine.model, ids, max_new_tokens)
    return ids


def run(
    engine: TransformersEngine,
    document: str | None = None,
    question: str | None = None,
    *,
    repeats: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Print the comparison and return its numbers. Raises UserError if the prompt is so short that it would stay dense."""
    document, question = fill_in(document, question)
    ids = prompt(engine, document, question, max_new_tokens)
    out = tables.console()
    config = engine.config
    out.print(f"{engine.name}, {ids.shape[1]} prompt tokens, {config.sparsity:.0%} FFN sparsity, blocks of {config.block_size}")
    out.print(kernels.describe())

    if config.sparsity and ids.shape[1] < config.shortest_prompt:
        raise UserError(
            f"The prompt has {ids.shape[1]} tokens; with these settings prompts under {config.shortest_prompt} stay dense."
        )
    text = transformers.encode(engine.tokenizer, document.strip(), chat=False)[0]
    least = config.shortest_prompt + perplexity.CONTINUATION
    if len(text) < least:
        raise UserError(f"The document has {len(text)} tokens; {least} are needed to measure perplexity, too.")
    with stage("TTFT", 2 * (repeats + 2)) as bar:
        row = speed.ttft(engine, ids, repeats, bar.step)
        row |= speed.split(engine, ids, 1, row, bar.step)
    scores = perplexity.evaluate(engine.attachment, [("the document", text)])
    with stage("answers", 2) as bar:
        with engine.dense():
            dense_ids = engine.generate(ids, max_new_tokens)
        bar.step()
        sparse_ids = engine.generate(ids, max_new_tokens)
        bar.step()
    answers = [engine.tokenizer.decode(new, skip_special_tokens=True).strip() for new in (dense_ids, sparse_ids)]

    gain = f"{row['speedup']:.2f}x" if row["sparse_tokens"] else "all dense"
    tables.table(
        f"median of {row['rounds']}, in alternation",
        ["", "dense", "sparse", ""],
        [
            ["TTFT", f"{row['ttft_dense_s']:.3f} s", f"{row['ttft_sparse_s']:.3f} s", gain],
            ["of which FFN", f"{row['ffn_dense_s']:.3f} s", f"{row['ffn_sparse_s']:.3f} s", f"{row['ffn_ratio']:.2f} of dense"],
            [
                "ppl of sparse tokens",
                f"{scores['ppl_dense']:.2f}",
                f"{scores['ppl_sparse']:.2f}",
                f"{scores['ppl_ratio']:.2f}x",
            ],
            [
                "ppl of what follows",
                f"{scores['cont_ppl_dense']:.2f}",
                f"{scores['cont_ppl_sparse']:.2f}",
                f"{scores['cont_ppl_ratio']:.2f}x",
            ],
        ],
    )
    if row["ceiling"]:
        out.print(f"ceiling {row['ceiling']:.2f}x: the FFN is {row['ffn_share']:.0%} of the dense time")
    out.print(f"prompt: {row['sparse_tokens']:,} tokens prefilled sparsely, {row['dense_tokens']:,} densely")
    out.headed("\n[bold]Question[/bold] ", question)
    out.headed("[bold]Dense  [/bold] ", answers[0])
    out.headed("[bold]Sparse [/bold] ", answers[1])
    return {
        "model": engine.name,
        "prompt_tokens": row["prompt_tokens"],
        **cfg.to_dict(config),
        "kernel": engine.choices["kernel"],
        **{key: row[key] for key in ("ttft_dense_s", "ttft_sparse_s", "speedup", "ffn_share", "ceiling", "rounds")},
        **{key: row[key] for key in ("ffn_dense_s", "ffn_sparse_s", "sparse_tokens", "dense_tokens")},
        **{key: scores[key] for key in ("ppl_dense", "ppl_sparse", "ppl_ratio", "kl")},
        **{key: scores[key] for key in ("cont_ppl_dense", "cont_ppl_sparse", "cont_ppl_ratio", "context_kept")},
        "question": question,
        "answer_dense": answers[0],
        "answer_sparse": answers[1],
        "machine": machine.describe(),
    }
