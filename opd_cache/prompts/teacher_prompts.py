"""A teacher's own prompts: a template over the prompts' fields, tokenized once per run with the teacher's tokenizer."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from opd_cache.config import TeacherPrompt
from opd_cache.errors import MismatchError, PromptError
from opd_cache.prompts.encode import Encoder, Fault, Messages, fill_template, user_turn
from opd_cache.prompts.intake import prompts_config_of, require_fields
from opd_cache.schema import TEACHER_PROMPTS, arrow_schema
from opd_cache.store.arrays import record_batch
from opd_cache.store.shards import footer_of, open_parquet, publish_table, read_row_groups

COLUMNS = ["prompt_index", "prompt_id", "text", "answer", "fields"]


def publish_teacher_prompts(
    name: str, config: TeacherPrompt, tokenizer: Any, num_embeddings: int, prompts: Path, digest: str, final: Path
) -> None:
    """Fill the template for every row of the file `prompts` (sha256 `digest`) and publish the ids as `final`.

    Row i is prompt i, in row groups like those of the prompts. Raises PromptError at the first prompt that cannot be
    filled or encoded, MismatchError where the prompts came without fields.
    """
    require_fields(prompts)
    section = f"teachers.{name}.prompt"
    encoder = Encoder(
        tokenizer,
        num_embeddings,
        f"teacher {name!r}",
        section,
        config.apply_chat_template,
        config.chat_template_kwargs,
    )
    schema, source = arrow_schema(TEACHER_PROMPTS), prompts_config_of(prompts)

    def batches() -> Iterator[pa.RecordBatch]:
        for table in read_row_groups(prompts, COLUMNS):
            rows = table.to_pylist()
            filled = [_filled(row, config, source, section) for row in rows]
            ids = [_ids(*pair) for pair in zip(rows, encoder.encode(filled), strict=True)]
            columns = {
                "prompt_index": [row["prompt_index"] for row in rows],
                "text": [text for text, _ in filled],
                "num_prompt_tokens": [len(one) for one in ids],
                "prompt_ids": ids,
            }
            yield record_batch(columns, schema)

    publish_table(final, schema, batches, _footer(name, config, digest))


def check_teacher_prompts(name: str, config: TeacherPrompt, digest: str, final: Path) -> None:
    """Refuse a published file that was made with other settings or for other prompts. Raises MismatchError."""
    with open_parquet(final) as file:
        found = footer_of(file, final)
    wanted = _footer(name, config, digest)
    if found.get("prompts") != digest:
        raise MismatchError(f"{final}: made for other prompts than the run's. Move the file away and score again.")
    recorded = found.get("config", {})
    for key, value in wanted["config"].items():
        if recorded.get(key) != value:
            raise MismatchError(
                f"{final}: made with teachers.{name}.prompt.{key} = {recorded.get(key)!r}, the recipe says {value!r}. Set it back, or give the teacher with the other prompt a name of its own."
            )


def _footer(name: str, config: TeacherPrompt, digest: str) -> dict[str, Any]:
    return {"stage": "teacher_prompts", "teacher": name, "config": asdict(config), "prompts": digest}


def _filled(
    row: dict[str, Any], config: TeacherPrompt, source: dict[str, Any], section: str
) -> tuple[str, Messages | None]:
    template, fields = config.template or "", json.loads(row["fields"])
    record = {**fields, "prompt": row["text"], "answer": row["answer"]}
    fault, text = fill_template(template, record, f"{section}.template")
    is_chat = source["template"] is None and source["prompt_key"] not in fields and row["text"].startswith("[{")
    if fault is None and is_chat and "{prompt}" in template:
        fault = "the prompt is chat messages, which {prompt} cannot hold; use fields of the record"
    if fault is None and not text.strip():
        fault = "the prompt is empty"
    if fault:
        raise _refused(row, fault)
    return text, user_turn(text, config.system_prompt) if config.apply_chat_template else None


def _ids(row: dict[str, Any], ids: list[int] | Fault) -> list[int]:
    if isinstance(ids, Fault):
        raise _refused(row, ids.said)
    return ids


def _refused(row: dict[str, Any], fault: str) -> PromptError:
    return PromptError(f"prompt {row['prompt_index']} ({row['prompt_id']!r}): {fault}. Mend the template.")
