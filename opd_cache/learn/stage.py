"""The learn stage: stream the joined shards in planned order, one optimizer step a global batch, publish the policy."""

import filecmp
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_cache import registry
from opd_cache.errors import FirstRankFailedError, StoreError, TryAgainError
from opd_cache.learn.batch import first_tokens, global_batches, micro_batches, scored_tokens
from opd_cache.learn.checkpoint import (
    STEPS,
    TrainerState,
    latest_checkpoint,
    publish_checkpoint,
    read_state,
    remove_checkpoints,
    write_state,
)
from opd_cache.learn.engine import Engine
from opd_cache.learn.inputs import open_sources, with_known_ids
from opd_cache.learn.loggers import open_loggers
from opd_cache.learn.losses import resolve_loss
from opd_cache.learn.plan import LearnPlan, plan_facts, plan_learning
from opd_cache.learn.ranks import ALONE, Ranks
from opd_cache.learn.step import Trainer, max_tokens_per_micro_batch
from opd_cache.learn.stream import Source, planned_rows, read_ahead
from opd_cache.learn.teachers import teaching_facts
from opd_cache.logs import StageProgress, short
from opd_cache.models import explained_memory_errors, tensors_on
from opd_cache.notes import write_note
from opd_cache.run import Run
from opd_cache.run_dir import CANARY, PLAN, SCHEMA_VERSION, TRAINER
from opd_cache.schema import STEPS as STEP_COLUMNS
from opd_cache.schema import arrow_schema
from opd_cache.stall import note_progress, phase
from opd_cache.stop import StopRequest, noted_signals
from opd_cache.store.arrays import record_batch
from opd_cache.store.disk import new_file, write_whole
from opd_cache.store.join import Joined
from opd_cache.store.manifest import check_files
from opd_cache.store.publish import publish_json, publish_link
from opd_cache.store.shards import write_table

log = logging.getLogger(__name__)
CANARY_TOKENS = 64  # of a response


@dataclass(frozen=True)
class Lesson:
    """An episode's learning as it stands: found by the first rank, known to all."""

    plan: LearnPlan
    about: dict[str, Any]  # what every checkpoint of it says of itself
    sources: list[Source]
    folder: Path  # where its weights are now
    state: TrainerState


def new_engine(run: Run, ranks: Ranks = ALONE) -> Engine:
    """The recipe's engine, without a model yet."""
    options = run.recipe.learn
    return registry.load(registry.ENGINES, options.engine, "learn.engine")(options, run.recipe.student, ranks)


def learn_episode(run: Run, episode: int, engine: Engine, ranks: Ranks = ALONE) -> bool:
    """Train the student on an episode's joined shards and publish its policy; True once it is there.

    Goes on from the newest checkpoint inside the episode. Only the first rank writes. Raises MissingInputError when
    rollouts or scores are not complete, MismatchError when the plan changed or the loss needs what the cache does not
    have, TryAgainError after a signal to stop, once a checkpoint is there.
    """
    start = time.monotonic()
    lesson = ranks.from_first(lambda: _open_lesson(run, episode))
    if lesson is None:
        return True
    limit = max_tokens_per_micro_batch(run.recipe, ranks)
    with noted_signals() as request, read_ahead(_remaining_batches(run, lesson)) as batches:
        # The initial student may be the policy of another run: its weights count, its optimizer does not.
        with phase("loading the student"):
            engine.load(lesson.folder, with_optimizer=lesson.folder != run.policy_folder(0))
        with explained_memory_errors("learn.max_tokens_per_micro_batch", limit):
            state = _train(run, episode, engine, ranks, lesson, batches, request)
            _publish_policy(run, episode, engine, ranks, replace(lesson, state=state))
        if ranks.is_first:
            _write_note(run, episode, ranks, state, time.monotonic() - start)
    return True


