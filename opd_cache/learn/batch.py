"""From joined rows to tensors: which rank learns which rows, in which micro-batches.

The shift between a token and the position that predicts it happens here and nowhere else. Every rank sees the whole
global batch and comes to the same division, so that nothing has to be agreed upon.
"""

# B sequences, T positions, N response tokens of all sequences in a row, K teacher top-k

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_cache.models import padded
from opd_cache.store.join import Joined
from opd_cache.types import Rollout, Score


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward. Per-token tensors are flat: N response tokens, sequence after sequence.

    Padded: attention_mask_BT marks the real positions. Packed: B is 1, the sequences stand behind each other without
    padding and position_ids_BT starts at 0 for each.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    predictor_N: Tensor  # flat index into [B * T] of the position whose hidden state predicts the token
    row_N: Tensor  # which sequence of the micro-batch each token belongs to
    target_ids_N: Tensor
    sampling_logprobs_N: Tensor  # NaN where not known
    teacher_logprobs_N: Tensor
    topk_ids_NK: Tensor
    topk_logprobs_NK: Tensor
    reward_advantages_N: Tensor
    counts: bool = True  # False: runs only so that this rank takes part in every collective, with a loss of 0


def global_batches(rows: Iterable[Joined], sizes: Iterable[int]) -> Iterator[list[Joined]]:
    """Slices of the planned order."""
    iterator = iter(rows)
    for size in sizes:
        yield list(islice(iterator, size))


def rows_to_learn(batch: Sequence[Joined], mask_truncated: bool) -> list[Joined]:
    """The rows that carry loss, as far as they are scored: not dropped, not empty and, where asked for, not truncated."""
    return [
        (scored_tokens(rollout, score), score)
        for rollout, score in batch
        if score.error is None
        and not score.is_dropped
        and scored_tokens(rollout, score).num_loss_tokens > 0
        and not (mask_truncated and rollout.finish_reason == "length")
    ]


def scored_tokens(rollout: Rollout, score: Score) -> Rollout:
    """The rollout up to the last token with a score: what comes behind has no loss, and changes nothing before it."""
    count = len(score.teacher_logprobs)
    if count == len(rollout.response_ids):
        return rollout
    per_token = {name: getattr(rollout, name) for name in ("sampling_logprobs", "raw_logprobs", "loss_mask")}
    cut = {name: values[:count] for name, values in per_token.items() if values is not None}
    return replace(rollout, response_ids=rollout.response_ids[:count], **cut)


def loss_places(rollout: Rollout) -> npt.NDArray[np.int64]:
    """[L], the places in the response that carry a loss: all, but for a loss_mask."""
    return np.arange(len(rollout.response_ids)) if rollout.loss_mask is None else np.flatnonzero(rollout.loss_mask)


def sampled_values(values: npt.NDArray | None, places: npt.NDArray[np.int64]) -> npt.NDArray:
    """[L], the values at these places; NaN where they are not known."""
    return np.full(len(places), np.nan, np.float32) if values is None else values[places]


def divide(lengths: Sequence[int], world: int, max_tokens: int, packed: bool) -> list[list[list[int]]]:
    """Micro-batches of row indices for every rank, of at most `max_tokens` tokens each (or one longer row).

    Longest first, each row to the rank with the least tokens so far. A padded micro-batch costs its longest row times
    its rows, so neighbours by length share one; a packed one costs the sum.
    """
    ranks: list[list[int]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(row)
        heapq.heappush(loads, (load + lengths[row], rank))
    split = _packs if packed else _runs_of_neighbours
    return [split(rows, lengths, max_tokens) for rows in ranks]


def _runs_of_neighbours(rows: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    runs, start = [], 0
    while start < len(rows):
        count = max(1, max_tokens // lengths[rows[start]])
        runs.append(rows[start : start + count])
        start += count
    return runs


def _packs(rows: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First fit, longest first."""
    packs: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        place = next((index for index, free in enumerate(room) if free >= lengths[row]), None)
        if place is None:
            packs.append([row])
            room.append(max_tokens - lengths[row])
        else:
            packs[place].append(row)
            room[place] -= lengths[row]
    return packs


def micro_batches(
    rows: Sequence[Joined],
    rewards: Sequence[float],
    max_tokens: int,
    packed: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches, as many on every rank: where one has fewer, it runs others that do not count.

    rewards: group-normalised advantage of each row.
    """
    if not rows:
        return
    parts = divide([rollout.num_tokens for rollout, _ in rows], world, max_tokens, packed)
    for index in range(max(len(part) for part in parts)):
        mine = parts[rank][index] if index < len(parts[rank]) else None
        # The first rank's last micro-batch is among the cheapest there are.
        chosen = mine or parts[0][-1][-1:]
        yield _micro_batch([rows[i] for i in chosen], [rewards[i] for i in chosen], packed, counts=mine is not None)


def _micro_batch(rows: Sequence[Joined], rewards: Sequence[float], packed: bool, counts: bool) -> MicroBatch:
    sequences = [np.concatenate([rollout.prompt_ids, rollout.response_ids]) for rollout, _ in rows]
    prompts = [len(rollout.prompt_ids) for rollout, _ in rows]
    kept = [loss_places(rollout) for rollout, _ in rows]
    num_kept = torch.tensor([len(places) for places in kept])
    lengths = [len(sequence) for sequence in sequences]
    if packed:
        ids, mask = padded([np.concatenate(sequences)], "right", torch.device("cpu"))[0], None
        positions = _tensor([np.arange(length) for length in lengths], torch.int64)[None]
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        ids, mask = padded(sequences, "right", torch.device("cpu"))
        positions = None
        starts = np.arange(len(rows)) * ids.shape[1]
    # logits at i − 1 predict token i
    predictors = [start + prompt - 1 + places for start, prompt, places in zip(starts, prompts, kept, strict=True)]
    placed = [(rollout, score, places) for (rollout, score), places in zip(rows, kept, strict=True)]
    return MicroBatch(
        input_ids_BT=ids,
        attention_mask_BT=mask,
        position_ids_BT=positions,
        predictor_N=_tensor(predictors, torch.int64),
        row_N=torch.repeat_interleave(torch.arange(len(rows)), num_kept),
        target_ids_N=_tensor([rollout.response_ids[places] for rollout, _, places in placed], torch.int64),
        sampling_logprobs_N=_tensor(
            [sampled_values(rollout.sampling_logprobs, places) for rollout, _, places in placed], torch.float32
        ),
        teacher_logprobs_N=_tensor([score.teacher_logprobs[places] for _, score, places in placed], torch.float32),
        topk_ids_NK=_tensor([score.topk_ids[places] for _, score, places in placed], torch.int64),
        topk_logprobs_NK=_tensor([score.topk_logprobs[places] for _, score, places in placed], torch.float32),
        reward_advantages_N=torch.repeat_interleave(torch.tensor(rewards, dtype=torch.float32), num_kept),
        counts=counts,
    )


def _tensor(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype)
