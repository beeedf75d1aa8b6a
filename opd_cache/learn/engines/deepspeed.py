"""The DeepSpeed engine: the ranks share out optimizer states, gradients and weights (ZeRO). Float32 weights, bfloat16
where the hardware has it, torch's AdamW, and the torch engine's files, whatever the stage and the number of ranks."""

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_cache.config import LearnConfig, ModelConfig
from opd_cache.errors import ConfigError, DivergedError
from opd_cache.learn.batch import MicroBatch
from opd_cache.learn.divide import Layout
from opd_cache.learn.lora import adapters_off
from opd_cache.learn.objective import Objective
from opd_cache.learn.ranks import Ranks
from opd_cache.learn.student import Student
from opd_cache.learn.weights import build_student, parameter_groups, read_optimizer, write_optimizer, write_student

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """Stays warm between episodes. Every method is a collective. Methods: opd_cache/learn/engine.py."""

    def __init__(self, options: LearnConfig, student: ModelConfig, ranks: Ranks) -> None:
        self.options, self.config, self.ranks = options, student, ranks
        self.stage = options.deepspeed.zero_stage
        self.student: Student
        self.layout: Layout = "padded"
        self._engine: Any = None  # deepspeed.DeepSpeedEngine
        self._adam: torch.optim.AdamW  # under DeepSpeed's wrapper
        self._holds: Path | None = None  # the checkpoint whose state is in memory

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def vocab_size(self) -> int:
        return self.student.model.vocab_size

    def load(self, folder: Path, with_optimizer: bool) -> None:
        if self._holds == folder:
            return
        deepspeed = _import_deepspeed(self.ranks.device(self.config.device))
        # Whole on the CPU first; DeepSpeed takes from it what belongs on this rank.
        student = build_student(self.options, self.config, folder, "cpu")
        if self._engine is None:
            self.layout = student.use_layout(self.options.packing)
            self._build(student, deepspeed)
        else:
            self._set_weights(student, deepspeed)
        self._set_optimizer(folder if with_optimizer else None)
        self._holds = folder

    def _build(self, student: Student, deepspeed: Any) -> None:
        options = self.options
        self.student = student
        if not dist.is_initialized():
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        betas = (options.adam_beta1, options.adam_beta2)
        groups = parameter_groups(student.module, options)
        self._adam = torch.optim.AdamW(
            groups, lr=options.learning_rate, betas=betas, eps=options.adam_epsilon, fused=True
        )
        os.environ["LOCAL_RANK"] = str(self.ranks.local_rank)  # srun does not say it under this name
        self._engine, *_ = deepspeed.initialize(model=student, optimizer=self._adam, config=self._deepspeed_config())
        for flat in self._flat_parameters():
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self._adam.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **zeros}
        if self.stage in (1, 2):
            # What the first step would do: let every parameter find its part of the flat states.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _deepspeed_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        }
        zero |= self.options.deepspeed.zero_options
        if self.options.deepspeed.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,  # the loss is scaled by the objective; nothing else reads these two
            "gradient_accumulation_steps": 1,
            "gradient_clipping": (self.options.max_grad_norm or 0.0) if self.stage else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def forward_backward(self, batch: MicroBatch, objective: Objective, is_last: bool) -> None:
        self._holds = None
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(self._engine(batch, objective))

    def optimizer_step(self, learning_rate: float) -> float:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            limit = self.options.max_grad_norm
            norm = float(nn.utils.clip_grad_norm_(self._engine.parameters(), math.inf if limit is None else limit))
            if math.isfinite(norm):
                self._engine.step()
        else:
            self._engine.step()  # changes nothing where the norm is not finite
            norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient norm is {norm}; nothing was published of this step. Lower learn.learning_rate or learn.max_grad_norm."
            )
        return norm

    def sampled_logprobs(self, batch: MicroBatch) -> Tensor:
        return self.student.sampled_logprobs(batch, exact=True)

    def reference_logprobs(self, batch: MicroBatch) -> Tensor:
        with adapters_off(self.student.module):
            return self.student.sampled_logprobs(batch)

    def save(self, folder: Path | None) -> None:
        module = self.student.module
        state = {name: self._get(parameter) for name, parameter in module.named_parameters()}
        if folder is not None:
            write_student(folder, state, module, self.options, self.config)
        optimizer = self._optimizer_tensors()
        if folder is not None:
            write_optimizer(folder, optimizer)
        else:
            for _ in optimizer:
                pass  # every rank gives its share of each tensor

    def saved_as(self, folder: Path) -> None:
        self._holds = folder

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        step = next(iter(self._adam.state.values()))["step"].cpu()
        for name, parameter in self._trained():
            yield f"step:{name}", step.clone()
            for key in MOMENTS:
                yield f"{key}:{name}", self._get(parameter, key)

    def _trained(self) -> list[tuple[str, Tensor]]:
        named = self.student.module.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def _flat_parameters(self) -> list[Tensor]:
        """What AdamW steps on this rank: the parameters themselves, or flat float32 shares of many of them."""
        if self.stage == 0:
            return [parameter for _, parameter in self._trained()]
        optimizer = self._engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _get(self, parameter: Tensor, key: str | None = None) -> Tensor:
        """A whole parameter, or its whole optimizer state, on the CPU."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is not None:
            full = (
                self._adam.state[parameter][key] if self.stage == 0 else safe_get_full_optimizer_state(parameter, key)
            )
        elif self.stage == 0:
            full = parameter
        elif parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().cpu().clone()
        return full.detach().cpu()

    def _set(self, parameter: Tensor, full: Tensor, key: str | None = None) -> None:
        """Take this rank's share of a whole float32 parameter, or of its optimizer state."""
        from deepspeed import utils as zero

        if self.stage == 0:
            (parameter.data if key is None else self._adam.state[parameter][key]).copy_(full)
        elif self.stage == 3:
            # safe_set_full_* cannot divide a parameter whose size is no multiple of the ranks; shares are padded.
            size = zero.safe_get_local_fp32_param(parameter).numel()
            flat = nn.functional.pad(full.flatten(), (0, size * self.ranks.world - full.numel()))
            share = flat.narrow(0, size * self.ranks.rank, size)
            if key is None:
                zero.safe_set_local_fp32_param(parameter, share)
            else:
                zero.safe_set_local_optimizer_state(parameter, share, key)
        elif key is None:
            zero.safe_set_full_fp32_param(parameter, full)
        else:
            zero.safe_set_full_optimizer_state(parameter, full, key)

    @torch.no_grad()
    def _set_weights(self, student: Student, deepspeed: Any) -> None:
        fresh = dict(student.module.named_parameters())
        for name, parameter in self._trained():
            full = fresh[name].to(self.device)
            self._set(parameter, full)
            # The float32 share is what steps; what computes is another copy, and in stage 3 spread over the ranks.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(full)

    @torch.no_grad()
    def _set_optimizer(self, folder: Path | None) -> None:
        for state in self._adam.state.values():
            for value in state.values():
                value.zero_()
        parameters = dict(self._trained())
        for key, name, value in read_optimizer(folder) if folder is not None else ():
            if key in MOMENTS:
                self._set(parameters[name], value.to(self.device), key)
            else:
                for state in self._adam.state.values():
                    state[key].copy_(value)


def _import_deepspeed(device: str) -> Any:
    """DeepSpeed, for the device that is meant, logging where everything else does. Raises ConfigError."""
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cpu" if on_cpu else "cuda"  # it is read at import, once
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"learn.engine = 'deepspeed', but deepspeed cannot be imported ({error}). Run: pip install 'opd-cache[deepspeed]'"
        ) from error
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output is for results
    # It calls collectives by names that newer torch versions want to rename.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if on_cpu:
        # A C++ extension for tensor-parallel inference, which no training uses; it would be compiled for more than a
        # minute at the first start, and where that is killed, every later start would wait for its lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
