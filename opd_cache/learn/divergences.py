"""Divergences between a student and a teacher of whom only some log-probs are known: tensors in, nats out.

The losses that a recipe names, and the policy gradients, are in losses.py.
"""

# N response tokens, K teacher top-k, S entries of the support: the top-k, the sampled token and, in one form, the tail.
# −inf on both sides marks an entry that is not there.

import math

import torch
from torch import Tensor

# float32 cannot tell a smaller tail from rounding of the sum.
SMALLEST_TAIL = 1e-7
# Stands in for −inf where that would make the gradient NaN; its exp is exactly 0.
FAR_BELOW = -1e30


def listed_logprobs(
    target_ids_N: Tensor,
    topk_ids_NK: Tensor,
    student_N: Tensor,
    student_topk_NK: Tensor,
    teacher_N: Tensor,
    teacher_topk_NK: Tensor,
) -> tuple[Tensor, Tensor]:
    """(student, teacher) log-probs [N, K + 1] of the teacher's top k and, where it is not among them, the sampled token.

    An entry that either side calls impossible (−inf) is listed for neither. It is padding, or an id that the student
    lacks, to which it could move no mass.
    """
    listed_NK = (student_topk_NK > -torch.inf) & (teacher_topk_NK > -torch.inf)
    has_sampled_N = ((topk_ids_NK == target_ids_N[:, None]) & listed_NK).any(-1)
    listed_N = (student_N > -torch.inf) & (teacher_N > -torch.inf) & ~has_sampled_N
    listed_NS = torch.cat([listed_NK, listed_N[:, None]], dim=-1)

    def select(topk_NK: Tensor, sampled_N: Tensor) -> Tensor:
        return torch.where(listed_NS, torch.cat([topk_NK, sampled_N[:, None]], dim=-1), -torch.inf)

    return select(student_topk_NK, student_N), select(teacher_topk_NK, teacher_N)


def close_support(logprobs_NS: Tensor, topk_mass: str) -> Tensor:
    """What becomes of the mass outside the list. Each form reaches the full vocabulary's value as k grows to it.

    tail_bucket: one more entry, "any other token". Any divergence of the buckets is a lower bound of the full one.
    renormalised: none; the listed entries sum to 1. Leaves the student free to put mass outside.
    unnormalised: nothing; the terms of the full sum that are listed. May be negative, and in the reverse direction
    lowers the loss by draining mass out of the list.
    """
    if topk_mass == "tail_bucket":
        return torch.cat([logprobs_NS, tail_logprob(logprobs_NS)[:, None]], dim=-1)
    if topk_mass == "renormalised":
        return logprobs_NS - _log_sum(logprobs_NS)[:, None]
    return logprobs_NS


def tail_logprob(logprobs_NS: Tensor) -> Tensor:
    """log(1 − Σ exp), the log-prob of everything not listed; at least log 1e-7, where rounding made the sum reach 1."""
    return torch.log(-torch.expm1(_log_sum(logprobs_NS).clamp(max=-SMALLEST_TAIL)))


def _log_sum(logprobs_NS: Tensor) -> Tensor:
    # The gradient of a logsumexp of nothing but −inf is NaN.
    return torch.where(logprobs_NS > -torch.inf, logprobs_NS, FAR_BELOW).logsumexp(-1)


def kl_divergence(p_NS: Tensor, q_NS: Tensor) -> Tensor:
    """KL(p || q) of log-probs, over the last dimension; entries with p = 0 add nothing, in the gradient too."""
    possible_NS = p_NS > -torch.inf
    # Select before multiplying: 0 · −inf is NaN, and its gradient too.
    p_NS = torch.where(possible_NS, p_NS, 0.0)
    q_NS = torch.where(possible_NS, q_NS, 0.0)
    return torch.where(possible_NS, p_NS.exp() * (p_NS - q_NS), 0.0).sum(-1)


def mixture(p_NS: Tensor, q_NS: Tensor, q_share: float) -> Tensor:
    """Log-probs of (1 − q_share)·p + q_share·q, for 0 < q_share < 1."""
    possible_NS = (p_NS > -torch.inf) | (q_NS > -torch.inf)
    p_NS = torch.where(possible_NS, p_NS, 0.0) + math.log1p(-q_share)
    q_NS = torch.where(possible_NS, q_NS, 0.0) + math.log(q_share)
    return torch.where(possible_NS, torch.logaddexp(p_NS, q_NS), -torch.inf)


def jensen_shannon(student_NS: Tensor, teacher_NS: Tensor, beta: float) -> Tensor:
    """β·KL(T || M) + (1−β)·KL(S || M) with M = (1−β)·S + β·T, in TRL's convention: other libraries swap β and 1−β.

    The formula goes to 0 at both ends. As in TRL, β = 0 means forward KL(T || S) instead, and β = 1 reverse KL(S || T).
    Source: generalised JSD, Agarwal et al., "On-Policy Distillation of Language Models", 2023, eq. 1.
    """
    if beta == 0:
        return kl_divergence(teacher_NS, student_NS)
    if beta == 1:
        return kl_divergence(student_NS, teacher_NS)
    mixture_NS = mixture(student_NS, teacher_NS, beta)
    return beta * kl_divergence(teacher_NS, mixture_NS) + (1 - beta) * kl_divergence(student_NS, mixture_NS)


def skew_kl(p_NS: Tensor, q_NS: Tensor, alpha: float) -> Tensor:
    """KL(p || α·p + (1−α)·q), at most −log α whatever q is; α = 0 is KL(p || q).

    DistiLLM's SKL has p = teacher and q = student, its SRKL p = student and q = teacher, both with α = 0.1.
    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024.
    """
    return kl_divergence(p_NS, q_NS if alpha == 0 else mixture(q_NS, p_NS, alpha))


def entropy_with_tail(topk_logprobs_NK: Tensor) -> Tensor:
    """Entropy of the top k and one bucket for all other tokens [N], nats: a lower bound of the full entropy."""
    logprobs_NS = close_support(topk_logprobs_NK, "tail_bucket")
    return -kl_divergence(logprobs_NS, torch.zeros_like(logprobs_NS))
