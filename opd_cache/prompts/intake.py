"""Prompts become token ids once, in prompts.parquet; from there on nothing is decoded and encoded again."""

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opd_cache.config import PromptsConfig
from opd_cache.errors import PromptError
from opd_cache.prompts.sources import read_records
from opd_cache.schema import PROMPTS, arrow_schema
from opd_cache.store.rows import split_lists
from opd_cache.store.shards import footer_of, open_parquet, publish_table, read_row_group
from opd_cache.types import Prompt

log = logging.getLogger(__name__)
ROWS_PER_GROUP = 4096
CANDIDATES_PER_BATCH = 1024
MAX_ID_CHARACTERS = 256
MAX_NAMED_FIELDS = 20
MAX_FIELD_CHARACTERS = 1 << 16
PLACE = re.compile(r"\{(\w+)\}")
# JSON can spell half of a surrogate pair, which is no character: no tokenizer and no Parquet file takes it.
SURROGATE = re.compile("[\ud800-\udfff]")


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

    def refuse_or_skip(place: str, fault: str, kind: str) -> None:
        if config.on_bad_prompt == "refuse":
            raise PromptError(f"{place}: {fault}. Mend it, or set prompts.on_bad_prompt=skip.")
        skipped[kind] = skipped.get(kind, 0) + 1

    def batches() -> Iterator[pa.RecordBatch]:
        tokenized = _tokenized(_candidates(config, refuse_or_skip), config, tokenizer, num_embeddings, refuse_or_skip)
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
        if len(prompt_id) > MAX_ID_CHARACTERS or not prompt_id.isprintable() or not prompt_id or _is_no_text(given):
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
        if _is_no_text(answer):
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


def _is_no_text(value: Any) -> bool:
    """Whether its text would be Python's and not the source's: true → True, a list → its repr."""
    return isinstance(value, bool | bytes | list | dict) or (isinstance(value, str) and bool(SURROGATE.search(value)))


def _fields(record: dict[str, Any]) -> str:
    names = [repr(name) for name in islice(record, MAX_NAMED_FIELDS)]
    return ", ".join(names + ["..."] * (len(record) > MAX_NAMED_FIELDS)) or "nothing"


def _prompt_of(record: dict[str, Any], config: PromptsConfig) -> tuple[str | None, str, list[dict[str, Any]] | None]:
    """(fault or None, text, chat messages or None) of one record."""
    if config.template is not None:
        for name in PLACE.findall(config.template):
            if name not in record:
                return f"prompts.template needs the field {name!r}; found: {_fields(record)}", "", None
            if record[name] is None or _is_no_text(record[name]):
                return f"{name!r} must be a text or a number, since prompts.template uses it", "", None
        text: Any = PLACE.sub(lambda match: str(record[match.group(1)]), config.template)
    elif config.prompt_key in record:
        text = record[config.prompt_key]
    elif config.messages_key in record:
        return _messages_of(record[config.messages_key], config)
    else:
        return f"no {config.prompt_key!r} and no {config.messages_key!r}; found: {_fields(record)}", "", None
    if not isinstance(text, str):
        return f"{config.prompt_key!r} must be a text", "", None
    if not text.strip():
        return "the prompt is empty", "", None
    if not config.apply_chat_template:
        return None, text, None
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt is not None else []
    return None, text, [*system, {"role": "user", "content": text}]


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
    candidates: Iterable[_Candidate], config: PromptsConfig, tokenizer: Any, num_embeddings: int, refuse: Any
) -> Iterator[tuple[_Candidate, list[int]]]:
    """(prompt, its token ids) of every good prompt, until prompts.limit of them were given; no line is read after it."""
    iterator, wanted = iter(candidates), config.limit or sys.maxsize
    while group := list(islice(iterator, min(CANDIDATES_PER_BATCH, wanted))):
        for candidate, ids in _encoded(group, config, tokenizer, refuse):
            if config.max_prompt_tokens is not None and len(ids) > config.max_prompt_tokens:
                refuse(
                    candidate.place,
                    f"the prompt has {len(ids)} tokens, more than prompts.max_prompt_tokens = {config.max_prompt_tokens}",
                    "too long",
                )
            elif not ids:
                refuse(candidate.place, "the prompt has no tokens", "empty")
            elif max(ids) >= num_embeddings:
                refuse(
                    candidate.place,
                    f"the prompt has token id {max(ids)} ({tokenizer.convert_ids_to_tokens(max(ids))!r}), the student has {num_embeddings} embeddings",
                    "with an unknown token",
                )
            elif ids[:2] == [tokenizer.bos_token_id] * 2:
                refuse(
                    candidate.place,
                    f"the prompt begins with {tokenizer.bos_token!r} twice; leave it out where the tokenizer or the chat template adds it",
                    "with a second BOS",
                )
            else:
                wanted -= 1
                yield candidate, ids


def _encoded(
    group: list[_Candidate], config: PromptsConfig, tokenizer: Any, refuse: Any
) -> Iterator[tuple[_Candidate, list[int]]]:
    if not config.apply_chat_template:
        yield from zip(group, tokenizer([candidate.text for candidate in group])["input_ids"], strict=True)
        return
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError("prompts.apply_chat_template is true, but the student's tokenizer has no chat template.")
    for candidate in group:
        try:
            ids = tokenizer.apply_chat_template(
                candidate.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **config.chat_template_kwargs,
            )
        except TemplateError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            refuse(candidate.place, f"the chat template fails ({reason})", "refused by the chat template")
            continue
        yield candidate, ids


def _batch(group: list[tuple[int, tuple[_Candidate, list[int]]]], schema: pa.Schema) -> pa.RecordBatch:
    columns = {
        "prompt_index": [index for index, _ in group],
        "prompt_id": [candidate.prompt_id for _, (candidate, _) in group],
        "text": [candidate.text for _, (candidate, _) in group],
        "num_prompt_tokens": [len(ids) for _, (_, ids) in group],
        "prompt_ids": [ids for _, (_, ids) in group],
        "answer": [candidate.answer for _, (candidate, _) in group],
        "fields": [candidate.fields for _, (candidate, _) in group],
    }
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def prompts_config_of(path: Path) -> dict[str, Any]:
    """The settings that a published prompts file was made with."""
    with open_parquet(path) as file:
        return footer_of(file, path)["config"]


def count_prompts(path: Path) -> int:
    with open_parquet(path) as file:
        return file.metadata.num_rows


def read_prompts(path: Path, indices: Iterable[int]) -> dict[int, Prompt]:
    """The asked-for prompts by index; only their row groups are read."""
    wanted = sorted(set(indices))
    found: dict[int, Prompt] = {}
    with open_parquet(path) as file:
        for group in sorted({index // ROWS_PER_GROUP for index in wanted}):
            table = read_row_group(file, path, group, ["prompt_index", "prompt_id", "prompt_ids", "answer"])
            ids = split_lists(table, "prompt_ids")
            rows = zip(
                table["prompt_index"].to_pylist(),
                table["prompt_id"].to_pylist(),
                ids,
                table["answer"].to_pylist(),
                strict=True,
            )
            for index, prompt_id, prompt_ids, answer in rows:
                found[index] = Prompt(index, prompt_id, prompt_ids, answer)
    return {index: found[index] for index in wanted}
