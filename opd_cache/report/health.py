"""What is wrong with a run, or not there: what its health checks warn of, missing and failed shards, slow ones, what no view reads."""

from typing import Any

from opd_cache.errors import OpdCacheError
from opd_cache.report.live import LiveRun
from opd_cache.run_dir import EPISODE_FOLDER, PLAN, REMOVED, RunDir
from opd_cache.status import asked_teachers, evaluated_subjects, failed_shards, kept_warnings, score_folders
from opd_cache.store.publish import read_json
from opd_cache.store.sealed import StageFiles, find_files, num_shards

SLOWER = 2.0  # times the median seconds a token of its stage
MAX_SLOW = 50
SLOW = f"""
    WITH measured AS (
        SELECT stage, teacher, scope, shard, file, host, engine, seconds, tokens, tokens / seconds AS tokens_per_s,
            median(tokens / seconds) OVER (PARTITION BY stage, teacher, episode IS NULL) AS median_tokens_per_s
        FROM shards WHERE seconds > 0 AND tokens > 0
    )
    SELECT *, median_tokens_per_s / tokens_per_s AS times_slower FROM measured
    WHERE times_slower >= {SLOWER} ORDER BY times_slower DESC LIMIT {MAX_SLOW}"""
WARNING = ("episode", "stage", "teacher", "text", "query", "command")
FAILURE = ("file", "stage", "error", "message", "time", "host", "pid")


def run_health(run: LiveRun) -> dict[str, Any]:
    """Lists of rows, each empty where all is well; `shards` counts what is sealed, `fault` is why no view can be read."""
    directory = RunDir(run.path)
    return {
        "name": run.name,
        **_measured(run),
        "warnings": [{key: warning[key] for key in WARNING} for warning in kept_warnings(directory)],
        "gaps": gaps(directory),
        "failed": [{key: note.get(key) for key in FAILURE} for note in failed_shards(directory)],
        "left_out": run.left_out,
        "removed_policies": removed_policies(directory),
        "moved_aside": moved_aside(directory),
    }


def _measured(run: LiveRun) -> dict[str, Any]:
    """What the views say of the shards. They cannot be read where a sealed file is gone or damaged."""
    try:
        state = run.state()
        (counted,) = state.rows("SELECT count(*) AS shards, count(seconds) AS with_seconds FROM shards WHERE is_sealed")
        return {**counted, "slow": state.rows(SLOW), "fault": None}
    except OpdCacheError as error:
        return {"shards": None, "with_seconds": None, "slow": [], "fault": str(error)}


def gaps(run: RunDir) -> list[dict[str, Any]]:
    """Every rollout and score stage that has begun and lacks shards or its seal, and every sealed shard that is gone."""
    found, rows = find_files(run, partial=True), []
    for stage in [*found.rollouts, *found.scores, *_unstarted(run)]:
        missing = _missing(run, stage)
        if missing or not stage.is_sealed:
            rows.append({
                "episode": stage.episode, "stage": stage.stage, "teacher": stage.teacher, "is_sealed": stage.is_sealed,
                "num_shards": _expected(run, stage), "missing": missing,
            })  # fmt: skip
    return sorted(rows, key=lambda row: (row["episode"], row["stage"], row["teacher"] or ""))


def _unstarted(run: RunDir) -> list[StageFiles]:
    """Planned rollouts without a shard; of scores that are not planned nothing is known to be missing."""
    stages = []
    for episode in run.episodes():
        target = run.episode(episode)
        folders = {"rollout": [(None, target.rollouts)]} | {
            "score": [(name, target.scores(name)) for name in asked_teachers(target)]
        }
        for stage, places in folders.items():
            stages += [
                StageFiles(stage, folder, target.log_name, episode, teacher, 0, [], {}, False)
                for teacher, folder in places
                if target.plan.exists() and not any(folder.glob("shard-*.parquet"))
            ]
    return stages


def _expected(run: RunDir, stage: StageFiles) -> int:
    plan = run.episode(stage.episode or 0).plan
    return len(stage.names) if stage.is_sealed else num_shards(read_json(plan) if plan.exists() else {})


def _missing(run: RunDir, stage: StageFiles) -> list[int]:
    """Numbers of the shards that are not there."""
    there = {int(path.name.split("-")[1]) for path in stage.files if path.exists()}
    return [shard for shard in range(_expected(run, stage)) if shard not in there]


def removed_policies(run: RunDir) -> list[dict[str, Any]]:
    """Version and bytes of those that learn.keep_policies has taken away."""
    notes = [run.policy_after(episode) / REMOVED for episode in run.episodes()]
    return [{key: read_json(note)[key] for key in ("policy_version", "bytes")} for note in notes if note.exists()]


def moved_aside(run: RunDir) -> list[str]:
    """Folders beside those that are read, such as `episode=3.old` or `teacher=main.bad`, and what lies in quarantine/."""
    found = [path for path in run.path.glob("episode=*") if not EPISODE_FOLDER.fullmatch(path.name)]
    found += [path for path in run.quarantine.glob("*") if not path.name.startswith(".")]
    for episode in run.episodes():
        target = run.episode(episode)
        read = set(score_folders(target))
        found += [path for path in target.path.glob("scores/*") if path not in read and not _begun(path)]
        found += list(target.path.glob("rollouts?*"))
    subjects = evaluated_subjects(run)
    found += [
        path for path in run.path.glob("evals/*") if path.name not in subjects and (path / "summary.json").exists()
    ]
    return sorted(str(path.relative_to(run.path)) for path in found)


def _begun(scores: Any) -> bool:
    """Scores without a plan are only just begun, or empty."""
    return not (scores / PLAN).exists()
