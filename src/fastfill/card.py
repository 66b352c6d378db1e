"""The model card of an artifact: the README.md of its folder, and its page on the Hugging Face hub."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastfill import hub
from fastfill.config import PrefillConfig
from fastfill.errors import printable


def page(
    base_model: dict[str, Any],
    prefill: PrefillConfig,
    shares: dict[str, float],
    calibration: dict[str, Any],
    quality: dict[str, Any],
) -> str:
    """What an artifact is for, how it was made, what it scores. The arguments are its parts; shares: `Artifact.flops`."""
    lines = [
        *_front_matter(base_model["name"]),
        f"# fastfill artifact for {base_model['name']}",
        "",
        f"Sparse prefill for this model at {prefill.sparsity:.0%} FFN sparsity in blocks of {prefill.block_size} tokens: "
        f"{shares['total']:.1%} of the dense FFN's multiply-adds per sparse token "
        f"(predictor {shares['predictor']:.1%}, compensator {shares['compensator']:.1%}).",
        "",
        "```python",
        "with fastfill.attach(model, ARTIFACT_FOLDER):",
        "    model.generate(...)",
        "```",
        "",
        "## How it was made",
        "",
        f"{calibration.get('sequences', 0)} sequences of text from {documents(calibration)}; "
        f"{calibration.get('tokens_distilled', 0)} tokens of end-to-end distillation; {calibration.get('seconds', 0):.0f} s. "
        "Settings, documents and machine are in `config.json` under `calibration`.",
        "",
        "## What it scores",
        "",
    ]
    if quality:
        lines += ["| measure | value |", "|---|---|"]
        single = {key: value for key, value in quality.items() if not isinstance(value, (dict, list))}
        lines += [f"| {printable(key, 60)} | {printable(str(value), 200)} |" for key, value in single.items()]
    else:
        lines.append("Not measured yet: `fastfill evaluate MODEL --artifact DIR --data HELD_OUT --record`.")
    return "\n".join(lines) + "\n"


def documents(calibration: dict[str, Any]) -> str:
    """Where the calibration text came from, sources of many documents first; of more than five, four and a number."""
    rows = Counter(row.split("#")[0] for row in calibration.get("document_rows", []))
    names = sorted(calibration.get("documents", []), key=lambda name: -rows[name])
    shown = [printable(name, 80) for name in names[: 5 if len(names) <= 5 else 4]]
    shown += [f"{len(names) - 4} more"] if len(names) > 5 else []
    return ", ".join(shown) or "unknown sources"


def _front_matter(name: str) -> list[str]:
    """What the hub reads of a page. base_model: where the model's name is that of a repository. The license is the author's to
    name."""
    base = [f"base_model: {name}"] if hub.is_repository(name) and not name.endswith(".gguf") else []
    return ["---", *base, "library_name: fastfill", "tags:", "- fastfill", "- sparse-prefill", "---", ""]
