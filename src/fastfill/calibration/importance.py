"""How much each layer's FFN matters: the weights that `schedule.allocate` shares the neuron budget by."""

from __future__ import annotations

from typing import Any

import torch

from fastfill.calibration.distill import kl_divergence
from fastfill.calibration.student import StudentFFN, swapped
from fastfill.calibration.team import ALONE, Team
from fastfill.families import Anatomy
from fastfill.progress import stage


@torch.no_grad()
def sensitivity(
    model: Any, anatomy: Anatomy, students: list[StudentFFN], tokens: torch.Tensor, team: Team = ALONE
) -> list[float]:
    """Mean KL (nats per token) to the dense logits when one layer alone is sparse, for each layer. Ours. tokens: (S, T)."""
    head = model.get_output_embeddings()
    device = anatomy.ffns[0].gate.device
    rows = [row[None].to(device) for row in tokens[team.share(len(tokens))]]
    teachers = [anatomy.base(input_ids=row, use_cache=False)[0][0, students[0].head :] for row in rows]
    intermediate = anatomy.intermediate
    kept = [student.kept for student in students]
    costs = []
    try:
        with stage("sensitivity of each layer", len(students)) as bar, swapped(anatomy, students):
            for student in students:
                student.kept = intermediate
            for student, keep in zip(students, kept, strict=True):
                student.kept = keep
                total = count = 0.0
                for row, teacher in zip(rows, teachers, strict=True):
                    hidden = anatomy.base(input_ids=row, use_cache=False)[0][0, student.head :]
                    divergence = kl_divergence(head(teacher), head(hidden))
                    total, count = total + float(divergence.sum()), count + len(divergence)
                student.kept = intermediate
                total, count = team.total(total, count)
                costs.append(max(total / count, 1e-6))
                bar.step(note=f"{costs[-1]:.4f} nats")
    finally:
        for student, keep in zip(students, kept, strict=True):
            student.kept = keep
    return costs


@torch.no_grad()
def token_mixing(model: Any, anatomy: Anatomy, tokens: torch.Tensor, team: Team = ALONE) -> list[float]:
    """Mean attention mass that goes neither to the token itself nor to the first token (the sink), for each layer: how much
    the layer mixes tokens. The paper names token-mixing importance; this formula is ours. tokens: (S, T)."""
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
