"""Whole files in the wrong place: swapped, of another run, older, of a future version, doubled, gone.

verify names them and what hangs on them, and nothing else; `repair` and the run's own command mend the run.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import GONE, MISPLACED, link_copy, put
from fault_log import DataLostError, FaultLog, SilentError, is_full
from helpers import edit_json, run_command
from oracle import assert_complete, assert_said, findings, published
from trials import every_fault
from warm import WarmCommands

from opd_cache.config import Recipe
from opd_cache.errors import OpdCacheError
from opd_cache.learn.inputs import open_source
from opd_cache.learn.losses import resolve_loss
from opd_cache.pipeline import InlineStages, run_episodes
from opd_cache.run import open_run
from opd_cache.run_dir import SCHEMA_VERSION
from opd_cache.store.shards import FOOTER_KEY, footer_of, write_table

NO_EVAL = "eval.path=null"
SHARD_0, SHARD_1 = (f"shard-0000{number}-of-00003.parquet" for number in range(2))
SCORES = "scores/teacher=main"


@pytest.fixture(scope="module")
def others(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of the same recipe by another seed, and one of the same seed whose first policy learned otherwise."""
    folder = tmp_path_factory.mktemp("others")
    settings = {"foreign": "seed=4", "older": "learn.learning_rate=2e-3"}
    for name, setting in settings.items():
        run = open_run(make_recipe(folder / name, NO_EVAL, setting))
        run_episodes(run, InlineStages(run))
    return {name: folder / name for name in settings}


class Misplaced(NamedTuple):
    """What is done to a run, and how the paths begin that verify is to name."""

    what: str
    do: Callable[[Path, dict[str, Path]], None]
    named: tuple[str, ...]


def swap(left: str, right: str) -> Misplaced:
    def do(run: Path, others: dict[str, Path]) -> None:
        aside = run / "aside"
        (run / left).rename(aside)
        (run / right).rename(run / left)
        aside.rename(run / right)

    return Misplaced(f"{left} swapped with {right}", do, (left, right))


def from_other(kind: str, *names: str, named: tuple[str, ...] = ()) -> Misplaced:
    def do(run: Path, others: dict[str, Path]) -> None:
        for name in names:
            if (run / name).is_dir():
                shutil.rmtree(run / name)
                shutil.copytree(others[kind] / name, run / name)
            else:
                put(run / name, (others[kind] / name).read_bytes())

    return Misplaced(f"{kind}: {', '.join(names)}", do, named or names)


def copied(source: str, target: str) -> Misplaced:
    return Misplaced(
        f"{source} doubled as {target}",
        lambda run, others: put(run / target, (run / source).read_bytes()),
        (target,),
    )


def newer(name: str) -> Misplaced:
    def do(run: Path, others: dict[str, Path]) -> None:
        data = (run / name).read_bytes()
        put(run / name, data)  # of its own
        if name.endswith(".json"):
            edit_json(run / name, schema_version=SCHEMA_VERSION + 1)
        else:
            of_version(run / name, SCHEMA_VERSION + 1)

    return Misplaced(f"of a newer version: {name}", do, (name,))


def of_version(path: Path, version: int) -> None:
    """The same shard as another version of opd-cache might have written it."""
    with pq.ParquetFile(path) as file:
        table, footer = file.read(), footer_of(file, path)
    schema = table.schema.remove_metadata()
    path.unlink()
    with open(path, "xb") as target:
        write_table(target, schema, table.to_batches(), {**footer, "schema_version": version})
    assert FOOTER_KEY in pq.read_metadata(path).metadata


def another_programs(name: str) -> Misplaced:
    def do(run: Path, others: dict[str, Path]) -> None:
        put(run / name, None)
        pq.write_table(pa.table({"rollout_id": ["1/0/0"], "a": [1]}), run / name)

    return Misplaced(f"another program's Parquet file: {name}", do, (name,))


def gone(name: str) -> Misplaced:
    def do(run: Path, others: dict[str, Path]) -> None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return Misplaced(f"deleted: {name}", do, (name,))


