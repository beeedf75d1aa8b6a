"""`opd-cache` commands in forked children of one process that has imported everything once.

usage: warm_server.py      one JSON job a line on stdin, one JSON answer a line on stdout

Jobs: {"arguments": [...], "folder": PATH, ...} forks a child that runs the command line, its output in PATH/stdout and
PATH/stderr; the answer gives its pid. {"wait": PID} answers with its exit status, {"halt": PID} when it has stopped itself
or ended. What a child can be given beside its arguments:
  "stop_at": [OPERATION, PART of the name, N]   it stops itself (SIGSTOP) right before the Nth such operation
  "do_at": [OPERATION, PART, N, ACTION, PATH]   it does ACTION to PATH right before that: "remove" a folder, or all else in it
  "limits": {"NOFILE": 64, ...}                 resource limits, from the command's own code on
  "user": 65534                                 as which user it runs
"""

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import traceback

import preloaded  # noqa: F401

from opd_cache import cli

HANGS_S = 240  # what takes so long says where it is, and ends with status 1


def at(operation: str, part: str, count: int, act) -> None:
    """Call `act` right before the Nth operation on a name that holds `part`."""
    left = count

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == operation and any(part in str(name) for name in arguments[:2]):
            left -= 1
            if left == 0:
                act()

    sys.addaudithook(hook)


def child(job: dict) -> None:
    """Run the command line and leave as an interpreter of its own would."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(os.path.join(job["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
    os.environ.update(job.get("environment", {}))
    os.chdir(job.get("cwd", "/"))
    if "user" in job:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    if "stop_at" in job:
        at(*job["stop_at"], lambda: os.kill(os.getpid(), signal.SIGSTOP))
    if "do_at" in job:
        operation, part, count, path = job["do_at"]
        at(operation, part, count, lambda: shutil.rmtree(path))
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    sys.argv = ["opd-cache", *job["arguments"]]
    status = 1
    try:
        for name, value in job.get("limits", {}).items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # an interpreter that ends ignores it, too
            sys.stderr.flush()
        os._exit(status)


def ended(status: int) -> dict:
    return {"status": None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)}


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = ended(os.waitpid(job["wait"], 0)[1])
        elif "halt" in job:
            answer = ended(os.waitpid(job["halt"], os.WUNTRACED)[1])
        else:
            pid = os.fork()
            if pid == 0:
                child(job)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


main()
