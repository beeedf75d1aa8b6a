"""A micro-batch in which each prompt stands once before all its responses: the body computes it once for all of them.

All positions lie behind each other in one row, without padding. Only attention knows of sequences: prompts attend to
themselves in one call, responses to their prompt and themselves in another. Numbers are those of whole sequences.
"""

# T positions, G prompts, P positions of the longest; S responses, R positions of the longest; h heads, d head size,
# F = h * d

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
    """How attention sees a row: its positions in two rectangles, G prompts of P places and S responses of R, behind each
    other. Places beyond an end are filled with any position, and masked."""

    source_N: Tensor  # N = G * P + S * R: the position at each place
    is_filler_N1: Tensor
    place_T: Tensor  # where each position lies in N
    sees_S1RK: Tensor  # bool, K = P + R: what a position of a response sees of its prompt and of its response
    longest_prompt: int
    responses_of_G: tuple[int, ...]  # how many responses each prompt has; they stand in the prompts' order

    @property
    def num_prompt_places(self) -> int:
        return len(self.responses_of_G) * self.longest_prompt


def shared_prompts(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> SharedPrompts:
    """The layout of a row: each prompt by its length, followed by its responses by theirs."""
    lengths = np.array([length for prompt, its in zip(prompts, responses, strict=True) for length in (prompt, *its)])
    is_prompt = np.array([index == 0 for its in responses for index in range(1 + len(its))])
    ends = lengths.cumsum()
    starts = ends - lengths
    P, R = lengths[is_prompt].max(), lengths[~is_prompt].max()
    first = np.empty_like(lengths)  # place
    first[is_prompt] = np.arange(is_prompt.sum()) * P
    first[~is_prompt] = is_prompt.sum() * P + np.arange((~is_prompt).sum()) * R
    place_T = np.repeat(first - starts, lengths) + np.arange(ends[-1])
    source_N = np.zeros(is_prompt.sum() * P + (~is_prompt).sum() * R, np.int64)
    source_N[place_T] = np.arange(ends[-1])
    is_filler_N = np.ones(len(source_N), bool)
    is_filler_N[place_T] = False
    own_S = np.repeat(prompts, [len(its) for its in responses])
    sees_SK = np.concatenate([np.arange(P) < own_S[:, None], np.ones((len(own_S), R), bool)], axis=1)
    causal_RK = np.concatenate([np.ones((R, P), bool), np.tri(R, dtype=bool)], axis=1)
    return SharedPrompts(
        torch.from_numpy(source_N),
        torch.from_numpy(is_filler_N[:, None]),
        torch.from_numpy(place_T),
        torch.from_numpy(sees_SK[:, None, None, :] & causal_RK),
        int(P),
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
    query_GhPd, query_ShRd = _in_rectangles(query, shared)
    key_GhPd, key_ShRd = _in_rectangles(key, shared)
    value_GhPd, value_ShRd = _in_rectangles(value, shared)
    of_prompts_GPhd = sdpa_attention_forward(module, query_GhPd, key_GhPd, value_GhPd, None, **options)[0]
    of_responses_SRhd = sdpa_attention_forward(
        module,
        query_ShRd,
        torch.cat([_for_responses(key_GhPd, shared), key_ShRd], dim=2),
        torch.cat([_for_responses(value_GhPd, shared), value_ShRd], dim=2),
        shared.sees_S1RK,
        **options,
    )[0]
    together_Nhd = torch.cat([of_prompts_GPhd.flatten(0, 1), of_responses_SRhd.flatten(0, 1)])
    return _FromPlaces.apply(together_Nhd.flatten(1), shared).unflatten(1, together_Nhd.shape[1:])[None], None


def _in_rectangles(values_1hTd: Tensor, shared: SharedPrompts) -> tuple[Tensor, Tensor]:
    """([G, h, P, d], [S, h, R, d]) of [1, h, T, d]."""
    values_Thd = values_1hTd[0].transpose(0, 1)
    rows_Nhd = _ToPlaces.apply(values_Thd.flatten(1), shared).unflatten(1, values_Thd.shape[1:])
    num_prompts, middle = len(shared.responses_of_G), shared.num_prompt_places
    prompts, responses = rows_Nhd[:middle], rows_Nhd[middle:]
    return (
        prompts.unflatten(0, (num_prompts, -1)).transpose(1, 2),
        responses.unflatten(0, (len(shared.sees_S1RK), -1)).transpose(1, 2),
    )


def _for_responses(values_GhPd: Tensor, shared: SharedPrompts) -> Tensor:
    """[S, h, P, d]: each prompt's as often as it has responses. Expanded, not indexed, so that its gradient is a sum in
    one order on every device."""
    parts = values_GhPd.split(1)
    return torch.cat([part.expand(count, -1, -1, -1) for part, count in zip(parts, shared.responses_of_G, strict=True)])


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
