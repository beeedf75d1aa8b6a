"""A micro-batch in which each prompt stands once before all its responses: the body computes it once for all of them.

All positions lie behind each other in one row, without padding. Only attention knows of sequences: prompts attend to
themselves in one call, responses to their prompt and themselves in another. Numbers are those of whole sequences.
"""

# T positions, G prompts, P positions of the longest; S responses, R positions of the longest; h heads, d head size

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from opd_cache.inference import can_share_prompts
from opd_cache.models import PROBE_TOLERANCE, LanguageModel, tensors_on

ATTENTION = "sdpa_shared_prompts"


@dataclass(frozen=True)
class SharedPrompts:
    """Where the prompts and responses of a row lie, for attention. What fills up a place is any other position."""

    prompts_GP: Tensor  # positions in the row
    responses_SR: Tensor
    sees_S1RK: Tensor  # bool, K = P + R: what a position of a response sees of its prompt and of its response
    place_T: Tensor  # of each position in [G * P + S * R]
    responses_of_G: tuple[int, ...]  # how many responses each prompt has; they stand in the prompts' order


def shared_prompts(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> SharedPrompts:
    """The layout of a row: each prompt by its length, followed by its responses by theirs."""
    lengths = [(prompt, *its) for prompt, its in zip(prompts, responses, strict=True)]
    starts = np.cumsum([0, *(length for group in lengths for length in group)])
    num_positions, group_starts = int(starts[-1]), np.cumsum([0, *(len(group) for group in lengths)])[:-1]
    is_prompt = np.zeros(len(starts) - 1, bool)
    is_prompt[group_starts] = True
    flat = np.array([length for group in lengths for length in group])
    P, R = max(prompts), int(flat[~is_prompt].max())
    # Places beyond an end are masked, or never read; each takes another position, so that their zeros add up nowhere.
    prompts_GP = (starts[:-1][is_prompt][:, None] + np.arange(P)) % num_positions
    responses_SR = (starts[:-1][~is_prompt][:, None] + np.arange(R)) % num_positions
    own = np.repeat(prompts, [len(its) for its in responses])
    sees_SK = np.concatenate([np.arange(P) < own[:, None], np.ones((len(own), R), bool)], axis=1)
    causal_RK = np.concatenate([np.ones((R, P), bool), np.tri(R, dtype=bool)], axis=1)
    first = np.empty(len(flat), np.int64)
    first[is_prompt] = np.arange(len(prompts)) * P
    first[~is_prompt] = len(prompts) * P + np.arange(len(own)) * R
    place_T = np.concatenate([start + np.arange(length) for start, length in zip(first, flat, strict=True)])
    return SharedPrompts(
        torch.from_numpy(prompts_GP),
        torch.from_numpy(responses_SR),
        torch.from_numpy(sees_SK[:, None, None, :] & causal_RK),
        torch.from_numpy(place_T),
        tuple(len(its) for its in responses),
    )


def use_shared_prompts(model: LanguageModel) -> bool:
    """Switch a model to attention that knows shared prompts, where it can: sdpa, every layer over whole sequences, and
    the same hidden states as without."""
    attention = str(model.module.config._attn_implementation)
    if attention == ATTENTION:
        return True
    if attention != "sdpa" or not can_share_prompts(model):
        return False
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.module.set_attn_implementation(ATTENTION)
    if _finds_the_same(model):
        return True
    model.module.set_attn_implementation(attention)
    return False


@torch.no_grad()
def _finds_the_same(model: LanguageModel) -> bool:
    """Whether four short sequences with two prompts have the hidden states that each has alone."""
    prompts, responses = [3, 5], [[4, 2], [1, 6]]
    count = sum(prompts) + sum(map(sum, responses))
    ids = torch.arange(2, 2 + count, device=model.device).remainder(model.vocab_size)
    cut = iter(ids.split([length for prompt, its in zip(prompts, responses, strict=True) for length in (prompt, *its)]))
    alone, positions = [], []
    for prompt, its in zip(prompts, responses, strict=True):
        start = next(cut)
        positions.append(torch.arange(prompt))
        for index, length in enumerate(its):
            whole = torch.cat([start, next(cut)])[None]
            hidden_TH = model.hidden(whole, torch.ones_like(whole))[0]
            alone.append(hidden_TH if index == 0 else hidden_TH[prompt:])
            positions.append(prompt + torch.arange(length))
    expected_TH = torch.cat(alone)
    try:
        positions_1T = torch.cat(positions)[None].to(ids.device)
        shared = tensors_on(ids.device, shared_prompts(prompts, responses))
        found_TH = hidden_of_shared(model, ids[None], shared, positions_1T)[0]
    except (TypeError, ValueError, RuntimeError):  # it does not pass on what its attention is to know
        return False
    difference = (found_TH - expected_TH).abs().max().item()
    return difference <= PROBE_TOLERANCE[expected_TH.dtype] * max(1.0, expected_TH.abs().max().item())


def hidden_of_shared(model: LanguageModel, ids_1T: Tensor, shared: SharedPrompts, position_ids: Tensor) -> Tensor:
    """Last hidden states [1, T, H]."""
    # A mask of four dimensions is passed on as it is: no other is made.
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids_1T.device)
    return model.hidden(ids_1T, mask, position_ids=position_ids, shared_prompts=shared)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, h, T, d] each; gives [1, T, h, d]."""
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    shared = shared_prompts
    query_GhPd, key_GhPd, value_GhPd = (_rows(values, shared.prompts_GP) for values in (query, key, value))
    query_ShRd, key_ShRd, value_ShRd = (_rows(values, shared.responses_SR) for values in (query, key, value))
    of_prompts = sdpa_attention_forward(module, query_GhPd, key_GhPd, value_GhPd, None, **options)[0]
    of_responses = sdpa_attention_forward(
        module,
        query_ShRd,
        torch.cat([_for_responses(key_GhPd, shared), key_ShRd], dim=2),
        torch.cat([_for_responses(value_GhPd, shared), value_ShRd], dim=2),
        shared.sees_S1RK,
        **options,
    )[0]
    together = torch.cat([of_prompts.flatten(0, 1), of_responses.flatten(0, 1)])
    return together.index_select(0, shared.place_T)[None], None


def _rows(values_1hTd: Tensor, places_BN: Tensor) -> Tensor:
    """[B, h, N, d] of positions [B, N]."""
    chosen = values_1hTd[0].transpose(0, 1).index_select(0, places_BN.flatten())
    return chosen.unflatten(0, tuple(places_BN.shape)).transpose(1, 2)


def _for_responses(values_GhPd: Tensor, shared: SharedPrompts) -> Tensor:
    """[S, h, P, d]: each prompt's as often as it has responses. Expanded, not indexed, so that its gradient is a sum in
    one order on every device."""
    parts = values_GhPd.split(1)
    return torch.cat([part.expand(count, -1, -1, -1) for part, count in zip(parts, shared.responses_of_G, strict=True)])
