"""A process with everything imported that forks one child a command; faulty_io.so, preloaded, interferes with a child.

usage: fault_server.py [COMMAND...]      one JSON job a line on stdin, one JSON answer a line on stdout

Jobs: {"command": ["rollout", ...], "folder": PATH, "fault": [call, number, action, errno] or null, "kill_after_s": S or
null} runs `opd-cache COMMAND`, counts its system calls on the folder, and kills its process group after so long. One
command beside opd-cache's own: `open RECIPE`, which opens a run. The arguments are a command that is run first, here.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback

import click
import preloaded  # noqa: F401
from fault import CALLS

from opd_cache.cli import cli, main
from opd_cache.commands.running import load_recipe_arguments
from opd_cache.run import open_run


@cli.command("open")
@click.argument("recipe", nargs=-1)
def open_command(recipe: tuple[str, ...]) -> None:
    """Open a run, making it on first use."""
    open_run(load_recipe_arguments(recipe))


def run_command(command: list[str]) -> int:
    sys.argv = ["opd-cache", *command]
    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(shim: ctypes.CDLL, job: dict) -> dict:
    shim.faulty_prepare()
    said = os.memfd_create("said")
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        call, number, action, errno = job["fault"] or (-1, 0, 0, 0)
        shim.faulty_arm(job["folder"].encode(), call, ctypes.c_long(number), action, errno)
        status = run_command(job["command"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if job["kill_after_s"] is not None:
        time.sleep(job["kill_after_s"])
        with contextlib.suppress(ProcessLookupError):  # it has not yet made its group, or is over
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    text = os.pread(said, 1 << 20, 0).decode(errors="replace")
    os.close(said)
    counts = {name: shim.faulty_count(call) for call, name in enumerate(CALLS)}
    place = shim.faulty_path().decode(errors="replace")
    return {"status": os.waitstatus_to_exitcode(status), "said": text, "counts": counts, "place": place}


def serve() -> None:
    shim = ctypes.CDLL(None)
    shim.faulty_count.restype = ctypes.c_long
    shim.faulty_path.restype = ctypes.c_char_p
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the commands print is no answer
    if sys.argv[1:] and (status := run_command(sys.argv[1:])):
        sys.exit(status)
    for line in jobs:
        print(json.dumps(answer(shim, json.loads(line))), file=answers, flush=True)
    os._exit(0)  # else it takes its libraries down for seconds


if __name__ == "__main__":
    serve()
