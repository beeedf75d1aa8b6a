"""The learn stage: stream the joined shards in planned order, one optimizer step a global batch, publish the policy."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from opd_cache import registry
from opd_cache.errors import MismatchError, MissingInputError
from opd_cache.learn.batch import global_batches
from opd_cache.learn.checkpoint import (
    STEPS,
    TRAINER,
    TrainerState,
    latest_checkpoint,
    publish_checkpoint,
    read_state,
    remove_checkpoints,
    verify_checkpoint,
    write_state,
)
from opd_cache.learn.engine import Engine
from opd_cache.learn.plan import LearnPlan, plan_facts, plan_learning
from opd_cache.learn.step import Trainer
from opd_cache.logs import StageProgress, short
from opd_cache.models import explained_memory_errors
from opd_cache.run import Run
from opd_cache.run_dir import PLAN, SCHEMA_VERSION
from opd_cache.schema import STEPS as STEP_COLUMNS
from opd_cache.schema import arrow_schema
from opd_cache.stage import write_note
from opd_cache.store.join import Joined, join_stages
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_shards, stage_command
from opd_cache.store.publish import fsync_folder, make_folder, publish_json
from opd_cache.store.shards import ShardSet, write_table

log = logging.getLogger(__name__)


def new_engine(run: Run) -> Engine:
    """The recipe's engine, without a model yet."""
    options = run.recipe.learn
    return registry.load(registry.ENGINES, options.engine, "learn.engine")(options, run.recipe.student)


def learn_episode(run: Run, episode: int, engine: Engine) -> bool:
    """Train the student on an episode's joined shards and publish its policy; True once it is there.

    Goes on from the newest checkpoint inside the episode. Raises MissingInputError when rollouts or scores are not
    complete, MismatchError when the plan changed or the loss needs top-k entries that the cache does not have.
    """
    if run.has_policy(episode + 1):
        run.is_learned(episode)  # refuses a policy that was trained from another one
        _link_steps(run, episode)
        remove_checkpoints(run.dir.learn(episode))
        return True
    start = time.monotonic()
    rollouts, scores, inputs = _open_inputs(run, episode)
    plan, about = _publish_plan(run, episode, inputs)
    source, state = _where_to_start(run, episode, plan, about["plan"])
    with explained_memory_errors("learn.max_tokens_per_micro_batch", run.recipe.learn.max_tokens_per_micro_batch):
        # The initial student may be the policy of another run: its weights count, its optimizer does not.
        engine.load(source, with_optimizer=source != run.policy_folder(0))
        state = _train(run, episode, engine, plan, join_stages(rollouts, scores, state.cursor), state, about)
    _publish_policy(run, episode, engine, state, about)
    tokens = sum(row["tokens"] for row in state.steps)
    if tokens == 0:
        log.warning("learn   episode %d | no rollout had a token to learn from; the policy is unchanged", episode)
    note = {
        "stage": "learn",
        "steps": len(state.steps),
        "tokens": tokens,
        "seconds": round(time.monotonic() - start, 4),
    }
    write_note(run.dir.log_folder("learn", f"episode={episode}"), "learn", note)
    return True


def _publish_plan(run: Run, episode: int, inputs: dict[str, Any]) -> tuple[LearnPlan, dict[str, Any]]:
    """Fix what this episode's learning does; returns it with what every checkpoint of it says of itself."""
    first_step = read_state(run.policy_folder(episode)).step if episode > 0 else 0
    plan = plan_learning(run.recipe, load_rollout_plan(run.dir.episode(episode)), first_step)
    folder = run.dir.learn(episode)
    identity = {"schema_version": SCHEMA_VERSION, "run_id": run.run_id}
    facts = {**identity, "episode": episode, **plan_facts(plan, run.recipe.learn, inputs)}
    remedy = f"Set it back, or move {folder} away to learn the episode again."
    digest = publish_json(folder / PLAN, facts, f"the learning of episode {episode}", remedy)
    return plan, {**identity, "policy_version": episode + 1, "plan": digest, "parent": inputs["policy"]}


def _where_to_start(run: Run, episode: int, plan: LearnPlan, plan_digest: str) -> tuple[Path, TrainerState]:
    """The newest checkpoint inside the episode, else the policy before it, verified; and where learning stands there."""
    checkpoint = latest_checkpoint(run.dir.learn(episode), plan_digest)
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
        state = read_state(checkpoint)
        log.info("learn   episode %d goes on after %d of %d steps", episode, len(state.steps), plan.num_steps)
        return checkpoint, state
    if episode > 0:
        verify_checkpoint(run.policy_folder(episode))
    return run.policy_folder(episode), TrainerState(plan.first_step, 0, [])


def _publish_policy(run: Run, episode: int, engine: Engine, state: TrainerState, about: dict[str, Any]) -> None:
    def fill(target: Path) -> None:
        engine.save(target)
        write_state(target, TrainerState(state.step, 0, []))
        _write_steps(target / TRAINER / STEPS, state.steps)

    final = run.dir.policy_after(episode)
    if publish_checkpoint(final, about, fill):
        engine.saved_as(final)
    _link_steps(run, episode)
    remove_checkpoints(run.dir.learn(episode))


