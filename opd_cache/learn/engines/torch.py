"""The plain torch engine: one process or several with whole copies, float32 weights, bfloat16 where the hardware has it."""

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opd_cache.config import LearnConfig, ModelConfig
from opd_cache.errors import DivergedError
from opd_cache.learn.batch import MicroBatch
from opd_cache.learn.divide import Layout
from opd_cache.learn.lora import adapters_off
from opd_cache.learn.objective import Objective
from opd_cache.learn.ranks import Ranks
from opd_cache.learn.student import Student
from opd_cache.learn.weights import (
    build_student,
    load_student,
    parameter_groups,
    read_optimizer,
    write_optimizer,
    write_student,
)


class TorchEngine:
    """Stays warm between episodes. Methods: opd_cache/learn/engine.py."""

    def __init__(self, options: LearnConfig, student: ModelConfig, ranks: Ranks) -> None:
        self.options, self.config, self.ranks = options, student, ranks
        self.student: Student
        self.optimizer: torch.optim.AdamW
        self.layout: Layout = "padded"
        self._wrapped: nn.Module
        self._holds: Path | None = None  # the checkpoint whose state is in memory

    @property
    def device(self) -> torch.device:
        return self.student.model.device

    @property
    def vocab_size(self) -> int:
        return self.student.model.vocab_size

    def load(self, folder: Path, with_optimizer: bool) -> None:
        if self._holds == folder:
            return
        if self._holds is None or not load_student(self.student.model, self.options, folder):
            self._build(folder)
        self.optimizer.state.clear()
        if with_optimizer:
            parameters = dict(self.student.module.named_parameters())
            for key, name, value in read_optimizer(folder):
                # A copy: what is read are pages of the file.
                self.optimizer.state[parameters[name]][key] = value.to(parameters[name].device, copy=True)
        self._holds = folder

    def _build(self, folder: Path) -> None:
        options = self.options
        self.student = build_student(options, self.config, folder, self.ranks.device(self.config.device))
        self.layout = self.student.use_layout(options.packing)
        betas = (options.adam_beta1, options.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student.module, options),
            lr=options.learning_rate,
            betas=betas,
            eps=options.adam_epsilon,
            fused=True,
        )
        self._wrapped = self.student
        self.student.head.adds_to_grad = self.ranks.world == 1
        if self.ranks.world > 1:
            # Looking for unused parameters keeps the buckets as they are at the start: else they are laid out anew after
            # the first step, and a resumed run would sum in another order than one that was never stopped.
            self._wrapped = DistributedDataParallel(
                self.student, gradient_as_bucket_view=True, find_unused_parameters=True
            )

    def forward_backward(self, batch: MicroBatch, objective: Objective, is_last: bool) -> None:
        self._holds = None
        # Gradients of earlier micro-batches stay where they are and travel with the last one's.
        keep = isinstance(self._wrapped, DistributedDataParallel) and not is_last
        with self._wrapped.no_sync() if keep else contextlib.nullcontext():  # type: ignore[operator]
            self._wrapped(batch, objective).backward()

    def optimizer_step(self, learning_rate: float) -> float:
        limit = self.options.max_grad_norm
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, float("inf") if limit is None else limit).item()
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient norm is {norm}; nothing was published of this step. Lower learn.learning_rate or learn.max_grad_norm."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sampled_logprobs(self, batch: MicroBatch) -> Tensor:
        return self.student.sampled_logprobs(batch, exact=True)

    def reference_logprobs(self, batch: MicroBatch) -> Tensor:
        with adapters_off(self.student.module):
            return self.student.sampled_logprobs(batch)

    def save(self, folder: Path | None) -> None:
        if folder is not None:
            module = self.student.module
            with ThreadPoolExecutor(1) as beside:
                writing = beside.submit(write_optimizer, folder, self._optimizer_tensors())
                write_student(folder, module.state_dict(), module, self.options, self.config)
                writing.result()

    def saved_as(self, folder: Path) -> None:
        self._holds = folder

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.student.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}:{name}", value
