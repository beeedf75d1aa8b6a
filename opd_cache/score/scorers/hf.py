"""Scoring with a transformers model: ids in, log-probs out.

The body runs on padded batches under a token budget, sorted by length; the LM head runs only at the positions that
predict a response token, in chunks. Where the samples of a prompt are worth it, the prompt is computed once and its
keys and values are shared.
"""

# B sequences of a batch, P prompt positions, R response positions, N response tokens,
# H hidden size, V vocabulary, K teacher top-k

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.fingerprint import fingerprint_model, model_folder
from opd_cache.inference import Prefilled, prefill, use_cpu_attention
from opd_cache.models import LanguageModel, dtype_name, explained_memory_errors, load_model, padded
from opd_cache.score.scores import LOGITS_BYTES, ScoreRequest, TokenScores, beyond_vocabulary, no_scores

# On a CPU the float32 logits of so many bytes stay in its cache.
PIECE_BUDGET = 8 << 20
TOKENS_OF_A_PART = 1024
SHARING_PAYS = 0.2  # share of all tokens that it must save: two passes and a copy of the cache cost something too


class HFScorer:
    """A teacher in transformers."""

    engine = f"transformers {transformers_version}"
    window = 512

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None:
        self.teacher, self.options = teacher, options
        self.dtype = dtype_name(teacher)
        self._model: LanguageModel | None = None
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
                hidden_NH = self._hidden_shared(batch) if share else self._hidden_plain(batch)
                columns = self._token_scores(hidden_NH, batch, top_k)
            yield from _split(columns, batch)

    def _chunk_rows(self, model: LanguageModel) -> int:
        """Rows whose logits are there at once."""
        return min(_rows_of(LOGITS_BYTES, model.vocab_size), self.options.max_tokens_per_batch)

    def _shares_prompts(self, rows: Sequence[ScoreRequest]) -> bool:
        if self.options.share_prompts != "auto":
            return self.options.share_prompts == "always"
        saved = sum(len(row.prompt_ids) for before, row in pairwise(rows) if row.group == before.group)
        return saved >= SHARING_PAYS * max(1, sum(row.num_tokens for row in rows))

    def _hidden_plain(self, rows: Sequence[ScoreRequest]) -> Tensor:
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

    def _hidden_shared(self, rows: Sequence[ScoreRequest]) -> Tensor:
        """The same, with each distinct prompt computed once; then responses of similar lengths together, on copies of its
        keys and values."""
        prompts = prefill(self.model, [row.prompt_ids for row in rows])
        hidden_by_row: dict[int, Tensor] = {}
        for part in _similar_lengths([len(row.response_ids) for row in rows]):
            for i, hidden_NH in zip(part, self._hidden_of_responses(prompts, rows, part), strict=True):
                hidden_by_row[i] = hidden_NH
        return torch.cat([hidden_by_row[i] for i in range(len(rows))])

    def _hidden_of_responses(
        self, prompts: Prefilled, rows: Sequence[ScoreRequest], part: Sequence[int]
    ) -> Iterator[Tensor]:
        """Of the rows numbered in `part`, each [its response tokens, H]."""
        model = self.model
        part_B = torch.tensor(part, device=model.device)
        numbers_B = prompts.numbers[part_B]
        # The last response token predicts nothing that we need.
        inputs = [rows[i].response_ids[:-1] for i in part]
        if max(len(ids) for ids in inputs) == 0:
            yield from prompts.last_GH[numbers_B][:, None]
            return
        prompt_mask_BP = prompts.mask_GP[numbers_B]
        ids_BR, mask_BR = padded(inputs, "right", model.device)
        positions_BR = prompt_mask_BP.sum(-1)[:, None] + torch.arange(ids_BR.shape[1], device=model.device)[None, :]
        output = model.body(
            input_ids=ids_BR,
            attention_mask=torch.cat([prompt_mask_BP, mask_BR], dim=1),
            position_ids=positions_BR * mask_BR,  # padding may sit beyond the context; its position must exist
            past_key_values=prompts.cache_of(part_B),
            use_cache=True,
        )
        for b, ids in enumerate(inputs):
            yield torch.cat([prompts.last_GH[numbers_B[b]][None], output.last_hidden_state[b, : len(ids)]])

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


def _batches(requests: Sequence[ScoreRequest], max_tokens: int, keep_groups: bool) -> Iterator[list[ScoreRequest]]:
    """Batches of at most `max_tokens` padded tokens, similar lengths together.

    With keep_groups, requests of one group stay side by side (a group over the budget is cut).
    """
    units: list[list[ScoreRequest]] = []
    for request in requests:
        if keep_groups and units and units[-1][-1].group == request.group:
            units[-1].append(request)
        else:
            units.append([request])
    units.sort(key=lambda unit: (max(request.num_tokens for request in unit), unit[0].key))
    batch: list[ScoreRequest] = []
    width = 0
    for request in (request for unit in units for request in unit):
        wider = max(width, request.num_tokens)
        if batch and wider * (len(batch) + 1) > max_tokens:
            yield batch
            batch, wider = [], request.num_tokens
        batch.append(request)
        width = wider
    if batch:
        yield batch


def _similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows, longest first, in parts: padding costs at most a fifth of a row, unless a part would be too small
    for matrices to be worth multiplying."""
    parts: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = parts[-1]
        longest = lengths[part[0]] if part else 0
        if lengths[i] < 0.8 * longest and longest * len(part) >= TOKENS_OF_A_PART:
            parts.append([])
        parts[-1].append(i)
    return parts


def _split(columns: Sequence[np.ndarray], requests: Sequence[ScoreRequest]) -> Iterator[TokenScores]:
    start = 0
    for request in requests:
        end = start + len(request.response_ids)
        logprobs, rank, topk_ids, topk_logprobs = (column[start:end] for column in columns)
        yield TokenScores(request.key, logprobs, rank, topk_ids, topk_logprobs)
        start = end
