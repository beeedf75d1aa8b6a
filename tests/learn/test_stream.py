"""The order of rows over epochs, replayed episodes and restarts; and the thread that reads ahead."""

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from opd_cache.learn.stream import Source, planned_rows, read_ahead
from opd_cache.learn.teachers import Teaching
from opd_cache.run import Run
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_parts


@pytest.fixture(scope="module")
def sources(finished_run: Run) -> list[Source]:
    """Both episodes of the run, the newer first."""
    found = []
    for episode in (1, 0):
        target = finished_run.dir.episode(episode)
        plan = load_rollout_plan(target)
        shards = rollout_shards(target, plan), (score_parts(target, plan, "main"),)
        sizes = plan.num_rollouts, plan.n_samples_per_prompt
        found.append(Source(episode, *shards, *sizes, Teaching(("main",)), target.prompts))
    return found


def ids(sources: list[Source], epochs: int, cursor: int = 0) -> list[str]:
    return [rollout.rollout_id for rollout, _ in planned_rows(sources, epochs, cursor)]


def test_every_row_comes_once_an_epoch(sources: list[Source]) -> None:
    one = ids(sources[:1], epochs=1)
    assert len(set(one)) == sources[0].num_rows
    assert ids(sources[:1], epochs=3) == one * 3


def test_replayed_episodes_are_mixed_in_by_whole_prompts(sources: list[Source]) -> None:
    order = ids(sources, epochs=1)
    assert set(Counter(order).values()) == {1}
    assert len(order) == sum(source.num_rows for source in sources)
    for start in range(0, len(order), 2):
        assert order[start].rsplit("/", 1)[0] == order[start + 1].rsplit("/", 1)[0]
    # Any four prompts in a row hold two of each episode.
    episodes = [row.split("/")[0] for row in order]
    for start in range(0, len(order) - 8, 8):
        assert sorted(episodes[start : start + 8 : 2]) == ["0", "0", "1", "1"]
    for source in sources:
        own = [row for row in order if row.startswith(f"{source.episode}/")]
        assert own == ids([source], epochs=1)


@pytest.mark.parametrize("count", [1, 2])
def test_any_cursor_goes_on_where_the_whole_order_would(sources: list[Source], count: int) -> None:
    whole = ids(sources[:count], epochs=2)
    for cursor in range(len(whole) + 1):
        assert ids(sources[:count], 2, cursor) == whole[cursor:]


def test_reading_ahead_works_while_the_caller_works_and_keeps_the_order() -> None:
    seen: list[tuple[int, str]] = []

    def items() -> Iterator[int]:
        for item in range(5):
            seen.append((item, threading.current_thread().name))
            yield item

    with read_ahead(items()) as ahead:
        assert next(ahead) == 0
        deadline = time.monotonic() + 5
        while len(seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert [item for item, _ in seen] == [0, 1]  # one ahead, not more
        assert list(ahead) == [1, 2, 3, 4]
    assert {name for _, name in seen} == {"read-ahead_0"}


def test_the_first_item_is_made_before_it_is_asked_for() -> None:
    made = threading.Event()

    def items() -> Iterator[int]:
        made.set()
        yield 1

    with read_ahead(items()) as ahead:
        assert made.wait(5)
        assert list(ahead) == [1]


def test_an_error_of_the_reader_reaches_the_caller_at_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    with read_ahead(items()) as ahead:
        assert next(ahead) == 1
        with pytest.raises(ValueError, match="damaged"):
            next(ahead)
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_a_caller_that_stops_early_leaves_no_thread() -> None:
    with read_ahead(iter(range(1000))) as ahead:
        assert next(ahead) == 0
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
