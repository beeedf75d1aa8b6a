"""The processes that learn together: who this one is, and the few things that they tell each other.

Started by `opd-cache learn` itself (learn.num_ranks), by torchrun or by srun; gloo on CPUs, NCCL beside it on GPUs.
"""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from opd_cache.errors import ConfigError, FirstRankFailedError, LostRanksError, OpdCacheError, TryAgainError

T = TypeVar("T")
TELLING_S = 5.0
LAUNCH = "OPD_CACHE_LAUNCH"  # any text that is the same for all ranks of one launch and no others


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. Every method but `device` is a collective: all ranks call it, in the same order."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on its machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device for a recipe's `device`: with several ranks on a machine, each takes the GPU of its number."""
        if self.world > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return f"cuda:{self.local_rank}"
        return name

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, on all. Where it raises, the others raise FirstRankFailedError."""
        if self.world == 1:
            return make()
        try:
            made: list[Any] = [make() if self.is_first else None, 0]
        except Exception as error:
            dist.broadcast_object_list([None, error.exit_status if isinstance(error, OpdCacheError) else 1])
            raise
        dist.broadcast_object_list(made)
        if made[1]:
            raise FirstRankFailedError(made[1])
        return made[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on the first rank; elsewhere an empty list."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.is_first else None
        dist.gather_object(value, values)
        return values or []

    def any(self, fact: bool) -> bool:
        """Whether it holds on any rank."""
        if self.world == 1:
            return fact
        flag = torch.tensor(int(fact))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)


ALONE = Ranks()


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Who torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or srun says that this process is; else alone. Raises ConfigError."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        # A batch script without srun has a SLURM_PROCID, but no step of several tasks.
        if names[0] in environment and names[1] in environment:
            try:
                rank, world, local = (int(environment.get(name, "0")) for name in names)
            except ValueError as error:
                raise ConfigError(f"{', '.join(names)} in the environment must be whole numbers: {error}.") from error
            if world > 1:
                return Ranks(rank, world, local)
    return ALONE


@contextlib.contextmanager
def joined_ranks(ranks: Ranks, timeout_s: float) -> Iterator[Ranks]:
    """Connect with the other ranks for as long as the block lasts. Raises LostRanksError when some of them are gone."""
    if ranks.world == 1:
        yield ranks
        return
    is_lost = False
    try:
        if not dist.is_initialized():
            _meet(ranks, timedelta(seconds=timeout_s), os.environ.get(LAUNCH, ""))
        yield ranks
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not is_lost:
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostRanksError(
            f"lost the other ranks ({reason}). The same command goes on from the last checkpoint."
        ) from error
    finally:
        # A group that lost a rank stays: taking it down waits for what was under way, as long as a collective may take.
        if dist.is_initialized() and not is_lost:
            dist.destroy_process_group()


def _meet(ranks: Ranks, timeout: timedelta, launch: str) -> None:
    """Raises TryAgainError where the meeting point is taken, or ranks of another launch are there."""
    _name_the_meeting_point()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, *_ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise TryAgainError(
            f"{place}, where the ranks meet, is in use, perhaps by another copy of this job. Run the same command again when that has ended, or set MASTER_PORT."
        ) from error
    _check_launch(store, ranks, launch, place)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout)


def _check_launch(store: dist.Store, ranks: Ranks, launch: str, place: str) -> None:
    """Refuse a meeting of two copies of one job: they have its number in common, and with that the meeting point."""
    keys = [f"launch/{rank}" for rank in range(ranks.world)]
    # The first to come has the rank's place, so that a second copy is turned away and does not disturb the first.
    kept = store.compare_set(keys[ranks.rank], "", f"launch {launch}")
    store.wait(keys)
    found = sorted({value.decode() for value in (kept, *store.multi_get(keys), f"launch {launch}".encode())})
    if len(found) > 1:
        _let_all_find_out(store, ranks)
        raise TryAgainError(
            f"rank {ranks.rank} met ranks of another launch at {place} ({LAUNCH} is {' and '.join(repr(one.removeprefix('launch ')) for one in found)}): two copies of one job are running. Run the same command again when one has ended."
        )


def _let_all_find_out(store: dist.Store, ranks: Ranks) -> None:
    """The store ends with the first rank: wait a little for those that have not read it yet."""
    store.add("told", 1)
    deadline = time.monotonic() + TELLING_S
    while ranks.is_first and store.add("told", 0) < ranks.world and time.monotonic() < deadline:
        time.sleep(0.05)


def _name_the_meeting_point() -> None:
    """Under srun: the step's first machine, and a port that follows from the job's number."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST")
        if nodes is None:
            raise ConfigError("several ranks, but no MASTER_ADDR in the environment. Start them with torchrun or srun.")
        os.environ["MASTER_ADDR"] = _address_of(_scontrol("show", "hostnames", nodes).split()[0])
    if "MASTER_PORT" not in os.environ:
        step = int(os.environ.get("SLURM_JOB_ID", "0")) * 31 + int(os.environ.get("SLURM_STEP_ID", "0"))
        os.environ["MASTER_PORT"] = str(20_000 + step % 20_000)


def _address_of(node: str) -> str:
    """The node's name where it can be looked up, else the address that Slurm knows it by."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        fields = _scontrol("-o", "show", "node", node).split()
        return next(field.removeprefix("NodeAddr=") for field in fields if field.startswith("NodeAddr="))
    return node


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
