"""Inputs of the losses made from whole distributions, and slow formulas of the same losses in plain Python."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from opd_cache.config import LossConfig
from opd_cache.learn.losses import TokenLogprobs

V = 7  # vocabulary
DIVERGENCES = (
    "reverse_kl_topk",
    "forward_kl_topk",
    "jsd_topk",
    "skew_kl_topk",
    "skew_reverse_kl_topk",
    "entropy_aware",
)
MASSES = ("tail_bucket", "renormalised", "unnormalised")
IMPORTANCES = ("ppo_clip", "truncated", "gate")
# Options under which no ratio is clipped, capped or gated.
UNCLIPPED = {"clip_ratio_low": 1.0, "clip_ratio_high": 1e9, "importance_cap": 1e9, "gate_low": 0.0, "gate_high": 1e9}


def logits(seed: int, rows: int = 1, vocabulary: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def tokens_of(
    student_NV: Tensor,
    teacher_NV: Tensor,
    sampled_N: Tensor,
    k: int,
    sampler_NV: Tensor | None = None,
    rewards_N: Tensor | None = None,
    row_N: Tensor | None = None,
) -> TokenLogprobs:
    """The losses' input from log-probs over the whole vocabulary; without row_N every token is its own response."""
    own = sampled_N[:, None]
    topk = teacher_NV.topk(k, -1)
    sampler_NV = student_NV.detach() if sampler_NV is None else sampler_NV
    return TokenLogprobs(
        target_ids_N=sampled_N,
        student_logprobs_N=student_NV.gather(-1, own)[:, 0],
        sampling_logprobs_N=sampler_NV.gather(-1, own)[:, 0],
        teacher_logprobs_N=teacher_NV.gather(-1, own)[:, 0],
        topk_ids_NK=topk.indices,
        topk_logprobs_NK=topk.values,
        student_topk_logprobs_NK=student_NV.gather(-1, topk.indices),
        row_N=torch.arange(len(sampled_N)) if row_N is None else row_N,
        reward_advantages_N=torch.zeros_like(teacher_NV[:, 0]) if rewards_N is None else rewards_N,
    )


def sampled_tokens(
    student_N: Tensor, teacher_N: Tensor, sampling_N: Tensor, rewards_N: Tensor | None = None
) -> TokenLogprobs:
    """The same for losses of the sampled token only, all of one response."""
    num_tokens = len(student_N)
    return TokenLogprobs(
        target_ids_N=torch.zeros(num_tokens, dtype=torch.int64),
        student_logprobs_N=student_N,
        sampling_logprobs_N=sampling_N,
        teacher_logprobs_N=teacher_N,
        topk_ids_NK=torch.zeros(num_tokens, 0, dtype=torch.int64),
        topk_logprobs_NK=student_N.new_zeros(num_tokens, 0),
        student_topk_logprobs_NK=student_N.new_zeros(num_tokens, 0),
        row_N=torch.zeros(num_tokens, dtype=torch.int64),
        reward_advantages_N=torch.zeros_like(teacher_N) if rewards_N is None else rewards_N,
    )


def gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow_divergence(
    name: str, options: LossConfig, student: list[float], teacher: list[float], sampled: int, k: int
) -> float:
    """One token's loss from two lists of probabilities."""
    ranked = sorted(range(len(teacher)), key=lambda v: -teacher[v])
    listed = [*ranked[:k], *([sampled] if sampled not in ranked[:k] else [])]
    s, t = ([side[v] for v in listed] for side in (student, teacher))
    if options.topk_mass == "tail_bucket":
        s, t = ([*side, max(1 - sum(side), 1e-7)] for side in (s, t))
    elif options.topk_mass == "renormalised":
        s, t = ([p / sum(side) for p in side] for side in (s, t))
    if name == "reverse_kl_topk":
        return kl(s, t)
    if name == "forward_kl_topk":
        return kl(t, s)
    if name == "jsd_topk":
        beta = options.jsd_beta
        if beta in (0, 1):
            return kl(s, t) if beta else kl(t, s)
        m = [(1 - beta) * a + beta * b for a, b in zip(s, t, strict=True)]
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    if name == "skew_kl_topk":
        return kl(t, [options.skew_alpha * b + (1 - options.skew_alpha) * a for a, b in zip(s, t, strict=True)])
    if name == "skew_reverse_kl_topk":
        return kl(s, [options.skew_alpha * a + (1 - options.skew_alpha) * b for a, b in zip(s, t, strict=True)])
    buckets = [teacher[v] for v in ranked[:k]]
    buckets.append(max(1 - sum(buckets), 1e-7))
    entropy = -sum(p * math.log(p) for p in buckets)
    return kl(s, t) + (options.entropy_forward_coef * kl(t, s) if entropy > options.entropy_threshold else 0.0)


def slow_weight(options: LossConfig, ratio: float, advantage: float) -> tuple[float, bool, bool]:
    """(weight of a token's advantage in the loss's value, whether it has a gradient, whether it counts as clipped)."""
    if options.importance == "ppo_clip":
        low, high = 1 - options.clip_ratio_low, 1 + options.clip_ratio_high
        if advantage > 0 and ratio > high:
            return high, False, True
        if advantage < 0 and ratio < low:
            return low, False, True
        return ratio, True, False
    if options.importance == "truncated":
        return min(ratio, options.importance_cap), True, ratio > options.importance_cap
    inside = options.gate_low <= ratio <= options.gate_high
    return (ratio if inside else 0.0), inside, not inside


def slow_gradient(value: Callable[[list[float]], float], at: list[float], step: float = 1e-5) -> list[float]:
    """Central differences."""

    def moved(index: int, by: float) -> float:
        return value([x + by * (i == index) for i, x in enumerate(at)])

    return [(moved(i, step) - moved(i, -step)) / (2 * step) for i in range(len(at))]
