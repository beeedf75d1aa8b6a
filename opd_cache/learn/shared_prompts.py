"""A micro-batch in which each prompt stands once before all its responses: the body computes it once for all of them.

All positions lie behind each other in one row, without padding. Only attention knows of sequences: it takes them apart into
rectangles of similar lengths. Prompts, and sequences whose prompt has no other response, attend to themselves; other
responses to their prompt and to themselves. Numbers are those of whole sequences.
"""

# T positions of a row, N places in its rectangles; of one rectangle B rows of R places, behind P places of their prompts;
# h heads, d head size, F = h * d

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from opd_cache.inference import can_share_prompts
from opd_cache.models import PROBE_TOLERANCE, LanguageModel, tensors_on

ATTENTION = "sdpa_shared_prompts"
# A row shorter than its rectangle's longest by more than this share, and than so many tokens, begins another one.
SHORTER, FEW_TOKENS = 0.3, 64
ALIGNED = 8  # tokens: GPU kernels copy masks of other widths


@dataclass(frozen=True)
class Rectangle:
    """Rows of similar lengths among the places of a layout."""

    start: int
    rows: int
    width: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.width

    def of(self, values_Nhd: Tensor) -> Tensor:
        """Its part, [B, h, R, d]."""
        return values_Nhd[self.start : self.end].unflatten(0, (self.rows, self.width)).transpose(1, 2)


@dataclass(frozen=True)
class Responses:
    """Responses of similar lengths whose prompts stand in one rectangle."""

    rectangle: Rectangle
    prompts: Rectangle
    of_prompt: tuple[tuple[int, int], ...]  # (row of the prompts' rectangle, how many of these responses follow it)
    sees_B1RK: Tensor  # bool, K = P + R: what a position sees of its prompt and of its response
    masks: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """sees_B1RK as attention adds it, made once for all layers."""
        key = (dtype, self.sees_B1RK.device)
        if key not in self.masks:
            zeros = torch.zeros(self.sees_B1RK.shape, dtype=dtype, device=key[1])
            self.masks[key] = zeros.masked_fill_(~self.sees_B1RK, -torch.inf)
        return self.masks[key]

    def with_prompts(self, values_Nhd: Tensor) -> Tensor:
        """[B, h, K, d]. A prompt's are expanded, not indexed, so that their gradient is a sum in one order on every device."""
        prompts_GhPd = self.prompts.of(values_Nhd)
        parts = [prompts_GhPd[row : row + 1].expand(count, -1, -1, -1) for row, count in self.of_prompt]
        return torch.cat([torch.cat(parts), self.rectangle.of(values_Nhd)], dim=2)


@dataclass(frozen=True)
class SharedPrompts:
    """How attention takes a row apart. Places beyond a sequence's end are filled with any position, and not seen."""

    source_N: Tensor  # the position at each place
    is_filler_N1: Tensor
    place_T: Tensor  # where each position lies in N
    whole: tuple[Rectangle, ...]  # prompts of several responses; sequences whose prompt has no other
    responses: tuple[Responses, ...]


class _Segment(NamedTuple):
    """A stretch of the row that attention puts into a row of a rectangle."""

    length: int
    start: int
    prompt: int = 0  # of a response: the row of its prompt's rectangle


def shared_prompts(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> SharedPrompts:
    """The layout of a row: each prompt by its length, followed by its responses by theirs."""
    alone: list[_Segment] = []
    shared: list[_Segment] = []
    behind: dict[_Segment, list[_Segment]] = {}
    start = 0
    for prompt, its in zip(prompts, responses, strict=True):
        if len(its) == 1:
            alone.append(_Segment(prompt + its[0], start))
        else:
            shared.append(_Segment(prompt, start))
            starts = accumulate(its, initial=start + prompt)
            behind[shared[-1]] = [_Segment(length, its_start) for length, its_start in zip(its, starts, strict=False)]
        start += prompt + sum(its)
    places = _Places(start)
    of_prompts = [(places.rectangle(part), part) for part in _similar(shared)]
    whole = [rectangle for rectangle, _ in of_prompts] + [places.rectangle(part) for part in _similar(alone)]
    parts: list[Responses] = []
    for rectangle, its_prompts in of_prompts:
        its_responses = [
            segment._replace(prompt=row) for row, prompt in enumerate(its_prompts) for segment in behind[prompt]
        ]
        lengths = np.array([prompt.length for prompt in its_prompts])
        parts += [_responses(places, rectangle, lengths, part) for part in _similar(its_responses)]
    return SharedPrompts(*places.tensors(), tuple(whole), tuple(parts))


def _responses(places: "_Places", prompts: Rectangle, lengths: np.ndarray, segments: list[_Segment]) -> Responses:
    """lengths: of the prompts, by row of their rectangle."""
    by_prompt = sorted(segments, key=lambda segment: segment.prompt)
    rectangle, P = places.rectangle(by_prompt), prompts.width
    R = rectangle.width
    own_B = lengths[[segment.prompt for segment in by_prompt]]
    sees_BK = np.concatenate([np.arange(P) < own_B[:, None], np.ones((len(own_B), R), bool)], axis=1)
    causal_RK = np.concatenate([np.ones((R, P), bool), np.tri(R, dtype=bool)], axis=1)
    counts = Counter(segment.prompt for segment in by_prompt)
    return Responses(rectangle, prompts, tuple(counts.items()), torch.from_numpy(sees_BK[:, None, None, :] & causal_RK))


def _similar(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Longest first, in parts of similar lengths."""
    parts: list[list[_Segment]] = []
    for segment in sorted(segments, key=lambda segment: -segment.length):
        longest = parts[-1][0].length if parts else 0
        if not parts or longest - segment.length > max(FEW_TOKENS, SHORTER * longest):
            parts.append([])
        parts[-1].append(segment)
    return parts


class _Places:
    """Rectangles behind each other, as they are asked for."""

    def __init__(self, num_positions: int) -> None:
        self.place_T = np.empty(num_positions, np.int64)
        self.sources: list[np.ndarray] = []
        self.end = 0

    def rectangle(self, segments: Sequence[_Segment]) -> Rectangle:
        longest = max(segment.length for segment in segments)
        width = longest if longest <= FEW_TOKENS else -(-longest // ALIGNED) * ALIGNED
        found = Rectangle(self.end, len(segments), width)
        source_BR = np.zeros((found.rows, width), np.int64)
        for row, (length, start, _) in enumerate(segments):
            positions = np.arange(start, start + length)
            source_BR[row, :length] = positions
            self.place_T[positions] = self.end + row * width + np.arange(length)
        self.sources.append(source_BR.ravel())
        self.end = found.end
        return found

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(source_N, is_filler_N1, place_T)."""
        is_filler_N = np.ones(self.end, bool)
        is_filler_N[self.place_T] = False
        sources = np.concatenate(self.sources)
        return torch.from_numpy(sources), torch.from_numpy(is_filler_N[:, None]), torch.from_numpy(self.place_T)


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
    query_Nhd, key_Nhd, value_Nhd = (_to_places(values, shared_prompts) for values in (query, key, value))
    found = [
        sdpa_attention_forward(module, part.of(query_Nhd), part.of(key_Nhd), part.of(value_Nhd), None, **options)[0]
        for part in shared_prompts.whole
    ]
    found += [
        sdpa_attention_forward(
            module,
            part.rectangle.of(query_Nhd),
            part.with_prompts(key_Nhd),
            part.with_prompts(value_Nhd),
            part.mask(query.dtype),
            **options,
        )[0]
        for part in shared_prompts.responses
    ]
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
