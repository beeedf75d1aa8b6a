"""What the learn stage asks of an engine: the seam between the stage and its backends."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from opd_cache.config import LearnConfig, ModelConfig
from opd_cache.learn.batch import MicroBatch


class Engine(Protocol):
    """Holds the student and its optimizer. Order of calls: load; a step's logprobs and backward for every micro-batch,
    then optimizer_step; save, and saved_as once that was published."""

    def __init__(self, options: LearnConfig, student: ModelConfig) -> None: ...

    @property
    def device(self) -> torch.device:
        """Where micro-batches belong."""

    def load(self, folder: Path, with_optimizer: bool) -> None:
        """Take the weights of a folder, and the optimizer's state of a policy or checkpoint; nothing to do when they are
        in memory. Without the optimizer, training starts anew from the weights."""

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(student log-probs [N], at the teacher's top k [N, K], entropy [N]) of a micro-batch, with gradient.

        A top-k id that the student has no embedding for is impossible for it: −inf.
        """

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the step's gradient."""

    def optimizer_step(self, learning_rate: float) -> float:
        """Clip, step, and clear the gradients; returns the gradient norm before clipping. Raises DivergedError."""

    def save(self, folder: Path) -> None:
        """Write a Hugging Face model folder, and the optimizer's state in trainer/."""

    def saved_as(self, folder: Path) -> None:
        """The state in memory is now also this folder."""
