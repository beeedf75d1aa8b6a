"""Everything in a run directory that can be compared with something, in the order in which it was made.

run.json → prompts → plan → rollout shards → seal → score plan → score shards → seal → learn plan → policy → next plan.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_cache.errors import CorruptShardError, MismatchError, StoreError
from opd_cache.learn.checkpoint import STEPS, TRAINER
from opd_cache.run_dir import COMPLETE, PLAN, RESULTS, SEAL, SUMMARY, RolloutSet, RunDir
from opd_cache.status import read_identity
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, rollout_shards, score_shards, stage_command
from opd_cache.store.publish import digest_file, read_json, read_plain_json
from opd_cache.store.rows import row_group
from opd_cache.store.sealed import MODES
from opd_cache.store.shards import ShardSet, read_row_groups
from opd_cache.verify.shards import Facts, Rows, check_digest, check_rollouts, check_scores, first_samples, hash_prompts

Seal = dict[str, Any]
Sealed = tuple[ShardSet, Seal | None]  # None where there is no seal, or none that can be read


@dataclass(frozen=True)
class Finding:
    """Something that is not what it should be."""

    file: Path
    problem: str
    moves: tuple[Path, ...]  # what must leave the run to open it again; nothing where only a person can mend it
    again: tuple[str, ...]  # the commands that then make it anew


@dataclass(frozen=True)
class Check:
    """Files to be read together, and what does it."""

    files: tuple[Path, ...]
    find: Callable[[], Iterator[Finding]]


@dataclass(frozen=True)
class Known:
    """What the whole run is compared with."""

    run: RunDir
    identity: dict[str, Any]
    vocab_size: int | None


def checks_of(run: RunDir) -> Iterator[Check]:
    """Every check of a run. Raises MissingInputError, MismatchError, CorruptShardError where run.json tells no run."""
    known = Known(run, read_identity(run), _vocab_size(run))
    yield from _prompts_checks(known)
    prompts = _PromptHashes()
    for episode in run.episodes():
        target = run.episode(episode)
        yield from _set_checks(known, target, prompts, is_evaluation=False)
        yield from _learn_checks(known, episode)
    for folder in sorted(run.path.glob("evals/*")):
        yield from _evaluation_checks(known, folder, prompts)


def single(path: Path, work: Callable[[], object], moves: tuple[Path, ...], *again: str) -> Check:
    """A check that fails as a whole."""

    def find() -> Iterator[Finding]:
        try:
            work()
        except (StoreError, OSError) as error:
            yield Finding(path, str(error), moves, again)

    return Check((path,), find)


def _unchanged(path: Path, wanted: str, said_by: str, moves: tuple[Path, ...], *again: str) -> Check:
    """Compare a file with its digest."""

    def work() -> None:
        if (found := digest_file(path)) != wanted:
            raise CorruptShardError(f"{path}: its sha256 is {found[:12]}…, {said_by} says {wanted[:12]}…")

    return single(path, work, moves, *again)


def _broken(path: Path, error: Exception, moves: tuple[Path, ...], *again: str) -> Check:
    def work() -> None:
        raise error

    return single(path, work, moves, *again)


def _prompts_checks(known: Known) -> Iterator[Check]:
    run = known.run

    wanted = {run.prompts: known.identity["prompts"]["sha256"], run.vocab: known.identity["vocab"]}
    for path, digest in wanted.items():
        yield _unchanged(path, digest, "run.json", ())


def _vocab_size(run: RunDir) -> int | None:
    """Rows of the student's embedding, which may be more than its tokenizer's ids; None before there is a policy."""
    configs = (run.policy_after(episode) / "config.json" for episode in run.episodes())
    path = next((path for path in configs if path.exists()), None)
    try:
        size = None if path is None else read_plain_json(path).get("vocab_size")
    except StoreError:
        return None
    return size if type(size) is int else None


class _PromptHashes:
    """hash_ids by prompt index, read once a prompts file."""

    def __init__(self) -> None:
        self._by_file: dict[Path, np.ndarray] = {}

    def of(self, path: Path, digest: str) -> np.ndarray:
        """Raises CorruptShardError when the file is not the one that a plan was made for."""
        if path not in self._by_file:
            if (found := digest_file(path)) != digest:
                raise CorruptShardError(f"{path}: its sha256 is {found[:12]}…, its plans say {digest[:12]}…")
            tables = read_row_groups(path, ["prompt_ids"])
            hashes = [value for table in tables for value in hash_prompts(row_group(table).lists["prompt_ids"])]
            self._by_file[path] = np.array(hashes, np.uint64)
        return self._by_file[path]


def _evaluation_checks(known: Known, folder: Path, prompts: _PromptHashes) -> Iterator[Check]:
    results, summary = folder / RESULTS, folder / SUMMARY
    again = stage_command("eval", known.run.evaluation_set(folder.name, MODES[0]))
    if summary.exists():
        try:
            content = read_json(summary)
        except StoreError as error:
            yield _broken(summary, error, (summary,), again)
        else:
            if content["subject"] != folder.name:
                return  # moved aside
            yield _unchanged(results, content["results"], SUMMARY, (results, summary), again)
    for mode in MODES:
        yield from _set_checks(known, known.run.evaluation_set(folder.name, mode), prompts, is_evaluation=True)


def _set_checks(known: Known, target: RolloutSet, prompts: _PromptHashes, is_evaluation: bool) -> Iterator[Check]:
    """The plan, the rollouts and all scores of an episode or an evaluation."""
    again = stage_command("rollout", target)
    if not target.plan.exists():
        return
    try:
        plan = load_rollout_plan(target)
        _check_plan(known, target, plan, is_evaluation)
        rollouts = rollout_shards(target, plan)
    except StoreError as error:
        yield _broken(target.plan, error, (target.plan,), again)
        return
    try:
        hashes = prompts.of(target.prompts, plan.prompts)
    except StoreError as error:
        if is_evaluation:  # run.json vouches for the other
            yield _broken(target.prompts, error, ())
        return
    seal = yield from _seal_checks(rollouts)
    scores: list[Sealed] = []
    for folder in sorted(path.parent for path in target.path.glob(f"scores/teacher=*/{PLAN}")):
        part = yield from _score_part(target, plan, folder)
        if part is not None:
            scores.append(part)
    facts = Facts(plan, first_samples(plan), hashes, known.vocab_size)
    for shard in range(plan.num_shards):
        if files := tuple(
            path for one in (rollouts, *(one for one, _ in scores)) if (path := one.path(shard)).exists()
        ):
            yield Check(files, _shard_finder((rollouts, seal), scores, shard, facts))


def _check_plan(known: Known, target: RolloutSet, plan: RolloutPlan, is_evaluation: bool) -> None:
    found = {"run_id": plan.run_id, "prompts": plan.prompts, "policy": plan.policy}
    wanted: dict[str, str | None] = {"run_id": known.identity["run_id"]}
    if not is_evaluation:
        wanted["prompts"] = known.identity["prompts"]["sha256"]
        if plan.imported is None and not known.run.replay_json.exists():
            wanted["policy"] = _policy_fingerprint(known, plan.policy_version)
    for key, value in wanted.items():
        if value is not None and found[key] != value:
            raise MismatchError(f"{target.plan}: made for {key} {found[key][:12]}, now {value[:12]}")


def _policy_fingerprint(known: Known, version: int) -> str | None:
    if version == 0:
        return str(known.identity["student"]["fingerprint"])
    try:
        return str(read_json(known.run.policy_after(version - 1) / COMPLETE)["fingerprint"])
    except StoreError:
        return None  # gone, or a finding of its own


def _seal_checks(shards: ShardSet) -> Generator[Check, None, Seal | None]:
    """Compare a seal with its plan and with which shards are there; gives it where it is one."""
    if not shards.is_sealed():
        return None
    try:
        seal = read_json(shards.seal_path)
        shards.check_seal(seal)
    except StoreError as error:
        yield _broken(shards.seal_path, error, (shards.seal_path,), shards.remedy)
        return None
    for shard in shards.missing():
        path = shards.path(shard)
        gone = CorruptShardError(f"{path}: missing, though {SEAL} lists it")
        yield _broken(path, gone, (shards.seal_path,), shards.remedy)
    return seal


def _digest_of(path: Path) -> str | None:
    """Of a JSON file that is there and whole; one that is not is a finding of its own."""
    try:
        read_json(path)
        return digest_file(path)
    except StoreError:
        return None


def _score_part(
    target: RolloutSet, plan: RolloutPlan, folder: Path
) -> Generator[Check, None, tuple[ShardSet, Seal | None] | None]:
    """The plan and the seal of one teacher's scores, compared with the rollouts' seal; None where there are none."""
    again = stage_command("score", target, folder.name.partition(",")[0].removeprefix("teacher="))
    try:
        content = read_json(folder / PLAN)
    except StoreError as error:
        yield _broken(folder / PLAN, error, (folder / PLAN,), again)
        return None
    teacher, first = content.get("teacher", ""), content.get("first_token") or 0
    if target.scores(teacher, first) != folder:
        return None  # moved aside
    try:
        scores = score_shards(target, plan, teacher, first)
        digest = _digest_of(target.rollouts / SEAL)
        if digest is not None and scores.about["rollouts"] != digest:
            raise MismatchError(
                f"{folder / PLAN}: made from rollouts {scores.about['rollouts'][:12]}, the seal beside it is {digest[:12]}"
            )
    except (StoreError, KeyError) as error:
        yield _broken(folder / PLAN, error, (folder,), again)
        return None
    seal = yield from _seal_checks(scores)
    return scores, seal


def _shard_finder(
    rollouts: Sealed, scores: Sequence[Sealed], shard: int, facts: Facts
) -> Callable[[], Iterator[Finding]]:
    """What compares the rollouts of one shard and then its scores, for as far as they are there."""

    def find() -> Iterator[Finding]:
        shards, seal = rollouts
        rows: Rows | None = None
        if shards.path(shard).exists():
            try:
                check_digest(shards, shard, seal)
                rows = check_rollouts(shards, shard, facts)
            except (StoreError, OSError) as error:
                yield _bad_shard(shards, shard, error, *(one for one, _ in scores if one.is_sealed()))
        for one, its_seal in scores:
            if not one.path(shard).exists():
                continue
            try:
                check_digest(one, shard, its_seal)
                if rows is not None:
                    check_scores(one, shard, rows, facts.vocab_size)
            except (StoreError, OSError) as error:
                yield _bad_shard(one, shard, error)

    return find


def _bad_shard(shards: ShardSet, shard: int, error: Exception, *downstream: ShardSet) -> Finding:
    opened = (shards, *downstream)
    seals = [one.seal_path for one in opened if one.is_sealed()]
    remedies = tuple(dict.fromkeys(one.remedy for one in opened))
    return Finding(shards.path(shard), str(error), (shards.path(shard), *seals), remedies)


def _learn_checks(known: Known, episode: int) -> Iterator[Check]:
    """The learning of an episode: its plan against what it learned from, and every checkpoint and policy file."""
    run, folder = known.run, known.run.learn(episode)
    again = stage_command("learn", run.episode(episode))
    plan, policy = folder / PLAN, run.policy_after(episode)
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if (checkpoint / COMPLETE).exists():
            yield from _checkpoint_checks(checkpoint, (checkpoint,), again)
    if plan.exists():
        yield single(plan, lambda: _check_learn_plan(known, episode), (plan,), again)
    if (policy / COMPLETE).exists():
        moves = (policy, run.steps(episode))  # a policy that is made anew has metrics of its own
        yield from _checkpoint_checks(policy, moves, again)
        yield single(policy / COMPLETE, lambda: _check_policy(policy, plan), moves, again)


def _checkpoint_checks(folder: Path, moves: tuple[Path, ...], again: str) -> Iterator[Check]:
    """Every file of a checkpoint or policy, against its manifest."""
    try:
        files = read_json(folder / COMPLETE)["files"]
    except StoreError as error:
        yield _broken(folder / COMPLETE, error, moves, again)
        return
    for name, digest in files.items():
        yield _unchanged(folder / name, digest, COMPLETE, moves, again)
        steps = folder.parent / "learn" / STEPS
        if name == f"{TRAINER}/{STEPS}" and steps.exists():
            yield _unchanged(steps, digest, f"{folder.name}/{COMPLETE}", (steps,), again)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name != COMPLETE and name not in files:
            stray = CorruptShardError(f"{path}: {COMPLETE} does not list it")
            yield _broken(path, stray, (path,), again)


def _check_learn_plan(known: Known, episode: int) -> None:
    path = known.run.learn(episode) / PLAN
    content = read_json(path)
    if content.get("run_id") != known.identity["run_id"]:
        raise MismatchError(f"{path}: made for run {content.get('run_id')}, this is {known.identity['run_id']}")
    for source in content.get("sources", []):
        target = known.run.episode(source["episode"])
        digest = _digest_of(target.rollouts / SEAL)
        if digest is not None and source["rollouts"] != digest:
            raise MismatchError(
                f"{path}: learned from rollouts {source['rollouts'][:12]} of {target.label}, their seal is now {digest[:12]}"
            )


def _check_policy(policy: Path, plan: Path) -> None:
    made_by = read_json(policy / COMPLETE).get("plan")
    digest = _digest_of(plan)
    if digest is not None and made_by != digest:
        raise MismatchError(
            f"{policy}: made by plan {str(made_by)[:12]}, {plan.name} of its learning is now {digest[:12]}"
        )
