"""On-policy distillation in three restartable stages joined by Parquet shards."""

from typing import TYPE_CHECKING

from opd_cache.limits import DEFAULT_MEMORY

if TYPE_CHECKING:
    from opd_cache.store.query import Connection, Runs

__version__ = "0.1.0"


def connect(runs: "Runs", *, partial: bool = False, memory: str = DEFAULT_MEMORY) -> "Connection":
    """A DuckDB connection with the views of a run directory, or of several by name: {"a": RUN, "b": OTHER}."""
    from opd_cache.store.query import connect as open_connection

    return open_connection(runs, partial=partial, memory=memory)
