"""Prompts become token ids once, in prompts.parquet; from there on nothing is decoded and encoded again."""

import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opd_cache.config import PromptsConfig
from opd_cache.errors import MismatchError, PromptError
from opd_cache.prompts.encode import (
    PROMPTS_PER_BATCH,
    SURROGATE,
    Encoder,
    Fault,
    fill_template,
    is_no_text,
    named_fields,
    user_turn,
)
from opd_cache.prompts.sources import read_records
from opd_cache.schema import PROMPTS, arrow_schema
from opd_cache.store.arrays import array_of, record_batch
from opd_cache.store.rows import numbers, split_lists
from opd_cache.store.shards import footer_of, open_parquet, publish_table, read_row_group
from opd_cache.types import Int32Array, Prompt

log = logging.getLogger(__name__)
ROWS_PER_GROUP = 4096
MAX_ID_CHARACTERS = 256
MAX_FIELD_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class _Candidate:
    """A record that has a prompt, before it is tokenized."""

    place: str
    prompt_id: str
    text: str
    messages: list[dict[str, Any]] | None
    answer: str | None
    fields: str


def take_in_prompts(config: PromptsConfig, tokenizer: Any, num_embeddings: int, final: Path) -> None:
    """Read, check, tokenize and publish all prompts; every id must be below `num_embeddings`.

    Raises PromptError with file and line at the first bad prompt, unless the recipe says to skip and count them.
    """
    skipped: dict[str, int] = {}
    encoder = Encoder(
        tokenizer,
        num_embeddings,
        "the student",
        "prompts",
        config.apply_chat_template,
        config.chat_template_kwargs,
    )

    def refuse_or_skip(place: str, fault: str, kind: str) -> None:
        if config.on_bad_prompt == "refuse":
            raise PromptError(f"{place}: {fault}. Mend it, or set prompts.on_bad_prompt=skip.")
        skipped[kind] = skipped.get(kind, 0) + 1

    def batches() -> Iterator[pa.RecordBatch]:
        tokenized = _tokenized(_candidates(config, refuse_or_skip), encoder, config, refuse_or_skip)
        rows = enumerate(tokenized)
        schema = arrow_schema(PROMPTS)
        count = 0
        while group := list(islice(rows, ROWS_PER_GROUP)):
            count += len(group)
            yield _batch(group, schema)
        if count == 0:
            raise PromptError(f"prompts.path = {config.path!r}: no usable prompt ({_counted(skipped)}).")

    publish_table(final, arrow_schema(PROMPTS), batches, {"stage": "prompts", "config": asdict(config)})
    if skipped:
        log.warning("prompts | %s | skipped: %s", config.path, _counted(skipped))


def _counted(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items())) or "the source is empty"


def _candidates(config: PromptsConfig, refuse: Any) -> Iterator[_Candidate]:
    seen: dict[str, str] = {}
    for number, (place, record) in enumerate(read_records(config), 1):
        if isinstance(record, str):
            refuse(place, record, "unreadable")
            continue
        fault, text, messages = _prompt_of(record, config)
        if fault:
            refuse(place, fault, "without a prompt")
            continue
        if SURROGATE.search(text):
            refuse(place, "the prompt holds half of a surrogate pair, which is no character", "without a prompt")
            continue
        given = record.get(config.id_key)
        prompt_id = f"line-{number}" if given is None else str(given)
        if len(prompt_id) > MAX_ID_CHARACTERS or not prompt_id.isprintable() or not prompt_id or is_no_text(given):
            refuse(
                place,
                f"{config.id_key!r} must be a text or number of 1-{MAX_ID_CHARACTERS} printable characters",
                "with a bad id",
            )
            continue
        if prompt_id in seen:
            refuse(place, f"id {prompt_id!r} was used before, at {seen[prompt_id]}", "with a duplicate id")
            continue
        seen[prompt_id] = place
        answer = record.get(config.answer_key)
        if is_no_text(answer):
            refuse(place, f"{config.answer_key!r} must be a text or a number", "with a bad answer")
            continue
        yield _Candidate(place, prompt_id, text, messages, None if answer is None else str(answer), _fields_of(record))


def _fields_of(record: dict[str, Any]) -> str:
    """The record's scalars as JSON. What JSON or UTF-8 cannot hold stays behind, and so does a text too long to be one
    of a prompt's facts."""
    kept = {name: value for name, value in record.items() if not SURROGATE.search(name) and _is_plain(value)}
    return json.dumps(kept, ensure_ascii=False)


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_FIELD_CHARACTERS and not SURROGATE.search(value)
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def _prompt_of(record: dict[str, Any], config: PromptsConfig) -> tuple[str | None, str, list[dict[str, Any]] | None]:
    """(fault or None, text, chat messages or None) of one record."""
    text: Any
    if config.template is not None:
        fault, text = fill_template(config.template, record, "prompts.template")
        if fault:
            return fault, "", None
    elif config.prompt_key in record:
        text = record[config.prompt_key]
    elif config.messages_key in record:
        return _messages_of(record[config.messages_key], config)
    else:
        return f"no {config.prompt_key!r} and no {config.messages_key!r}; found: {named_fields(record)}", "", None
    if not isinstance(text, str):
        return f"{config.prompt_key!r} must be a text", "", None
    if not text.strip():
        return "the prompt is empty", "", None
    if not config.apply_chat_template:
        return None, text, None
    return None, text, user_turn(text, config.system_prompt)


