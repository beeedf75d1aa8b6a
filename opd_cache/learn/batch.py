"""From joined rows to tensors. The shift between a token and the position that predicts it happens here and nowhere else."""

# B sequences, T positions, N response tokens of all sequences in a row, K teacher top-k

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_cache.inference import distinct_neighbours
from opd_cache.learn.divide import Layout, RowSize, divide_worthwhile
from opd_cache.learn.shared_prompts import SharedPrompts, shared_prompts
from opd_cache.models import padded
from opd_cache.store.join import Joined
from opd_cache.types import Rollout, Score


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward. Per-token tensors are flat: N response tokens, sequence after sequence.

    Padded: attention_mask_BT marks the real positions. Packed: B is 1, the sequences stand behind each other without
    padding and position_ids_BT starts at 0 for each. Shared: the same, with each prompt once before all its responses.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    shared_prompts: SharedPrompts | None
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


def micro_batches(
    rows: Sequence[Joined],
    rewards: Sequence[float],
    max_tokens: int,
    layout: Layout = "padded",
    rank: int = 0,
    world: int = 1,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches, as many on every rank: where one has fewer, it runs others that do not count. Padded in
    place of shared where that saves nothing.

    rewards: group-normalised advantage of each row.
    """
    if not rows:
        return
    prompts = [rollout.prompt_ids for rollout, _ in rows]
    numbers = distinct_neighbours(prompts)
    sizes = [
        RowSize(len(prompt), len(rollout.response_ids), number)
        for prompt, (rollout, _), number in zip(prompts, rows, numbers, strict=True)
    ]
    layout, parts = divide_worthwhile(sizes, world, max_tokens, layout)
    for index in range(max(len(part) for part in parts)):
        mine = parts[rank][index] if index < len(parts[rank]) else None
        # The first rank's last micro-batch is among the cheapest there are.
        chosen = mine or parts[0][-1][-1:]
        if layout == "shared":  # pieces of one prompt meet again
            chosen = sorted(chosen)
        groups = [list(group) for _, group in groupby(chosen, key=lambda row: numbers[row])]
        yield _micro_batch(
            [[rows[row] for row in group] for group in groups],
            [rewards[row] for row in chosen],
            layout,
            counts=mine is not None,
        )


def _micro_batch(
    groups: Sequence[Sequence[Joined]], rewards: Sequence[float], layout: Layout, counts: bool
) -> MicroBatch:
    """groups: neighbours with one prompt."""
    rows = [row for group in groups for row in group]
    kept = [loss_places(rollout) for rollout, _ in rows]
    num_kept = torch.tensor([len(places) for places in kept])
    if layout != "shared":
        groups = [[row] for row in rows]
    place = _in_a_rectangle if layout == "padded" else _in_one_row
    ids, mask, positions, last_of_prompts, starts = place([[rollout for rollout, _ in group] for group in groups])
    shared = None
    if layout == "shared":
        prompts = [len(group[0][0].prompt_ids) for group in groups]
        shared = shared_prompts(prompts, [[len(rollout.response_ids) for rollout, _ in group] for group in groups])
    # logits at i − 1 predict token i
    predictors = [
        np.where(places == 0, last, start + places - 1)
        for last, start, places in zip(last_of_prompts, starts, kept, strict=True)
    ]
    placed = [(rollout, score, places) for (rollout, score), places in zip(rows, kept, strict=True)]
    return MicroBatch(
        input_ids_BT=ids,
        attention_mask_BT=mask,
        position_ids_BT=positions,
        shared_prompts=shared,
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


class _Placed(NamedTuple):
    """Where the sequences lie: flat positions of each row's last prompt token and of its first response token."""

    ids_BT: Tensor
    mask_BT: Tensor | None
    positions_BT: Tensor | None
    last_of_prompts: list[int]
    starts: list[int]


def _in_a_rectangle(groups: Sequence[Sequence[Rollout]]) -> _Placed:
    """Rows of whole sequences, one rollout a group, padded on the right."""
    rollouts = [rollout for group in groups for rollout in group]
    sequences = [np.concatenate([rollout.prompt_ids, rollout.response_ids]) for rollout in rollouts]
    ids, mask = padded(sequences, "right", torch.device("cpu"))
    starts = [row * ids.shape[1] + len(rollout.prompt_ids) for row, rollout in enumerate(rollouts)]
    return _Placed(ids, mask, None, [start - 1 for start in starts], starts)


def _in_one_row(groups: Sequence[Sequence[Rollout]]) -> _Placed:
    """Each group's prompt, then all its responses, which count their positions from the prompt's end."""
    parts: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    lasts: list[int] = []
    starts: list[int] = []
    end = 0
    for group in groups:
        prompt = len(group[0].prompt_ids)
        parts.append(group[0].prompt_ids)
        positions.append(np.arange(prompt))
        end += prompt
        last = end - 1
        for rollout in group:
            parts.append(rollout.response_ids)
            positions.append(prompt + np.arange(len(rollout.response_ids)))
            lasts.append(last)
            starts.append(end)
            end += len(rollout.response_ids)
    return _Placed(_tensor(parts, torch.int64)[None], None, _tensor(positions, torch.int64)[None], lasts, starts)


def _tensor(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype)
