"""Samplers and a loss that get stuck, each in its way: `rollout.sampler=stuck:InC`, `learn.loss.name=stuck:LOSS`."""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from random_sampler import RandomSampler

from opd_cache.config import LossConfig, ModelConfig
from opd_cache.learn.losses import Loss, TokenLogprobs, TokenLoss
from opd_cache.rollout.samplers.hf import HFSampler
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.store.plans import SamplingPlan

LONG_S = 60


def say_that_it_begins() -> None:
    """For the test that waits for it."""
    Path(os.environ["BEGUN"]).touch()


class LoadsForever(HFSampler):
    """Loads a real model over and over."""

    def load_policy(self, config: ModelConfig) -> None:
        super().load_policy(config)
        say_that_it_begins()
        while True:
            self.model = None
            super().load_policy(config)


class Stuck(RandomSampler):
    """Samples one shard, then gets stuck in the next."""

    shards = 0

    def sample(self, requests: Sequence[SampleRequest], plan: SamplingPlan) -> Iterator[Sample]:
        if self.shards:
            say_that_it_begins()
            self.get_stuck()
        self.shards += 1
        yield from super().sample(requests, plan)

    def get_stuck(self) -> None:
        raise NotImplementedError


class InC(Stuck):
    def get_stuck(self) -> None:
        ctypes.CDLL(None).sleep(LONG_S)


class InARead(Stuck):
    """Of a pipe that nobody ever writes to."""

    def get_stuck(self) -> None:
        os.read(os.pipe()[0], 1)


class Swallowing(Stuck):
    """What stops it is taken for one more problem to be retried."""

    def get_stuck(self) -> None:
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(LONG_S)


class InADestructor(Stuck):
    """Where Python prints what is raised, and goes on."""

    def get_stuck(self) -> None:
        while True:
            SlowToGo()


class SlowToGo:
    def __del__(self) -> None:
        time.sleep(LONG_S)


def _stuck_loss(tokens: TokenLogprobs, options: LossConfig) -> TokenLoss:
    say_that_it_begins()
    time.sleep(LONG_S)
    return TokenLoss(tokens.student_logprobs_N)


LOSS = Loss(_stuck_loss)
