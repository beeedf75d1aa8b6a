"""Where the sequences of a batch lie: in a padded rectangle, or behind each other in one row. The shift between a token and
the position that predicts it happens here and nowhere else."""

# B sequences, T positions, N response tokens

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_cache.inference import distinct_neighbours
from opd_cache.models import padded

Ids = npt.NDArray[np.integer]


class Group(NamedTuple):
    """A prompt, and what the body is to read of each response behind it: the last token of one predicts nothing."""

    prompt: Ids
    responses: list[Ids]


@dataclass(frozen=True)
class Placed:
    """Token ids, and where each response's prompt ends and it begins itself: flat positions in [B * T]."""

    ids_BT: Tensor
    mask_BT: Tensor | None
    positions_BT: Tensor | None
    last_of_prompts: list[int]
    starts: list[int]

    def predictors(self, places: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        """[N], the flat positions that predict the tokens at these places of each response."""
        found = [
            np.where(its == 0, last, start + its - 1)
            for last, start, its in zip(self.last_of_prompts, self.starts, places, strict=True)
        ]
        return torch.from_numpy(np.concatenate(found))


def grouped(prompts: Sequence[Ids], responses: Sequence[Ids], share: bool) -> list[Group]:
    """Neighbours with the same prompt together, where they are to share it; else a group for each response."""
    groups: list[Group] = []
    numbers = distinct_neighbours(prompts) if share else range(len(prompts))
    for number, prompt, response in zip(numbers, prompts, responses, strict=True):
        if number == len(groups):
            groups.append(Group(prompt, []))
        groups[-1].responses.append(response)
    return groups


def in_a_rectangle(groups: Sequence[Group]) -> Placed:
    """A row for each response, with its prompt before it, padded on the right."""
    rows = list(_pairs(groups))
    ids, mask = padded([np.concatenate(row) for row in rows], "right", torch.device("cpu"))
    starts = [row * ids.shape[1] + len(prompt) for row, (prompt, _) in enumerate(rows)]
    return Placed(ids, mask, None, [start - 1 for start in starts], starts)


def in_one_row(groups: Sequence[Group]) -> Placed:
    """Each group's prompt, then all its responses, which count their positions from the prompt's end."""
    parts: list[Ids] = []
    positions: list[npt.NDArray[np.int64]] = []
    lasts: list[int] = []
    starts: list[int] = []
    end = 0
    for prompt, responses in groups:
        parts.append(prompt)
        positions.append(np.arange(len(prompt)))
        end += len(prompt)
        lasts += [end - 1] * len(responses)
        for response in responses:
            parts.append(response)
            positions.append(len(prompt) + np.arange(len(response)))
            starts.append(end)
            end += len(response)
    return Placed(_row_of(parts), None, _row_of(positions), lasts, starts)


def _pairs(groups: Sequence[Group]) -> Iterator[tuple[Ids, Ids]]:
    return ((group.prompt, response) for group in groups for response in group.responses)


def _row_of(arrays: Sequence[Ids]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))[None]
