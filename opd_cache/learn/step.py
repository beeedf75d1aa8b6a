"""One optimizer step on one global batch, and what is known of it afterwards."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_cache.config import ModelConfig, Recipe
from opd_cache.errors import ModelError
from opd_cache.estimate import micro_batch_tokens, model_size
from opd_cache.fingerprint import model_folder
from opd_cache.learn.batch import MicroBatch, loss_places, micro_batches, rows_to_learn, sampled_values
from opd_cache.learn.engine import Engine
from opd_cache.learn.losses import resolve_loss, token_advantages
from opd_cache.learn.objective import FIGURES, Objective, StepFacts, summarize
from opd_cache.learn.ranks import Ranks
from opd_cache.learn.rewards import group_advantages, mean_reward
from opd_cache.learn.student import Student
from opd_cache.models import autocast_dtype, gpu_bytes, load_model, tensors_on
from opd_cache.store.join import Joined


def max_tokens_per_micro_batch(recipe: Recipe, ranks: Ranks) -> int:
    """The same on every rank, since each of them divides a batch among all: what the first one finds."""

    def find() -> int:
        student = model_size(model_folder(recipe.student))
        return micro_batch_tokens(recipe.learn, student, ranks.world, gpu_bytes(recipe.student.device))

    return ranks.from_first(find)


class Trainer:
    """Applies the recipe's loss with an engine. Holds no state between steps but the reference policy."""

    def __init__(self, recipe: Recipe, engine: Engine, policy_version: int, ranks: Ranks) -> None:
        self.config, self.engine, self.ranks = recipe.learn, engine, ranks
        self.policy_version = policy_version
        self.max_tokens = max_tokens_per_micro_batch(recipe, ranks)
        self.loss = resolve_loss(self.config.loss)
        self.reference: Student | None = None
        # A LoRA adapter that is switched off leaves the initial student; anything else is a model of its own.
        if self.config.kl_coef > 0 and (self.config.lora.rank is None or self.config.reference is not None):
            self.reference = _load_reference(recipe, engine)

    def step(self, batch: Sequence[Joined], step: int, learning_rate: float, read_s: float) -> dict[str, Any]:
        """Forward, backward and optimizer on one global batch; returns its row of steps.parquet, whole on the first rank.

        The loss is the token mean over the global batch: every micro-batch is divided by the batch's token count,
        so neither their number nor that of the ranks matters. A batch without a token to learn from changes nothing.
        """
        start = time.monotonic()
        rows = rows_to_learn(batch, self.config.mask_truncated)
        num_tokens = sum(rollout.num_loss_tokens for rollout, _ in rows)
        figures = self._forward_backward(batch, rows, num_tokens)
        grad_norm = self.engine.optimizer_step(learning_rate) if num_tokens else 0.0
        gathered = self.ranks.gather(figures)
        whole = np.concatenate(gathered, axis=1) if gathered else figures
        compute_s = time.monotonic() - start
        return {
            "step": step + 1,
            "policy_version": self.policy_version,
            **summarize(whole, num_tokens),
            **self._batch_facts(batch),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": num_tokens,
            "read_s": read_s,
            "compute_s": compute_s,
            "tokens_per_s": num_tokens / max(read_s + compute_s, 1e-9),
        }

    def _forward_backward(self, batch: Sequence[Joined], rows: Sequence[Joined], num_tokens: int) -> np.ndarray:
        mean, std = self._advantage_moments(rows)
        facts = StepFacts(num_tokens, mean, std, gradients_are_averaged_over=self.ranks.world)
        rewards = group_advantages(batch, rows) if self.loss.needs_reward else [0.0] * len(rows)
        micros = micro_batches(
            rows,
            rewards,
            self.max_tokens,
            layout=self.engine.layout,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        figures = [np.zeros((len(FIGURES), 0), np.float32)]
        micro = next(micros, None)
        while micro is not None:
            following = next(micros, None)
            moved = tensors_on(self.engine.device, micro)
            objective = Objective(
                self.loss, self.config, facts, moved, self.engine.vocab_size, self._reference_logprobs(moved)
            )
            self.engine.forward_backward(moved, objective, is_last=following is None)
            figures.append(objective.figures())
            micro = following
        return np.concatenate(figures, axis=1)

    def _reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        if self.config.kl_coef == 0:
            return None
        return self.reference.sampled_logprobs(batch) if self.reference else self.engine.reference_logprobs(batch)

    def _advantage_moments(self, rows: Sequence[Joined]) -> tuple[float, float]:
        """Mean and deviation over the global batch of the advantages under the student that sampled: known before any
        forward pass, so the same for every micro-batch size and number of ranks."""
        if not rows or not self.config.loss.normalize_advantages:
            return 0.0, 1.0
        kept = [loss_places(rollout) for rollout, _ in rows]
        sampled = [
            sampled_values(rollout.student_logprobs, places) for (rollout, _), places in zip(rows, kept, strict=True)
        ]
        taught = [score.teacher_logprobs[places] for (_, score), places in zip(rows, kept, strict=True)]
        advantages_N, _ = token_advantages(
            torch.from_numpy(np.concatenate(taught)).double(),
            torch.from_numpy(np.concatenate(sampled)).double(),
            torch.from_numpy(np.repeat(np.arange(len(rows)), [len(values) for values in sampled])),
            self.config.loss,
        )
        return float(advantages_N.mean()), float(advantages_N.std(correction=0))

    def _batch_facts(self, batch: Sequence[Joined]) -> dict[str, Any]:
        return {
            "rollouts": len(batch),
            "staleness": float(np.mean([self.policy_version - rollout.policy_version for rollout, _ in batch])),
            "reward": mean_reward(batch),
            "response_length": float(np.mean([len(rollout.response_ids) for rollout, _ in batch])),
            "truncated_share": float(np.mean([rollout.finish_reason == "length" for rollout, _ in batch])),
            "error_share": float(np.mean([score.error is not None for _, score in batch])),
            "dropped_share": float(np.mean([score.is_dropped for _, score in batch])),
        }


def _load_reference(recipe: Recipe, engine: Engine) -> Student:
    """Raises ModelError where it cannot compute the micro-batches that the engine's student takes."""
    student, device = recipe.student, engine.device
    source = recipe.learn.reference or str(model_folder(student))
    dtype = autocast_dtype(recipe.learn.precision, device) or torch.float32
    config = ModelConfig(
        model=source,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        attn_implementation=student.attn_implementation,
        trust_remote_code=student.trust_remote_code,
    )
    reference = Student(load_model(config, "reference policy").frozen())
    if reference.use_layout(recipe.learn.packing) != engine.layout:
        raise ModelError(
            f"reference policy {source!r}: cannot compute {engine.layout} sequences as the student does. Use learn.packing=never."
        )
    return reference
