"""`opd-cache` as a process of its own, which ends at once when it is done: Python would first take apart all that torch and
transformers are made of, for more than a second."""

import atexit
import os
import sys
from contextlib import suppress


def command() -> None:
    """What the script `opd-cache` and `python -m opd_cache` run."""
    pid, status = os.getpid(), 1  # 1: of an exception that nobody catches

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # nobody reads it, or it was never there
                stream.flush()
        if os.getpid() == pid:
            os._exit(status)

    # The first that is registered runs last: every other module has put away what it has by then.
    atexit.register(end)
    from opd_cache.cli import main

    try:
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


if __name__ == "__main__":
    command()
