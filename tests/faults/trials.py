"""Many faults in one test: all are tried, also after one that was not survived."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from fault_log import FaultLog

SHOWN = 10
Trial = Callable[[str], AbstractContextManager[None]]


@contextmanager
def every_fault(faults: FaultLog, row: str) -> Iterator[Trial]:
    """Gives trial(FAULT), which notes an assertion that fails; then raises one for all of them."""
    failures: list[str] = []
    tried = 0

    @contextmanager
    def trial(fault: str) -> Iterator[None]:
        nonlocal tried
        tried += 1
        try:
            with faults.trial(row, fault):
                yield
        except AssertionError as error:
            failures.append(f"{fault}: {type(error).__name__}: {error}")

    yield trial
    assert failures == [], f"{len(failures)} of {tried} not survived:\n" + "\n".join(failures[:SHOWN])
