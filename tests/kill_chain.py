"""Run or replay in forked children that SIGKILL themselves at a file operation in the run directory, until one survives.

usage: kill_chain.py SEED RUN_DIR RECIPE...             prints one line: {"kills": N, "operations": [...]}
       kill_chain.py SEED RUN_DIR --replay RUN [key=value...]

The parent imports everything once; a child starts where the killed one left off. The operation at which a child dies
(open, link, rename, mkdir, remove, ... counted from its start) is drawn anew for each.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401

torch.set_num_threads(1)  # a forked child must find no thread pool that it cannot use

from opd_cache.evals import stage as _evals  # noqa: E402, F401
from opd_cache.learn import stage as _learn  # noqa: E402, F401
from opd_cache.learn.engines import torch as _torch_engine  # noqa: E402, F401
from opd_cache.pipeline import InlineStages, run_episodes  # noqa: E402
from opd_cache.recipes import load_recipe  # noqa: E402
from opd_cache.replay import replay_run  # noqa: E402
from opd_cache.run import open_run  # noqa: E402

OPERATIONS = {"open", "os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
MOST_OPERATIONS = 250  # more than opening a run and publishing a checkpoint take, so that every child can get further


def die_at(operation: int, run_dir: str, pipe: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        # The names that an operation has: a link and a renaming have two.
        if event in OPERATIONS and any(run_dir in str(name) for name in arguments[:2]):
            count += 1
            if count == operation:
                names = " ".join(str(name).split(run_dir)[-1] for name in arguments[:2])
                os.write(pipe, f"{event} {names}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def work(run_dir: str, arguments: list[str]) -> None:
    if arguments[0] == "--replay":
        replay_run(Path(arguments[1]), Path(run_dir), None, arguments[2:])
    else:
        run = open_run(load_recipe([*arguments, f"run_dir={run_dir}"]))
        run_episodes(run, InlineStages(run))


def main() -> None:
    seed, run_dir, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rng = random.Random(seed)
    deaths = []
    while True:
        operation = rng.randint(1, MOST_OPERATIONS)
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            die_at(operation, run_dir, sender)
            work(run_dir, arguments)
            os._exit(0)
        os.close(sender)
        _, status = os.waitpid(child, 0)
        said = os.read(receiver, 1000).decode()
        os.close(receiver)
        if os.WIFEXITED(status):
            print(json.dumps({"kills": len(deaths), "operations": deaths}))
            sys.exit(os.WEXITSTATUS(status))
        deaths.append(said)
        if len(deaths) > 100:
            sys.exit("no progress after 100 kills")


main()
