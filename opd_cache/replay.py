"""Training again from a run's cache alone, into a run directory of its own: no sampler and no teacher is needed.

The rollouts and scores are linked, the learn stage does the rest. What came of it is compared in compare.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

from opd_cache.compare import compare_episodes
from opd_cache.config import Recipe
from opd_cache.config.values import shown
from opd_cache.errors import ConfigError, MismatchError, MissingInputError
from opd_cache.launch.ranks import run_ranks
from opd_cache.learn.plan import NOT_IN_THE_PLAN, plan_learning
from opd_cache.pipeline import InlineStages
from opd_cache.recipes import recipe_yaml, stored_recipe
from opd_cache.run import IDENTITY, Run, check_same_run, open_run
from opd_cache.run_dir import COMPLETE, PLAN, REMOVED, SEAL, RolloutSet, RunDir
from opd_cache.stall import stall_watch
from opd_cache.status import asked_teachers, read_identity
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, rollout_shards, score_parts
from opd_cache.store.publish import (
    TEMPORARY_SUFFIX,
    publish_file,
    publish_folder,
    publish_json,
    publish_link,
    read_json,
)

EPISODES = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
# Settings that may differ from one start of a replay to the next: they change memory, speed, safety and warnings.
FREE_KEYS = ("torch_threads", "health", *(f"learn.{name}" for name in NOT_IN_THE_PLAN))
CHOOSES_TEACHERS = ("learn.teacher", "learn.routes")  # as overrides begin


@dataclass(frozen=True)
class Replay:
    """What is replayed, checked and not yet begun."""

    source: RunDir
    identity: dict[str, Any]  # the run.json of the source
    recipe: Recipe  # of the new run
    episodes: list[int]
    overrides: dict[str, Any]  # key → value
    is_new: bool

    @property
    def into(self) -> RunDir:
        return RunDir(Path(self.recipe.run_dir))

    def cached_episodes(self) -> list[int]:
        """Those whose rollouts and scores are needed: learn.replay_episodes reaches behind the first one."""
        first = max(0, self.episodes[0] - self.recipe.learn.replay_episodes)
        return list(range(first, self.episodes[-1] + 1))


def replay_run(source: Path, into: Path, episodes: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Learn a run's episodes (`"0-4"`; None: all that are scored) again with `key=value` overrides, into `into`.

    What is there already is kept, so that the same call goes on after any interruption. Returns the comparison that
    `opd-cache replay --json` prints. Raises ConfigError, MissingInputError or MismatchError before anything is written
    where the replay cannot be; whatever the learn stage raises afterwards.
    """
    replay = plan_replay(RunDir(source), into, episodes, overrides)
    _link_inputs(replay)
    _learn(open_run(replay.recipe), replay.episodes, overrides)
    return {
        "run": str(source),
        "run_id": replay.identity["run_id"],
        "into": str(into),
        "overrides": replay.overrides,
        "episodes": compare_episodes(replay.source, replay.into, replay.episodes),
    }


def plan_replay(source: RunDir, into: Path, episodes: str | None, overrides: Sequence[str]) -> Replay:
    """What a replay will do. Writes nothing; raises as `replay_run` says."""
    identity = read_identity(source)
    _check_place(source.path, into)
    recipe = _recipe(source, identity, into, overrides)
    keys = dict.fromkeys(override.partition("=")[0] for override in overrides)
    values = {key: reduce(lambda section, name: section[name], key.split("."), recipe.to_dict()) for key in keys}
    begun = read_json(RunDir(into).replay_json) if RunDir(into).replay_json.exists() else None
    if episodes is not None:
        numbers = parse_episodes(episodes)
    else:
        numbers = begun["episodes"] if begun else _scored_episodes(source, recipe.learning_teachers())
    replay = Replay(source, identity, recipe, numbers, values, is_new=begun is None)
    if begun is not None:
        _check_begun(replay, begun)
    check_same_run(recipe, identity, source.run_json)
    plans = {episode: _check_cache(replay, episode) for episode in replay.cached_episodes()}
    if numbers[0] > 0 and not (source.policy_after(numbers[0] - 1) / COMPLETE).exists():
        raise MissingInputError(
            f"{source.policy_after(numbers[0] - 1)}: not there, and episode {numbers[0]} starts from it. Replay from episode 0 on, or run: opd-cache learn RECIPE --episode {numbers[0] - 1}"
        )
    if numbers[0] > 0 and begun is None and (source.policy_after(numbers[0] - 1) / REMOVED).exists():
        raise MissingInputError(
            f"{source.policy_after(numbers[0] - 1)}: removed by the retention rule (learn.keep_policies), and episode {numbers[0]} starts from it. Replay from episode 0 on, or behind a policy that was kept."
        )
    if replay.is_new:
        _check_settings(replay, plans)
    return replay


