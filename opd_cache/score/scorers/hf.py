"""Scoring with a transformers model: ids in, log-probs out.

The body runs on padded batches under a token budget, sorted by length; the LM head runs only at the positions that
predict a response token, in chunks. Where the samples of a prompt are worth it, the prompt is computed once and its
keys and values are shared.
"""

# G prompts of a batch, B sequences of a batch, P prompt positions, R response positions, N response tokens,
# H hidden size, V vocabulary, K teacher top-k

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers import __version__ as transformers_version

from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.models import LanguageModel, dtype_name, load_model, padded, token_row_chunk
from opd_cache.score.scores import empty_score
from opd_cache.types import Rollout, Score

SHARING_PAYS = 0.25  # share of all tokens that it must save: two passes and a copy of the cache cost something too


@dataclass(frozen=True)
class _TokenScores:
    """Per response token of a batch, rows one after the other."""

    logprobs_N: np.ndarray
    rank_N: np.ndarray
    topk_ids_NK: np.ndarray
    topk_logprobs_NK: np.ndarray


class HFScorer:
    """A teacher in transformers."""

    engine = f"transformers {transformers_version}"
    window = 512

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None:
        self.teacher, self.options = teacher, options
        self.dtype = dtype_name(teacher)
        self._model: LanguageModel | None = None

    def load(self) -> None:
        if self._model is not None:
            return
        model = load_model(self.teacher, "teacher")
        if self.options.top_k > model.vocab_size:
            raise ConfigError(
                f"score.top_k = {self.options.top_k}, but teacher {self.teacher.model!r} has only {model.vocab_size} tokens."
            )
        self._model = model

    @property
    def model(self) -> LanguageModel:
        self.load()
        assert self._model is not None
        return self._model

    @torch.inference_mode()
    def score(self, rows: Sequence[Rollout], top_k: int) -> Iterator[tuple[int, Score]]:
        """(index, score) of every row. A row beyond the teacher's context gets an error, never a truncation."""
        limit = self.model.context_length
        scorable: list[int] = []
        for index, row in enumerate(rows):
            if len(row.response_ids) == 0:
                yield index, empty_score(row, top_k)
            elif limit is not None and row.num_tokens > limit:
                yield index, empty_score(row, top_k, f"{row.num_tokens} tokens, the teacher's context is {limit}")
            elif (largest := max(row.prompt_ids.max(), row.response_ids.max())) >= self.model.vocab_size:
                error = f"token id {largest}, the teacher has {self.model.vocab_size} embeddings"
                yield index, empty_score(row, top_k, error)
            else:
                scorable.append(index)
        share = self._shares_prompts([rows[index] for index in scorable])
        for batch in _batches(rows, scorable, self.options.max_tokens_per_batch, share):
            members = [rows[index] for index in batch]
            hidden_NH = self._hidden_shared(members) if share else self._hidden_plain(members)
            tokens = self._token_scores(hidden_NH, members, top_k)
            yield from zip(batch, _split(tokens, members), strict=True)

    def _shares_prompts(self, rows: Sequence[Rollout]) -> bool:
        if self.options.share_prompts != "auto":
            return self.options.share_prompts == "always"
        saved = sum(
            len(rows[i].prompt_ids) for i in range(1, len(rows)) if rows[i].prompt_index == rows[i - 1].prompt_index
        )
        return saved >= SHARING_PAYS * max(1, sum(row.num_tokens for row in rows))

    def _hidden_plain(self, rows: Sequence[Rollout]) -> Tensor:
        """[N, H] hidden states that predict the response tokens; prompt and response in one right-padded pass."""
        ids_BT, mask_BT = padded(
            [np.concatenate([row.prompt_ids, row.response_ids]) for row in rows], "right", self.model.device
        )
        hidden_BTH = self.model.hidden(ids_BT, mask_BT)
        starts = [len(row.prompt_ids) - 1 for row in rows]
        return torch.cat(
            [
                hidden_BTH[b, start : start + len(row.response_ids)]
                for b, (start, row) in enumerate(zip(starts, rows, strict=True))
            ]
        )

    def _hidden_shared(self, rows: Sequence[Rollout]) -> Tensor:
        """The same, with each distinct prompt computed once: left-padded prompts first, then responses on copies of
        their keys and values."""
        model = self.model
        group_of_row: list[int] = []
        prompts: list[np.ndarray] = []
        for i, row in enumerate(rows):
            if i == 0 or rows[i - 1].prompt_index != row.prompt_index:
                prompts.append(row.prompt_ids)
            group_of_row.append(len(prompts) - 1)
        prompt_ids_GP, prompt_mask_GP = padded(prompts, "left", model.device)
        positions_GP = (prompt_mask_GP.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.module.config)
        output = model.body(
            input_ids=prompt_ids_GP,
            attention_mask=prompt_mask_GP,
            position_ids=positions_GP,
            past_key_values=cache,
            use_cache=True,
        )
        groups_B = torch.tensor(group_of_row, device=model.device)
        first_BH = output.last_hidden_state[:, -1][groups_B]
        # The last response token predicts nothing that we need.
        inputs = [row.response_ids[:-1] for row in rows]
        if max(len(ids) for ids in inputs) == 0:
            return first_BH
        cache.batch_select_indices(groups_B)
        ids_BR, mask_BR = padded(inputs, "right", model.device)
        lengths_B = prompt_mask_GP.sum(-1)[groups_B]
        positions_BR = lengths_B[:, None] + torch.arange(ids_BR.shape[1], device=model.device)[None, :]
        mask_BT = torch.cat([prompt_mask_GP[groups_B], mask_BR], dim=1)
        # Padding may sit beyond the context; its position must still be one that exists.
        positions_BR = positions_BR * mask_BR
        rest_BRH = model.body(
            input_ids=ids_BR, attention_mask=mask_BT, position_ids=positions_BR, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return torch.cat([torch.cat([first_BH[b : b + 1], rest_BRH[b, : len(ids)]]) for b, ids in enumerate(inputs)])

    def _token_scores(self, hidden_NH: Tensor, rows: Sequence[Rollout], top_k: int) -> _TokenScores:
        model = self.model
        targets_N = torch.from_numpy(np.concatenate([row.response_ids for row in rows])).to(model.device, torch.int64)
        pieces = []
        for rows_NH, targets in zip(
            hidden_NH.split(token_row_chunk(model.vocab_size)),
            targets_N.split(token_row_chunk(model.vocab_size)),
            strict=True,
        ):
            pieces.append(_score_tokens(model.logits(rows_NH), targets, top_k))
        columns = [torch.cat(column).cpu().numpy() for column in zip(*pieces, strict=True)]
        return _TokenScores(*columns)


def _score_tokens(logits_NV: Tensor, targets_N: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [N], rank [N], top-k ids [N, K], top-k logprobs [N, K]); rank counts strictly likelier tokens from 1."""
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N1 = logprobs_NV.gather(-1, targets_N[:, None])
    rank_N = (logprobs_NV > chosen_N1).sum(-1, dtype=torch.int32) + 1
    topk = logprobs_NV.topk(top_k, dim=-1)
    return chosen_N1.squeeze(-1), rank_N, topk.indices.to(torch.int32), topk.values


def _batches(
    rows: Sequence[Rollout], indices: Sequence[int], max_tokens: int, keep_groups: bool
) -> Iterator[list[int]]:
    """Batches of row indices with at most `max_tokens` padded tokens, similar lengths together.

    With keep_groups, rows of one prompt stay side by side (a group over the budget is cut).
    """
    units: list[list[int]] = []
    for index in indices:
        together = keep_groups and units and rows[units[-1][-1]].prompt_index == rows[index].prompt_index
        if together:
            units[-1].append(index)
        else:
            units.append([index])
    units.sort(key=lambda unit: (max(rows[i].num_tokens for i in unit), unit[0]))
    batch: list[int] = []
    width = 0
    for index in (index for unit in units for index in unit):
        wider = max(width, rows[index].num_tokens)
        if batch and wider * (len(batch) + 1) > max_tokens:
            yield batch
            batch, wider = [], rows[index].num_tokens
        batch.append(index)
        width = wider
    if batch:
        yield batch


def _split(tokens: _TokenScores, rows: Sequence[Rollout]) -> Iterator[Score]:
    start = 0
    for row in rows:
        end = start + len(row.response_ids)
        yield Score(
            row.rollout_id,
            row.ids_hash,
            tokens.logprobs_N[start:end],
            tokens.rank_N[start:end],
            tokens.topk_ids_NK[start:end],
            tokens.topk_logprobs_NK[start:end],
        )
        start = end
