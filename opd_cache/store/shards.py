"""One stage's shards: encode, publish, list the missing, seal, and read through the seal.

A shard is immutable and byte-identical whenever the same plan is worked off on the same machine: its footer holds
what it was made from and nothing of when or where (that is in logs/).
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from opd_cache.errors import CorruptShardError, MismatchError, MissingInputError, StoreError
from opd_cache.run_dir import SCHEMA_VERSION, SEAL, shard_name
from opd_cache.store.disk import disk_error
from opd_cache.store.publish import digest_bytes, digest_file, publish_file, publish_json, read_json
from opd_cache.store.shapes import check_version

FOOTER_KEY = b"opd_cache"
WIDE_LEAVES = (pa.int32(), pa.float32())


def encoding(schema: pa.Schema) -> dict[str, Any]:
    """How a table is written: byte-stream-split and zstd on 32-bit numbers, dictionaries only on strings.

    Measured on 2.5 M tokens: 4.36 bytes a response token for ids and one log-prob, against 5.78 with pyarrow's defaults.
    Top-k columns gain from a higher level: 28 bytes at k = 8 with zstd-3.
    """
    split, strings = [], []
    for field in schema:
        is_list = pa.types.is_list(field.type)
        leaf = field.type.value_type if is_list else field.type
        path = f"{field.name}.list.element" if is_list else field.name
        if leaf in WIDE_LEAVES:
            split.append(path)
        elif pa.types.is_string(leaf):
            strings.append(path)
    return {
        "compression": "zstd",
        "compression_level": 3 if "topk_ids" in schema.names else 1,
        "use_dictionary": strings,
        "use_byte_stream_split": split,
        "write_page_checksum": True,
        "write_page_index": True,
        "store_schema": False,
    }


def write_table(file: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch], footer: dict[str, Any]) -> None:
    """Write one row group a batch. The writer is closed by hand: as a context manager it would complete a file
    whose rows were cut short by an exception."""
    writer = pq.ParquetWriter(file, schema, **encoding(schema))
    try:
        for batch in batches:
            writer.write_batch(batch, row_group_size=max(1, batch.num_rows))
    except BaseException:
        # Else its destructor would complete the file, by then closed, and print a traceback of its own.
        writer.is_open = False
        raise
    writer.add_key_value_metadata({FOOTER_KEY.decode(): json.dumps(footer, sort_keys=True)})
    writer.close()


def open_parquet(path: Path, data: bytes | None = None) -> pq.ParquetFile:
    """Open with page checksums verified on every read; data: the file's bytes, where they have been read already.

    Raises CorruptShardError or MissingInputError.
    """
    with _explained_read_errors(path):
        return pq.ParquetFile(path if data is None else pa.BufferReader(data), page_checksum_verification=True)


def read_row_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of a file, one at a time. Raises CorruptShardError on damage."""
    with open_parquet(path) as file:
        for index in range(file.num_row_groups):
            yield read_row_group(file, path, index, columns)


def read_row_group(file: pq.ParquetFile, path: Path, index: int, columns: list[str] | None = None) -> pa.Table:
    """One row group, checksums verified. Raises CorruptShardError on damage."""
    with _explained_read_errors(path):
        return file.read_row_group(index, columns=columns, use_threads=False)


