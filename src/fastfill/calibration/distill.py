"""End to end: train predictors and compensators of all layers together until the sparse logits match the dense ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from fastfill.calibration import capture
from fastfill.calibration.fit import TENSORS
from fastfill.calibration.student import StudentFFN, Weights, stand_ins
from fastfill.calibration.team import ALONE, Team
from fastfill.config import CalibrationConfig
from fastfill.errors import UserError
from fastfill.families import Anatomy
from fastfill.progress import stage

PREDICTOR, COMPENSATOR = (tuple(f"{network}.{part}" for part in TENSORS) for network in ("predictor", "compensator"))
TRAINED = PREDICTOR + COMPENSATOR


class Teacher:
    """The dense model's last hidden states. outputs: those of the last layer, (S, T, H), for sequences (S, T) already
    computed, which saves a quarter of a step."""

    def __init__(self, model: Any, anatomy: Anatomy, tokens: torch.Tensor, outputs: torch.Tensor):
        self.model, self.anatomy = model, anatomy
        self.known = {_key(row): out for row, out in zip(tokens, outputs, strict=True)}

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (1, T) -> (T, H)."""
        out = self.known.get(_key(ids[0]))
        layers = 0 if out is None else len(self.anatomy.layers)
        with capture.known(self.anatomy, layers, ids if out is None else out[None]):
            return self.anatomy.base(input_ids=ids, use_cache=False)[0][0]


