"""Reading prompt records, each with its place for error messages, from files, folders and dataset names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_cache.config import PromptsConfig
from opd_cache.errors import PromptError

REASON_CHARS = 300
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")

# (place, record) or (place, what is wrong with it)
Record = tuple[str, dict[str, Any] | str]


def read_records(config: PromptsConfig) -> Iterator[Record]:
    """Every record of the source in order; a broken one arrives as the text of its fault."""
    path = Path(config.path)
    if path.suffix in FILE_SUFFIXES:
        return read_file(_existing(path))
    if path.is_file():
        raise PromptError(f"prompts.path = {config.path!r}: expected a file that ends in {', '.join(FILE_SUFFIXES)}.")
    return _read_dataset(config, path)


def read_file(path: Path) -> Iterator[Record]:
    """Every record of a file that ends in one of FILE_SUFFIXES."""
    return {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[path.suffix](path)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise PromptError(f"prompts.path = {str(path)!r}: no such file.")
    return path


def _read_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if not line.strip():
                yield place, "the line is empty"
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield place, _not_json(error)
                continue
            yield place, record if isinstance(record, dict) else f"expected an object, found {_kind(record)}"


def _not_json(error: ValueError | RecursionError) -> str:
    return f"not JSON ({'nested too deep' if isinstance(error, RecursionError) else error})"


def _read_json(path: Path) -> Iterator[Record]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path}: {_not_json(error)}.") from error
    if not isinstance(content, list):
        raise PromptError(f"{path}: expected an array of objects, found {_kind(content)}.")
    for number, record in enumerate(content, 1):
        yield (
            f"{path} item {number}",
            record if isinstance(record, dict) else f"expected an object, found {_kind(record)}",
        )


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    # Arrow reads dates that Python has not, and texts that are no UTF-8.
    except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, LookupError) as error:
        raise PromptError(
            f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:REASON_CHARS]})."
        ) from error


def _read_dataset(config: PromptsConfig, path: Path) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        known = ", ".join(FILE_SUFFIXES)
        raise PromptError(
            f"prompts.path = {config.path!r} is no {known} file; dataset folders and names need: pip install 'opd-cache[hub]'."
        ) from error
    try:
        if path.is_dir():
            dataset = datasets.load_from_disk(config.path)
        else:
            dataset = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise PromptError(
            f"prompts.path = {config.path!r} (split {config.split!r}) is no file and cannot be loaded as a dataset: {reason}."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise PromptError(f"{config.path}: has no split {config.split!r}. Known: {', '.join(dataset)}.")
        dataset = dataset[config.split]
    for number, record in enumerate(dataset, 1):
        yield f"{config.path}[{config.split}] row {number}", record


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "a string",
        int: "a number",
        float: "a number",
        bool: "a boolean",
    }
    return names.get(type(value), "null")
