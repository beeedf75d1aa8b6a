"""A process of the store's tests, warm with everything imported, that forks one child a job.

usage: worker.py FOLDER      one JSON job a line on stdin, one JSON answer a line on stdout

Jobs: {"work": NAME, "folder": PATH} forks a child that stops itself (the answer gives its pid), works once it is
continued, and ends with the error's exit status; {"wait": PID} answers with its status and what it printed.
"""

import functools
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import store_helpers as made

from opd_cache.errors import OpdCacheError
from opd_cache.store.publish import publish_file, publish_folder

NUM_SHARDS = 2


def publish_shard(folder: Path) -> bool:
    return made.publish_rollouts(made.rollout_set(folder), 0, small_rollouts(), rows_per_group=16)


def publish_two_files(folder: Path) -> bool:
    def fill(temporary: Path) -> None:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "numbers").write_bytes(bytes(range(256)) * 50)
        (temporary / "manifest").write_text("numbers")

    return publish_folder(folder / "policy", fill)


def seal_two_shards(folder: Path) -> bool:
    shards = made.rollout_set(folder, NUM_SHARDS)
    for shard in shards.missing():
        made.publish_rollouts(shards, shard, small_rollouts()[shard::NUM_SHARDS])
    return shards.seal()


def seal_only(folder: Path) -> bool:
    return made.rollout_set(folder, NUM_SHARDS).seal()


def publish_own_file(folder: Path) -> bool:
    """Every process writes other bytes, so that a replaced file would show."""
    line = f"{os.getpid()}\n".encode()

    def write(file: BinaryIO) -> None:
        for _ in range(20_000):
            file.write(line)

    def check(path: Path) -> None:
        assert path.read_bytes() == path.read_bytes()[: len(line)] * 20_000

    return publish_file(folder / "file", write, check)


def publish_own_folder(folder: Path) -> bool:
    def fill(temporary: Path) -> None:
        for name in "ab":
            (temporary / name).write_text(str(os.getpid()))

    return publish_folder(folder / "folder", fill)


def publish_own_shard(folder: Path) -> bool:
    return made.publish_rollouts(made.rollout_set(folder), 0, made.make_rollouts(20, seed=os.getpid()))


@functools.cache
def small_rollouts() -> list:
    return made.make_rollouts(40, seed=5)


WORK = {
    work.__name__: work
    for work in (
        publish_shard, publish_two_files, seal_two_shards, seal_only,
        publish_own_file, publish_own_folder, publish_own_shard,
    )
}  # fmt: skip


def child(job: dict, output: int) -> None:
    """Do one job and leave: 0 with true or false, or the exit status of the error with its text."""
    if "max_file_bytes" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"],) * 2)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        answer, status = json.dumps(WORK[job["work"]](Path(job["folder"]))), 0
    except OpdCacheError as error:
        answer, status = str(error), error.exit_status
    except BaseException as error:
        answer, status = repr(error), 1
    os.write(output, answer.encode())
    os._exit(status)


def main() -> None:
    warm = Path(sys.argv[1])
    for work in (publish_shard, publish_two_files, seal_two_shards):
        work(warm)
    outputs: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            reader = outputs.pop(job["wait"])
            answer = {"status": os.waitstatus_to_exitcode(status), "said": os.read(reader, 65_536).decode()}
            os.close(reader)
        else:
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                child(job, writer)
            os.close(writer)
            os.waitpid(pid, os.WUNTRACED)
            outputs[pid] = reader
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


main()
