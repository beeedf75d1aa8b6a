"""The recipe's loss on one micro-batch, as the LM head asks for it; and the per-token figures that it leaves behind."""

# N response tokens, K teacher top-k, M = 1 + K gathered ids, F figures

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd_cache.config import LearnConfig
from opd_cache.learn.batch import MicroBatch
from opd_cache.learn.losses import Loss, TokenLogprobs, kl_penalty

FIGURES = ("loss", "reverse_kl", "ratio", "clipped", "clamped", "entropy", "penalty")


@dataclass(frozen=True)
class StepFacts:
    """What all micro-batches of a step share."""

    num_tokens: int  # response tokens of the global batch: the normaliser
    advantage_mean: float = 0.0
    advantage_std: float = 1.0
    gradients_are_averaged_over: int = 1  # ranks whose gradients an engine averages; the loss undoes it


class Objective:
    """Loss of a micro-batch: token sum divided by the global batch's tokens, so that micro-batches and ranks add up."""

    def __init__(
        self,
        loss: Loss,
        config: LearnConfig,
        facts: StepFacts,
        batch: MicroBatch,
        vocab_size: int,
        reference_logprobs_N: Tensor | None,
    ) -> None:
        self.loss, self.config, self.facts, self.batch = loss, config, facts, batch
        self.reference_logprobs_N = reference_logprobs_N
        self.looks_across = loss.needs_responses
        kept = slice(None) if loss.needs_topk else slice(0)
        self.topk_ids_NK, self.topk_logprobs_NK = batch.topk_ids_NK[:, kept], batch.topk_logprobs_NK[:, kept]
        self.beyond_NK = self.topk_ids_NK >= vocab_size
        self.ids_NM = torch.cat([batch.target_ids_N[:, None], self.topk_ids_NK.masked_fill(self.beyond_NK, 0)], dim=-1)
        self._figures: list[tuple[Tensor, ...]] = []  # [N] of each chunk, in the order of FIGURES

    def __call__(self, rows: slice, logprobs_NM: Tensor, entropy_N: Tensor) -> Tensor:
        if not self.batch.counts:
            return logprobs_NM.sum() * 0.0
        batch = self.batch
        tokens = TokenLogprobs(
            target_ids_N=batch.target_ids_N[rows],
            student_logprobs_N=logprobs_NM[:, 0],
            sampling_logprobs_N=batch.sampling_logprobs_N[rows],
            teacher_logprobs_N=batch.teacher_logprobs_N[rows],
            topk_ids_NK=self.topk_ids_NK[rows],
            topk_logprobs_NK=self.topk_logprobs_NK[rows],
            student_topk_logprobs_NK=logprobs_NM[:, 1:].masked_fill(self.beyond_NK[rows], -torch.inf),
            row_N=batch.row_N[rows],
            reward_advantages_N=batch.reward_advantages_N[rows],
            advantage_mean=self.facts.advantage_mean,
            advantage_std=self.facts.advantage_std,
        )
        result = self.loss.compute(tokens, self.config.loss)
        loss_N, penalty_N = result.loss_N, torch.zeros_like(result.loss_N)
        if self.reference_logprobs_N is not None:
            penalty_N = kl_penalty(tokens.student_logprobs_N, self.reference_logprobs_N[rows], self.config.kl_estimator)
            loss_N = loss_N + self.config.kl_coef * penalty_N
        student_N = tokens.student_logprobs_N.detach()
        self._figures.append((
            loss_N.detach(),
            student_N - tokens.teacher_logprobs_N,
            (student_N - tokens.sampling_logprobs_N).exp(),
            result.clipped_N,
            result.clamped_N,
            entropy_N,
            penalty_N.detach(),
        ))  # fmt: skip
        return loss_N.sum() * (self.facts.gradients_are_averaged_over / self.facts.num_tokens)

    def figures(self) -> np.ndarray:
        """[F, N] of the tokens that counted, in the order of FIGURES."""
        if not self._figures:
            return np.zeros((len(FIGURES), 0), np.float32)
        return torch.stack([torch.cat(chunks).float() for chunks in zip(*self._figures, strict=True)]).cpu().numpy()


def summarize(figures: np.ndarray, num_tokens: int) -> dict[str, float | None]:
    """The columns of steps.parquet that come from per-token figures [F, N] of the whole global batch."""
    if not num_tokens:
        figures = np.zeros((len(FIGURES), 1))
    by_name = dict(zip(FIGURES, figures.astype(np.float64), strict=True))
    reverse_kl = by_name["reverse_kl"]
    p50, p99 = np.quantile(reverse_kl, [0.5, 0.99]).tolist()
    return {
        "loss": by_name["loss"].sum() / max(num_tokens, 1),
        "reverse_kl": reverse_kl.mean(),
        "reverse_kl_p50": p50,
        "reverse_kl_p99": p99,
        **_ratio_figures(by_name["ratio"]),
        "clipped_share": by_name["clipped"].mean(),
        "clamped_share": by_name["clamped"].mean(),
        "entropy": by_name["entropy"].mean(),
        "kl_penalty": by_name["penalty"].mean(),
    }


def _ratio_figures(ratios: np.ndarray) -> dict[str, float | None]:
    """Of the tokens whose sampler's log-prob is known; None where it is of none."""
    known = ratios[~np.isnan(ratios)]
    if not len(known):
        return dict.fromkeys(("ratio_mean", "ratio_max", "ess"))
    squares = np.square(known).sum()
    ess = float(known.sum() ** 2 / (len(known) * squares)) if squares else 0.0
    return {"ratio_mean": known.mean(), "ratio_max": known.max(), "ess": ess}