EPISODES = ("episode=0", "episode=1")
MISPLACEMENTS = (
    swap(f"episode=1/rollouts/{SHARD_0}", f"episode=1/rollouts/{SHARD_1}"),
    swap(f"episode=1/{SCORES}/{SHARD_0}", f"episode=1/{SCORES}/{SHARD_1}"),
    swap(f"episode=0/rollouts/{SHARD_0}", f"episode=1/rollouts/{SHARD_0}"),
    swap("episode=0/rollouts/_SEALED.json", "episode=1/rollouts/_SEALED.json"),
    swap(f"episode=0/{SCORES}/_SEALED.json", f"episode=1/{SCORES}/_SEALED.json"),
    swap("episode=0/plan.json", "episode=1/plan.json"),
    swap(f"episode=0/{SCORES}/plan.json", f"episode=1/{SCORES}/plan.json"),
    swap(f"episode=0/{SCORES}", f"episode=1/{SCORES}"),
    swap("episode=0/learn/plan.json", "episode=1/learn/plan.json"),
    swap("episode=0/policy", "episode=1/policy"),
    swap("episode=0/policy/model.safetensors", "episode=1/policy/model.safetensors"),
    *(
        from_other(kind, name)
        for kind in (("foreign", "older") if is_full() else ("foreign",))
        for name in (f"episode=1/rollouts/{SHARD_1}", f"episode=1/{SCORES}/{SHARD_1}", "episode=1/rollouts/_SEALED.json",
                     "episode=1/plan.json", f"episode=1/{SCORES}/plan.json", "episode=0/learn/plan.json", "episode=0/policy",
                     "episode=1/policy/model.safetensors", f"episode=1/{SCORES}/_SEALED.json")
    ),
    from_other("older", f"episode=1/rollouts/{SHARD_1}"),
    from_other("older", "episode=0/policy"),
    from_other("older", "episode=0/learn/plan.json"),
    from_other("foreign", "episode=1/rollouts"),
    from_other("older", "episode=1/rollouts"),
    from_other("older", "episode=1/plan.json", "episode=1/rollouts", named=("episode=1/plan.json", "episode=1/learn/plan.json")),
    copied(f"episode=1/rollouts/{SHARD_0}", f"episode=1/rollouts/{SHARD_1}"),
    copied(f"episode=1/{SCORES}/{SHARD_0}", f"episode=1/{SCORES}/{SHARD_1}"),
    copied(f"episode=1/rollouts/{SHARD_0}", f"episode=1/{SCORES}/{SHARD_0}"),
    copied(f"episode=1/rollouts/{SHARD_0}", "episode=1/rollouts/shard-00003-of-00003.parquet"),
    copied(f"episode=1/{SCORES}/{SHARD_0}", f"episode=1/{SCORES}/shard-00000-of-00004.parquet"),
    copied("episode=1/policy/model.safetensors", "episode=1/policy/model-00002.safetensors"),
    *map(newer, (
        "episode=1/plan.json", "episode=1/rollouts/_SEALED.json", f"episode=1/rollouts/{SHARD_1}", f"episode=1/{SCORES}/plan.json",
        f"episode=1/{SCORES}/_SEALED.json", f"episode=1/{SCORES}/{SHARD_1}", "episode=1/learn/plan.json",
        "episode=1/policy/_COMPLETE.json",
    )),
    another_programs(f"episode=1/rollouts/{SHARD_1}"),
    another_programs(f"episode=1/{SCORES}/{SHARD_1}"),
    *map(gone, (
        "episode=1/plan.json", "episode=1/rollouts/_SEALED.json", f"episode=1/rollouts/{SHARD_1}", f"episode=1/{SCORES}/plan.json",
        f"episode=1/{SCORES}/_SEALED.json", f"episode=1/{SCORES}/{SHARD_1}", "episode=1/learn/plan.json",
        "episode=1/policy/_COMPLETE.json", "episode=1/policy/model.safetensors", "episode=1/policy/trainer",
    )),
)  # fmt: skip


@pytest.mark.parametrize("misplaced", MISPLACEMENTS, ids=lambda misplaced: misplaced.what)
def test_what_is_in_the_wrong_place_is_named_and_mended(
    faults: FaultLog, commands: WarmCommands, plain_run: Path, others: dict[str, Path], recipe: list[str],
    tmp_path: Path, misplaced: Misplaced,
) -> None:  # fmt: skip
    run = link_copy(plain_run, tmp_path / "run")
    with faults.trial(GONE if misplaced.what.startswith("deleted") else MISPLACED, misplaced.what):
        misplaced.do(run, others)
        before = published(run)
        assert_named(run, misplaced.named)
        assert_said(commands.run("repair", run), 0)
        assert_not_lost(run, before)
        again = commands.run("run", *recipe, NO_EVAL)
        assert again.status == 0, again
        assert_complete(run, plain_run)


