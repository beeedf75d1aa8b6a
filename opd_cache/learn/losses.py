"""The losses: pure functions of log-probs, per response token, in nats. Reduction is the learner's.

To add one: write a function (TokenLogprobs, LossConfig) → TokenLoss, wrap it in a Loss, and add a line to
registry.LOSSES; or name it in a recipe as `my_package.module:MY_LOSS`. The divergences' formulas are in divergences.py.
"""

# N response tokens, K teacher top-k, S entries of a divergence's support

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_cache import registry
from opd_cache.config import LossConfig
from opd_cache.errors import ConfigError
from opd_cache.learn.divergences import (
    close_support,
    entropy_with_tail,
    jensen_shannon,
    kl_divergence,
    listed_logprobs,
    skew_kl,
)

# A probability of 0 counts as the smallest that float32 holds in full precision, −87.3 nats: advantages stay finite.
SMALLEST_LOGPROB = math.log(torch.finfo(torch.float32).tiny)
# exp(20) = 4.9e8: a larger ratio is no weight but an overflow on its way.
MAX_LOG_RATIO = 20.0
_NO_TOKEN: Any = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Everything that a loss may use. `student_*` carry gradient; all others are data."""

    target_ids_N: Tensor  # the sampled tokens
    student_logprobs_N: Tensor  # live
    sampling_logprobs_N: Tensor  # when it sampled; NaN where not known, see Loss.needs_sampler
    teacher_logprobs_N: Tensor
    topk_ids_NK: Tensor  # the teacher's likeliest; K is 0 for a loss that does not need them
    topk_logprobs_NK: Tensor
    student_topk_logprobs_NK: Tensor  # live, at topk_ids; −inf where the student has no such id
    row_N: Tensor  # int64: which response each token belongs to; a response's tokens are neighbours, in order
    reward_advantages_N: Tensor  # group-normalised task reward of the token's response; zeros without rewards
    advantage_mean: float = 0.0  # of token_advantages under the sampler, over the global batch
    advantage_std: float = 1.0


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each token [N], and what happened to it [N] (bool); a loss that leaves these out says: to no token."""

    loss_N: Tensor
    clipped_N: Tensor = _NO_TOKEN  # a ratio clip, cap or gate removed or capped its gradient
    clamped_N: Tensor = _NO_TOKEN  # the advantage clamp changed its advantage

    def __post_init__(self) -> None:
        for name in ("clipped_N", "clamped_N"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.zeros_like(self.loss_N, dtype=torch.bool))


@dataclass(frozen=True)
class Loss:
    """A loss and what it needs."""

    compute: Callable[[TokenLogprobs, LossConfig], TokenLoss]
    needs_topk: bool = False
    needs_reward: bool = False
    needs_sampler: bool = False  # its log-probs; else they may be NaN, as of imported rollouts that came without
    needs_responses: bool = False  # looks across the tokens of a response; else any slice of N may be computed alone


def resolve_loss(options: LossConfig) -> Loss:
    """The loss that a recipe names, with the needs of these options: a mixed loss needs what its terms need."""
    loss = _load(options.name, "learn.loss.name")
    terms = _terms(options) if options.name == "mixed" else {}
    parts = [loss, *(_load(name, "learn.loss.terms") for name in terms)]
    discounted = options.discount > 0 and "reverse_kl_pg" in (options.name, *terms)
    return dataclasses.replace(
        loss,
        needs_topk=any(part.needs_topk for part in parts),
        needs_reward=any(part.needs_reward for part in parts),
        needs_sampler=any(part.needs_sampler for part in parts),
        needs_responses=discounted or any(part.needs_responses for part in parts),
    )


def _load(name: str, key: str) -> Loss:
    loss = registry.load(registry.LOSSES, name, key)
    if not isinstance(loss, Loss):
        raise ConfigError(f"{key} = {name!r} is a {type(loss).__name__}, expected a Loss: MY_LOSS = Loss(my_function).")
    return loss