def _messages_of(messages: Any, config: PromptsConfig) -> tuple[str | None, str, list[dict[str, Any]] | None]:
    if not config.apply_chat_template:
        return "chat messages need prompts.apply_chat_template=true", "", None
    messages = list(messages) if isinstance(messages, list | np.ndarray) else messages
    if not isinstance(messages, list) or not messages:
        return f"{config.messages_key!r} must be a list with at least one message", "", None
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            return f"each of {config.messages_key!r} needs a 'role' and a 'content', both texts", "", None
    if messages[-1]["role"] == "assistant":
        return f"{config.messages_key!r} ends with the assistant's turn; the student has nothing to answer", "", None
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return None, json.dumps(messages, ensure_ascii=False), messages


def _tokenized(
    candidates: Iterable[_Candidate], encoder: Encoder, config: PromptsConfig, refuse: Any
) -> Iterator[tuple[_Candidate, list[int]]]:
    """(prompt, its token ids) of every good prompt, until prompts.limit of them were given; no line is read after it."""
    iterator, wanted = iter(candidates), config.limit or sys.maxsize
    while group := list(islice(iterator, min(PROMPTS_PER_BATCH, wanted))):
        encoded = encoder.encode([(candidate.text, candidate.messages) for candidate in group])
        for candidate, ids in zip(group, encoded, strict=True):
            if isinstance(ids, Fault):
                refuse(candidate.place, ids.said, ids.kind)
            elif config.max_prompt_tokens is not None and len(ids) > config.max_prompt_tokens:
                refuse(
                    candidate.place,
                    f"the prompt has {len(ids)} tokens, more than prompts.max_prompt_tokens = {config.max_prompt_tokens}",
                    "too long",
                )
            else:
                wanted -= 1
                yield candidate, ids


def _batch(group: list[tuple[int, tuple[_Candidate, list[int]]]], schema: pa.Schema) -> pa.RecordBatch:
    columns: dict[str, Iterable] = {
        "prompt_index": [index for index, _ in group],
        "prompt_id": [candidate.prompt_id for _, (candidate, _) in group],
        "text": [candidate.text for _, (candidate, _) in group],
        "num_prompt_tokens": [len(ids) for _, (_, ids) in group],
        "prompt_ids": [ids for _, (_, ids) in group],
        "answer": [candidate.answer for _, (candidate, _) in group],
        "fields": [candidate.fields for _, (candidate, _) in group],
    }
    return record_batch(columns, schema)


def prompts_config_of(path: Path) -> dict[str, Any]:
    """The settings that a published prompts file was made with."""
    with open_parquet(path) as file:
        return footer_of(file, path)["config"]


def count_prompts(path: Path) -> int:
    with open_parquet(path) as file:
        return file.metadata.num_rows


def prompt_lengths(path: Path) -> tuple[int, int]:
    """Tokens of the shortest and of the longest prompt."""
    with open_parquet(path) as file:
        groups = range(file.num_row_groups)
        columns = [read_row_group(file, path, group, ["num_prompt_tokens"])["num_prompt_tokens"] for group in groups]
    lengths = np.concatenate([numbers(column) for column in columns])
    return int(lengths.min()), int(lengths.max())


def require_fields(path: Path) -> None:
    """Refuse a prompts file of an opd-cache that did not keep the source's fields. Raises MismatchError."""
    with open_parquet(path) as file:
        if "fields" not in file.schema_arrow.names:
            raise MismatchError(
                f"{path}: has no column 'fields'; an older opd-cache took the prompts in. Choose another run_dir to take them in again."
            )


def read_prompts(path: Path, indices: Iterable[int]) -> dict[int, Prompt]:
    """The asked-for prompts by index; only their row groups are read."""
    rows = _rows_at(path, indices, ["prompt_id", "prompt_ids", "answer"])
    return {index: Prompt(index, *row) for index, row in rows.items()}


def read_prompt_ids(path: Path, indices: Iterable[int]) -> dict[int, Int32Array]:
    """Their token ids alone, of a file of prompts or of a teacher's prompts."""
    return {index: ids for index, (ids,) in _rows_at(path, indices, ["prompt_ids"]).items()}


def read_fields(path: Path, indices: Iterable[int]) -> dict[int, tuple[str, dict[str, Any]]]:
    """(prompt_id, fields of the source record) by index. Raises MismatchError where the prompts came without fields."""
    require_fields(path)
    rows = _rows_at(path, indices, ["prompt_id", "fields"])
    return {index: (prompt_id, json.loads(fields)) for index, (prompt_id, fields) in rows.items()}


def read_prompt_table(path: Path, indices: Iterable[int]) -> pa.Table:
    """The asked-for rows with all their columns, one row group in memory at a time."""
    wanted = array_of(sorted(set(indices)), pa.int32())
    with open_parquet(path) as file:
        tables = [file.schema_arrow.empty_table()]
        for group in sorted({index // ROWS_PER_GROUP for index in wanted.to_pylist()}):
            table = read_row_group(file, path, group)
            tables.append(table.filter(pc.is_in(table["prompt_index"], wanted)))
    return pa.concat_tables(tables)


def _rows_at(path: Path, indices: Iterable[int], columns: list[str]) -> dict[int, tuple[Any, ...]]:
    """The values of these columns by prompt_index."""
    wanted = sorted(set(indices))
    found: dict[int, tuple[Any, ...]] = {}
    with open_parquet(path) as file:
        for group in sorted({index // ROWS_PER_GROUP for index in wanted}):
            table = read_row_group(file, path, group, ["prompt_index", *columns])
            values = [split_lists(table, name) if name == "prompt_ids" else table[name].to_pylist() for name in columns]
            found.update(zip(table["prompt_index"].to_pylist(), zip(*values, strict=True), strict=True))
    return {index: found[index] for index in wanted}