def assert_named(run: Path, named: tuple[str, ...]) -> None:
    found = findings(run)
    assert found is not None
    if unnoticed := [name for name in named if not any(name in text for text in found)]:
        raise SilentError(f"verify does not name {unnoticed}: {found}")
    assert [text for text in found if not any(name in text for name in named)] == []


def assert_not_lost(run: Path, before: dict[str, bytes]) -> None:
    """repair has moved files, and changed or deleted none."""
    files = (path for path in run.rglob("*") if path.is_file())
    kept = {path.read_bytes() for path in files}
    if lost := [name for name, data in before.items() if data not in kept]:
        raise DataLostError(f"repair has deleted {lost}")


@pytest.fixture(scope="module")
def two_teachers(plain_run: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run whose episode 1 is scored by a second teacher and not learned yet, and its recipe."""
    run = link_copy(plain_run, tmp_path_factory.mktemp("teachers") / "run")
    for name in ("learn", "policy"):
        shutil.rmtree(run / "episode=1" / name)
    second = f"teachers.second={{model: {task}/student, dtype: float32, device: cpu}}"
    recipe = [str(task / "recipe.yaml"), NO_EVAL, second, "learn.teacher=main"]
    ended = run_command("score", *recipe, f"run_dir={run}", "--episode", "1", "--teacher", "second")
    assert ended.returncode == 0, ended.stderr
    return run, recipe


@pytest.mark.parametrize(
    "part", ["", f"/{SHARD_1}", "/_SEALED.json", "/plan.json"], ids=["folder", "shard", "seal", "plan"]
)
def test_scores_of_two_teachers_that_change_places_are_refused(
    faults: FaultLog, commands: WarmCommands, two_teachers: tuple[Path, list[str]], plain_run: Path, tmp_path: Path, part: str
) -> None:  # fmt: skip
    made, settings = two_teachers
    run = link_copy(made, tmp_path / "run")
    recipe = [*settings, f"run_dir={run}"]
    one, other = (f"episode=1/scores/teacher={name}{part}" for name in ("main", "second"))
    with faults.trial(MISPLACED, f"scores of two teachers swapped: {part or 'the folders'}"):
        swap(one, other).do(run, {})
        assert_named(run, (one, other))
        assert_said(commands.run("learn", *recipe, "--episode", "1"), 2)
        assert not (run / "episode=1/policy").exists()
        assert_said(commands.run("repair", run), 0)
        assert commands.run("run", *recipe).status == 0
        shutil.rmtree(run / "episode=1/scores/teacher=second", ignore_errors=True)
        assert_complete(run, plain_run)


def test_no_misplaced_cache_is_learned_from(
    faults: FaultLog, plain_run: Path, others: dict[str, Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The learner reads every row of the episode before anything of it could count: it refuses, or has the right rows."""
    expected = rows_to_learn(plain_run, make_recipe)
    with every_fault(faults, MISPLACED) as trial:
        caches = (one for one in MISPLACEMENTS if "rollouts" in one.what or "scores" in one.what)
        for number, misplaced in enumerate(caches):
            run = link_copy(plain_run, tmp_path / str(number))
            misplaced.do(run, others)
            with trial(f"learn: {misplaced.what}"):
                found = expected
                with contextlib.suppress(OpdCacheError):
                    found = rows_to_learn(run, make_recipe)
                if found != expected:
                    raise SilentError("other rows are learned from")


def rows_to_learn(path: Path, make_recipe: Callable[..., Recipe]) -> list[bytes]:
    from opd_cache.learn.stream import planned_rows

    run = open_run(make_recipe(path, NO_EVAL))
    source, _ = open_source(run.recipe, run.dir.episode(1), 1, resolve_loss(run.recipe.learn.loss))
    return [
        rollout.response_ids.tobytes() + score.teacher_logprobs.tobytes() + score.topk_logprobs.tobytes()
        for rollout, score in planned_rows([source], epochs=1, cursor=0)
    ]