def _open_inputs(run: Run, episode: int) -> tuple[ShardSet, ShardSet, dict[str, Any]]:
    """The episode's sealed rollouts and scores, checked against each other."""
    target, teacher = run.dir.episode(episode), run.recipe.learning_teacher()
    for path, stage in ((target.plan, "rollout"), (target.scores(teacher) / PLAN, "score")):
        if not path.exists():
            raise MissingInputError(f"{path}: not there. Run: {stage_command(stage, target)}")
    plan = load_rollout_plan(target)
    rollouts, scores = rollout_shards(target, plan), score_shards(target, plan, teacher)
    rollouts_seal, scores_seal = rollouts.open_seal(), scores.open_seal()
    if scores.about["rollouts"] != rollouts_seal:
        raise MismatchError(
            f"{scores.folder}: the scores were made from other rollouts than {rollouts.folder} now holds. Move the folder away and run: {scores.remedy}"
        )
    if plan.policy != (found := run.policy_fingerprint(episode)):
        raise MismatchError(
            f"{target.plan}: sampled by policy {plan.policy[:12]}, but the policy of version {episode} is {found[:12]}. Move {target.path} away and run: {rollouts.remedy}"
        )
    loss = registry.load(registry.LOSSES, run.recipe.learn.loss.name, "learn.loss.name")
    if loss.needs_topk and not scores.about["top_k"]:
        raise MismatchError(
            f"learn.loss.name = {run.recipe.learn.loss.name!r} needs the teacher's top k, but {scores.folder} was scored with score.top_k=0. Use reverse_kl_pg, or score again with score.top_k=8 in another run_dir."
        )
    return (
        rollouts,
        scores,
        {"teacher": teacher, "policy": plan.policy, "rollouts": rollouts_seal, "scores": scores_seal},
    )


def _train(
    run: Run,
    episode: int,
    engine: Engine,
    plan: LearnPlan,
    rows: Iterator[Joined],
    state: TrainerState,
    about: dict[str, Any],
) -> TrainerState:
    """Run the remaining steps; checkpoints on the way where the recipe wants them."""
    config = run.recipe.learn
    trainer = Trainer(run.recipe, engine, policy_version=episode)
    batches = global_batches(rows, config.train_batch_size)
    with StageProgress("learn", f"episode {episode}", plan.num_steps - len(state.steps), "steps") as progress:
        while len(state.steps) < plan.num_steps:
            waiting = time.monotonic()
            batch = next(batches)
            read_s = time.monotonic() - waiting
            metrics = trainer.step(batch, state.step, plan.learning_rate(state.step, config), read_s)
            state = TrainerState(state.step + 1, state.cursor + len(batch), [*state.steps, metrics])
            progress.advance(1, metrics["tokens"])
            _log_step(episode, plan, state, metrics)
            every = config.checkpoint_every_steps
            if every and len(state.steps) % every == 0 and len(state.steps) < plan.num_steps:
                _publish_inner_checkpoint(run, episode, engine, state, about)
    return state


def _publish_inner_checkpoint(
    run: Run, episode: int, engine: Engine, state: TrainerState, about: dict[str, Any]
) -> None:
    def fill(target: Path) -> None:
        engine.save(target)
        write_state(target, state)

    final = run.dir.checkpoint(episode, len(state.steps))
    publish_checkpoint(final, about, fill)
    remove_checkpoints(run.dir.learn(episode), older_than=final)


def _log_step(episode: int, plan: LearnPlan, state: TrainerState, metrics: dict[str, Any]) -> None:
    log.info(
        "learn   episode %d step %d/%d | loss %.4f | reverse_kl %.4f nats | ratio max %.2f | grad norm %.2f | %s tok/s",
        episode, len(state.steps), plan.num_steps, metrics["loss"], metrics["reverse_kl"], metrics["ratio_max"], metrics["grad_norm"], short(metrics["tokens_per_s"]),
    )  # fmt: skip


def _write_steps(path: Path, rows: list[dict[str, Any]]) -> None:
    schema = arrow_schema(STEP_COLUMNS)
    with open(path, "xb") as file:
        write_table(
            file,
            schema,
            [pa.RecordBatch.from_pylist(rows, schema=schema)],
            {"schema_version": SCHEMA_VERSION, "stage": "learn"},
        )


def _link_steps(run: Run, episode: int) -> None:
    """learn/steps.parquet is the policy's own record of its steps, under the name where queries look."""
    final = run.dir.steps(episode)
    source = run.dir.policy_after(episode) / TRAINER / STEPS
    if not final.exists() and source.exists():
        make_folder(final.parent)
        with contextlib.suppress(FileExistsError):
            os.link(source, final)
        fsync_folder(final.parent)
