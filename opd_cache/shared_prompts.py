"""How attention takes a row apart in which each prompt stands once before all its responses (sequences.py).

It puts the sequences into rectangles of similar lengths. Prompts, and sequences whose prompt has no other response, attend
to themselves; other responses to their prompt and to themselves.
"""

# T positions of a row, N places in its rectangles; of one rectangle B rows of R places, behind P places of their prompts;
# h heads, d head size

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd_cache.sequences import Group

# A row shorter than its rectangle's longest by more than this share, and than so many tokens, begins another one.
SHORTER, FEW_TOKENS = 0.3, 64
ALIGNED = 8  # tokens: GPU kernels copy masks of other widths


@dataclass(frozen=True)
class Rectangle:
    """Rows of similar lengths among the places of a layout."""

    number: int
    rows: int
    width: int

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        """Its own, [B, h, R, d], of what lies in all rectangles, each [B * R, h, d]."""
        return parts[self.number].unflatten(0, (self.rows, self.width)).transpose(1, 2)


class Masks:
    """Masks as attention adds them, made once for all layers."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, torch.device, int | None], Tensor] = {}

    def of(self, like: Tensor, window: int | None, sees: Callable[[torch.device], Tensor]) -> Tensor:
        """In the dtype and on the device of a tensor. sees: what is seen, bool."""
        key = (like.dtype, like.device, window)
        if key not in self._made:
            seen = sees(like.device)
            zeros = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._made[key] = zeros.masked_fill_(~seen, -torch.inf)
        return self._made[key]


def _causal(R: int, window: int | None, device: torch.device) -> Tensor:
    """[R, R], bool: the own position and those before it, as far as a window reaches."""
    sees_RR = torch.ones((R, R), dtype=torch.bool, device=device).tril()
    return sees_RR if window is None else sees_RR.triu(1 - window)


@dataclass(frozen=True)
class Whole:
    """Prompts of several responses, or sequences whose prompt has no other."""

    rectangle: Rectangle
    masks: Masks = field(default_factory=Masks)

    def mask(self, like: Tensor, window: int | None) -> Tensor | None:
        """None: all positions up to the own one are seen."""
        R = self.rectangle.width
        if window is None or window >= R:
            return None
        return self.masks.of(like, window, lambda device: _causal(R, window, device))


@dataclass(frozen=True)
class Responses:
    """Responses of similar lengths whose prompts stand in one rectangle."""

    rectangle: Rectangle
    prompts: Rectangle
    of_prompt: tuple[tuple[int, int], ...]  # (row of the prompts' rectangle, how many of these responses follow it)
    prompt_lengths: tuple[int, ...]  # of each row
    masks: Masks = field(default_factory=Masks)

    def mask(self, like: Tensor, window: int | None) -> Tensor:
        """[B, 1, R, K], K = P + R: what a position sees of its prompt and of its response."""
        if window is not None and window >= self.prompts.width + self.rectangle.width:
            window = None
        return self.masks.of(like, window, lambda device: self._sees(window, device))

    def _sees(self, window: int | None, device: torch.device) -> Tensor:
        P, R = self.prompts.width, self.rectangle.width
        own_B11 = torch.tensor(self.prompt_lengths, device=device)[:, None, None]
        place_P, place_R1 = torch.arange(P, device=device), torch.arange(R, device=device)[:, None]
        sees_prompt_BRP = (place_P < own_B11).expand(-1, R, -1)
        if window is not None:
            sees_prompt_BRP = sees_prompt_BRP & (own_B11 + place_R1 - place_P < window)
        sees_response_BRR = _causal(R, window, device).expand(len(own_B11), -1, -1)
        return torch.cat([sees_prompt_BRP, sees_response_BRR], dim=2)[:, None]

    def with_prompts(self, parts: Sequence[Tensor]) -> Tensor:
        """[B, h, K, d]. A prompt's are expanded, not indexed, so that their gradient is a sum in one order on every device."""
        prompts = self.prompts.of(parts).split(1)
        expanded = [prompts[row].expand(count, -1, -1, -1) for row, count in self.of_prompt]
        return torch.cat([torch.cat(expanded), self.rectangle.of(parts)], dim=2)


