"""What sampling and scoring with transformers share: two faster ways to the same numbers on a CPU; and prompts that are
computed once for all their samples."""

# G distinct prompts, P prompt positions

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from opd_cache.models import LanguageModel, padded

GROUPED = "sdpa_grouped"
FEW_ROWS = 64


def distinct_neighbours(prompts: Sequence[np.ndarray]) -> list[int]:
    """For each prompt the number of the distinct one that it is, where equal ones stand side by side."""
    numbers = [0]
    for before, prompt in pairwise(prompts):
        numbers.append(numbers[-1] + (not np.array_equal(before, prompt)))
    return numbers


def prefill(model: LanguageModel, prompts: Sequence[np.ndarray]) -> DynamicCache:
    """Keys and values of prompts, left-padded, a row for each; equal neighbours are computed once."""
    numbers = distinct_neighbours(prompts)
    firsts = [prompts[numbers.index(number)] for number in range(numbers[-1] + 1)]
    ids_GP, mask_GP = padded(firsts, "left", model.device)
    cache = DynamicCache(config=model.module.config)
    model.body(
        input_ids=ids_GP,
        attention_mask=mask_GP,
        position_ids=(mask_GP.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_select_indices(torch.tensor(numbers, device=model.device))
    return cache


def can_share_prompts(model: LanguageModel) -> bool:
    """Whether all that the model keeps of a prompt are keys and values of whole sequences, which can be copied."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.module.config).layers)


def use_cpu_attention(model: LanguageModel) -> None:
    """On a CPU, let groups of query heads read their keys and values where they lie: transformers copies them for every
    head when a batch is padded, which takes longer than the attention of a single new token. The same numbers, bit by
    bit."""
    if model.device.type == "cpu" and getattr(model.module.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.module.set_attn_implementation(GROUPED)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    is_plain = all(options.get(name) is None for name in ("position_bias", "cache"))
    if attention_mask is None or query.requires_grad or not is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def use_cpu_head(model: LanguageModel) -> None:
    """On a CPU in float32, multiply the LM head's weight by the few rows of a decoding step, not these by the weight's
    transpose: up to three times faster."""
    head = model.head
    if model.device.type == "cpu" and type(head) is nn.Linear and head.bias is None and model.dtype == torch.float32:
        model.module.set_output_embeddings(_HeadOfFewRows(head))


class _HeadOfFewRows(nn.Linear):
    """Shares the weight of another."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if len(rows) > FEW_ROWS:
            return super().forward(hidden)
        return torch.mm(self.weight, rows.t()).t().contiguous().view(*hidden.shape[:-1], -1)
