"""Answers of the SQL box, and JSON that a browser reads as it was meant."""

import json
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

from opd_cache.limits import Limits
from opd_cache.schema import TABLES

MAX_ROWS = 1_000
LARGEST_INTEGER = 2**53  # beyond it JavaScript rounds


def answer_query(runs: str | Path | dict[str, Path], sql: str, partial: bool, limits: Limits) -> dict[str, Any]:
    """Columns and the first rows of one SELECT; `more` says that there were others. Raises ConfigError in one line."""
    from opd_cache.store.query import open_query

    start = time.monotonic()
    with open_query(runs, sql, partial=partial, limits=limits) as answer:
        rows = [list(row) for row in islice(answer.rows(), MAX_ROWS + 1)]
        return {
            "columns": answer.columns,
            "rows": rows[:MAX_ROWS],
            "more": len(rows) > MAX_ROWS,
            "seconds": round(time.monotonic() - start, 3),
            "left_out": answer.left_out,
        }


def view_columns() -> dict[str, list[dict[str, str]]]:
    """Name and meaning of every column of every view."""
    return {view: [{"name": one.name, "doc": one.doc} for one in columns] for view, columns in TABLES.items()}


def to_json(value: Any) -> str:
    """JSON of one line; infinities become the texts inf and -inf, integers that JavaScript would round become texts."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= LARGEST_INTEGER else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {str(key): _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
