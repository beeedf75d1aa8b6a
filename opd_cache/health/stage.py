"""A look at a complete stage: its figures, what is wrong with them, a note of it in the run, and a stop where asked for.

The figures are read from seals and from steps.parquet. The same look is taken where a stage is sealed and before the
next one starts, and says nothing that it has said before.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_cache.config import HealthConfig, Recipe
from opd_cache.errors import UnhealthyError
from opd_cache.health.checks import Finding, findings, learn_means, rollout_shares, score_means
from opd_cache.notes import write_note
from opd_cache.run_dir import SEAL, RunDir
from opd_cache.status import asked_teachers, query_command, scored_parts
from opd_cache.store.publish import read_json, read_plain_json
from opd_cache.store.shards import read_row_groups

log = logging.getLogger(__name__)
FIRST_EPISODES = 2  # whose entropy is the measure of later ones


def check_stage(
    run: RunDir, recipe: Recipe, stage: str, episode: int, teacher: str | None = None, keep: bool = True
) -> None:
    """Look at a stage (rollout, score of one teacher, learn), where it is complete; else there is nothing to say.

    Logs one line a warning that is new and, with `keep`, keeps them in logs/health. Raises UnhealthyError for what
    health.fail_on names.
    """
    figures = _figures(run, stage, episode, teacher)
    if figures is None:
        return
    found = findings(stage, figures, recipe.health)
    label = f"episode {episode} {stage}" + (f" {teacher}" if teacher else "")
    lines = [f"{finding.text}. See: {query_command(str(run.path), finding.query)}" for finding in found]
    note = {
        "stage": stage,
        "episode": episode,
        "teacher": teacher,
        "figures": figures,
        "warnings": [{**asdict(finding), "text": finding.text, "query": finding.query} for finding in found],
    }
    path = run.health_note(episode, stage, teacher)
    if _kept(path) != json.loads(json.dumps(note)):
        if keep:
            write_note(path, note)
        for line in lines:
            log.warning("health  %s | %s", label, line)
    _stop(label, recipe.health, found, lines)


def check_episode(run: RunDir, recipe: Recipe, episode: int, keep: bool = True) -> None:
    """Look at all that is complete of an episode."""
    check_stage(run, recipe, "rollout", episode, keep=keep)
    for teacher in asked_teachers(run.episode(episode)):
        check_stage(run, recipe, "score", episode, teacher, keep)
    check_stage(run, recipe, "learn", episode, keep=keep)


def _kept(path: Path) -> dict[str, Any] | None:
    return read_plain_json(path) if path.exists() else None


def _stop(label: str, health: HealthConfig, found: Sequence[Finding], lines: Sequence[str]) -> None:
    named = [line for finding, line in zip(found, lines, strict=True) if finding.name in (health.fail_on or ())]
    if named:
        more = f" ({len(named) - 1} more of health.fail_on)" if len(named) > 1 else ""
        raise UnhealthyError(
            f"{label}: {named[0]}{more}. The run stops before its next stage; to go on, change the threshold or take it out of health.fail_on."
        )


def _figures(run: RunDir, stage: str, episode: int, teacher: str | None) -> dict[str, float] | None:
    """None where the stage is not complete."""
    target = run.episode(episode)
    if stage == "rollout":
        sums = _sums([target.rollouts])
        return None if sums is None else rollout_shares(sums)
    if stage == "score":
        parts = [target.scores(teacher or "", first) for first in scored_parts(target, teacher or "")]
        sums = _sums(parts) if parts else None
        return None if sums is None else score_means(sums)
    if not run.steps(episode).exists():
        return None
    first = (
        [row for number in range(FIRST_EPISODES) for row in _steps(run, number)] if episode >= FIRST_EPISODES else []
    )
    return learn_means(_steps(run, episode), first)


def _sums(folders: Iterable[Path]) -> Counter[str] | None:
    """The figures of all shards of these folders. None where one is not sealed; empty where a shard has none, which an
    older version made."""
    total: Counter[str] = Counter()
    for folder in folders:
        if not (folder / SEAL).exists():
            return None
        for shard in read_json(folder / SEAL)["shards"]:
            if not shard.get("figures"):
                return Counter()
            total.update(shard["figures"])
    return total


def _steps(run: RunDir, episode: int) -> list[dict[str, Any]]:
    path = run.steps(episode)
    tables = read_row_groups(path, ["tokens", "ess", "entropy"]) if path.exists() else ()
    return [row for table in tables for row in table.to_pylist()]
