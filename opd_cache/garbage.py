"""Python's garbage collector, kept from looking through what is none."""

import atexit
import contextlib
import functools
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For what makes objects by the hundred thousand and all of them to stay: the modules of torch and transformers, what a
    large seal becomes. To look for garbage among them, again and again, takes a third of the time of making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def keep_what_is_there() -> None:
    """Never look again through what is in memory now. Only at the first call: later there are models among it."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # extension modules report what they then still hold as leaks
