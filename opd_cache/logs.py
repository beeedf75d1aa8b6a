"""Log lines and progress. A terminal gets a bar with rate and ETA; a file gets a plain line now and then."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from opd_cache.stall import note_progress

LINE_INTERVAL_S = 20.0
console = Console(stderr=True)
log = logging.getLogger("opd_cache")


def set_up_logging(verbose: bool = False) -> None:
    """One line an event on stderr."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("opd_cache")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def short(number: float) -> str:
    """214000 → 214k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


class StageProgress:
    """Progress of one stage in rows and tokens: `with StageProgress("score", "episode 3", total_rows) as progress`."""

    def __init__(self, stage: str, label: str, total: int, unit: str = "rollouts") -> None:
        self.stage, self.label, self.total, self.unit = stage, label, total, unit
        self.done = self.tokens = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "StageProgress":
        self._start = self._last_line = time.monotonic()
        note_progress(f"the beginning of {self.stage} {self.label}")
        if console.is_terminal and self.total:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[unit]} {task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(f"{self.stage} {self.label}", total=self.total, unit=self.unit, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, rows: int, tokens: int) -> None:
        self.done += rows
        self.tokens += tokens
        note_progress(f"{self.stage} {self.label}, {self.done}/{self.total} {self.unit}")
        now = time.monotonic()
        rate = self.tokens / max(now - self._start, 1e-9)
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=rows, rate=f"{short(rate)} tok/s")
        elif now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            eta = (self.total - self.done) * (now - self._start) / max(self.done, 1)
            log.info(
                "%-7s %s | %d/%d %s | %s tok/s | %.0f s left",
                self.stage,
                self.label,
                self.done,
                self.total,
                self.unit,
                short(rate),
                eta,
            )
