"""Scoring with a transformers model: ids in, log-probs out.

The body runs on batches of similar lengths under a token budget, the LM head only at the positions that predict a
response token, in chunks. Where its samples are worth it, a prompt is computed once for all of them.
"""

# B sequences of a batch, T positions, N response tokens, H hidden size, V vocabulary, K teacher top-k

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.fingerprint import fingerprint_model, model_folder
from opd_cache.inference import use_cpu_attention
from opd_cache.models import LanguageModel, dtype_name, explained_memory_errors, load_model, tensors_on
from opd_cache.score.scores import LOGITS_BYTES, ScoreRequest, TokenScores, beyond_vocabulary, no_scores
from opd_cache.sequences import grouped, in_a_rectangle, in_one_row
from opd_cache.shared_attention import hidden_of_shared, use_shared_prompts
from opd_cache.shared_prompts import shared_prompts

# On a CPU the float32 logits of so many bytes stay in its cache.
PIECE_BUDGET = 8 << 20
SHARING_PAYS = 0.1  # share of all tokens that it must save: attention in rectangles costs something, too


class HFScorer:
    """A teacher in transformers."""

    engine = f"transformers {transformers_version}"
    window = 512

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None:
        self.teacher, self.options = teacher, options
        self.dtype = dtype_name(teacher)
        self._model: LanguageModel | None = None
        self._can_share = False
        self._buffer: Tensor | None = None  # of the head's output, a chunk of rows

    def fingerprint(self) -> str:
        return fingerprint_model(model_folder(self.teacher))

    def load(self) -> None:
        if self._model is not None:
            return
        model = load_model(self.teacher, "teacher")
        if self.options.top_k > model.vocab_size:
            raise ConfigError(
                f"score.top_k = {self.options.top_k}, but teacher {self.teacher.model!r} has only {model.vocab_size} tokens."
            )
        wanted = self.options.share_prompts
        self._can_share = wanted != "never" and use_shared_prompts(model)
        if wanted == "always" and not self._can_share:
            raise ConfigError(
                f"score.share_prompts = always, but the attention of teacher {self.teacher.model!r} ({model.module.config._attn_implementation}) cannot share prompts; use auto."
            )
        use_cpu_attention(model)
        self._model = model
        self._buffer = model.head_buffer(self._chunk_rows(model))

    def close(self) -> None:
        self._model = self._buffer = None

    @property
    def model(self) -> LanguageModel:
        self.load()
        assert self._model is not None
        return self._model

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        """One TokenScores a request. A request beyond the teacher's context gets an error, never a truncation."""
        limit = self.model.context_length
        scorable: list[ScoreRequest] = []
        for request in requests:
            if len(request.response_ids) == 0:
                yield no_scores(request.key, top_k)
            elif limit is not None and request.num_tokens > limit:
                yield no_scores(request.key, top_k, f"{request.num_tokens} tokens, the teacher's context is {limit}")
            elif error := beyond_vocabulary(request, self.model.vocab_size):
                yield no_scores(request.key, top_k, error)
            else:
                scorable.append(request)
        share = self._shares_prompts(scorable)
        for batch in _batches(scorable, self.options.max_tokens_per_batch, share):
            with explained_memory_errors("score.max_tokens_per_batch", self.options.max_tokens_per_batch):
                columns = self._token_scores(self._hidden(batch, share), batch, top_k)
            yield from _split(columns, batch)

    def _chunk_rows(self, model: LanguageModel) -> int:
        """Rows whose logits are there at once."""
        return min(_rows_of(LOGITS_BYTES, model.vocab_size), self.options.max_tokens_per_batch)

    def _shares_prompts(self, rows: Sequence[ScoreRequest]) -> bool:
        if not self._can_share or self.options.share_prompts == "always":
            return self._can_share
        saved = sum(len(row.prompt_ids) for before, row in pairwise(rows) if row.group == before.group)
        return saved >= SHARING_PAYS * max(1, sum(row.num_tokens for row in rows))

    def _hidden(self, rows: Sequence[ScoreRequest], share: bool) -> Tensor:
        """[N, H] hidden states that predict the response tokens."""
        prompts, seen = [row.prompt_ids for row in rows], [row.response_ids[:-1] for row in rows]
        groups, model = grouped(prompts, seen, share), self.model
        if share:
            placed, shared = tensors_on(model.device, (in_one_row(groups), shared_prompts(groups)))
            hidden_BTH = hidden_of_shared(model, placed.ids_BT, shared, placed.positions_BT)
        else:
            placed = tensors_on(model.device, in_a_rectangle(groups))
            hidden_BTH = model.hidden(placed.ids_BT, placed.mask_BT)
        predictors_N = placed.predictors([np.arange(len(row.response_ids)) for row in rows])
        return hidden_BTH.flatten(0, 1)[predictors_N.to(model.device)]

    def _token_scores(self, hidden_NH: Tensor, rows: Sequence[ScoreRequest], top_k: int) -> list[np.ndarray]:
        """Columns of TokenScores, of all rows behind each other."""
        model = self.model
        targets_N = torch.from_numpy(np.concatenate([row.response_ids for row in rows])).to(model.device, torch.int64)
        wanted = [row.support_ids for row in rows if row.support_ids is not None]
        support_NK = torch.from_numpy(np.concatenate(wanted)).to(model.device, torch.int64) if wanted else None
        pieces = []
        for chunk in _slices(0, len(hidden_NH), self._chunk_rows(model)):
            output_CV = model.head_output(hidden_NH[chunk], self._buffer)
            size = _rows_of(PIECE_BUDGET, model.vocab_size) if model.device.type == "cpu" else len(output_CV)
            for part in _slices(chunk.start, chunk.start + len(output_CV), size):
                logits_NV = model.finished(output_CV[part.start - chunk.start : part.stop - chunk.start])
                support = None if support_NK is None else support_NK[part]
                pieces.append(_score_tokens(logits_NV, targets_N[part], top_k, support))
        return [torch.cat(column).cpu().numpy() for column in zip(*pieces, strict=True)]


