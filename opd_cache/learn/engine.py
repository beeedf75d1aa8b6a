"""What the learn stage asks of an engine: the seam between the stage and its backends."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from opd_cache.config import LearnConfig, ModelConfig
from opd_cache.learn.batch import MicroBatch
from opd_cache.learn.divide import Layout
from opd_cache.learn.objective import Objective
from opd_cache.learn.ranks import Ranks


class Engine(Protocol):
    """Holds the student and its optimizer, on every rank alike. Order of calls: load; a step's forward_backward for every
    micro-batch, then optimizer_step; save, and saved_as once that was published."""

    def __init__(self, options: LearnConfig, student: ModelConfig, ranks: Ranks) -> None: ...

    @property
    def device(self) -> torch.device:
        """Where micro-batches belong."""

    @property
    def vocab_size(self) -> int:
        """Token ids that the student has an embedding for."""

    @property
    def layout(self) -> Layout:
        """How micro-batches are to lie."""

    def load(self, folder: Path, with_optimizer: bool) -> None:
        """Take the weights of a folder, and the optimizer's state of a policy or checkpoint; nothing to do when they are
        in memory. Without the optimizer, training starts anew from the weights."""

    def forward_backward(self, batch: MicroBatch, objective: Objective, is_last: bool) -> None:
        """Add a micro-batch's share of the step's gradient. Averages over the ranks when it is the step's last."""

    def optimizer_step(self, learning_rate: float) -> float:
        """Clip, step, and clear the gradients; returns the gradient norm before clipping. Raises DivergedError, then on
        every rank and with the weights as they were."""

    def sampled_logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probs [N] of the sampled tokens under the student as it is, in the weights' own precision. On all ranks."""

    def reference_logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probs [N] of the sampled tokens under the student that training started from: its LoRA adapter off."""

    def save(self, folder: Path | None) -> None:
        """Write a Hugging Face model folder, and the optimizer's state in trainer/. On all ranks; only the first has a
        folder."""

    def saved_as(self, folder: Path) -> None:
        """The state in memory is now also this folder."""
