"""Layer by layer: fit the predictor to what each token needs, and the compensator to what the selection leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fastfill import kernels
from fastfill.calibration.team import ALONE, Team
from fastfill.config import CalibrationConfig
from fastfill.ffn import FFN, energy

TENSORS = "w_in", "w_out", "bias"  # of a predictor, and of a compensator
CHUNK = 4096  # tokens whose (T, F) activations are in memory at a time


def shares(h: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Activations (T, F) -> the share of its token's importance that each neuron has, fp32. norm: `FFN.down_norm`."""
    return F.normalize(energy(h, norm), p=1, dim=-1)


def statistics(x: torch.Tensor, h: torch.Tensor, ffn: FFN, team: Team = ALONE) -> dict[str, torch.Tensor]:
    """Of the FFN's inputs x (T, H) and activations h (T, F): mean importance (F,), normalised per token, and RMS of the inputs
    (H,). Here and below, x and h of a team are what this process has of the text, and the result is that of all its text."""
    total, norm = torch.zeros(ffn.neurons, device=x.device), ffn.down_norm()
    for part in h.split(CHUNK):
        total += shares(part, norm).sum(0)
    squares = x.float().square().sum(0)
    team.sum(total, squares)
    _, tokens = team.place(len(x))
    return {"importance": total / tokens, "input_rms": (squares / tokens).sqrt()}


def _rms(x: torch.Tensor, team: Team) -> torch.Tensor:
    squares, count = team.total(float(x.float().square().sum(dtype=torch.float64)), x.numel())
    return torch.tensor((squares / count) ** 0.5, device=x.device).clamp_min(1e-6)


def fit_predictor(
    x: torch.Tensor,
    h: torch.Tensor,
    ffn: FFN,
    mean: torch.Tensor,
    rank: int,
    config: CalibrationConfig,
    seed: int,
    tick: Callable[[], None],
    team: Team = ALONE,
) -> dict[str, torch.Tensor]:
    """Fit p_t = softmax(W_out W_in x_t + b) to the token's own importance distribution by cross-entropy. Ours.

    x: (T, H). h: (T, F). mean: (F,), the mean distribution, whose logarithm starts the bias. Block labels, pooled inputs and
    log-sum-exp pooling were all worse (docs/log.md). Returns w_in (r, H), w_out (F, r), bias (F,), fp32.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = x.shape[1]
    first, tokens = team.place(len(x))
    intermediate = ffn.neurons
    rms, norm = _rms(x, team), ffn.down_norm()
    w_in = torch.randn(rank, hidden, generator=generator).to(x.device) / (hidden**0.5 * rms)
    w_out = torch.randn(intermediate, rank, generator=generator).to(x.device) * 0.1
    bias = mean.clamp_min(1e-9).log()
    parameters = [w_in.requires_grad_(), w_out.requires_grad_(), bias.requires_grad_()]
    weights = dict(zip(TENSORS, parameters, strict=True))
    # W_in lives on the scale 1 / (sqrt(H) rms): Adam's step must too.
    rates = [config.fit_lr / float(rms), config.fit_lr * 5, config.fit_lr * 5]
    optimizer = torch.optim.Adam([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)])
    steps_an_epoch = -(-tokens // config.fit_batch)
    total = config.fit_epochs * steps_an_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=min(0.1, 1 - 1 / (total + 1)))
    with torch.enable_grad():
        for _ in range(config.fit_epochs):
            order = torch.randperm(tokens, generator=generator)
            for rows in order.split(config.fit_batch):
                mine = (rows[(rows >= first) & (rows < first + len(x))] - first).to(x.device)
                loss = cross_entropy(logits(x[mine], weights), h[mine], norm).sum() / len(rows)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                team.sum(*(p.grad for p in parameters if p.grad is not None))
                optimizer.step()
                schedule.step()
                tick()
    return {name: weight.detach() for name, weight in weights.items()}


def logits(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The predictor's W_out W_in x_t + b of x (T, H) -> (T, F)."""
    return F.linear(F.linear(x, weights["w_in"].to(x.dtype)), weights["w_out"].to(x.dtype), weights["bias"].to(x.dtype))


