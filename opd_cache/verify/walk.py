"""Everything in a run directory that can be compared with something, in the order in which it was made.

run.json → prompts → plan → rollout shards → seal → score plan → score shards → seal → learn plan → policy → next plan.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_cache.errors import CorruptShardError, MismatchError, OpdCacheError, StoreError
from opd_cache.fingerprint import num_embeddings
from opd_cache.run_dir import PLAN, RESULTS, SEAL, SUMMARY, RolloutSet, RunDir
from opd_cache.schema import EVALS, arrow_schema
from opd_cache.status import read_identity
from opd_cache.store.manifest import check_files
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, rollout_shards, score_shards, stage_command
from opd_cache.store.publish import read_json
from opd_cache.store.rows import row_group
from opd_cache.store.sealed import MODES
from opd_cache.store.shards import ShardSet, footer_of, open_parquet, read_row_groups
from opd_cache.verify.checks import (
    Check,
    Finding,
    Known,
    broken,
    digest_of,
    file_digest,
    gone,
    is_aside,
    misplaced,
    raise_if_not_of_file,
    sealed_digest,
    single,
    unchanged,
)
from opd_cache.verify.learning import check_policy, learn_checks
from opd_cache.verify.shards import Facts, Rows, check_rollouts, check_scores, first_samples, hash_prompts, read_shard

Seal = dict[str, Any]
Sealed = tuple[ShardSet, Seal | None]  # None where there is no seal, or none that can be read


def checks_of(run: RunDir) -> Iterator[Check]:
    """Every check of a run. Raises MissingInputError, MismatchError, CorruptShardError where run.json tells no run."""
    known = Known(run, read_identity(run), _vocab_size(run))
    yield from _prompts_checks(known)
    prompts = _PromptHashes()
    for episode in run.episodes():
        target = run.episode(episode)
        yield from _set_checks(known, target, prompts, is_evaluation=False)
        yield from learn_checks(known, episode)
    for folder in sorted(run.path.glob("evals/*")):
        yield from _evaluation_checks(known, folder, prompts)


def _prompts_checks(known: Known) -> Iterator[Check]:
    run = known.run

    wanted = {run.prompts: known.identity["prompts"]["sha256"], run.vocab: known.identity["vocab"]}
    for path, digest in wanted.items():
        yield unchanged(path, digest, "run.json", ())


def _vocab_size(run: RunDir) -> int | None:
    """Rows of the student's embedding, which may be more than its tokenizer's ids; None before there is a policy whose
    configuration is whole."""
    for folder in map(run.policy_after, run.episodes()):
        try:
            check_files(folder, lambda name: name == "config.json")
            return num_embeddings(folder)
        except (OpdCacheError, OSError):
            continue  # not there yet, or a finding of its own
    return None


class _PromptHashes:
    """hash_ids by prompt index, read once a prompts file."""

    def __init__(self) -> None:
        self._by_file: dict[Path, np.ndarray] = {}

    def of(self, path: Path, digest: str) -> np.ndarray:
        """Raises CorruptShardError when the file is not the one that a plan was made for."""
        if path not in self._by_file:
            if (found := file_digest(path)) != digest:
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
            yield broken(summary, error, (summary,), again)
        else:
            if is_aside(folder.name, content["subject"], known):
                return
            if content["subject"] != folder.name:
                yield broken(summary, misplaced(summary, content["subject"], folder.name), (summary,), again)
            yield unchanged(results, content["results"], SUMMARY, (results, summary), again)
    elif results.exists():
        yield single(results, lambda: _check_results(results), (results,), again)
    for mode in MODES:
        yield from _set_checks(known, known.run.evaluation_set(folder.name, mode), prompts, is_evaluation=True)


def _check_results(path: Path) -> None:
    """Of results without a summary, which would hold their digest."""
    for table in read_row_groups(path):
        if not table.schema.equals(arrow_schema(EVALS), check_metadata=False):
            raise CorruptShardError(
                f"{path}: has the columns {', '.join(table.column_names)}, expected {', '.join(arrow_schema(EVALS).names)}"
            )


def _set_checks(known: Known, target: RolloutSet, prompts: _PromptHashes, is_evaluation: bool) -> Iterator[Check]:
    """The plan, the rollouts and all scores of an episode or an evaluation."""
    again = stage_command("rollout", target)
    if not target.plan.exists():
        if any(target.path.glob("*/**/shard-*.parquet")):
            yield broken(target.plan, gone(target.plan, "shards were made by it"), (), again)
        return
    try:
        plan = load_rollout_plan(target)
        _check_plan(known, target, plan, is_evaluation)
        rollouts = rollout_shards(target, plan)
    except StoreError as error:
        yield broken(target.plan, error, (target.plan, *_made_by(target.plan, target.rollouts)), again)
        return
    try:
        hashes = prompts.of(target.prompts, plan.prompts)
    except StoreError as error:
        if is_evaluation:  # run.json vouches for the other
            yield broken(target.prompts, error, ())
        return
    folders = sorted(target.path.glob("scores/teacher=*"))
    if is_evaluation:
        is_used = (target.path.parent / RESULTS).exists()
        learned: Collection[str] = [folder.name for folder in folders] if is_used else []
    else:
        learned = _learned_from(known, target)
        is_used = bool(learned)
    seal = yield from _seal_checks(rollouts, is_used or any((folder / PLAN).exists() for folder in folders))
    for name in sorted(set(learned) - {folder.name for folder in folders}):
        path, teacher = target.path / "scores" / name, name.partition(",")[0].removeprefix("teacher=")
        yield broken(path, gone(path, "the episode was learned from it"), (), stage_command("score", target, teacher))
    scores: list[Sealed] = []
    for folder in folders:
        part = yield from _score_part(known, target, plan, folder, folder.name in learned)
        if part is not None:
            scores.append(part)
    facts = Facts(plan, first_samples(plan), hashes, known.vocab_size)
    for shard in range(plan.num_shards):
        if files := tuple(
            path for one in (rollouts, *(one for one, _ in scores)) if (path := one.path(shard)).exists()
        ):
            yield Check(files, _shard_finder((rollouts, seal), scores, shard, facts))


def _made_by(plan: Path, folder: Path) -> list[Path]:
    """The shards that were made by a plan which does not belong here, and their seal."""
    digest, found = digest_of(plan), []
    for path in sorted(folder.glob("shard-*.parquet")):
        try:
            with open_parquet(path) as file:
                made_by = footer_of(file, path).get("plan")
        except StoreError:
            continue  # a finding of its own, once the plan is there
        if digest is not None and made_by == digest:
            found.append(path)
    return [*found, *([folder / SEAL] if found else [])]


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
        return str(check_policy(known, version - 1)["fingerprint"])
    except StoreError:
        return None  # gone, or a finding of its own


def _learned_from(known: Known, target: RolloutSet) -> Collection[str]:
    """Names of the score folders that the episode itself was learned from, as far as its plan of that is whole."""
    try:
        content = read_json(known.run.learn(int(target.scope)) / PLAN)
        (scores,) = (source["scores"] for source in content["sources"] if source["episode"] == int(target.scope))
        return scores if isinstance(scores, dict) else [f"teacher={content['teacher']}"]
    except (StoreError, KeyError, ValueError):
        return []


def _seal_checks(shards: ShardSet, is_used: bool) -> Generator[Check, None, Seal | None]:
    """Compare a seal with its plan and with which shards are there; gives it where it is one.

    is_used: something was made from it, so that it must be there.
    """
    if not shards.is_sealed():
        if is_used:
            yield broken(shards.seal_path, gone(shards.seal_path, "later stages read it"), (), shards.remedy)
        return None
    try:
        seal = read_json(shards.seal_path)
        shards.check_seal(seal)
    except StoreError as error:
        yield broken(shards.seal_path, error, (shards.seal_path,), shards.remedy)
        return None
    yield from _stray_checks(shards)
    for shard in shards.missing():
        path = shards.path(shard)
        yield broken(path, gone(path, f"{SEAL} lists it"), (path, shards.seal_path), shards.remedy)
    return seal


def _stray_checks(shards: ShardSet) -> Iterator[Check]:
    planned = {shards.path(shard) for shard in range(shards.num_shards)}
    for path in sorted({*shards.folder.glob("shard-*.parquet")} - planned):
        yield broken(path, CorruptShardError(f"{path}: no shard of its plan"), (path,))


def _score_part(
    known: Known, target: RolloutSet, plan: RolloutPlan, folder: Path, is_used: bool
) -> Generator[Check, None, Sealed | None]:
    """The plan and the seal of one teacher's scores, compared with the rollouts' seal; None where there are none."""
    again = stage_command("score", target, folder.name.partition(",")[0].removeprefix("teacher="))
    if not (folder / PLAN).exists():
        if is_used or any(folder.glob("shard-*.parquet")):
            yield broken(folder / PLAN, gone(folder / PLAN, "scores were made by it"), (), again)
        return None
    try:
        content = read_json(folder / PLAN)
    except StoreError as error:
        yield broken(folder / PLAN, error, (folder / PLAN,), again)
        return None
    teacher, first = content.get("teacher", ""), content.get("first_token") or 0
    if is_aside(folder.name, made_as := target.scores(teacher, first).name, known):
        return None
    try:
        if made_as != folder.name:
            raise misplaced(folder / PLAN, made_as, folder.name)
        scores = score_shards(target, plan, teacher, first)
        digest = sealed_digest(target)
        if digest is not None and scores.about["rollouts"] != digest:
            raise MismatchError(
                f"{folder / PLAN}: made from rollouts {scores.about['rollouts'][:12]}, the seal beside it is {digest[:12]}"
            )
    except (StoreError, KeyError) as error:
        yield broken(folder / PLAN, error, (folder / PLAN, *_made_by(folder / PLAN, folder)), again)
        return None
    seal = yield from _seal_checks(scores, is_used)
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
                rows = check_rollouts(shards, shard, facts, read_shard(shards, shard, seal))
            except (StoreError, OSError) as error:
                raise_if_not_of_file(error)
                yield _bad_shard(shards, shard, error, *(one for one, _ in scores if one.is_sealed()))
        for one, its_seal in scores:
            if not one.path(shard).exists():
                continue
            try:
                data = read_shard(one, shard, its_seal)
                if rows is not None:
                    check_scores(one, shard, rows, facts.vocab_size, data)
            except (StoreError, OSError) as error:
                raise_if_not_of_file(error)
                yield _bad_shard(one, shard, error)

    return find


def _bad_shard(shards: ShardSet, shard: int, error: Exception, *downstream: ShardSet) -> Finding:
    opened = (shards, *downstream)
    seals = [one.seal_path for one in opened if one.is_sealed()]
    remedies = tuple(dict.fromkeys(one.remedy for one in opened))
    return Finding(shards.path(shard), str(error), (shards.path(shard), *seals), remedies)
