"""One optimizer step on one global batch, and what is known of it afterwards."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_cache import registry
from opd_cache.config import Recipe
from opd_cache.fingerprint import model_folder
from opd_cache.learn.batch import MicroBatch, micro_batches, rows_to_learn
from opd_cache.learn.engine import Engine
from opd_cache.learn.losses import Loss, TokenLogprobs, kl_penalty
from opd_cache.store.join import Joined


class Trainer:
    """Applies the recipe's loss with an engine. Holds no state between steps but the reference policy."""

    def __init__(self, recipe: Recipe, engine: Engine, policy_version: int) -> None:
        self.config = recipe.learn
        self.engine = engine
        self.policy_version = policy_version
        self.loss: Loss = registry.load(registry.LOSSES, self.config.loss.name, "learn.loss.name")
        self.reference: Engine | None = None
        if self.config.kl_coef > 0:
            self.reference = registry.load(registry.ENGINES, self.config.engine, "learn.engine")(
                self.config, recipe.student
            )
            self.reference.load(model_folder(recipe.student), with_optimizer=False)

    def step(self, batch: Sequence[Joined], step: int, learning_rate: float, read_s: float) -> dict[str, Any]:
        """Forward, backward and optimizer on one global batch; returns its row of steps.parquet.

        The loss is the token mean over the global batch: every micro-batch is divided by the batch's token count,
        so their number does not matter. A batch without a token to learn from changes nothing.
        """
        start = time.monotonic()
        rows = rows_to_learn(batch, self.config.mask_truncated)
        num_tokens = sum(len(rollout.response_ids) for rollout, _ in rows)
        collected = _Collected()
        options = self.config.loss
        mean, std = _advantage_moments(rows, options.advantage_clamp) if options.normalize_advantages else (0.0, 1.0)
        for micro in micro_batches(rows, self.config.max_tokens_per_micro_batch, self.engine.device):
            self._backward(micro, num_tokens, mean, std, collected)
        grad_norm = self.engine.optimizer_step(learning_rate) if num_tokens else 0.0
        compute_s = time.monotonic() - start
        return {
            "step": step + 1,
            "policy_version": self.policy_version,
            **collected.summary(num_tokens),
            **_batch_facts(batch),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": num_tokens,
            "read_s": read_s,
            "compute_s": compute_s,
            "tokens_per_s": num_tokens / max(read_s + compute_s, 1e-9),
        }

    def _backward(self, micro: MicroBatch, num_tokens: int, mean: float, std: float, collected: "_Collected") -> None:
        student_N, student_topk_NK, entropy_N = self.engine.logprobs(micro)
        tokens = TokenLogprobs(
            target_ids_N=micro.target_ids_N,
            student_logprobs_N=student_N,
            sampling_logprobs_N=micro.sampling_logprobs_N,
            teacher_logprobs_N=micro.teacher_logprobs_N,
            topk_ids_NK=micro.topk_ids_NK,
            topk_logprobs_NK=micro.topk_logprobs_NK,
            student_topk_logprobs_NK=student_topk_NK,
            advantage_mean=mean,
            advantage_std=std,
        )
        result = self.loss.compute(tokens, self.config.loss)
        loss_N = result.loss_N
        penalty_N = torch.zeros_like(loss_N)
        if self.reference is not None:
            with torch.no_grad():
                reference_N, _, _ = self.reference.logprobs(micro)
            penalty_N = kl_penalty(student_N, reference_N, self.config.kl_estimator)
            loss_N = loss_N + self.config.kl_coef * penalty_N
        self.engine.backward(loss_N.sum() / num_tokens)
        collected.add(tokens, loss_N, penalty_N, result.clipped_N, entropy_N)


class _Collected:
    """Per-token figures of one global batch, on the CPU."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []  # [6, N] each

    def add(
        self, tokens: TokenLogprobs, loss_N: Tensor, penalty_N: Tensor, clipped_N: Tensor, entropy_N: Tensor
    ) -> None:
        student_N = tokens.student_logprobs_N.detach()
        ratio_N = (student_N - tokens.sampling_logprobs_N).exp()
        rows = (
            loss_N.detach(),
            student_N - tokens.teacher_logprobs_N,
            ratio_N,
            clipped_N.float(),
            entropy_N,
            penalty_N.detach(),
        )
        self.pieces.append(torch.stack([row.float() for row in rows]).cpu().numpy())

    def summary(self, num_tokens: int) -> dict[str, float]:
        figures = np.concatenate(self.pieces, axis=1).astype(np.float64) if self.pieces else np.zeros((6, 1))
        loss, reverse_kl, ratio, clipped, entropy, penalty = figures
        return {
            "loss": loss.sum() / max(num_tokens, 1),
            "reverse_kl": reverse_kl.mean(),
            "reverse_kl_p50": float(np.quantile(reverse_kl, 0.5)),
            "reverse_kl_p99": float(np.quantile(reverse_kl, 0.99)),
            "ratio_mean": ratio.mean(),
            "ratio_max": ratio.max(),
            "clipped_share": clipped.mean(),
            "entropy": entropy.mean(),
            "kl_penalty": penalty.mean(),
        }


def _advantage_moments(rows: Sequence[Joined], clamp: float | None) -> tuple[float, float]:
    """Mean and deviation over the global batch of the advantages under the student that sampled: known before any
    forward pass, so the same for every micro-batch size. Clamped as the advantages are."""
    if not rows:
        return 0.0, 1.0
    pieces = []
    for rollout, score in rows:
        student = rollout.sampling_logprobs if rollout.raw_logprobs is None else rollout.raw_logprobs
        pieces.append(score.teacher_logprobs.astype(np.float64) - student)
    advantages = np.concatenate(pieces)
    if clamp is not None:
        advantages = advantages.clip(-clamp, clamp)
    return float(advantages.mean()), float(advantages.std())


def _batch_facts(batch: Sequence[Joined]) -> dict[str, Any]:
    return {
        "rollouts": len(batch),
        "response_length": float(np.mean([len(rollout.response_ids) for rollout, _ in batch])),
        "truncated_share": float(np.mean([rollout.finish_reason == "length" for rollout, _ in batch])),
        "error_share": float(np.mean([score.error is not None for _, score in batch])),
    }