def _key(ids: torch.Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()


class Distiller:
    """Training state: fp32 weights per layer, AdamW moments, the step. One step is `config.batch` sequences, shared among the
    team; all of it can be saved as tensors and resumed."""

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        students: list[StudentFFN],
        config: CalibrationConfig,
        head: int,
        teacher: Teacher,
        team: Team = ALONE,
    ):
        self.model, self.anatomy, self.students, self.config, self.head = model, anatomy, students, config, head
        self.teacher, self.team = teacher, team
        self.step_done = 0
        self.losses: list[float] = []
        self.weights: list[Weights] = []
        groups = []
        for student in students:
            student.weights = {name: student.weights[name].detach().clone().requires_grad_() for name in TRAINED}
            self.weights.append(student.weights)
            for name, weight in student.weights.items():
                # Adam's step has no scale, and tensors differ 20-fold in theirs, those of different models too.
                rate = config.predictor_lr if name.startswith("predictor") else config.compensator_lr
                rate *= (float(weight.detach().std(correction=0)) if weight.numel() else 0.0) or 1.0
                groups.append({"params": [weight], "lr": rate, "peak": rate})
        cuda = self.anatomy.ffns[0].gate.is_cuda  # fused there: six launches a layer instead of seventy
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda)

    def step(self, ids: torch.Tensor) -> float:
        """One step on ids (batch, T), of which each process of a team takes its share. Loss: mean over the tokens behind the
        dense head of KL(dense || sparse) of the logits, nats, and `answer_weight` times that over the teacher-forced answer.
        Raises UserError when it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._warm_cosine()
        self.optimizer.zero_grad(set_to_none=True)
        mine = ids[self.team.share(len(ids))].to(self.anatomy.ffns[0].gate.device)
        (loss,) = self.team.total(sum(self._backward(row[None], len(ids)) for row in mine))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.team.sum(*(p.grad for p in parameters if p.grad is not None))
        norms = [
            float(torch.nn.utils.clip_grad_norm_([layer[name] for layer in self.weights for name in network], 1.0))
            for network in (PREDICTOR, COMPENSATOR)
        ]
        if not all(map(math.isfinite, (loss, *norms))):
            raise UserError(
                f"The distillation diverged at step {self.step_done + 1} (its loss is {loss:.3g}, its gradients {norms[0]:.3g} "
                f"and {norms[1]:.3g}); nothing was written. Delete the checkpoint and use lower rates (--compensator-lr, "
                "--predictor-lr)."
            )
        self.optimizer.step()
        self.step_done += 1
        self.losses.append(loss)
        return loss

    def rehearse(self, ids: torch.Tensor) -> None:
        """The work of a step on ids (batch, T), without effect, to time it."""
        for row in ids[self.team.share(len(ids))].to(self.anatomy.ffns[0].gate.device):
            self._backward(row[None], len(ids))
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def judge(self, ids: torch.Tensor) -> float:
        """The loss of ids (S, T) as `step` has it, without a step; the same positions are scored each time."""
        mine, loss = ids[self.team.share(len(ids))].to(self.anatomy.ffns[0].gate.device), 0.0
        with stage("text set aside", len(mine)) as bar:
            for row in mine:
                loss += float(self._loss(row[None], len(ids), 0))
                bar.step()
        (total,) = self.team.total(loss)
        return total

    def _backward(self, ids: torch.Tensor, batch: int) -> float:
        """Add the gradient of ids (1, T), one of a batch; their part of the loss."""
        with torch.enable_grad():
            loss = self._loss(ids, batch, self.step_done)
            loss.backward()
        return float(loss.detach())

    def _loss(self, ids: torch.Tensor, batch: int, turn: int) -> torch.Tensor:
        """The part of ids (1, T), one of a batch, in the loss."""
        head = self.anatomy.head
        prompt, answer = self._scored(ids.shape[1], turn)
        scored = torch.cat([prompt, answer])
        with torch.no_grad():
            teacher = head(self.teacher.hidden(ids)[scored])
        with stand_ins(self.anatomy, self.students):
            student = head(self.anatomy.base(input_ids=ids, use_cache=False)[0][0, scored])
        kl = kl_divergence(teacher, student)
        loss = kl[: len(prompt)].mean() / batch
        if len(answer):
            loss = loss + self.config.answer_weight * kl[len(prompt) :].mean() / batch
        return loss

    def _scored(self, tokens: int, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of a sequence whose logits are compared: every `loss_stride`-th of the prompt behind the dense head, others
        at each turn, and all of the answer. With 152,000 words the logits of all of them take half as long as the layers."""
        stop = self.students[0].stop(tokens) if self.config.answer else tokens
        first = self.head + turn % min(self.config.loss_stride, stop - self.head)
        return torch.arange(first, stop, self.config.loss_stride), torch.arange(stop, tokens)

    def _warm_cosine(self) -> float:
        warm = max(1, min(20, self.config.steps // 10))
        if self.step_done < warm:
            return (self.step_done + 1) / warm
        done = (self.step_done - warm) / max(1, self.config.steps - warm)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments as plain tensors."""
        tensors = {"losses": torch.tensor(self.losses)}
        for index, layer in enumerate(self.weights):
            for name in TRAINED:
                tensors[f"{index}.{name}"] = layer[name].detach()
                for moment in ("exp_avg", "exp_avg_sq"):
                    if layer[name] in self.optimizer.state:
                        tensors[f"{index}.{name}.{moment}"] = self.optimizer.state[layer[name]][moment]
        return tensors

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        self.losses = tensors["losses"].tolist()
        self.step_done = len(self.losses)
        with torch.no_grad():
            for index, layer in enumerate(self.weights):
                for name in TRAINED:
                    layer[name].copy_(tensors[f"{index}.{name}"])
                    if f"{index}.{name}.exp_avg" in tensors:
                        self.optimizer.state[layer[name]] = {
                            "step": torch.tensor(float(self.step_done), device=layer[name].device),
                            "exp_avg": tensors[f"{index}.{name}.exp_avg"].to(layer[name].device),
                            "exp_avg_sq": tensors[f"{index}.{name}.exp_avg_sq"].to(layer[name].device),
                        }


class _KL(torch.autograd.Function):
    """KL(softmax(t) || softmax(s)) per row with its own gradient, softmax(s) - softmax(t): half the memory of autograd's."""

    @staticmethod
    def forward(ctx: Any, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        out, grads = [], []
        for t, s in zip(teacher.split(16), student.split(16), strict=True):
            log_t, log_s = F.log_softmax(t.float(), -1), F.log_softmax(s.float(), -1)
            p = log_t.exp()
            out.append((p * (log_t - log_s)).sum(-1))
            grads.append((log_s.exp_().sub_(p)).to(student.dtype))
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        (saved,) = ctx.saved_tensors
        return None, saved * grad[0][:, None].to(saved.dtype)


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """(T, V), (T, V) logits -> (T,) KL(teacher || student) in nats, differentiable in the student."""
    return _KL.apply(teacher, student)
