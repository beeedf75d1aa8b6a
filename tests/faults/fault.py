"""One thing that goes wrong at one system call, as faulty_io.c knows it."""

import errno
from typing import NamedTuple

# In the order of faulty_io.c.
CALLS = ("openat", "write", "fsync", "close", "link", "unlink", "mkdir", "rename")
ACTIONS = ("nothing", "kill", "fail", "fail from here", "short", "lie: nothing", "lie: half", "lie: zeros", "lie: bit")
LIES = tuple(action for action in ACTIONS if action.startswith("lie"))


class Fault(NamedTuple):
    """What happens at the number-th call (from 1) of its kind on the run directory."""

    call: str
    number: int
    action: str
    error: str = ""  # ENOSPC, ... where the action is to fail

    def __str__(self) -> str:
        return f"{self.call} {self.number} {self.action} {self.error}".rstrip()

    def to_job(self) -> list[int]:
        error = getattr(errno, self.error) if self.error else 0
        return [CALLS.index(self.call), self.number, ACTIONS.index(self.action), error]
