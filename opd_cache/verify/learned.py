"""What an episode's learning left: its plan against what it learned from, checkpoints and policies against their manifests."""

from collections.abc import Callable, Iterator
from pathlib import Path

from opd_cache.errors import CorruptShardError, MismatchError, StoreError
from opd_cache.learn.checkpoint import STEPS, TRAINER
from opd_cache.retention import RECORD
from opd_cache.run_dir import COMPLETE, PLAN, REMOVED, SEAL
from opd_cache.store.gc import TEMPORARY
from opd_cache.store.plans import stage_command
from opd_cache.store.publish import read_json
from opd_cache.verify.findings import Check, Known, broken, digest_of, single, unchanged


def learn_checks(known: Known, episode: int) -> Iterator[Check]:
    """The learning of an episode: its plan against what it learned from, and every checkpoint and policy file."""
    run, folder = known.run, known.run.learn(episode)
    again = stage_command("learn", run.episode(episode))
    plan, policy = folder / PLAN, run.policy_after(episode)
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if (checkpoint / COMPLETE).exists():
            yield from _checkpoint_checks(checkpoint, (checkpoint,), again)
    if plan.exists():
        yield single(plan, lambda: _check_learn_plan(known, episode), (plan,), again)
    if (policy / REMOVED).exists():
        yield from _removed_checks(policy, again)
        yield single(policy / COMPLETE, lambda: _check_policy(policy, plan), ())
    elif (policy / COMPLETE).exists():
        moves = (policy, run.steps(episode))  # a policy that is made anew has metrics of its own
        yield from _checkpoint_checks(policy, moves, again)
        yield single(policy / COMPLETE, lambda: _check_policy(policy, plan), moves, again)


def _removed_checks(policy: Path, again: str) -> Iterator[Check]:
    """A policy that learn.keep_policies has removed: its note, its record, and what a removal cut short has left."""
    note = policy / REMOVED

    def work() -> None:
        if (said := read_json(note)["manifest"]) != (found := digest_of(policy / COMPLETE)):
            raise MismatchError(f"{note}: of the policy with manifest {said[:12]}, beside it is {str(found)[:12]}")

    yield single(note, work, ())
    yield from _checkpoint_checks(
        policy, (), again, gone=lambda name: name not in RECORD and not (policy / name).exists()
    )


def _checkpoint_checks(
    folder: Path, moves: tuple[Path, ...], *again: str, gone: Callable[[str], bool] = lambda name: False
) -> Iterator[Check]:
    """Every file of a checkpoint or policy, but for those that are rightly gone, against its manifest."""
    try:
        files = read_json(folder / COMPLETE)["files"]
    except StoreError as error:
        yield broken(folder / COMPLETE, error, moves, *again)
        return
    for name, digest in files.items():
        if gone(name):
            continue
        yield unchanged(folder / name, digest, COMPLETE, moves, *again)
        steps = folder.parent / "learn" / STEPS
        if name == f"{TRAINER}/{STEPS}" and steps.exists():
            yield unchanged(steps, digest, f"{folder.name}/{COMPLETE}", (steps,), *again)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_ours = name in (COMPLETE, REMOVED) or name in files or TEMPORARY.fullmatch(path.name)
        if path.is_file() and not is_ours:
            stray = CorruptShardError(f"{path}: {COMPLETE} does not list it")
            yield broken(path, stray, (path,), *again)


def _check_learn_plan(known: Known, episode: int) -> None:
    path = known.run.learn(episode) / PLAN
    content = read_json(path)
    if content.get("run_id") != known.identity["run_id"]:
        raise MismatchError(f"{path}: made for run {content.get('run_id')}, this is {known.identity['run_id']}")
    for source in content.get("sources", []):
        target = known.run.episode(source["episode"])
        digest = digest_of(target.rollouts / SEAL)
        if digest is not None and source["rollouts"] != digest:
            raise MismatchError(
                f"{path}: learned from rollouts {source['rollouts'][:12]} of {target.label}, their seal is now {digest[:12]}"
            )


def _check_policy(policy: Path, plan: Path) -> None:
    made_by = read_json(policy / COMPLETE).get("plan")
    digest = digest_of(plan)
    if digest is not None and made_by != digest:
        raise MismatchError(
            f"{policy}: made by plan {str(made_by)[:12]}, {plan.name} of its learning is now {digest[:12]}"
        )