def cross_entropy(predicted: torch.Tensor, h: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """(T,) nats: of the predictor's logits (T, F) to the `shares` of each token's neurons. h: (T, F). norm: (F,)."""
    target = shares(h, norm).to(predicted.dtype)
    return -(target * predicted.log_softmax(-1)).sum(-1, dtype=torch.float32)


def block_sums(predicted: torch.Tensor, block_size: int) -> torch.Tensor:
    """Learned scores, as `LearnedPredictor` has them, of its logits (N * B, F) -> (N, F), in fp32."""
    return predicted.softmax(-1).view(-1, block_size, predicted.shape[-1]).sum(1, dtype=torch.float32)


def captured_share(
    x: torch.Tensor,
    h: torch.Tensor,
    ffn: FFN,
    weights: dict[str, torch.Tensor],
    kept: int,
    block_size: int,
    team: Team = ALONE,
) -> tuple[float, float]:
    """Share of the tokens' (normalised) importance that the chosen neurons hold: (learned, oracle). x: (N * B, H).
    h: (N * B, F)."""
    learned, best, norm = 0.0, 0.0, ffn.down_norm()
    for part, activations in _chunks(x, h, block_size):
        truth = shares(activations, norm).view(-1, block_size, h.shape[1]).sum(1)
        ids = kernels.top_k(block_sums(logits(part, weights), block_size), kept).long()
        learned += float(truth.gather(1, ids).sum())
        best += float(truth.topk(kept, dim=1).values.sum())
    learned, best, tokens = team.total(learned, best, len(x))
    return learned / tokens, best / tokens


def _chunks(x: torch.Tensor, h: torch.Tensor, block_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size = max(1, CHUNK // block_size) * block_size
    return zip(x.split(size), h.split(size), strict=True)


def fit_compensator(
    x: torch.Tensor,
    h: torch.Tensor,
    ffn: FFN,
    weights: dict[str, torch.Tensor],
    kept: int,
    block_size: int,
    linear_rank: int,
    silu_rank: int,
    seed: int,
    team: Team = ALONE,
) -> dict[str, torch.Tensor]:
    """Closed form: the rank-r affine map of x that best predicts what the skipped neurons would have added (reduced-rank
    regression, ours); the SiLU branch starts at zero and is left to the distillation. x: (N * B, H). h: (N * B, F)."""
    hidden = x.shape[1]
    gram = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64, device=x.device)
    cross = torch.zeros(hidden + 1, hidden, dtype=torch.float64, device=x.device)
    for part, activations in _chunks(x, h, block_size):
        ids = kernels.top_k(block_sums(logits(part, weights), block_size), kept).long()
        skip = h.new_ones(len(ids), 1, h.shape[1]).scatter_(2, ids[:, None], 0)
        missing = F.linear((activations.view(-1, block_size, h.shape[1]) * skip).view_as(activations), ffn.down)
        inputs = torch.cat([part.float(), torch.ones(len(part), 1, device=x.device)], 1)
        with torch.autocast(x.device.type, enabled=False):  # sums over all tokens want more than bf16
            gram += inputs.T @ inputs
            cross += inputs.T @ missing.float()
    team.sum(gram, cross)
    ridge = 1e-3 * gram.diagonal()[:-1].mean()
    gram.diagonal()[:-1] += ridge
    solution = torch.linalg.solve(gram, cross)  # (H + 1, H)
    weight, bias = solution[:-1].T, solution[-1]
    # The best rank r in the norm of the predictions: SVD of W L, where L L^T is the inputs' second moment.
    factor = torch.linalg.cholesky(gram[:-1, :-1])
    u = torch.linalg.svd(weight @ factor, full_matrices=False).U[:, :linear_rank]
    # Balance both factors, so that one learning rate suits both in the distillation.
    projected = u.T @ weight
    scale = projected.norm(dim=1, keepdim=True).clamp_min(1e-12).sqrt()
    generator = torch.Generator().manual_seed(seed)
    rms = _rms(x, team)
    curved = torch.randn(silu_rank, hidden, generator=generator).to(x.device) / (hidden**0.5 * rms)
    zeros = torch.zeros(hidden, silu_rank, device=x.device)
    return {
        "w_in": torch.cat([(projected / scale).float(), curved]),
        "w_out": torch.cat([(u * scale.T).float(), zeros], 1),
        "bias": bias.float(),
    }