def reverse_kl_pg(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """Policy gradient on the sampled token: advantage = teacher − student log-prob, detached.

    On-policy its gradient is that of KL(student || teacher) of the next token; with discount 1, of whole responses.
    """
    advantages_N, clamped_N = token_advantages(
        tokens.teacher_logprobs_N, tokens.student_logprobs_N, tokens.row_N, options
    )
    if options.normalize_advantages:
        advantages_N = (advantages_N - tokens.advantage_mean) / (tokens.advantage_std + 1e-8)
    loss_N, clipped_N = _policy_gradient(tokens, options.coef * advantages_N, options)
    return TokenLoss(loss_N, clipped_N, clamped_N)


def token_advantages(teacher_N: Tensor, student_N: Tensor, row_N: Tensor, options: LossConfig) -> tuple[Tensor, Tensor]:
    """(advantages [N] of reverse_kl_pg before normalisation, detached; bool [N]: the clamp changed it).

    teacher − student log-prob, clamped, then summed over the rest of the response with the discount. A probability of 0
    counts as the smallest float32 and as clamped.
    """
    exact_N = (teacher_N - student_N).detach()
    advantages_N = (teacher_N.clamp(min=SMALLEST_LOGPROB) - student_N.clamp(min=SMALLEST_LOGPROB)).detach()
    if options.advantage_clamp is not None:
        advantages_N = advantages_N.clamp(-options.advantage_clamp, options.advantage_clamp)
    clamped_N = advantages_N != exact_N
    return discounted_sums(advantages_N, row_N, options.discount), clamped_N


def discounted_sums(values_N: Tensor, row_N: Tensor, discount: float) -> Tensor:
    """sum over s ≥ t of discount^(s − t) · value_s within each response [N]. Exact, in log2(N) passes over all tokens."""
    if discount == 0:
        return values_N
    sums_N, reach = values_N, 1  # sums_N[t] covers the tokens t, ..., t + reach − 1 of its response
    while reach < len(values_N):
        beyond_N = torch.where(row_N[reach:] == row_N[:-reach], sums_N[reach:], 0.0)
        sums_N = torch.cat([sums_N[:-reach] + discount**reach * beyond_N, sums_N[-reach:]])
        reach *= 2
    return sums_N


def reward_pg(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """Policy gradient of the task reward: every token's advantage is its response's, group-normalised."""
    return TokenLoss(*_policy_gradient(tokens, tokens.reward_advantages_N, options))


def _policy_gradient(tokens: TokenLogprobs, advantages_N: Tensor, options: LossConfig) -> tuple[Tensor, Tensor]:
    """(−weight · advantage [N], whose gradient is −weight · advantage · ∇ log p of the student; clipped [N]).

    The weight is the live student's probability over the sampler's, as options.importance has it. Sources: PPO (Schulman
    et al., 2017); truncated importance sampling (Ionides, 2008); the gate as in NeMo-RL's multi-teacher distillation.
    """
    student_N = tokens.student_logprobs_N.clamp(min=SMALLEST_LOGPROB)
    log_ratio_N = student_N.detach() - tokens.sampling_logprobs_N
    weight_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    live_N = (student_N - student_N.detach()).exp()  # 1, with the gradient of log p
    if options.importance == "ppo_clip":
        ratio_N, low, high = weight_N * live_N, 1 - options.clip_ratio_low, 1 + options.clip_ratio_high
        surrogate_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
        clipped_N = torch.where(advantages_N > 0, weight_N > high, weight_N < low) & (advantages_N != 0)
        return -surrogate_N, clipped_N | (log_ratio_N > MAX_LOG_RATIO)
    if options.importance == "truncated":
        clipped_N = weight_N > options.importance_cap
        weight_N = weight_N.clamp(max=options.importance_cap)
    else:
        clipped_N = (weight_N < options.gate_low) | (weight_N > options.gate_high)
        weight_N = weight_N.masked_fill(clipped_N, 0.0)
    return -weight_N * advantages_N * live_N, clipped_N


def reverse_kl_topk(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """KL(student || teacher) over the teacher's top k, the sampled token and what topk_mass makes of the rest.

    Exact gradient, no sampling noise.
    """
    return TokenLoss(kl_divergence(*_support(tokens, options)))


def forward_kl_topk(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """KL(teacher || student) over the same entries: covers all that the teacher would do."""
    student_NS, teacher_NS = _support(tokens, options)
    return TokenLoss(kl_divergence(teacher_NS, student_NS))


def jsd_topk(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """Generalised Jensen-Shannon divergence over the same entries; jsd_beta as in divergences.jensen_shannon."""
    return TokenLoss(jensen_shannon(*_support(tokens, options), options.jsd_beta))


def skew_kl_topk(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """KL(teacher || α·teacher + (1−α)·student) over the same entries: DistiLLM's SKL."""
    student_NS, teacher_NS = _support(tokens, options)
    return TokenLoss(skew_kl(teacher_NS, student_NS, options.skew_alpha))


def skew_reverse_kl_topk(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """KL(student || α·student + (1−α)·teacher) over the same entries: DistiLLM's SRKL."""
    return TokenLoss(skew_kl(*_support(tokens, options), options.skew_alpha))


def entropy_aware(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """KL(student || teacher), plus entropy_forward_coef · KL(teacher || student) where the teacher is unsure.

    Unsure: the entropy of the teacher's top k and one tail bucket is strictly above entropy_threshold. That is a lower
    bound of its entropy, depends on neither the sampled token nor the student, and is the same in every topk_mass form.
    Source: Jin et al., "Entropy-Aware On-Policy Distillation of Language Models", 2026.
    """
    student_NS, teacher_NS = _support(tokens, options)
    unsure_N = entropy_with_tail(tokens.topk_logprobs_NK) > options.entropy_threshold
    forward_N = torch.where(unsure_N, kl_divergence(teacher_NS, student_NS), 0.0)
    return TokenLoss(kl_divergence(student_NS, teacher_NS) + options.entropy_forward_coef * forward_N)


def _support(tokens: TokenLogprobs, options: LossConfig) -> tuple[Tensor, Tensor]:
    """(student, teacher) log-probs [N, S] on the entries that a divergence runs over."""
    student_NS, teacher_NS = listed_logprobs(
        tokens.target_ids_N,
        tokens.topk_ids_NK,
        tokens.student_logprobs_N,
        tokens.student_topk_logprobs_NK,
        tokens.teacher_logprobs_N,
        tokens.topk_logprobs_NK,
    )
    return close_support(student_NS, options.topk_mass), close_support(teacher_NS, options.topk_mass)


def mixed(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    """Sum of weight · loss over options.terms; a token is clipped or clamped where it is in any term."""
    total = TokenLoss(torch.zeros_like(tokens.student_logprobs_N))
    for name, weight in _terms(options).items():
        term = _load(name, "learn.loss.terms").compute(tokens, options)
        total = TokenLoss(
            total.loss_N + weight * term.loss_N, total.clipped_N | term.clipped_N, total.clamped_N | term.clamped_N
        )
    return total


def _terms(options: LossConfig) -> dict[str, float]:
    """The terms that count: a weight of 0 takes back a term of an earlier recipe file."""
    return {name: weight for name, weight in options.terms.items() if weight != 0}


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


REVERSE_KL_PG = Loss(reverse_kl_pg, needs_sampler=True)
REVERSE_KL_TOPK = Loss(reverse_kl_topk, needs_topk=True)
FORWARD_KL_TOPK = Loss(forward_kl_topk, needs_topk=True)
JSD_TOPK = Loss(jsd_topk, needs_topk=True)
SKEW_KL_TOPK = Loss(skew_kl_topk, needs_topk=True)
SKEW_REVERSE_KL_TOPK = Loss(skew_reverse_kl_topk, needs_topk=True)
ENTROPY_AWARE = Loss(entropy_aware, needs_topk=True)
REWARD_PG = Loss(reward_pg, needs_reward=True, needs_sampler=True)
MIXED = Loss(mixed)
