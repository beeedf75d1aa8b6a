"""A row in which each prompt stands once before all its responses: the body computes it once for all of them.

Only attention knows of sequences (shared_prompts.py). Numbers are those of whole sequences.
"""

# T positions of a row, N places in its rectangles; of one rectangle B rows of R places; h heads, d head size, F = h * d

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from opd_cache.inference import grouped_attention
from opd_cache.models import HIDDEN_TOLERANCE, LanguageModel, hidden_difference, tensors_on
from opd_cache.sequences import Group, in_one_row
from opd_cache.shared_prompts import SharedPrompts, shared_prompts

ATTENTION = "sdpa_shared_prompts"


def use_shared_prompts(model: LanguageModel) -> bool:
    """Switch a model to attention that knows shared prompts, where it can: sdpa, every layer over whole sequences or a
    window, and the same hidden states as without."""
    attention = str(model.module.config._attn_implementation)
    if attention == ATTENTION:
        return True
    if attention != "sdpa" or attention_windows(model) is None:
        return False
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.module.set_attn_implementation(ATTENTION)
    if _finds_the_same(model):
        return True
    model.module.set_attn_implementation(attention)
    return False


def attention_windows(model: LanguageModel) -> tuple[int | None, ...] | None:
    """For each layer how many tokens up to its own a position sees, None for all; None where a layer is another kind."""
    config = model.module.config
    layers = DynamicCache(config=config).layers
    is_chunked = getattr(config.get_text_config(), "attention_chunk_size", None) is not None
    if is_chunked or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return tuple(getattr(layer, "sliding_window", None) for layer in layers)


@torch.no_grad()
def _finds_the_same(model: LanguageModel) -> bool:
    """Whether four short sequences with two prompts have the hidden states that each has alone."""
    ids = np.arange(2, 23) % model.vocab_size
    groups = [Group(ids[:3], [ids[3:7], ids[7:9]]), Group(ids[9:14], [ids[14:15], ids[15:21]])]
    row = tensors_on(model.device, in_one_row(groups))
    expected: list[Tensor] = []
    for prompt, responses in groups:
        for index, response in enumerate(responses):
            whole = torch.from_numpy(np.concatenate([prompt, response]))[None].to(model.device)
            hidden_TH = model.hidden(whole, torch.ones_like(whole))[0]
            expected.append(hidden_TH if index == 0 else hidden_TH[len(prompt) :])
    expected_TH = torch.cat(expected)
    try:
        shared = tensors_on(model.device, shared_prompts(groups))
        found_TH = hidden_of_shared(model, row.ids_BT, shared, row.positions_BT)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # it does not pass on what its attention is to know
    return hidden_difference(found_TH, expected_TH) <= HIDDEN_TOLERANCE[expected_TH.dtype]


def hidden_of_shared(
    model: LanguageModel, ids_1T: Tensor, shared: SharedPrompts, position_ids: Tensor | None
) -> Tensor:
    """Last hidden states [1, T, H]."""
    # A mask of four dimensions is passed on as it is: no other is made.
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids_1T.device)
    windows = attention_windows(model)
    return model.hidden(ids_1T, mask, position_ids=position_ids, shared_prompts=shared, attention_windows=windows)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    attention_windows: Sequence[int | None] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, h, T, d] each; gives [1, T, h, d]."""
    attend = grouped_attention if query.device.type == "cpu" else sdpa_attention_forward
    if shared_prompts is None:
        return attend(module, query, key, value, attention_mask, **options)
    window = attention_windows[module.layer_idx] if any(attention_windows) else None
    of_query, of_key, of_value = (
        shared_prompts.parts(_to_places(all_, shared_prompts)) for all_ in (query, key, value)
    )
    found = []
    for whole in shared_prompts.whole:
        queries, keys, values = (whole.rectangle.of(parts) for parts in (of_query, of_key, of_value))
        found.append(attend(module, queries, keys, values, whole.mask(query, window), **options)[0])
    for part in shared_prompts.responses:
        queries = part.rectangle.of(of_query)
        keys, values = part.with_prompts(of_key), part.with_prompts(of_value)
        found.append(attend(module, queries, keys, values, part.mask(query, window), **options)[0])
    together_Nhd = torch.cat([output_BRhd.flatten(0, 1) for output_BRhd in found])
    return _FromPlaces.apply(together_Nhd.flatten(1), shared_prompts).unflatten(1, together_Nhd.shape[1:])[None], None


def _to_places(values_1hTd: Tensor, shared: SharedPrompts) -> Tensor:
    """[N, h, d]."""
    values_Thd = values_1hTd[0].transpose(0, 1)
    return _ToPlaces.apply(values_Thd.flatten(1), shared).unflatten(1, values_Thd.shape[1:])


class _ToPlaces(torch.autograd.Function):
    """[N, F] of [T, F]. Backward, positions fetch their gradients, which no two places share: nothing is summed, as an
    index's own backward would do it slowly on a CPU and in any order on a GPU. A filler's gradient is zero, since it is
    masked."""

    @staticmethod
    def forward(ctx: Any, values_TF: Tensor, shared: SharedPrompts) -> Tensor:
        ctx.shared = shared
        return values_TF.index_select(0, shared.source_N)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0].index_select(0, ctx.shared.place_T), None


class _FromPlaces(torch.autograd.Function):
    """[T, F] of [N, F]."""

    @staticmethod
    def forward(ctx: Any, values_NF: Tensor, shared: SharedPrompts) -> Tensor:
        ctx.shared = shared
        return values_NF.index_select(0, shared.place_T)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0].index_select(0, ctx.shared.source_N).masked_fill_(ctx.shared.is_filler_N1, 0.0), None