@contextlib.contextmanager
def _explained_read_errors(path: Path) -> Iterator[None]:
    """Tell damage from what keeps us from looking: no right to read it, no memory, too many open files."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingInputError(f"{path}: no such file.") from error
    except MemoryError:
        raise
    except OSError as error:
        if failing := disk_error(error, path):
            raise failing from error
        if error.errno is None:  # what Arrow says of a file's content
            raise _corrupt(path, error) from error
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception | str) -> CorruptShardError:
    reason = " ".join(str(error).split())[:200]
    return CorruptShardError(
        f"{path}: damaged ({reason}). Move the file and its folder's {SEAL} away and run the stage again."
    )


def footer_of(file: pq.ParquetFile, path: Path) -> dict[str, Any]:
    """What the writer said of this file. Raises CorruptShardError when it said nothing."""
    raw = (file.metadata.metadata or {}).get(FOOTER_KEY)
    if raw is None:
        raise CorruptShardError(f"{path}: not written by opd-cache (its footer has no {FOOTER_KEY.decode()!r} entry).")
    try:
        footer = json.loads(raw)
    except ValueError as error:
        raise _corrupt(path, error) from error
    if not isinstance(footer, dict):
        raise _corrupt(path, f"its {FOOTER_KEY.decode()!r} entry is no JSON object")
    check_version(footer.get("schema_version"), path)
    return footer


def publish_table(
    final: Path, schema: pa.Schema, batches: Callable[[], Iterable[pa.RecordBatch]], footer: dict[str, Any]
) -> bool:
    """Publish one Parquet file, read back with checksums before it gets its name."""
    content = {"schema_version": SCHEMA_VERSION, **footer}

    def write(file: BinaryIO) -> None:
        write_table(file, schema, batches(), content)

    def check(path: Path) -> None:
        for _ in read_row_groups(path):
            pass

    return publish_file(final, write, check)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one stage in one folder, all made from one plan.

    `about` is what their footers and their seal say: run id, stage, scope, plan digest and the settings.
    `remedy` is the command that makes missing shards, for error messages.
    """

    folder: Path
    num_shards: int
    schema: pa.Schema
    about: dict[str, Any]
    remedy: str

    def path(self, shard: int) -> Path:
        return self.folder / shard_name(shard, self.num_shards)

    def missing(self) -> list[int]:
        """Shards without a file: the resume list and the work list."""
        present: set[str] = set()
        if self.folder.is_dir():
            with os.scandir(self.folder) as entries:
                present = {entry.name for entry in entries if entry.is_file()}
        return [shard for shard in range(self.num_shards) if shard_name(shard, self.num_shards) not in present]

    @property
    def seal_path(self) -> Path:
        return self.folder / SEAL

    def is_sealed(self) -> bool:
        return self.seal_path.exists()

    def publish(
        self, shard: int, batches: Callable[[], Iterable[pa.RecordBatch]], figures: Mapping[str, float] | None = None
    ) -> bool:
        """Publish one shard; False when another process was first.

        figures: sums over the shard's rows for its footer and the seal, known when the last batch is.
        """
        footer = {
            **self.about,
            "shard": shard,
            "num_shards": self.num_shards,
            "figures": {} if figures is None else figures,
        }
        return publish_table(self.path(shard), self.schema, batches, footer)

    def open(self, shard: int, data: bytes | None = None) -> pq.ParquetFile:
        """Open a shard and check that it is this shard of this plan; data: its bytes, where they have been read already.

        Raises MismatchError, CorruptShardError.
        """
        path = self.path(shard)
        file = open_parquet(path, data)
        try:
            self._check(file, path, shard)
        except StoreError:
            file.close()
            raise
        return file

    def _check(self, file: pq.ParquetFile, path: Path, shard: int) -> None:
        footer = footer_of(file, path)
        expected = {
            "run_id": self.about["run_id"],
            "stage": self.about["stage"],
            "plan": self.about["plan"],
            "shard": shard,
        }
        for key, value in expected.items():
            if footer.get(key) != value:
                raise MismatchError(
                    f"{path}: its footer says {key} = {footer.get(key)!r}, expected {value!r}: it was made for another run or plan. Move the file away and run: {self.remedy}"
                )
        # No checksum covers Parquet's own footer: of single flipped bits there, these two checks refuse all that
        # pyarrow would read as other rows, other types or other columns.
        if not file.schema_arrow.equals(self.schema):
            raise _corrupt(path, "its columns are not those of this stage")
        grouped = sum(file.metadata.row_group(index).num_rows for index in range(file.num_row_groups))
        if grouped != file.metadata.num_rows:
            raise _corrupt(path, f"its footer counts {file.metadata.num_rows} rows, its row groups {grouped}")

    def seal(self) -> bool:
        """Write the seal when every shard is there; False while some are missing."""
        if self.is_sealed():
            return True
        if self.missing():
            return False
        shards = [self._described(shard) for shard in range(self.num_shards)]
        content = {
            "schema_version": SCHEMA_VERSION,
            **self.about,
            "shards": shards,
            "rows": sum(entry["rows"] for entry in shards),
            "tokens": sum(entry["tokens"] for entry in shards),
            "bytes": sum(entry["bytes"] for entry in shards),
        }
        publish_json(self.seal_path, content, "the seal", f"Move {self.seal_path} away and run: {self.remedy}")
        return True

    def _described(self, shard: int) -> dict[str, Any]:
        path = self.path(shard)
        with self.open(shard) as file:
            figures = footer_of(file, path).get("figures")
            columns = [
                read_row_group(file, path, group, ["num_response_tokens"]) for group in range(file.num_row_groups)
            ]
        return {
            "file": path.name,
            "rows": sum(len(column) for column in columns),
            "tokens": sum(sum(column["num_response_tokens"].to_pylist()) for column in columns),
            "bytes": path.stat().st_size,
            "sha256": digest_file(path),
            **({"figures": figures} if figures else {}),
        }

    def open_seal(self) -> str:
        """Check the seal and the presence and size of every shard; returns the seal's digest.

        Raises MissingInputError when the stage is not complete, MismatchError when it was made from other inputs,
        CorruptShardError when a shard is gone or has another size.
        """
        if not self.is_sealed():
            missing = len(self.missing())
            raise MissingInputError(
                f"{self.folder}: {self.num_shards - missing} of {self.num_shards} shards are there and no {SEAL}. Run: {self.remedy}"
            )
        seal = read_json(self.seal_path)
        self.check_seal(seal)
        for shard, entry in enumerate(seal["shards"]):
            path = self.path(shard)
            size = path.stat().st_size if path.exists() else None
            if size != entry["bytes"]:
                raise CorruptShardError(
                    f"{path}: {'missing' if size is None else f'{size} bytes'}, the seal says {entry['bytes']} bytes. Move it and {SEAL} away and run: {self.remedy}"
                )
        return digest_bytes(self.seal_path.read_bytes())

    def check_seal(self, seal: dict[str, Any]) -> None:
        """Compare what a seal says with the plan. Raises MismatchError, CorruptShardError."""
        for key, value in self.about.items():
            if seal.get(key) != value:
                raise MismatchError(
                    f"{self.seal_path}: made with {key} = {seal.get(key)!r}, now {value!r}. Move the folder away and run: {self.remedy}"
                )
        listed = [entry["file"] for entry in seal.get("shards", [])]
        if listed != [self.path(shard).name for shard in range(self.num_shards)]:
            raise CorruptShardError(
                f"{self.seal_path}: lists {len(listed)} shards, the plan has {self.num_shards}. Move it away and run: {self.remedy}"
            )
