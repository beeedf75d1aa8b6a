"""A run as pages ask it: one connection on its sealed files, made anew when there are others.

The scalars of all samples are kept in memory, and the texts of a run that is not too big: they answer filters in
milliseconds. Both are kept from one state of the run to the next for every episode whose seals are the same.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_cache.errors import OpdCacheError
from opd_cache.limits import DEFAULT_TIMEOUT_S, Limits
from opd_cache.run_dir import RunDir
from opd_cache.schema import SAMPLES
from opd_cache.status import failed_shards
from opd_cache.store.sealed import RunFiles, StageFiles, find_files
from opd_cache.store.views import view_files

if TYPE_CHECKING:
    from opd_cache.store.query import Connection

RECHECK_S = 2.0
TEXT_TOKENS = 50_000_000  # response tokens whose texts are kept: some 6 bytes each
READ_ON_DEMAND = ("prompt_text", "response_text")
SCALARS = [column.name for column in SAMPLES if column.name not in READ_ON_DEMAND]
KEPT = {
    "sample_rows": f"SELECT {', '.join(SCALARS)} FROM samples",
    "sample_texts": "SELECT episode, rollout_id, teacher, response_text FROM samples",
}


class RunState:
    """What of a run is sealed at one time."""

    def __init__(self, found: RunFiles, limits: Limits, partial: bool, previous: "RunState | None") -> None:
        from opd_cache.store.query import open_views

        self.found, self.limits, self.key = found, limits, state_key(found)
        self._connection, _ = open_views(found.dir.path, partial, limits.memory)
        self._previous = previous
        self._locks = {table: threading.Lock() for table in KEPT}
        self.kept: dict[str, dict[int, str]] = {}  # table → the key of each episode that is in it

    @property
    def keeps_texts(self) -> bool:
        return sum(stage.facts.get("tokens", 0) for stage in self.found.rollouts) <= TEXT_TOKENS

    def cursor(self) -> "Connection":
        """For one thread."""
        return self._connection.cursor()

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """All rows by column name. Raises ConfigError in one line."""
        from opd_cache.store.query import stopped_after

        cursor = self.cursor()
        with stopped_after(cursor, self.limits.timeout_s):
            result = cursor.execute(sql, list(values))
            names = [column[0] for column in result.description or []]
            return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    def columns(self, sql: str, values: Sequence[Any] = ()) -> dict[str, list[Any]]:
        """The same column by column; without rows no columns."""
        rows = self.rows(sql, values)
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}

    def keep(self, table: str) -> str:
        """Fill one of KEPT where that has not been done; returns its name. Raises ConfigError."""
        with self._locks[table]:
            if table not in self.kept:
                self.kept[table] = self._filled(table)
        return table

    def _filled(self, table: str) -> dict[int, str]:
        from opd_cache.store.query import stopped_after

        wanted, connection = episode_keys(self.found), self.cursor()
        same = {episode: rows for episode, key in wanted.items() if (rows := self._rows_before(table, episode, key))}
        new = ", ".join(str(episode) for episode in wanted if episode not in same)
        with stopped_after(connection, DEFAULT_TIMEOUT_S):
            connection.execute(f"CREATE OR REPLACE TABLE {table} AS {KEPT[table]} WHERE episode IN ({new or 'NULL'})")
            for rows in same.values():
                connection.register("same_as_before", rows)
                connection.execute(f"INSERT INTO {table} SELECT * FROM same_as_before")
                connection.unregister("same_as_before")
        return wanted

    def _rows_before(self, table: str, episode: int, key: str) -> Any:
        """The episode's rows as the state before this one has them; None where they may have changed."""
        before = self._previous
        if before is None or before.kept.get(table, {}).get(episode) != key:
            return None
        return before.cursor().sql(f"SELECT * FROM {table} WHERE episode = {episode:d}").to_arrow_table()

    def warm(self) -> None:
        """Fill what the first page and the first search would wait for, then let go of the state before."""
        self.keep("sample_rows")
        if self.keeps_texts:
            self.keep("sample_texts")
        self._previous = None


class LiveRun:
    """One run under a name, as it is now."""

    def __init__(self, name: str, path: Path, partial: bool, limits: Limits) -> None:
        self.name, self.path, self.partial, self.limits = name, path, partial, limits
        self.left_out: list[str] = []
        self._lock = threading.Lock()
        self._checked = 0.0
        self._state: RunState | None = None
        self._is_watched = False

    def files(self) -> RunFiles:
        """What is sealed now. Raises MissingInputError, MismatchError."""
        found = find_files(RunDir(self.path.absolute()), self.partial)
        self.left_out = [one.text for one in found.left_out]
        return found

    def watch(self) -> None:
        """Open the run; from now on what a page would wait for is made ready in the background."""
        self._is_watched = True
        with contextlib.suppress(OpdCacheError):  # who asks for the run is told
            self.state()
        threading.Thread(target=self._warm, daemon=True).start()

    def _warm(self) -> None:
        with contextlib.suppress(OpdCacheError):
            self.state().warm()

    def state(self) -> RunState:
        """What is sealed now, looked up again every two seconds. Raises what `opd_cache.connect` raises."""
        with self._lock:
            if self._state is not None and time.monotonic() - self._checked < RECHECK_S:
                return self._state
            found = self.files()
            if self._state is None or state_key(found) != self._state.key:
                before, self._state = self._state, RunState(found, self.limits, self.partial, self._state)
                if self._is_watched and before is not None:
                    threading.Thread(target=self._warm, daemon=True).start()
            self._checked = time.monotonic()
            return self._state

    def key(self) -> str:
        """Differs whenever a page would: by what is sealed, by what is on its way to it, by what has failed."""
        sealed = state_key(self.files())
        return _digest([sealed, self.left_out, [note["file"] for note in failed_shards(RunDir(self.path))]])


def state_key(found: RunFiles) -> str:
    """Differs whenever the views hold other rows."""
    stages = [*found.rollouts, *found.scores, *found.evaluations]
    return _digest([[str(path) for path in view_files(found)], [_facts(stage) for stage in stages]])


def episode_keys(found: RunFiles) -> dict[int, str]:
    """Of every episode that has scores: differs whenever its samples do."""
    stages: dict[int, list[Any]] = {}
    for stage in [*found.rollouts, *found.scores]:
        if stage.episode is not None:
            stages.setdefault(stage.episode, []).append(_facts(stage))
    return {episode: _digest(facts) for episode, facts in sorted(stages.items())}


def _facts(stage: StageFiles) -> list[Any]:
    return [str(stage.folder), stage.is_sealed, stage.names, stage.facts]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
