"""What is compared in an episode's learning: its plan, its checkpoints, its policy."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from opd_cache.errors import CorruptShardError, MismatchError, StoreError
from opd_cache.learn.checkpoint import STEPS
from opd_cache.retention import RECORD
from opd_cache.run_dir import COMPLETE, PLAN, REMOVED, TRAINER
from opd_cache.store.gc import TEMPORARY
from opd_cache.store.manifest import check_place, read_manifest
from opd_cache.store.plans import stage_command
from opd_cache.store.publish import digest_file, read_json
from opd_cache.verify.checks import Check, Known, broken, digest_of, gone, sealed_digest, single, unchanged


def learn_checks(known: Known, episode: int) -> Iterator[Check]:
    """The learning of an episode: its plan against what it learned from, and every checkpoint and policy file."""
    run, folder = known.run, known.run.learn(episode)
    again = stage_command("learn", run.episode(episode))
    plan, policy = folder / PLAN, run.policy_after(episode)
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        yield from _folder_checks(checkpoint, partial(_manifest, known, episode, checkpoint), (checkpoint,), again)
    if plan.exists():
        yield single(plan, lambda: _check_learn_plan(known, episode), (plan,), again)
    elif (policy / COMPLETE).exists() and not run.replay_json.exists():  # a replay's first policy is another run's
        yield broken(plan, gone(plan, "a policy was made by it"), (), again)
    if (policy / REMOVED).exists():
        yield from _removed_checks(policy, partial(check_policy, known, episode), again)
    elif policy.exists():
        # A policy that is made anew has metrics of its own. Where the plan is not the one that it was made by, either may
        # be the wrong one.
        moves = (policy, run.steps(episode), *((plan,) if _is_other_plan(known, episode) else ()))
        yield from _folder_checks(policy, partial(check_policy, known, episode), moves, again)


def _removed_checks(policy: Path, open_manifest: Callable[[], dict[str, Any]], again: str) -> Iterator[Check]:
    """A policy that learn.keep_policies has removed: its note, its record, and what a removal cut short has left."""
    note = policy / REMOVED

    def work() -> None:
        if (said := read_json(note)["manifest"]) != (found := digest_of(policy / COMPLETE)):
            raise MismatchError(f"{note}: of the policy with manifest {said[:12]}, beside it is {str(found)[:12]}")

    yield single(note, work, ())
    yield from _folder_checks(
        policy, open_manifest, (), again, is_gone=lambda name: name not in RECORD and not (policy / name).exists()
    )


def _folder_checks(
    folder: Path,
    open_manifest: Callable[[], dict[str, Any]],
    moves: tuple[Path, ...],
    again: str,
    is_gone: Callable[[str], bool] = lambda name: False,
) -> Iterator[Check]:
    """Every file of a checkpoint or policy, but for those that are rightly gone, against its manifest."""
    try:
        manifest = open_manifest()
    except StoreError as error:
        yield broken(folder / COMPLETE, error, moves, again)
        return
    files = manifest["files"]
    for name, digest in files.items():
        if is_gone(name):
            continue
        yield unchanged(folder / name, digest, COMPLETE, moves, again)
        steps = folder.parent / "learn" / STEPS
        if name == f"{TRAINER}/{STEPS}" and steps.exists():
            yield unchanged(steps, digest, f"{folder.name}/{COMPLETE}", (steps,), again)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_ours = name in (COMPLETE, REMOVED) or name in files or TEMPORARY.fullmatch(path.name)
        if path.is_file() and not is_ours:
            stray = CorruptShardError(f"{path}: {COMPLETE} does not list it")
            yield broken(path, stray, (path,), again)


def _manifest(known: Known, episode: int, folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    check_place(manifest, known.identity["run_id"], episode + 1, folder)
    return manifest


def _check_learn_plan(known: Known, episode: int) -> None:
    path = known.run.learn(episode) / PLAN
    content = read_json(path)
    for key, wanted in {"run_id": known.identity["run_id"], "episode": episode}.items():
        if content.get(key) != wanted:
            raise MismatchError(f"{path}: made for {key} {content.get(key)}, this is {wanted}")
    for source in content.get("sources", []):
        target = known.run.episode(source["episode"])
        digest = sealed_digest(target)
        if digest is not None and source["rollouts"] != digest:
            raise MismatchError(
                f"{path}: learned from rollouts {source['rollouts'][:12]} of {target.label}, their seal is now {digest[:12]}"
            )


def check_policy(known: Known, episode: int) -> dict[str, Any]:
    """The manifest of a policy that belongs where it lies. Raises StoreError."""
    policy, plan = known.run.policy_after(episode), known.run.learn(episode) / PLAN
    manifest = _manifest(known, episode, policy)
    if _is_other_plan(known, episode):
        raise MismatchError(
            f"{policy}: made by plan {str(manifest.get('plan'))[:12]}, {known.name(plan)} is {digest_file(plan)[:12]}"
        )
    return manifest


def _is_other_plan(known: Known, episode: int) -> bool:
    """Whether a policy was made by another plan than the one beside it, where that belongs there."""
    try:
        _check_learn_plan(known, episode)
        made_by = _manifest(known, episode, known.run.policy_after(episode)).get("plan")
    except StoreError:
        return False  # a finding of its own
    return bool(made_by != digest_file(known.run.learn(episode) / PLAN))
