"""Figures by layer: sparsity, which neurons are selected, and how well the predictor finds them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from fastfill.errors import UserError
from fastfill.lab.report.draw import HEX, Sheet, as_percent, heat, label, style
from fastfill.lab.report.values import NAN, Table, count, known, mean, number, numbers, percent, short, text

Document = dict[str, Any]
COLUMNS = 512  # neurons of a map are averaged into at most as many columns; a screen shows no more


def sparsity(documents: Sequence[Document]) -> str:
    """Share of neurons skipped by layer, from `inspect --json`; one document as bars, several as lines."""
    with Sheet("sparsity", "Sparsity by layer", sparsity_caption(documents), 320) as sheet:
        (ax,) = sheet.axes()
        for index, document in enumerate(documents):
            values = [number(value) for value in document["layer_sparsity"]]
            look, name = style(index), _artifact_name(document, documents)
            if len(documents) == 1:
                for layer, bar in enumerate(ax.bar(range(len(values)), values, color=HEX[look.colour], width=0.75, label=name)):
                    bar.set_gid(f"layer-{layer}")
            else:
                ax.plot(
                    values, color=HEX[look.colour], marker=look.marker, linestyle=look.line, label=name, gid=f"series-{index}"
                )
            ax.axhline(number(document.get("sparsity")), color=HEX["ink"], linewidth=1.2, linestyle=":", label="mean asked for")
        ax.set_title("share of FFN neurons skipped")
        ax.set_xlabel("layer")
        ax.set_ylim(bottom=0)
        ax.grid(axis="x", visible=False)
        as_percent(ax.yaxis)
        whole_numbers(ax.xaxis)
        sheet.legend([ax])
    return sheet.svg


def sparsity_caption(documents: Sequence[Document]) -> str:
    values = [number(value) for value in documents[0]["layer_sparsity"]]
    if not known(values):
        return "The artifact has no sparsity by layer."
    least, most = min(known(values)), max(known(values))
    return (
        f"{_artifact_name(documents[0], documents)}: layers skip from {percent(least)} (layer {values.index(least)}) to "
        f"{percent(most)} (layer {values.index(most)}) of their neurons; the mean is {percent(mean(values))}."
    )


def sparsity_tables(documents: Sequence[Document]) -> list[Table]:
    return [
        Table(
            f"Sparsity by layer, {_artifact_name(document, documents)}",
            ["layer", "neurons kept", "neurons skipped (share)"],
            [
                [str(layer), count(kept), percent(value, 2)]
                for layer, (kept, value) in enumerate(zip(document["kept"], document["layer_sparsity"], strict=False))
            ],
        )
        for document in documents
    ]


def _artifact_name(document: Document, documents: Sequence[Document]) -> str:
    base = document.get("base_model")
    name = short(base.get("name", "artifact")) if isinstance(base, dict) else "artifact"
    return f"{name} ({documents.index(document) + 1})" if len(documents) > 1 else name


def picks(document: Document, name: str = "picks") -> str:
    """Left: neurons of each layer, sorted by how often a block selects them. Right: what two blocks in sequence
    share. document: what `evaluate --task picks` prints. name: prefix of the ids."""
    import numpy as np

    share = [[number(value) for value in layer] for layer in document["share"]]
    widest = max((len(layer) for layer in share), default=1)
    grid = np.full((len(share), widest), np.nan)
    for row, layer in enumerate(share):
        grid[row, : len(layer)] = layer
    overlap = [number(value) for value in document["overlap"]]
    with Sheet(name, "Selected neurons by layer", picks_caption(document), 130 + 11 * max(len(share), 10)) as sheet:
        left, right = sheet.axes(1, 2, width_ratios=(3, 2))
        heat(left, np.nan_to_num(np.clip(grid, 0, 1)), extent=(0, 1, len(share) - 0.5, -0.5))
        left.set_title("share of blocks that select a neuron (filled: all)")
        left.set_xlabel("neurons of the layer, most selected first")
        left.set_ylabel("layer")
        as_percent(left.xaxis)
        whole_numbers(left.yaxis)
        right.plot(overlap, range(len(overlap)), color=HEX["blue"], marker="o", markersize=5, gid="series-0", label="measured")
        chance = _chance(document)
        right.plot(
            chance, range(len(chance)), color=HEX["orange"], linestyle="--", gid="series-1", label="by chance (kept / all)"
        )
        right.set_ylim(len(share) - 0.5, -0.5)
        right.set_xlim(0, 1)
        right.set_title("selection shared with the block before")
        as_percent(right.xaxis)
        whole_numbers(right.yaxis)
        sheet.legend([right])
    return sheet.svg


def picks_caption(document: Document) -> str:
    bins = [number(value) for layer in document["share"] for value in layer]
    overlap = mean(number(value) for value in document["overlap"])
    always, never = mean(float(v >= 0.95) for v in known(bins)), mean(float(v <= 0.05) for v in known(bins))
    return (
        f"On {text(document.get('document', 'the document'), 60)}, {percent(always, 0)} of the neurons are selected by nearly "
        f"every block and {percent(never, 0)} by hardly any; a block shares {percent(overlap, 0)} of its selection with "
        f"the block before (by chance it would be {percent(mean(_chance(document)), 0)})."
    )


def picks_tables(document: Document) -> list[Table]:
    rows = []
    for layer, (values, overlap) in enumerate(zip(document["share"], document["overlap"], strict=False)):
        share = known(number(value) for value in values)
        kept = document["kept"][layer] if layer < len(document["kept"]) else None
        always, never = (
            mean(float(test) for test in tests) for tests in ([v >= 0.95 for v in share], [v <= 0.05 for v in share])
        )
        chance = _chance(document)[layer] if layer < len(document["kept"]) else NAN
        rows.append([str(layer), count(kept), *(percent(v) for v in (always, never, overlap, chance))])
    columns = [
        "layer",
        "neurons kept",
        "selected by 95 % of blocks or more",
        "by 5 % or less",
        "shared with block before",
        "by chance",
    ]
    return [Table("Selection by layer (shares of the layer's neurons, then of a block's selection)", columns, rows)]


def _chance(document: Document) -> list[float]:
    """Overlap of two choices that know nothing of each other: K / F."""
    neurons = number(document.get("neurons"))
    return [number(kept) / neurons if neurons > 0 else NAN for kept in document["kept"]]


def maps(document: Document, name: str = "maps") -> str:
    """Block by neuron, a panel per layer of document["maps"]; neurons most selected first. Needs only `neurons` and `maps` of
    what `evaluate --task picks` prints. name: prefix of the ids.

    Raises UserError if a map is damaged.
    """
    found = [(entry.get("layer"), picked(entry.get("blocks"), document.get("neurons"))) for entry in document["maps"]]
    with Sheet(name, "Selected neurons by block", maps_caption(document), 40 + 165 * max(len(found), 1)) as sheet:
        for ax, (layer, chosen) in zip(sheet.axes(len(found), 1), found, strict=True):
            blocks, neurons = chosen.shape
            heat(ax, _columns(chosen[:, (-chosen.sum(0)).argsort(kind="stable")]), extent=(0, neurons, blocks - 0.5, -0.5))
            ax.set_title(f"layer {count(layer)}: {round(chosen.sum() / max(blocks, 1)):,} of {neurons:,} neurons a block")
            ax.set_ylabel("block")
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            whole_numbers(ax.yaxis)
        ax.set_xlabel("neurons of the layer, most selected first (filled: selected)")
    return sheet.svg


def maps_caption(document: Document) -> str:
    parts = []
    for entry in document["maps"]:
        chosen = picked(entry.get("blocks"), document.get("neurons"))
        always, ever = chosen.all(0).sum(), chosen.any(0).sum()
        parts.append(f"layer {count(entry.get('layer'))}: {always:,} in every block, {ever:,} in any")
    neurons = count(document.get("neurons"))
    return f"What the blocks of one document select of the {neurons} neurons. " + "; ".join(parts).capitalize() + "."


def maps_tables(document: Document) -> list[Table]:
    rows = []
    for entry in document["maps"]:
        chosen = picked(entry.get("blocks"), document.get("neurons"))
        counts = chosen.sum(1) if len(chosen) else [0]
        numbers_ = (len(chosen), min(counts), max(counts), chosen.all(0).sum(), chosen.any(0).sum())
        rows.append([count(entry.get("layer")), *(f"{value:,}" for value in numbers_)])
    columns = ["layer", "blocks", "fewest selected in a block", "most", "selected in every block", "selected in any"]
    return [Table("Neurons selected by the blocks of one document", columns, rows)]


def picked(blocks: Any, neurons: Any) -> Any:
    """Bit sets in base64, one per block -> booleans (N, F). Raises UserError if one does not hold `neurons` bits."""
    import numpy as np

    size = int(number(neurons)) if number(neurons) > 0 else 0
    try:
        raw = [base64.b64decode(block, validate=True) for block in blocks]
    except (binascii.Error, TypeError, ValueError):
        raw = [b""]  # of no size that fits
    if not size or any(len(block) != -(-size // 8) for block in raw):
        raise UserError(f"A neuron map does not hold {size} bits for each block; run `fastfill evaluate --task picks` again.")
    bits = np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(len(raw), -1)
    return np.unpackbits(bits, axis=1)[:, :size].astype(bool)


def _columns(chosen: Any) -> Any:
    """(N, F) -> (N, at most COLUMNS), means of neighbours."""
    import numpy as np

    if not chosen.size:
        return np.zeros((1, 1))
    edges = np.linspace(0, chosen.shape[1], min(COLUMNS, chosen.shape[1]) + 1).round().astype(int)
    return np.add.reduceat(chosen.astype(float), edges[:-1], axis=1) / np.diff(edges)


def recall(documents: Sequence[Document]) -> str:
    """Predictor against oracle by layer, from `evaluate --task recall`. Left: ids in common. Right: importance held."""
    with Sheet("recall", "Predictor recall by layer", recall_caption(documents), 360) as sheet:
        left, right = sheet.axes(1, 2)
        for index, document in enumerate(documents):
            look, layers = style(2 * index), document["layers"]
            options = {"color": HEX[look.colour], "marker": look.marker, "linestyle": "-", "markersize": 5}
            name = f" ({_recall_name(document)})" if len(documents) > 1 else ""
            at = numbers(layers, "layer")
            left.plot(at, numbers(layers, "recall"), label=f"predictor{name}", gid=f"series-{index}", **options)
            right.plot(at, numbers(layers, "held"), label=f"predictor{name}", gid=f"held-{index}", **options)
            options |= {"color": HEX["ink"], "marker": "", "linestyle": "--"}
            right.plot(at, numbers(layers, "held_oracle"), label=f"oracle{name}", gid=f"oracle-{index}", **options)
            options |= {"color": HEX["muted"], "linestyle": ":"}
            left.plot(at, numbers(layers, "by_chance"), label=f"by chance{name}", gid=f"chance-{index}", **options)
        left.set_title("oracle's neurons that are selected")
        right.set_title("importance that the selection holds")
        for ax in (left, right):
            ax.set_xlabel("layer")
            ax.set_ylim(0, 1.02)
            as_percent(ax.yaxis)
            whole_numbers(ax.xaxis)
        sheet.legend([left, right])
    return sheet.svg


def _recall_name(document: Document) -> str:
    return f"{label(document.get('predictor', '?'))}, {percent(document.get('sparsity'), 0)}"


def recall_caption(documents: Sequence[Document]) -> str:
    document = documents[0]
    layers = [line for line in document["layers"] if known([number(line.get("recovery"))])]
    worst = min(layers, key=lambda line: number(line["recovery"]), default=None)
    end = f", least in layer {count(worst.get('layer'))} ({percent(worst['recovery'])})" if worst else ""
    return (
        f"The predictor selects {percent(document.get('recall'))} of the oracle's neurons, and its selection holds "
        f"{percent(document.get('recovery'))} of the importance that the oracle's hold{end}."
    )


def recall_tables(documents: Sequence[Document]) -> list[Table]:
    keys = ("recall", "by_chance", "held", "held_oracle", "recovery")
    columns = [
        "layer",
        "neurons kept",
        "oracle's neurons selected",
        "by chance",
        "importance held",
        "held by oracle",
        "of the oracle's",
    ]
    return [
        Table(
            f"Recall by layer, predictor {_recall_name(document)}",
            columns,
            [
                [count(line.get("layer")), count(line.get("kept")), *(percent(line.get(key)) for key in keys)]
                for line in document["layers"]
            ],
        )
        for document in documents
    ]


def whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