@dataclass(frozen=True)
class SharedPrompts:
    """How attention takes a row apart. Places beyond a sequence's end are filled with any position, and not seen."""

    source_N: Tensor  # the position at each place
    is_filler_N1: Tensor
    place_T: Tensor  # where each position lies in N
    whole: tuple[Whole, ...]
    responses: tuple[Responses, ...]

    def parts(self, values_Nhd: Tensor) -> tuple[Tensor, ...]:
        """What lies in each rectangle, [B * R, h, d]."""
        own = [part.rectangle for part in self.whole] + [part.rectangle for part in self.responses]
        return tuple(values_Nhd.split([rectangle.rows * rectangle.width for rectangle in own]))


class _Segment(NamedTuple):
    """A stretch of the row that attention puts into a row of a rectangle."""

    length: int
    start: int
    prompt: int = 0  # of a response: the row of its prompt's rectangle


def shared_prompts(groups: Sequence[Group]) -> SharedPrompts:
    """The layout of the row that `in_one_row` makes of them."""
    alone: list[_Segment] = []
    shared: list[_Segment] = []
    behind: dict[_Segment, list[_Segment]] = {}
    start = 0
    for prompt_ids, responses in groups:
        prompt, its = len(prompt_ids), [len(ids) for ids in responses]
        if len(its) == 1:
            alone.append(_Segment(prompt + its[0], start))
        else:
            shared.append(_Segment(prompt, start))
            starts = accumulate(its, initial=start + prompt)
            placed = zip(its, starts, strict=False)
            behind[shared[-1]] = [_Segment(length, its_start) for length, its_start in placed if length]
        start += prompt + sum(its)
    places = _Places(start)
    of_prompts = [(places.rectangle(part), part) for part in _similar(shared)]
    whole = [rectangle for rectangle, _ in of_prompts] + [places.rectangle(part) for part in _similar(alone)]
    parts: list[Responses] = []
    for rectangle, its_prompts in of_prompts:
        its_responses = [
            segment._replace(prompt=row) for row, prompt in enumerate(its_prompts) for segment in behind[prompt]
        ]
        lengths = [prompt.length for prompt in its_prompts]
        parts += [_responses(places, rectangle, lengths, part) for part in _similar(its_responses)]
    return SharedPrompts(*places.tensors(), tuple(map(Whole, whole)), tuple(parts))


def _responses(places: "_Places", prompts: Rectangle, lengths: list[int], segments: list[_Segment]) -> Responses:
    """lengths: of the prompts, by row of their rectangle."""
    by_prompt = sorted(segments, key=lambda segment: segment.prompt)
    counts = Counter(segment.prompt for segment in by_prompt)
    own = tuple(lengths[segment.prompt] for segment in by_prompt)
    return Responses(places.rectangle(by_prompt), prompts, tuple(counts.items()), own)


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
        self.sources: list[np.ndarray] = []  # of each rectangle
        self.end = 0

    def rectangle(self, segments: Sequence[_Segment]) -> Rectangle:
        longest = max(segment.length for segment in segments)
        width = longest if longest <= FEW_TOKENS else -(-longest // ALIGNED) * ALIGNED
        found = Rectangle(len(self.sources), len(segments), width)
        source_BR = np.zeros((found.rows, width), np.int64)
        for row, (length, start, _) in enumerate(segments):
            positions = np.arange(start, start + length)
            source_BR[row, :length] = positions
            self.place_T[positions] = self.end + row * width + np.arange(length)
        self.sources.append(source_BR.ravel())
        self.end += source_BR.size
        return found

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(source_N, is_filler_N1, place_T)."""
        is_filler_N = np.ones(self.end, bool)
        is_filler_N[self.place_T] = False
        sources = np.concatenate(self.sources)
        return torch.from_numpy(sources), torch.from_numpy(is_filler_N[:, None]), torch.from_numpy(self.place_T)