def _open_lesson(run: Run, episode: int) -> Lesson | None:
    """What is to be done, with the plan published; None when the policy is there already."""
    folder = run.dir.learn(episode)
    if run.has_policy(episode + 1):
        run.is_learned(episode)  # refuses a policy that was trained from another one
        _finish(run, episode)
        if (folder / PLAN).exists():
            return None
    loss = resolve_loss(run.recipe.learn.loss)
    sources, facts = open_sources(run, episode, loss)
    first_step = read_state(run.dir.policy_after(episode - 1)).step if episode > 0 else 0
    num_rows = sum(source.num_rows for source in sources)
    groups = [source.rows_per_prompt for source in sources]
    plan = plan_learning(run.recipe, episode, num_rows, groups, loss.needs_reward, first_step)
    identity = {"schema_version": SCHEMA_VERSION, "run_id": run.run_id}
    parent = run.policy_fingerprint(episode)
    inputs = {**teaching_facts(run.recipe), "policy": parent, "sources": facts}
    content = {**identity, "episode": episode, **plan_facts(plan, run.recipe.learn, inputs)}
    remedy = f"Set it back, or move {folder} away to learn the episode again."
    digest = publish_json(folder / PLAN, content, f"the learning of episode {episode}", remedy)
    if run.has_policy(episode + 1):
        return None  # only its plan had to be made anew
    about = {**identity, "policy_version": episode + 1, "plan": digest, "parent": parent}
    return Lesson(plan, about, sources, *_where_to_start(run, episode, plan, digest))


def _where_to_start(run: Run, episode: int, plan: LearnPlan, plan_digest: str) -> tuple[Path, TrainerState]:
    """The newest checkpoint inside the episode, else the policy before it, verified; and where learning stands there."""
    while (checkpoint := latest_checkpoint(run.dir.learn(episode), plan_digest)) is not None:
        try:
            check_files(checkpoint)
            state = read_state(checkpoint)
        except StoreError:
            if checkpoint.exists():
                raise
            continue  # another learner of the same episode was further, and has removed it
        log.info("learn   episode %d goes on after %d of %d steps", episode, len(state.steps), plan.num_steps)
        return checkpoint, state
    if episode > 0:
        check_files(run.policy_folder(episode))
    return run.policy_folder(episode), TrainerState(plan.first_step, 0, [])


def _remaining_batches(run: Run, lesson: Lesson) -> Iterator[list[Joined]]:
    rows = planned_rows(lesson.sources, run.recipe.learn.epochs_per_episode, lesson.state.cursor)
    return global_batches(rows, lesson.plan.batch_sizes()[len(lesson.state.steps) :])


def _train(
    run: Run,
    episode: int,
    engine: Engine,
    ranks: Ranks,
    lesson: Lesson,
    batches: Iterator[list[Joined]],
    request: StopRequest,
) -> TrainerState:
    """Run the remaining steps; checkpoints on the way where the recipe wants them."""
    config, plan, state = run.recipe.learn, lesson.plan, lesson.state
    trainer = Trainer(run.recipe, engine, episode, ranks)
    done = len(state.steps)
    known = with_known_ids(batches, engine.vocab_size, trainer.loss, config.loss.teacher_only_ids)
    names = (config.loggers or []) if ranks.is_first else []
    with (
        StageProgress("learn", f"episode {episode}", plan.num_steps - done, "steps") as progress,
        open_loggers(names, run.dir.logs, run.run_id, run.recipe.to_dict(), state.step) as loggers,
    ):
        waiting = time.monotonic()
        for batch in known:
            read_s = time.monotonic() - waiting
            metrics = trainer.step(batch, state.step, plan.learning_rate(state.step, config), read_s)
            state = TrainerState(state.step + 1, state.cursor + len(batch), [*state.steps, metrics])
            note_progress(f"step {len(state.steps)} of {plan.num_steps} of episode {episode}")
            if ranks.is_first:
                progress.advance(1, metrics["tokens"])
                _log_step(episode, plan, state, metrics)
                for logger in loggers:
                    logger.log(state.step, {name: value for name, value in metrics.items() if value is not None})
            is_stopped = ranks.any(request.signal_name is not None)
            if len(state.steps) < plan.num_steps:
                if is_stopped or _checkpoint_is_due(run, len(state.steps)):
                    _publish_inner_checkpoint(run, episode, engine, ranks, lesson, state)
                if is_stopped:
                    raise _stopped(request, ranks, episode, len(state.steps), plan)
            waiting = time.monotonic()
    return state


def _checkpoint_is_due(run: Run, step: int) -> bool:
    config = run.recipe.learn
    return any(every and step % every == 0 for every in (config.checkpoint_every_steps, config.keep_every))


def _stopped(request: StopRequest, ranks: Ranks, episode: int, step: int, plan: LearnPlan) -> Exception:
    if not ranks.is_first:
        return FirstRankFailedError(TryAgainError.exit_status)
    return TryAgainError(
        f"stopped by {request.signal_name or 'a signal to another rank'} after step {step} of {plan.num_steps} of episode {episode}; a checkpoint is there and the same command goes on from it."
    )


