"""What the fault table is made of: a line for each fault that a test tried, with how it ended.

A test names the table's row and the fault, and asserts inside `trial`:

    with faults.trial("SIGKILL before the Nth system call", "rollout, 3rd link"):
        ...

DataLostError and SilentError are assertions that the table counts apart from any other failure.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataLostError(AssertionError):
    """What had been published is gone or other, or the run cannot be finished any more."""


class SilentError(AssertionError):
    """A fault was taken for data, or for success, and nobody was told."""


OUTCOMES: dict[type[BaseException], str] = {DataLostError: "lost", SilentError: "silent"}


class FaultLog:
    """Appends to a file of this process; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"{os.getpid()}.jsonl"

    @contextmanager
    def trial(self, row: str, fault: str) -> Iterator[None]:
        outcome = "survived"
        try:
            yield
        except BaseException as error:
            outcome = OUTCOMES.get(type(error), "failed")
            raise
        finally:
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"row": row, "fault": fault, "outcome": outcome, "time": time.time()}) + "\n")


def is_full() -> bool:
    """Whether every fault is wanted (FAULTS=full), or a set that represents them."""
    return os.environ.get("FAULTS") == "full"
