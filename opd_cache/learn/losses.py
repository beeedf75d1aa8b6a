"""The losses: pure functions of log-probs, per response token, in nats. Reduction is the learner's.

To add one: write a function (TokenLogprobs, LossConfig) → TokenLoss, wrap it in a Loss, and add a line to
registry.LOSSES; or name it in a recipe as `my_package.module:MY_LOSS`.
"""

# N response tokens, K teacher top-k, S = K + 1: the support of the divergences (top-k and the sampled token)

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_cache.config import LossConfig

# float32 cannot tell a smaller tail from rounding of the sum.
SMALLEST_TAIL = 1e-7


@dataclass(frozen=True)
class TokenLogprobs:
    """Everything that a loss may use. `student_*` carry gradient; all others are data."""

    target_ids_N: Tensor  # the sampled tokens
    student_logprobs_N: Tensor  # live
    sampling_logprobs_N: Tensor  # when it sampled
    teacher_logprobs_N: Tensor
    topk_ids_NK: Tensor  # the teacher's likeliest
    topk_logprobs_NK: Tensor
    student_topk_logprobs_NK: Tensor  # live, at topk_ids
    advantage_mean: float = 0.0  # of teacher − sampling log-prob over the global batch
    advantage_std: float = 1.0


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each token [N], and whether a clip removed its gradient [N] (bool)."""

    loss_N: Tensor
    clipped_N: Tensor


@dataclass(frozen=True)
class Loss:
    """A loss and what it needs from the cache."""

    compute: Callable[[TokenLogprobs, LossConfig], TokenLoss]
    needs_topk: bool


def reverse_kl_pg(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """Policy gradient on the sampled token: advantage = teacher − student log-prob, detached, with the PPO clip.

    On-policy its gradient is that of KL(student || teacher); replayed tokens are weighted by the live student's
    probability over the sampler's.
    """
    advantages_N = tokens.teacher_logprobs_N - tokens.student_logprobs_N.detach()
    if options.advantage_clamp is not None:
        advantages_N = advantages_N.clamp(-options.advantage_clamp, options.advantage_clamp)
    if options.normalize_advantages:
        advantages_N = (advantages_N - tokens.advantage_mean) / (tokens.advantage_std + 1e-8)
    ratio_N = (tokens.student_logprobs_N - tokens.sampling_logprobs_N).exp()
    low, high = 1 - options.clip_ratio_low, 1 + options.clip_ratio_high
    surrogate_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    clipped_N = torch.where(advantages_N > 0, ratio_N > high, ratio_N < low).detach()
    return TokenLoss(-surrogate_N, clipped_N)


def reverse_kl_topk(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """KL(student || teacher) over the teacher's top k, the sampled token and a tail bucket for all other tokens.

    A lower bound of the full divergence that reaches it as k grows to the vocabulary; exact gradient, no sampling noise.
    """
    student_NS, teacher_NS = support_with_tail(tokens)
    return _unclipped(kl_divergence(student_NS, teacher_NS))


def forward_kl_topk(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """KL(teacher || student) over the same buckets: covers all that the teacher would do."""
    student_NS, teacher_NS = support_with_tail(tokens)
    return _unclipped(kl_divergence(teacher_NS, student_NS))


def kl_divergence(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, nats; entries with p = 0 add nothing, in the gradient too."""
    possible = p_logprobs > -torch.inf
    # Select before multiplying: 0 · −inf is NaN, and its gradient too.
    p_logprobs = torch.where(possible, p_logprobs, 0.0)
    q_logprobs = torch.where(possible, q_logprobs, 0.0)
    return torch.where(possible, p_logprobs.exp() * (p_logprobs - q_logprobs), 0.0).sum(-1)


def support_with_tail(tokens: TokenLogprobs) -> tuple[Tensor, Tensor]:
    """Student and teacher log-probs [N, K + 2] on a partition of the vocabulary: the teacher's top k, the sampled token
    where it is not among them (else −inf), and everything else as one bucket."""
    # A token that the student does not have is nothing that it can move mass to: the teacher's share joins the tail.
    possible_NK = tokens.student_topk_logprobs_NK > -torch.inf
    sampled_is_listed_N = (tokens.topk_ids_NK == tokens.target_ids_N[:, None]).any(-1)

    def partition(topk_NK: Tensor, sampled_N: Tensor) -> Tensor:
        sampled_N1 = torch.where(sampled_is_listed_N, -torch.inf, sampled_N)[:, None]
        listed_NS = torch.cat([topk_NK, sampled_N1], dim=-1)
        return torch.cat([listed_NS, tail_logprob(listed_NS)[:, None]], dim=-1)

    student_NS = partition(tokens.student_topk_logprobs_NK, tokens.student_logprobs_N)
    teacher_topk_NK = torch.where(possible_NK, tokens.topk_logprobs_NK, -torch.inf)
    return student_NS, partition(teacher_topk_NK, tokens.teacher_logprobs_N)


def tail_logprob(logprobs_NS: Tensor) -> Tensor:
    """log(1 − Σ exp), the log-prob of everything not listed; at least log 1e-7, where rounding made the sum reach 1."""
    listed_N = logprobs_NS.logsumexp(-1).clamp(max=-SMALLEST_TAIL)
    return torch.log(-torch.expm1(listed_N))


def _unclipped(loss_N: Tensor) -> TokenLoss:
    return TokenLoss(loss_N, torch.zeros_like(loss_N, dtype=torch.bool))


def kl_penalty(student_logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(student || reference) on the student's samples, nats.

    Back-propagated, k2 gives the reverse-KL gradient, k3 the forward-KL one, and k1 zero in expectation.
    Source: Schulman, "Approximating KL divergence", 2020.
    """
    difference_N = student_logprobs_N - reference_logprobs_N
    if estimator == "k1":
        return difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    return torch.expm1(-difference_N) + difference_N


REVERSE_KL_PG = Loss(reverse_kl_pg, needs_topk=False)
REVERSE_KL_TOPK = Loss(reverse_kl_topk, needs_topk=True)
FORWARD_KL_TOPK = Loss(forward_kl_topk, needs_topk=True)
