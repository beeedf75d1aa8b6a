"""Old policies: which of them learn.keep_policies gives up, and taking those away.

The large files of a policy go. Its record stays: manifest, trainer state, steps and config.json, and a note of the
removal, which comes first. So whoever reads the folder, at any moment, takes the policy for removed and not for damaged,
and a removal that was cut short goes on where it stopped.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from opd_cache.config import KeepPolicies, Recipe
from opd_cache.run_dir import COMPLETE, REMOVED, SCHEMA_VERSION, SEAL, RunDir
from opd_cache.status import evaluation_summary
from opd_cache.store.disk import fsync_path
from opd_cache.store.publish import digest_file, publish_json, read_json

log = logging.getLogger(__name__)
# Read after the weights are gone: by learning's own plan and links, by verify and by queries.
RECORD = ("config.json", "trainer/state.json", "trainer/steps.parquet")


@dataclass(frozen=True)
class OldPolicy:
    """A policy that is to go, and what of it is still here."""

    version: int
    folder: Path
    files: tuple[Path, ...]
    bytes: int


def removable_policies(run: RunDir, recipe: Recipe) -> list[OldPolicy]:
    """The policies that the rule gives up and nothing needs any more, and those whose removal was cut short."""
    versions = [episode + 1 for episode in run.episodes() if (run.policy_after(episode) / COMPLETE).exists()]
    kept = _kept(run, recipe.learn.keep_policies, versions)
    return [
        old
        for version in versions
        if (old := _old_policy(run, version)).files
        and ((old.folder / REMOVED).exists() or (version not in kept and not _is_needed(run, recipe, version)))
    ]


def remove_policies(run: RunDir, recipe: Recipe) -> list[OldPolicy]:
    """Remove them; returns what was removed."""
    found = removable_policies(run, recipe)
    for old in found:
        _remove(old, recipe.learn.keep_policies)
        log.info("retain  policy %d removed by learn.keep_policies | %s bytes", old.version, f"{old.bytes:,}")
    return found


def _old_policy(run: RunDir, version: int) -> OldPolicy:
    folder = run.policy_after(version - 1)
    listed = (folder / name for name in read_json(folder / COMPLETE)["files"] if name not in RECORD)
    files = tuple(path for path in listed if path.exists())
    return OldPolicy(version, folder, files, sum(path.stat().st_size for path in files))


def _remove(old: OldPolicy, rule: KeepPolicies) -> None:
    content = {
        "schema_version": SCHEMA_VERSION,
        "policy_version": old.version,
        "manifest": digest_file(old.folder / COMPLETE),
        "rule": asdict(rule),
        "bytes": old.bytes,
        "time": int(time.time()),
    }
    remedy = f"Move {old.folder / REMOVED} away."
    publish_json(old.folder / REMOVED, content, "the removal", remedy, compare=("policy_version", "manifest"))
    for path in old.files:
        path.unlink(missing_ok=True)
    for folder in dict.fromkeys(path.parent for path in old.files):
        fsync_path(folder)
        if folder != old.folder and not any(folder.iterdir()):
            folder.rmdir()


def _kept(run: RunDir, rule: KeepPolicies, versions: list[int]) -> set[int]:
    """Those that the rule itself keeps."""
    if rule.last is None:
        return set(versions)
    kept = {
        *sorted(versions)[-rule.last :],
        *(version for version in versions if rule.every and version % rule.every == 0),
    }
    best = _best(run, versions) if rule.best else None
    return kept if best is None else kept | {best}


def _best(run: RunDir, versions: list[int]) -> int | None:
    """The best of those that were evaluated; the earlier one of equals."""
    found = {version: evaluation_summary(run, f"policy={version}") for version in versions}
    for key, sign in (("sampled_accuracy", 1), ("reverse_kl", -1)):
        values = {
            version: sign * summary[key] for version, summary in found.items() if summary and summary[key] is not None
        }
        if values:
            return max(values, key=lambda version: (values[version], -version))
    return None


def _is_needed(run: RunDir, recipe: Recipe, version: int) -> bool:
    """Whether something that is still to be done reads the policy, or the recipe names it."""
    if recipe.eval_is_due(version) and evaluation_summary(run, f"policy={version}") is None:
        return True
    if any(not _is_learned(run, episode) for episode in _episodes_from(recipe, version)):
        return True
    if any(_awaits_scores(run, recipe, episode) for episode in _episodes_from(recipe, version)):
        return True
    return str(version) in _named_versions(recipe) or _is_named(run, recipe, version) or _starts_replay(run, version)


def _episodes_from(recipe: Recipe, version: int) -> Iterator[int]:
    """Episodes that start from the policy, or are sampled by it."""
    yield version
    if version + 1 < recipe.num_episodes and recipe.sampling_version(version + 1) == version:
        yield version + 1


def _is_learned(run: RunDir, episode: int) -> bool:
    return (run.policy_after(episode) / COMPLETE).exists() and run.steps(episode).exists()


def _awaits_scores(run: RunDir, recipe: Recipe, episode: int) -> bool:
    """Whether the policy that sampled an episode has still to score it, as a teacher."""
    moving = [name for name in recipe.teachers_to_score() if recipe.teachers[name].policy == "current"]
    return any(not (run.episode(episode).scores(name) / SEAL).exists() for name in moving)


def _named_versions(recipe: Recipe) -> set[str | None]:
    return {teacher.policy for teacher in recipe.teachers.values()}


def _is_named(run: RunDir, recipe: Recipe, version: int) -> bool:
    """Whether a path of the recipe is this policy's folder."""
    models = [recipe.student.model, recipe.learn.reference, *(one.model for one in recipe.teachers.values())]
    folder = run.policy_after(version - 1)
    return any(Path(model).exists() and folder.samefile(model) for model in models if model is not None)


def _starts_replay(run: RunDir, version: int) -> bool:
    return run.replay_json.exists() and read_json(run.replay_json)["episodes"][0] == version
