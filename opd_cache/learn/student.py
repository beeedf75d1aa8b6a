"""The student as engines wrap it: a micro-batch in, its loss out. The same module under plain torch and DeepSpeed."""

# B sequences, T positions, N response tokens, K teacher top-k, H hidden size

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from opd_cache.errors import ModelError
from opd_cache.learn.batch import MicroBatch
from opd_cache.learn.divide import Layout
from opd_cache.learn.head import Head
from opd_cache.learn.objective import Objective
from opd_cache.models import HIDDEN_TOLERANCE, LanguageModel, autocast_dtype, hidden_difference
from opd_cache.shared_attention import hidden_of_shared, use_shared_prompts


class Student(nn.Module):
    """A language model's body, and its head without the logits."""

    def __init__(self, model: LanguageModel, precision: str = "float32", liger: str = "never") -> None:
        super().__init__()
        self.precision = precision
        self.module = model.module
        self.model = model
        self.head = Head(model, liger)

    def forward(self, batch: MicroBatch, objective: Objective) -> Tensor:
        """The micro-batch's share of the step's loss, a scalar."""
        with self._autocast():
            return self.head(self._hidden(batch), objective.ids_NM, objective)

    def sampled_logprobs(self, batch: MicroBatch, exact: bool = False) -> Tensor:
        """Log-probs [N] of the sampled tokens, without gradient. exact: in the weights' precision, whatever the recipe's."""
        with torch.no_grad(), contextlib.nullcontext() if exact else self._autocast():
            # Called as a module: ZeRO-3 then gathers its weight.
            return self.head(self._hidden(batch), batch.target_ids_N[:, None], None).squeeze(-1)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        # In here and not around an engine's call: DeepSpeed switches off what is around its own.
        device = self.model.device
        dtype = autocast_dtype(self.precision, device)
        return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states [N, H] of the positions that predict a response token."""
        options = {} if batch.position_ids_BT is None else {"position_ids": batch.position_ids_BT}
        if batch.shared_prompts is not None:
            hidden_BTH = hidden_of_shared(self.model, batch.input_ids_BT, batch.shared_prompts, **options)
        else:
            hidden_BTH = self.model.hidden(batch.input_ids_BT, batch.attention_mask_BT, **options)
        return hidden_BTH.flatten(0, 1)[batch.predictor_N]

    def use_layout(self, packing: str) -> Layout:
        """How micro-batches are to lie: learn.packing, resolved for this model, which is made ready for it.

        Raises ModelError where packing is asked for that the model cannot do.
        """
        if packing == "never":
            return "padded"
        if use_shared_prompts(self.model):
            return "shared"
        if packing == "auto" and "flash" not in str(self.model.module.config._attn_implementation):
            return "padded"
        self.check_packing()
        return "packed"

    def check_packing(self) -> None:
        """Refuse a model whose packed sequences see each other. Raises ModelError."""
        ids = torch.arange(2, 14, device=self.model.device).remainder(self.model.vocab_size)
        one, two = ids[:5], ids[5:]
        positions = torch.cat([torch.arange(len(part), device=ids.device) for part in (one, two)])[None]
        with torch.no_grad():
            packed = self.model.hidden(torch.cat([one, two])[None], None, position_ids=positions)[0]
            alone = torch.cat([self.model.hidden(part[None], torch.ones_like(part[None]))[0] for part in (one, two)])
        if not hidden_difference(packed, alone) <= HIDDEN_TOLERANCE[packed.dtype]:
            raise ModelError(
                f"{self.model.source}: with attn_implementation={self.model.module.config._attn_implementation!r} packed sequences see each other. Use learn.packing=never."
            )
