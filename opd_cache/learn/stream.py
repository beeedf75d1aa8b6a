"""The joined rows of an episode's learning, in order, read ahead by one thread: this episode's, and older ones' replayed."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from opd_cache.learn.dropped import drop_condition, marked_rows
from opd_cache.learn.teachers import Teaching
from opd_cache.store.join import Joined, join_teachers, shards_from
from opd_cache.store.shards import ShardSet

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """The sealed rollouts of one episode, their scores, and which of them are learned from."""

    episode: int
    rollouts: ShardSet
    scores: tuple[tuple[ShardSet, ...], ...]  # the parts of each teacher's, in the order of teaching.names
    num_rows: int
    rows_per_prompt: int
    teaching: Teaching
    prompts: Path  # which the rollouts' prompt_index means
    drop_where: str | None = None


def planned_rows(sources: Sequence[Source], epochs: int, cursor: int) -> Iterator[Joined]:
    """Every row of every source once an epoch, from row `cursor` of all epochs on. Memory: a row group of each source."""
    per_epoch = sum(source.num_rows for source in sources)
    for epoch in range(cursor // max(per_epoch, 1), epochs):
        yield from _one_epoch(sources, cursor % per_epoch if epoch == cursor // per_epoch else 0)


def _one_epoch(sources: Sequence[Source], start: int) -> Iterator[Joined]:
    taken, order = [0] * len(sources), merged(sources)
    skip = start
    for index, count in order:
        if skip < count:
            break
        skip -= count
        taken[index] += count
    else:
        return
    streams = [_source_rows(source, rows) for source, rows in zip(sources, taken, strict=True)]
    for row in range(count):
        joined = next(streams[index])
        if row >= skip:
            yield joined
    for index, count in order:
        for _ in range(count):
            yield next(streams[index])
    for stream in streams:
        next(stream, None)  # a stream that ends checks that its files end, too


def _source_rows(source: Source, start: int) -> Iterator[Joined]:
    """Every rollout of the source from row `start` on, with the one score that it is learned from."""
    rollouts, teaching = source.rollouts, source.teaching
    condition = None if source.drop_where is None else drop_condition(source.drop_where, rollouts, source.prompts)
    for shard, first in shards_from(rollouts, start):
        rows = join_teachers(rollouts, source.scores, shard, first)
        if condition is None:
            yield from ((rollout, teaching.combine(rollout, scores)) for rollout, scores in rows)
        else:
            yield from marked_rows(rows, teaching, condition, rollouts, shard, source.prompts)


def merged(sources: Sequence[Source]) -> Iterator[tuple[int, int]]:
    """(source, rows): whole prompts, from the source that is least far, so that every batch holds its share of each."""
    if len(sources) == 1:
        yield 0, sources[0].num_rows
        return
    taken = [0] * len(sources)
    for _ in range(sum(-(-source.num_rows // source.rows_per_prompt) for source in sources)):
        index = min(
            (index for index, source in enumerate(sources) if taken[index] < source.num_rows),
            key=lambda index: (taken[index] / sources[index].num_rows, index),
        )
        count = min(sources[index].rows_per_prompt, sources[index].num_rows - taken[index])
        taken[index] += count
        yield index, count


@contextlib.contextmanager
def read_ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """The items, each made by one thread while the caller works on the one before; the first from now on."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        first = reader.submit(next, items, None)

        def ahead() -> Iterator[T]:
            coming = first
            while (item := coming.result()) is not None:
                coming = reader.submit(next, items, None)
                yield item

        yield ahead()
