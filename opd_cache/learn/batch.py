"""From joined rows to tensors."""

# B sequences, T positions, N response tokens of all sequences in a row, K teacher top-k

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_cache.inference import distinct_neighbours
from opd_cache.learn.divide import Layout, RowSize, divide_worthwhile
from opd_cache.sequences import grouped, in_a_rectangle, in_one_row
from opd_cache.shared_prompts import SharedPrompts, shared_prompts
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
    return first_tokens(rollout, len(score.teacher_logprobs))


def first_tokens(rollout: Rollout, count: int) -> Rollout:
    """The rollout with so many tokens of its response, or all."""
    if count >= len(rollout.response_ids):
        return rollout
    per_token = {name: getattr(rollout, name) for name in ("sampling_logprobs", "raw_logprobs", "loss_mask")}
    cut = {name: values[:count] for name, values in per_token.items() if values is not None}
    return replace(rollout, response_ids=rollout.response_ids[:count], **cut)


def loss_places(rollout: Rollout) -> npt.NDArray[np.int64]:
    """[L], the places in the response that carry a loss: all, but for a loss_mask."""
    return np.arange(len(rollout.response_ids)) if rollout.loss_mask is None else np.flatnonzero(rollout.loss_mask)


def seen_ids(rollout: Rollout) -> npt.NDArray[np.int32]:
    """What the body reads of a response: the tokens before the last that carries a loss."""
    places = loss_places(rollout)
    return rollout.response_ids[: places[-1] if len(places) else 0]


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
        RowSize(len(prompt), len(seen_ids(rollout)), number)
        for prompt, (rollout, _), number in zip(prompts, rows, numbers, strict=True)
    ]
    layout, parts = divide_worthwhile(sizes, world, max_tokens, layout)
    for index in range(max(len(part) for part in parts)):
        mine = parts[rank][index] if index < len(parts[rank]) else None
        # The first rank's last micro-batch is among the cheapest there are.
        chosen = mine or parts[0][-1][-1:]
        if layout == "shared":  # pieces of one prompt meet again
            chosen = sorted(chosen)
        yield _micro_batch(
            [rows[row] for row in chosen], [rewards[row] for row in chosen], layout, counts=mine is not None
        )


def _micro_batch(rows: Sequence[Joined], rewards: Sequence[float], layout: Layout, counts: bool) -> MicroBatch:
    kept = [loss_places(rollout) for rollout, _ in rows]
    num_kept = torch.tensor([len(places) for places in kept])
    prompts, seen = [rollout.prompt_ids for rollout, _ in rows], [seen_ids(rollout) for rollout, _ in rows]
    groups = grouped(prompts, seen, share=layout == "shared")
    placed = in_a_rectangle(groups) if layout == "padded" else in_one_row(groups)
    by_row = [(rollout, score, places) for (rollout, score), places in zip(rows, kept, strict=True)]
    return MicroBatch(
        input_ids_BT=placed.ids_BT,
        attention_mask_BT=placed.mask_BT,
        position_ids_BT=placed.positions_BT,
        shared_prompts=shared_prompts(groups) if layout == "shared" else None,
        predictor_N=placed.predictors(kept),
        row_N=torch.repeat_interleave(torch.arange(len(rows)), num_kept),
        target_ids_N=_tensor([rollout.response_ids[places] for rollout, _, places in by_row], torch.int64),
        sampling_logprobs_N=_tensor(
            [sampled_values(rollout.sampling_logprobs, places) for rollout, _, places in by_row], torch.float32
        ),
        teacher_logprobs_N=_tensor([score.teacher_logprobs[places] for _, score, places in by_row], torch.float32),
        topk_ids_NK=_tensor([score.topk_ids[places] for _, score, places in by_row], torch.int64),
        topk_logprobs_NK=_tensor([score.topk_logprobs[places] for _, score, places in by_row], torch.float32),
        reward_advantages_N=torch.repeat_interleave(torch.tensor(rewards, dtype=torch.float32), num_kept),
        counts=counts,
    )


def _tensor(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype)
