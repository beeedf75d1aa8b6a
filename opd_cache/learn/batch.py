"""From joined rows to tensors. The shift between a token and the position that predicts it happens here and nowhere else."""

# B sequences, T positions, N response tokens of all sequences in a row, K teacher top-k

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from opd_cache.store.join import Joined


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward. Per-token tensors are packed: N response tokens, sequence after sequence."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    row_N: Tensor  # sequence of each response token
    position_N: Tensor  # the position whose hidden state predicts it: one before its own
    target_ids_N: Tensor
    sampling_logprobs_N: Tensor
    teacher_logprobs_N: Tensor
    topk_ids_NK: Tensor
    topk_logprobs_NK: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.target_ids_N)


def global_batches(rows: Iterable[Joined], size: int) -> Iterator[list[Joined]]:
    """Slices of the planned order; the last one may be short."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def rows_to_learn(batch: Sequence[Joined], mask_truncated: bool) -> list[Joined]:
    """The rows that carry loss: scored, not empty and, where asked for, not truncated."""
    return [
        (rollout, score)
        for rollout, score in batch
        if score.error is None
        and len(rollout.response_ids) > 0
        and not (mask_truncated and rollout.finish_reason == "length")
    ]


def micro_batches(rows: Sequence[Joined], max_tokens: int, device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches of at most `max_tokens` padded tokens, longest rows first so that neighbours need little padding."""
    by_length = sorted(rows, key=lambda row: -row[0].num_tokens)
    start = 0
    while start < len(by_length):
        width = by_length[start][0].num_tokens
        count = max(1, max_tokens // width)
        yield _micro_batch(by_length[start : start + count], device)
        start += count


def _micro_batch(rows: Sequence[Joined], device: torch.device) -> MicroBatch:
    width = max(rollout.num_tokens for rollout, _ in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    row_index, position = [], []
    for b, (rollout, _) in enumerate(rows):
        prompt, response = len(rollout.prompt_ids), len(rollout.response_ids)
        ids[b, :prompt] = rollout.prompt_ids
        ids[b, prompt : prompt + response] = rollout.response_ids
        mask[b, : prompt + response] = 1
        row_index.append(np.full(response, b))
        # logits at i − 1 predict token i
        position.append(np.arange(prompt - 1, prompt + response - 1))

    def packed(arrays: Iterable[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(list(arrays))).to(device, dtype)

    return MicroBatch(
        input_ids_BT=torch.from_numpy(ids).to(device),
        attention_mask_BT=torch.from_numpy(mask).to(device),
        row_N=packed(row_index, torch.int64),
        position_N=packed(position, torch.int64),
        target_ids_N=packed((rollout.response_ids for rollout, _ in rows), torch.int64),
        sampling_logprobs_N=packed((rollout.sampling_logprobs for rollout, _ in rows), torch.float32),
        teacher_logprobs_N=packed((score.teacher_logprobs for _, score in rows), torch.float32),
        topk_ids_NK=packed((score.topk_ids for _, score in rows), torch.int64),
        topk_logprobs_NK=packed((score.topk_logprobs for _, score in rows), torch.float32),
    )
