"""Responses as a folder that `datasets.load_dataset` reads: Parquet files and a card."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opd_cache import __version__
from opd_cache.errors import ConfigError
from opd_cache.exports.rows import SCHEMA, Piece, Responses, piece_batches
from opd_cache.logs import StageProgress
from opd_cache.schema import EXPORTED, STEPS, arrow_schema, markdown_table
from opd_cache.status import read_identity
from opd_cache.store.publish import publish_folder
from opd_cache.store.shards import read_row_groups

CARD = "README.md"


def write_dataset(responses: Responses, folder: Path) -> None:
    """Write a folder that is not there yet, whole or not at all. Raises ConfigError where it is there."""
    if folder.exists():
        raise ConfigError(f"{folder}: exists and is not overwritten; choose another name.")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{folder.parent}: no such folder; make it, or choose another place for {folder.name}.")

    def fill(target: Path) -> None:
        (target / "responses").mkdir()
        with StageProgress("export", str(folder), responses.num_rows, "rows") as progress:
            for piece in responses.pieces:
                _write_parquet(
                    target / "responses" / f"{piece.name}.parquet", SCHEMA, _watched(responses, piece, progress)
                )
        has_steps = _write_steps(responses, target)
        (target / CARD).write_text(_card(responses, folder.name, has_steps), encoding="utf-8")

    if not publish_folder(folder.absolute(), fill):
        raise ConfigError(f"{folder}: exists and is not overwritten; choose another name.")


def _watched(responses: Responses, piece: Piece, progress: StageProgress) -> Iterator[pa.RecordBatch]:
    for batch in piece_batches(responses, piece):
        yield batch
        progress.advance(batch.num_rows, len(batch["response_ids"].flatten()))


def _write_parquet(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    # A file that is cut short by an exception is removed with its folder.
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_index=True) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_steps(responses: Responses, target: Path) -> bool:
    """The optimizer steps of the exported episodes, in one file; False where none was learned."""
    schema = arrow_schema(STEPS).insert(0, pa.field("episode", pa.int32(), nullable=False))
    episodes = dict.fromkeys(piece.episode for piece in responses.pieces)
    paths = {episode: path for episode in episodes if (path := responses.run.steps(episode)).exists()}
    if not paths:
        return False

    def batches() -> Iterator[pa.RecordBatch]:
        for episode, path in paths.items():
            for table in read_row_groups(path):
                rows = [{"episode": episode, **row} for row in table.to_pylist()]
                yield pa.RecordBatch.from_pylist(rows, schema=schema)

    (target / "steps").mkdir()
    _write_parquet(target / "steps" / "steps.parquet", schema, batches())
    return True


def _card(responses: Responses, name: str, has_steps: bool) -> str:
    identity = read_identity(responses.run)
    recipe = identity["recipe"]
    teachers = sorted({piece.teacher for piece in responses.pieces if piece.teacher is not None})
    models = "\n".join(
        f"- teacher `{teacher}`: `{recipe['teachers'].get(teacher, {}).get('model', 'added later')}`"
        for teacher in teachers
    )
    episodes = sorted({piece.episode for piece in responses.pieces})
    steps = "- config_name: steps\n  data_files: steps/*.parquet\n" if has_steps else ""
    rollout = recipe["rollout"]
    loss = recipe["learn"]["loss"]["name"]
    return f"""---
pretty_name: {json.dumps(name)}
tags: [on-policy-distillation, opd-cache]
configs:
- config_name: responses
  data_files: responses/*.parquet
  default: true
{steps}---

# {name}

Responses that a student model sampled while it was distilled on-policy, with its teacher's log-prob of every token.
Exported by opd-cache {__version__} from run `{identity["run_id"]}`: {responses.num_rows:,} rows of episodes {episodes[0]} to {episodes[-1]}.

- student: `{recipe["student"]["model"]}`
{models}
- sampled at temperature {rollout["temperature"]}, top-p {rollout["top_p"]}, top-k {rollout["top_k"] or "off"}, up to {rollout["max_new_tokens"]} tokens
- learned with the loss `{loss}`

```python
from datasets import load_dataset

responses = load_dataset({json.dumps(name)}, split="train")
```

One row is a response as one teacher scored it. A list of log-probs has one entry a token, nats.

{markdown_table(EXPORTED)}
"""