def _check_place(source: Path, into: Path) -> None:
    ours, theirs = into.resolve(), source.resolve()
    if ours == theirs:
        raise ConfigError(f"--into {into}: is the run itself. Choose another folder, such as {source}-replay.")
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        place = "inside the run" if ours.is_relative_to(theirs) else "around the run"
        raise ConfigError(f"--into {into}: lies {place}. Choose another folder, such as {source}-replay.")
    run = RunDir(into)
    if run.replay_json.exists() or not into.exists():
        return
    if run.run_json.exists():
        raise ConfigError(
            f"--into {into}: is a run of its own, and no replay. Choose another folder, such as {source}-replay."
        )
    if any(not entry.name.endswith(TEMPORARY_SUFFIX) for entry in into.iterdir()):
        raise ConfigError(
            f"--into {into}: holds other files. Choose a new or an empty folder, such as {source}-replay."
        )


def _recipe(source: RunDir, identity: dict[str, Any], into: Path, overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        key, is_set, _ = override.partition("=")
        if is_set and not key.startswith(("learn.", "health.")) and key != "torch_threads":
            raise ConfigError(
                f"{key}: a replay changes only learn.*, health.* and torch_threads; all else is as in {source.path}. ({override})"
            )
    content = {**identity["recipe"], "run_dir": str(into)}
    if any(override.startswith(CHOOSES_TEACHERS) for override in overrides):
        content["teachers"] = {**content["teachers"], **_added_teachers(source, content["teachers"])}
    return stored_recipe(content, overrides, str(source.run_json))


def _added_teachers(source: RunDir, named: dict[str, Any]) -> dict[str, Any]:
    """Teachers that scored after the run was made. run.json does not say where their models lie; learning needs none."""
    added = {}
    for target in map(source.episode, source.episodes()):
        for name in asked_teachers(target):
            if name not in named:
                fingerprint = read_json(target.scores(name) / PLAN)["teacher_fingerprint"]
                added[name] = {"model": f"fingerprint:{fingerprint}"}
    return added


def parse_episodes(text: str) -> list[int]:
    match = EPISODES.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if last < first:
        raise ConfigError(f"--episodes {text!r}: expected one number, or an unbroken range such as 0-4.")
    return list(range(first, last + 1))


def _scored_episodes(source: RunDir, teachers: Sequence[str]) -> list[int]:
    numbers = [
        number
        for number in source.episodes()
        if all((source.episode(number).scores(name) / SEAL).exists() for name in teachers)
    ]
    if not numbers:
        raise MissingInputError(
            f"{source.path}: no episode has sealed scores of the teacher {' and '.join(map(repr, teachers))}. Run: opd-cache score RECIPE --episode 0"
        )
    unbroken = [number for place, number in enumerate(numbers) if number == numbers[0] + place]
    if unbroken != numbers:
        raise ConfigError(
            f"{source.path}: of the episodes {', '.join(map(str, numbers))} with scores, some between are missing. Choose a range: --episodes {unbroken[0]}-{unbroken[-1]}"
        )
    return numbers


def _check_begun(replay: Replay, begun: dict[str, Any]) -> None:
    """Refuse to go on with another replay than the one that was begun there."""
    recorded = {"run_id": begun["run_id"], "episodes": begun["episodes"], **_bound(begun["overrides"])}
    wanted = {
        "run_id": replay.identity["run_id"],
        "episodes": replay.episodes,
        **_bound(replay.overrides),
    }
    for key in {**recorded, **wanted}:
        was, now = (shown(values[key]) if key in values else "as in the run" for values in (recorded, wanted))
        if was != now:
            raise MismatchError(
                f"{replay.into.replay_json}: the replay was made with {key} = {was}, now {now}. Set it back, or choose another folder with --into."
            )


def _bound(overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in overrides.items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    }


def _check_cache(replay: Replay, episode: int) -> RolloutPlan:
    """The plan of an episode whose rollouts and scores are sealed, whole and of each other."""
    from opd_cache.learn.inputs import check_asked_for, open_scores

    target = replay.source.episode(episode)
    check_asked_for(target, replay.recipe.learning_teachers())
    plan = load_rollout_plan(target)
    seal = rollout_shards(target, plan).open_seal()
    for name in _teachers(target, plan, replay.recipe.learning_teachers()):
        open_scores(target, plan, seal, name)
    return plan


def _teachers(target: RolloutSet, plan: RolloutPlan, needed: Sequence[str]) -> list[str]:
    """The teachers that are learned from, and all others whose scores are sealed."""
    others = (name for name in asked_teachers(target) if name not in needed)
    return [*needed, *(name for name in others if all(part.is_sealed() for part in score_parts(target, plan, name)))]


def _check_settings(replay: Replay, plans: dict[int, RolloutPlan]) -> None:
    """Refuse settings that the cache cannot serve. Raises ConfigError, MismatchError."""
    from opd_cache.learn.inputs import open_source
    from opd_cache.learn.losses import resolve_loss

    recipe = replay.recipe
    loss = resolve_loss(recipe.learn.loss)
    for episode, plan in plans.items():
        open_source(recipe, replay.source.episode(episode), episode, loss)
        plan_learning(recipe, episode, plan.num_rollouts, [plan.n_samples_per_prompt], loss.needs_reward, 0)


def _link_inputs(replay: Replay) -> None:
    """Give the new run all that learning reads. replay.json comes first: it says what the folder is."""
    source, into, identity = replay.source, replay.into, replay.identity
    if replay.is_new:
        content = {"run_id": identity["run_id"], "episodes": replay.episodes, "overrides": replay.overrides}
        remedy = "Choose another folder with --into."
        publish_json(into.replay_json, {"run": str(source.path), **content}, "the replay", remedy, tuple(content))
    for path in (source.prompts, source.vocab):
        publish_link(path, into.path / path.name)
    for episode in replay.cached_episodes():
        for path in _cache_files(source.episode(episode), replay.recipe.learning_teachers()):
            publish_link(path, into.path / path.relative_to(source.path))
    if replay.episodes[0] > 0:
        _link_policy(*(run.policy_after(replay.episodes[0] - 1) for run in (source, into)))
    content = {**identity, "recipe": replay.recipe.to_dict()}
    publish_json(into.run_json, content, "the run", "Choose another folder with --into.", compare=IDENTITY)
    if not into.recipe_yaml.exists():
        _publish_text(into.recipe_yaml, recipe_yaml(replay.recipe))


def _cache_files(target: RolloutSet, needed: Sequence[str]) -> list[Path]:
    """An episode's plan, its rollouts and its sealed scores, seals after the shards that they list."""
    plan = load_rollout_plan(target)
    teachers = _teachers(target, plan, needed)
    scores = [part for name in teachers for part in score_parts(target, plan, name)]
    sets = [rollout_shards(target, plan), *scores]
    shards = [path for one in sets for path in (*map(one.path, range(one.num_shards)), one.seal_path)]
    return [target.plan, *(part.folder / PLAN for part in scores), *shards]


def _link_policy(source: Path, final: Path) -> None:
    def fill(folder: Path) -> None:
        for name in (*read_json(source / COMPLETE)["files"], COMPLETE):
            publish_link(source / name, folder / name)

    if not final.exists():
        publish_folder(final, fill)
    publish_link(source / COMPLETE, final / COMPLETE)


def _publish_text(final: Path, text: str) -> None:
    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    publish_file(final, write, lambda path: None)


def _learn(run: Run, episodes: Sequence[int], overrides: Sequence[str]) -> None:
    stages: InlineStages | None = None
    for episode in episodes:
        if run.is_learned(episode):
            continue
        if run.recipe.learn.num_ranks > 1:
            # recipe.yaml is as the replay was begun; overrides of this start come after it.
            command = ["learn", str(run.dir.recipe_yaml), *overrides, "--episode", str(episode)]
            run_ranks(command, run.recipe.learn.num_ranks)
        else:
            stages = stages or InlineStages(run)
            with stall_watch(run.recipe.stall_timeout_s):
                stages.learn(episode)