def _rows_of(budget_bytes: int, vocab_size: int) -> int:
    """Rows of float32 logits that fit."""
    return max(16, budget_bytes // (4 * vocab_size))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


def _score_tokens(
    logits_NV: Tensor, targets_N: Tensor, top_k: int, support_NK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [N], rank [N], top-k ids [N, K], top-k logprobs [N, K]); rank counts strictly likelier tokens from 1.

    support_NK: ids that stand in place of the teacher's likeliest. The logits' memory is used again.
    """
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N1 = logprobs_NV.gather(-1, targets_N[:, None])
    # Counted in float32, exact below 2^24 tokens: on a CPU a sum over bool takes three times as long.
    rank_N = torch.gt(logprobs_NV, chosen_N1, out=logits_NV).sum(-1).to(torch.int32) + 1
    if support_NK is None:
        listed_NK, support_NK = logprobs_NV.topk(top_k, dim=-1)
    else:
        listed_NK = logprobs_NV.gather(-1, support_NK)
    return chosen_N1.squeeze(-1), rank_N, support_NK.to(torch.int32), listed_NK


def _batches(requests: Sequence[ScoreRequest], max_tokens: int, share: bool) -> Iterator[list[ScoreRequest]]:
    """Batches of at most `max_tokens` positions, similar lengths together: padded ones, or with shared prompts.

    With `share`, requests of one group stay side by side (a group over the budget is cut).
    """
    units: list[list[ScoreRequest]] = []
    for request in requests:
        if share and units and units[-1][-1].group == request.group:
            units[-1].append(request)
        else:
            units.append([request])
    units.sort(key=lambda unit: (max(request.num_tokens for request in unit), unit[0].key))
    batch: list[ScoreRequest] = []
    size = 0
    for request in (request for unit in units for request in unit):
        larger = _size_with(batch, size, request, share)
        if batch and larger > max_tokens:
            yield batch
            batch, larger = [], request.num_tokens
        batch.append(request)
        size = larger
    if batch:
        yield batch


def _size_with(batch: Sequence[ScoreRequest], size: int, request: ScoreRequest, share: bool) -> int:
    """Positions of a batch of `size` with one more request."""
    if not share:
        longest = max(request.num_tokens, size // max(1, len(batch)))
        return longest * (len(batch) + 1)
    is_known = bool(batch) and batch[-1].group == request.group
    return size + (len(request.response_ids) if is_known else request.num_tokens)


def _split(columns: Sequence[np.ndarray], requests: Sequence[ScoreRequest]) -> Iterator[TokenScores]:
    start = 0
    for request in requests:
        end = start + len(request.response_ids)
        logprobs, rank, topk_ids, topk_logprobs = (column[start:end] for column in columns)
        yield TokenScores(request.key, logprobs, rank, topk_ids, topk_logprobs)
        start = end
