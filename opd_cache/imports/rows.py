"""One outside row as a rollout of the run: whose prompt it answers, its ids, its log-probs. Every fault is named by place."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd_cache.errors import RolloutFileError
from opd_cache.imports.formats import OutsideRow, read_rows
from opd_cache.store.rows import split_lists
from opd_cache.store.shards import read_row_groups
from opd_cache.types import Int32Array, Rollout, hash_ids

FLOATS = (int, float)
_NO_IDS = np.zeros(0, np.int32)


@dataclass
class PromptBook:
    """The run's prompts, to be found by what a row says of them."""

    hashes: list[int] = field(default_factory=list)  # of the prompt's ids, by prompt_index
    by_hash: dict[int, int] = field(default_factory=dict)  # the first prompt with these ids
    by_id: dict[str, int] = field(default_factory=dict)
    by_text: dict[str, int] = field(default_factory=dict)
    by_decoded: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, tokenizer: Any) -> "PromptBook":
        book = cls()
        for table in read_row_groups(path, ["prompt_id", "text", "prompt_ids"]):
            rows = zip(
                table["prompt_id"].to_pylist(), table["text"].to_pylist(), split_lists(table, "prompt_ids"), strict=True
            )
            for prompt_id, text, ids in rows:
                book._add(prompt_id, text, ids, tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        return book

    def _add(self, prompt_id: str, text: str, ids: Int32Array, decoded: str) -> None:
        index, key = len(self.hashes), hash_ids(ids, _NO_IDS)
        self.hashes.append(key)
        self.by_hash.setdefault(key, index)
        self.by_id[prompt_id] = index
        self.by_text.setdefault(_text_key(text), index)
        self.by_decoded.setdefault(decoded, index)

    def find(self, row: OutsideRow, prompt_ids: Int32Array | None) -> int:
        """prompt_index of the row's prompt. Raises RolloutFileError where it is none of the run's."""
        named = self._named(row)
        if prompt_ids is not None:
            key = hash_ids(prompt_ids, _NO_IDS)
            # Several prompts may have the same ids: then the one that the row names.
            if named is not None and self.hashes[named] == key:
                return named
            if (found := self.by_hash.get(key)) is None:
                raise _unknown(row, f"its {len(prompt_ids)} prompt_ids are")
            return found
        if named is not None:
            return named
        for what, table, value in (
            ("prompt", self.by_text, row.prompt),
            ("input", self.by_decoded, row.decoded_prompt),
        ):
            if value is None:
                continue
            if (found := table.get(_text_key(value))) is None:
                raise _unknown(row, f"{what} = {_short(value)} is")
            return found
        raise RolloutFileError(f"{row.place}: names no prompt; expected prompt_ids, prompt_index, prompt_id or prompt.")

    def _named(self, row: OutsideRow) -> int | None:
        if row.prompt_id is not None and (index := self.by_id.get(str(row.prompt_id))) is not None:
            return index
        index = row.prompt_index
        is_index = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(self.hashes)
        if not is_index and row.prompt_ids is None and row.prompt is None and (index, row.prompt_id) != (None, None):
            raise _unknown(row, f"prompt_id = {row.prompt_id!r}, prompt_index = {index!r} is")
        return index if is_index else None


def _unknown(row: OutsideRow, what: str) -> RolloutFileError:
    return RolloutFileError(
        f"{row.place}: {what} none of the run's prompts. Take them in with prompts.path, with the same template, for a new run_dir."
    )


def _text_key(value: Any) -> str:
    """A text as it is; chat messages, which prompts keep as JSON, in one form."""
    messages = value
    if isinstance(value, str):
        try:
            messages = json.loads(value) if value.lstrip().startswith("[") else value
        except ValueError:
            return value
    if isinstance(messages, list):
        kept = [{k: v for k, v in one.items() if v is not None} if isinstance(one, dict) else one for one in messages]
        return json.dumps(kept, sort_keys=True, ensure_ascii=False)
    return value if isinstance(value, str) else repr(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Reader:
    """Outside files as rollouts of one episode, in the order of the files and of their rows."""

    files: Sequence[Path]
    format: str
    scope: str
    policy_version: int
    book: PromptBook
    prompts: Path
    tokenizer: Any
    stop_token_ids: Sequence[int]
    num_embeddings: int

    def rollouts(self) -> Iterator[Rollout]:
        """Every row, checked. Its prompt_ids are the run's own; they are put in by the stage. Raises RolloutFileError."""
        samples: Counter[int] = Counter()
        seen: dict[str, str] = {}
        for path in self.files:
            for row in read_rows(path, self.format):
                if (
                    row.rollout_id is not None
                    and (before := seen.setdefault(str(row.rollout_id), row.place)) != row.place
                ):
                    raise RolloutFileError(
                        f"{row.place}: rollout {row.rollout_id!r} was there before, at {before}. An export holds one row a teacher: export with --teacher NAME."
                    )
                yield self._rollout(row, samples)

    def _rollout(self, row: OutsideRow, samples: Counter[int]) -> Rollout:
        prompt_ids = None if row.prompt_ids is None else self._ids(row, row.prompt_ids, "prompt_ids")
        index = self.book.find(row, prompt_ids)
        response_ids, finish_reason = self._response(row)
        mask = _mask(row, len(response_ids))
        sample, samples[index] = samples[index], samples[index] + 1
        return Rollout(
            rollout_id=f"{self.scope}/{index}/{sample}",
            prompt_index=index,
            sample_index=sample,
            prompt_ids=_NO_IDS,
            response_ids=response_ids,
            sampling_logprobs=_logprobs(row, len(response_ids), mask),
            finish_reason=finish_reason,
            policy_version=self.policy_version,
            reward=_reward(row),
            loss_mask=mask,
        )

    def _response(self, row: OutsideRow) -> tuple[Int32Array, str]:
        """(ids, finish_reason). A text is encoded, and gets an EOS unless it was cut: what was sampled is not known."""
        stated = row.finish_reason
        if stated not in (None, "stop", "length"):
            raise RolloutFileError(f"{row.place}: finish_reason = {stated!r}, expected stop or length.")
        if row.response_ids is not None:
            ids = self._ids(row, row.response_ids, "response_ids")
            ends = len(ids) > 0 and int(ids[-1]) in self.stop_token_ids
            if stated is not None and (stated == "stop") != ends:
                raise RolloutFileError(
                    f"{row.place}: finish_reason = {stated!r}, but its last id {'is' if ends else 'is not'} one of the student's EOS {list(self.stop_token_ids)}. Set rollout.stop_token_ids to those that the sampler stopped at."
                )
            return ids, "stop" if ends else "length"
        if not isinstance(row.response, str):
            raise RolloutFileError(
                f"{row.place}: found no response_ids and response = {_short(row.response)}, expected a text."
            )
        if row.sampling_logprobs is not None or row.loss_mask is not None:
            raise RolloutFileError(
                f"{row.place}: log-probs or a mask of a text belong to no known tokens. Give response_ids."
            )
        encoded = self.tokenizer.encode(row.response, add_special_tokens=False)
        eos = [] if stated == "length" else [self.stop_token_ids[0]]
        return self._ids(row, [*encoded, *eos], "response"), "length" if stated == "length" else "stop"

    def _ids(self, row: OutsideRow, values: Any, name: str) -> Int32Array:
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise RolloutFileError(f"{row.place}: {name} = {_short(values)}, expected a list of token ids.")
        if values and not 0 <= min(values) <= max(values) < self.num_embeddings:
            wrong = next(value for value in values if not 0 <= value < self.num_embeddings)
            raise RolloutFileError(
                f"{row.place}: {name} holds {wrong}, the student has {self.num_embeddings} embeddings."
            )
        return np.array(values, np.int32)


def _mask(row: OutsideRow, length: int) -> np.ndarray | None:
    if row.loss_mask is None:
        return None
    values = row.loss_mask
    if not isinstance(values, list) or len(values) != length or not all(value in (0, 1) for value in values):
        found = len(values) if isinstance(values, list) else "no"
        raise RolloutFileError(
            f"{row.place}: loss_mask has {found} values, expected a 0 or 1 for each of {length} response_ids."
        )
    return np.array(values, np.bool_)


def _logprobs(row: OutsideRow, length: int, mask: np.ndarray | None) -> np.ndarray | None:
    """Those of tokens that the student did not sample are 0, whatever stood there."""
    values = row.sampling_logprobs
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != length:
        found = len(values) if isinstance(values, list) else "no"
        raise RolloutFileError(f"{row.place}: sampling_logprobs has {found} values, response_ids has {length}.")
    kept = [0.0 if mask is not None and not mask[place] else _number(value) for place, value in enumerate(values)]
    bad = next((place for place, value in enumerate(kept) if value is None or not value <= 0), None)
    if bad is not None:
        raise RolloutFileError(
            f"{row.place}: sampling_logprobs[{bad}] = {_short(values[bad])}, expected a log-prob, at most 0."
        )
    return np.array(kept, np.float32)


def _number(value: Any) -> float | None:
    """Infinities are texts in JSON, as our own exports write them."""
    if value == "-inf":
        return -math.inf
    return float(value) if isinstance(value, FLOATS) and not isinstance(value, bool) else None


def _reward(row: OutsideRow) -> float | None:
    value = None if row.reward is None else _number(row.reward)
    if row.reward is not None and (value is None or not math.isfinite(value)):
        raise RolloutFileError(f"{row.place}: reward = {_short(row.reward)}, expected a finite number.")
    return value
