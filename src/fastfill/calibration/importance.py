"""How much each layer's FFN matters: the weights that `schedule.allocate` shares the neuron budget by."""

from __future__ import annotations

from typing import Any

import torch

from fastfill.calibration import capture
from fastfill.calibration.distill import kl_divergence
from fastfill.calibration.student import StudentFFN
from fastfill.calibration.team import ALONE, Team
from fastfill.families import Anatomy
from fastfill.progress import stage
from fastfill.swap import swapped


@torch.no_grad()
def sensitivity(
    model: Any, anatomy: Anatomy, students: list[StudentFFN], tokens: torch.Tensor, stride: int = 1, team: Team = ALONE
) -> list[float]:
    """Mean KL (nats per token) to the dense logits when one layer alone is sparse, for each layer. Ours. tokens: (S, T); every
    `stride`-th behind the dense head is scored.

    Layers before the sparse one are not recomputed; the head runs only on scored tokens.
    """
    head = anatomy.head
    rows = tokens[team.share(len(tokens))]
    scored = slice(students[0].head, None, stride)
    costs = [0.0] * len(students)
    count = 0
    with stage("sensitivity of each layer", len(rows) * len(students)) as bar:
        for row in rows:
            ids = row[None].to(anatomy.ffns[0].gate.device)
            with capture.layer_calls(anatomy) as calls:
                teacher = head(anatomy.base(input_ids=ids, use_cache=False)[0][0, scored])
            count += len(teacher)
            for layer, student in enumerate(students):
                with capture.known(anatomy, layer, calls[layer][0]), swapped([(anatomy.ffns[layer].module, student)]):
                    hidden = anatomy.base(input_ids=ids, use_cache=False)[0][0, scored]
                costs[layer] += float(kl_divergence(teacher, head(hidden)).sum())
                bar.step()
    *costs, tokens_scored = team.total(*costs, count)
    return [max(cost / tokens_scored, 1e-6) for cost in costs]


@torch.no_grad()
def token_mixing(model: Any, anatomy: Anatomy, tokens: torch.Tensor, team: Team = ALONE) -> list[float]:
    """Mean attention mass that goes neither to the token itself nor to the first token (the sink), for each layer: how much
    the layer mixes tokens. The paper names token-mixing importance; this formula is ours. tokens: (S, T).
    Every layer must have an attention."""
    before = model.config._attn_implementation
    sums = [0.0] * len(anatomy.attentions)

    def note(index: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            attention = out[1].float()  # (1, heads, T, T)
            own = attention.diagonal(dim1=-2, dim2=-1)[..., 1:]
            sums[index] += float((1 - own - attention[..., 1:, 0]).clamp_min(0).mean())

        return hook

    hooks = [module.register_forward_hook(note(index)) for index, module in enumerate(anatomy.attentions)]
    try:
        model.set_attn_implementation("eager")  # the others do not return the attention weights
        with stage("token mixing of each layer", len(tokens)) as bar:
            for row in tokens[team.share(len(tokens))]:
                anatomy.base(input_ids=row[None].to(anatomy.ffns[0].gate.device), use_cache=False)
                bar.step()
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    return [max(total / len(tokens), 1e-6) for total in team.total(*sums)]
