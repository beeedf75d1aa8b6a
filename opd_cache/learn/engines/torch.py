"""The plain torch engine: one process, float32 weights, bfloat16 autocast where the hardware has it."""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from opd_cache.config import LearnConfig, ModelConfig
from opd_cache.errors import DivergedError
from opd_cache.fingerprint import model_folder
from opd_cache.learn.batch import MicroBatch
from opd_cache.learn.checkpoint import TRAINER, copy_model_files
from opd_cache.learn.logprobs import gather_logprobs
from opd_cache.models import LanguageModel, load_model, load_weights_into

OPTIMIZER = "optimizer.safetensors"


class TorchEngine:
    """One process. Stays warm between episodes. Methods: opd_cache/learn/engine.py."""

    def __init__(self, options: LearnConfig, student: ModelConfig) -> None:
        self.options, self.student = options, student
        self.model: LanguageModel
        self.optimizer: torch.optim.AdamW
        self._holds: Path | None = None  # the checkpoint whose state is in memory
        self._folder = model_folder(student)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def load(self, folder: Path, with_optimizer: bool) -> None:
        if self._holds == folder:
            return
        if self._holds is None or not load_weights_into(self.model, folder):
            self._build(folder)
        self.optimizer.state.clear()
        state_file = folder / TRAINER / OPTIMIZER
        if with_optimizer:
            self._load_optimizer(load_file(state_file))
        self._holds = folder

    def _build(self, folder: Path) -> None:
        config = ModelConfig(
            model=str(folder),
            dtype="float32",
            device=self.student.device,
            attn_implementation=self.student.attn_implementation,
            trust_remote_code=self.student.trust_remote_code,
        )
        self.model = load_model(config, "student")
        if self.options.gradient_checkpointing:
            # transformers checkpoints in train mode only, where dropout would move the student's log-probs.
            _disable_dropout(self.model.module)
            self.model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.module.train()
            self.model.check_split()
        matrices = [p for p in self.model.module.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.module.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (self.options.adam_beta1, self.options.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.options.learning_rate, betas=betas, eps=self.options.adam_epsilon, fused=True
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        wanted = self.options.precision
        has_bfloat16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        if wanted == "bfloat16" or (wanted == "auto" and has_bfloat16):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        with self.autocast():
            hidden_BTH = self.model.hidden(batch.input_ids_BT, batch.attention_mask_BT)
            hidden_NH = hidden_BTH[batch.row_N, batch.position_N]
            beyond_NK = batch.topk_ids_NK >= self.model.vocab_size
            ids_NM = torch.cat([batch.target_ids_N[:, None], batch.topk_ids_NK.masked_fill(beyond_NK, 0)], dim=-1)
            logprobs_NM, entropy_N = gather_logprobs(self.model, hidden_NH, ids_NM)
        return logprobs_NM[:, 0], logprobs_NM[:, 1:].masked_fill(beyond_NK, -torch.inf), entropy_N

    def backward(self, loss: Tensor) -> None:
        self._holds = None
        loss.backward()

    def optimizer_step(self, learning_rate: float) -> float:
        limit = self.options.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.model.module.parameters(), float("inf") if limit is None else limit)
        if not math.isfinite(norm.item()):
            raise DivergedError(
                f"the gradient norm is {norm.item()}; nothing was published of this step. Lower learn.learning_rate or learn.max_grad_norm."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def save(self, folder: Path) -> None:
        module = self.model.module
        # transformers refuses to save generation settings that contradict each other, as some models have: theirs is copied.
        module.generation_config = GenerationConfig()
        module.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        copy_model_files(self._folder, folder, existing=[path.name for path in folder.iterdir()])
        (folder / TRAINER).mkdir(exist_ok=True)
        save_file(self._optimizer_tensors(), folder / TRAINER / OPTIMIZER)

    def saved_as(self, folder: Path) -> None:
        self._holds = folder

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.model.module.named_parameters()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = self._names()
        return {
            f"{key}:{names[id(p)]}": value.contiguous()
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.model.module.named_parameters())
        for label, value in tensors.items():
            key, _, name = label.partition(":")
            parameter = parameters[name]
            self.optimizer.state[parameter][key] = value.to(parameter.device)


def _disable_dropout(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        # Attention and residual dropout are often plain numbers, read in forward.
        for name, value in vars(child).items():
            if "drop" in name and isinstance(value, float):
                setattr(child, name, 0.0)