def _publish_inner_checkpoint(
    run: Run, episode: int, engine: Engine, ranks: Ranks, lesson: Lesson, state: TrainerState
) -> None:
    final = run.dir.checkpoint(episode, len(state.steps))
    _publish(final, engine, ranks, lesson.about, state)
    if ranks.is_first:
        remove_checkpoints(run.dir.learn(episode), run.recipe.learn.keep_last, run.recipe.learn.keep_every)


def _publish_policy(run: Run, episode: int, engine: Engine, ranks: Ranks, lesson: Lesson) -> None:
    final, state = run.dir.policy_after(episode), lesson.state
    canary = _canary(engine, lesson)

    def also(target: Path) -> None:
        _write_steps(target / TRAINER / STEPS, state.steps)
        if canary is not None:
            write_whole(target / CANARY, json.dumps(canary).encode())

    if _publish(final, engine, ranks, lesson.about, TrainerState(state.step, 0, []), also):
        engine.saved_as(final)
    if ranks.is_first:
        _finish(run, episode)


def _publish(
    final: Path,
    engine: Engine,
    ranks: Ranks,
    about: dict[str, Any],
    state: TrainerState,
    also: Callable[[Path], None] = lambda target: None,
) -> bool:
    """Publish a checkpoint, with what `also` writes into it. All ranks give their parts."""

    def fill(target: Path) -> None:
        engine.save(target)
        write_state(target, state)
        also(target)

    won = False
    with phase(f"saving {final.name}"):
        if ranks.is_first:
            won = publish_checkpoint(final, about, fill)
        else:
            engine.save(None)
        return ranks.any(won)


def _canary(engine: Engine, lesson: Lesson) -> dict[str, Any] | None:
    """The beginning of a rollout and its log-probs under the new policy: an engine that loads it must find the same."""
    rows = (row for row in planned_rows(lesson.sources, 1, 0) if len(row[0].response_ids) and row[1].error is None)
    if (row := next(rows, None)) is None:
        return None
    rollout = replace(first_tokens(scored_tokens(*row), CANARY_TOKENS), loss_mask=None)
    (batch,) = micro_batches([(rollout, row[1])], [0.0], max_tokens=1)
    return {
        "prompt_ids": rollout.prompt_ids.tolist(),
        "response_ids": rollout.response_ids.tolist(),
        "logprobs": engine.sampled_logprobs(tensors_on(engine.device, batch)).tolist(),
    }


def _finish(run: Run, episode: int) -> None:
    """Link the policy's steps where queries look, and drop the checkpoints that the policy has made useless."""
    _link_steps(run, episode)
    remove_checkpoints(run.dir.learn(episode), keep_every=run.recipe.learn.keep_every)


def _write_note(run: Run, episode: int, ranks: Ranks, state: TrainerState, seconds: float) -> None:
    tokens = sum(row["tokens"] for row in state.steps)
    if tokens == 0:
        log.warning("learn   episode %d | no rollout had a token to learn from; the policy is unchanged", episode)
    note = {"stage": "learn", "steps": len(state.steps), "tokens": tokens, "seconds": round(seconds, 4)}
    write_note(run.dir.log_folder("learn", f"episode={episode}") / "learn.json", {**note, "ranks": ranks.world})


def _log_step(episode: int, plan: LearnPlan, state: TrainerState, metrics: dict[str, Any]) -> None:
    log.info(
        "learn   episode %d step %d/%d | loss %.4f | reverse_kl %.4f nats | ratio max %s | grad norm %.2f | %s tok/s",
        episode, len(state.steps), plan.num_steps, metrics["loss"], metrics["reverse_kl"], _shown(metrics["ratio_max"]), metrics["grad_norm"], short(metrics["tokens_per_s"]),
    )  # fmt: skip


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _write_steps(path: Path, rows: list[dict[str, Any]]) -> None:
    schema = arrow_schema(STEP_COLUMNS)
    with new_file(path) as file:
        write_table(
            file,
            schema,
            [record_batch({name: [row.get(name) for row in rows] for name in schema.names}, schema)],
            {"schema_version": SCHEMA_VERSION, "stage": "learn"},
        )


def _link_steps(run: Run, episode: int) -> None:
    """learn/steps.parquet is the policy's own record of its steps, under the name where queries look."""
    final = run.dir.steps(episode)
    source = run.dir.policy_after(episode) / TRAINER / STEPS
    if not source.exists():
        return
    if final.exists() and not filecmp.cmp(final, source, shallow=False):
        final.unlink()  # the record of a policy that was removed, and has been learned anew
    publish_link(source, final)
