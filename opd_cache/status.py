"""What a run has so far, read from its files alone: no torch, no Parquet."""

from pathlib import Path
from typing import Any

from opd_cache.errors import MissingInputError
from opd_cache.run_dir import COMPLETE, FAILED_SHARD, PLAN, REMOVED, SEAL, SUMMARY, RolloutSet, RunDir, shard_name
from opd_cache.store.publish import read_json, read_plain_json

STAGES = ("rollout", "score", "learn", "eval")


def run_status(path: Path) -> dict[str, Any]:
    """Everything that `opd-cache status --json` prints. Raises MissingInputError when there is no run."""
    run = RunDir(path)
    identity = read_identity(run)
    recipe = identity["recipe"]
    teachers = {
        subject.removeprefix("teacher="): evaluation_summary(run, subject)
        for subject in evaluated_subjects(run)
        if subject.startswith("teacher=")
    }
    episodes = [_episode(run, episode) for episode in run.episodes()]
    return {
        "run_dir": str(path),
        "run_id": identity["run_id"],
        "num_episodes": recipe["num_episodes"],
        "episodes_done": sum(entry["learn"]["done"] for entry in episodes),
        "baseline": evaluation_summary(run, "policy=0"),
        "teacher": teachers.get(_learning_teacher(recipe)),
        "teachers": teachers,
        "episodes": episodes,
        "failed_shards": failed_shards(run),
        "warnings": kept_warnings(run),
        "seconds": {stage: round(sum(note["seconds"] for note in _notes(run, stage)), 2) for stage in STAGES},
        "bytes": {
            "rollouts": sum(entry["rollouts"]["bytes"] for entry in episodes),
            "scores": sum(scores["bytes"] for entry in episodes for scores in entry["scores"].values()),
        },
        "response_tokens": sum(entry["rollouts"]["tokens"] for entry in episodes),
    }


def _learning_teacher(recipe: dict[str, Any]) -> str:
    """The first of those that the student learns from."""
    learn = recipe["learn"]
    routed = (learn.get("routes") or {}).values()
    return next(iter([*routed, *(learn.get("teachers") or {}), learn["teacher"] or next(iter(recipe["teachers"]))]))


def read_identity(run: RunDir) -> dict[str, Any]:
    """run.json. Raises MissingInputError when there is no run, MismatchError when another version wrote it."""
    if not run.run_json.exists():
        raise MissingInputError(
            f"{run.path}: no run.json; this is no run directory. Start one: opd-cache run RECIPE run_dir={run.path}"
        )
    return read_json(run.run_json)


def _episode(run: RunDir, episode: int) -> dict[str, Any]:
    target = run.episode(episode)
    plan = read_json(target.plan) if target.plan.exists() else None
    shards = -(-len(plan["prompt_indices"]) // plan["prompts_per_shard"]) if plan else 0
    manifest = run.policy_after(episode) / COMPLETE
    learn_plan = run.learn(episode) / PLAN
    return {
        "episode": episode,
        "policy_version": plan["policy_version"] if plan else None,  # that samples it
        "rollouts": _stage(target.rollouts, shards),
        "scores": {folder.name.removeprefix("teacher="): _stage(folder, shards) for folder in score_folders(target)},
        "learn": {
            "done": manifest.exists(),
            "removed": manifest.with_name(REMOVED).exists(),  # by learn.keep_policies
            "steps": read_json(learn_plan)["num_steps"] if learn_plan.exists() else None,
        },
        "eval": evaluation_summary(run, f"policy={episode + 1}"),
    }


def _stage(folder: Path, shards: int) -> dict[str, Any]:
    sealed = read_json(folder / SEAL) if (folder / SEAL).exists() else {}
    planned = {shard_name(shard, shards) for shard in range(shards)}
    done = len(planned & {path.name for path in folder.iterdir()}) if folder.is_dir() else 0
    return {
        "shards": shards,
        "done": done,
        "sealed": bool(sealed),
        "rows": sealed.get("rows", 0),
        "tokens": sealed.get("tokens", 0),
        "bytes": sealed.get("bytes", 0),
    }


def evaluation_summary(run: RunDir, subject: str) -> dict[str, Any] | None:
    """The figures of `policy=N` or `teacher=NAME`; None when it was not evaluated."""
    path = run.evaluation(subject) / SUMMARY
    summary = read_json(path) if path.exists() else {}
    return summary if summary.get("subject") == subject else None


def evaluated_subjects(run: RunDir) -> list[str]:
    """Every `policy=N` and `teacher=NAME` with a summary of its own. A folder moved aside, such as `policy=3.old`, has
    another's."""
    names = sorted(path.parent.name for path in run.path.glob(f"evals/*/{SUMMARY}"))
    return [name for name in names if evaluation_summary(run, name) is not None]


def asked_teachers(target: RolloutSet) -> list[str]:
    """The teachers with a scoring plan of their own. A folder moved aside, such as `teacher=main.old`, has another's."""
    names = sorted(path.parent.name.removeprefix("teacher=") for path in target.path.glob(f"scores/teacher=*/{PLAN}"))
    return [name for name in names if read_json(target.scores(name) / PLAN).get("teacher") == name]


def scored_parts(target: RolloutSet, teacher: str) -> list[int]:
    """First response token of each part of a teacher's scores, in order: 0, and the horizons that were grown since."""
    parts: list[int] = []
    following: int | None = 0
    while following is not None and (path := target.scores(teacher, following) / PLAN).exists():
        parts.append(following)
        horizon = read_json(path).get("horizon")
        following = horizon if horizon is None or horizon > following else None
    return parts


def unfinished_stages(target: RolloutSet) -> list[str]:
    """Of rollout and score those that were begun and are not sealed: not done yet, or taken out by `repair`."""
    begun = {"rollout": [target.rollouts], "score": sorted(target.path.glob("scores/teacher=*"))}
    plans = {"rollout": target.plan}
    return [
        stage
        for stage, folders in begun.items()
        if any(
            folder.is_dir() and not (plans.get(stage, folder / PLAN).exists() and (folder / SEAL).exists())
            for folder in folders
        )
    ]


def score_folders(target: RolloutSet) -> list[Path]:
    """Every folder with scores, teacher by teacher."""
    return [target.scores(name, first) for name in asked_teachers(target) for first in scored_parts(target, name)]


def _notes(run: RunDir, stage: str) -> list[dict[str, Any]]:
    folder = run.path / "logs" / stage
    # An evaluation's note covers its own rollouts and scores, whose notes lie under eval-*.
    return [
        read_plain_json(path)
        for path in sorted(folder.glob("*/*.json"))
        if not path.parent.name.startswith("eval-") and not path.name.endswith(FAILED_SHARD)
    ]


def failed_shards(run: RunDir) -> list[dict[str, Any]]:
    """What failed for good and has not been made since, with the error that each met last."""
    notes = [read_plain_json(path) for path in sorted(run.logs.glob(f"*/*/*{FAILED_SHARD}"))]
    return [
        note
        for note in notes
        if not ((run.path / note["file"]).exists() or (run.path / note["file"]).with_name(SEAL).exists())
    ]


def kept_warnings(run: RunDir) -> list[dict[str, Any]]:
    """What was warned of, by episode and stage: stage, episode, teacher, name, value, threshold, text, query, command."""
    notes = [read_plain_json(path) for path in run.health_notes()]
    notes.sort(key=lambda note: (note["episode"], STAGES.index(note["stage"]), note["teacher"] or ""))
    return [
        {
            **{key: note[key] for key in ("stage", "episode", "teacher")},
            **warning,
            "command": query_command(str(run.path), warning["query"]),
        }
        for note in notes
        for warning in note["warnings"]
    ]


def query_command(run_dir: str, query: str) -> str:
    """The command that asks a ready query."""
    return f"opd-cache query {run_dir} --example {query}"


def status_tables(status: dict[str, Any]) -> list[Any]:
    """The same for people: rich renderables."""
    from rich.table import Table

    stages = Table(
        title=f"{status['run_dir']} · run {status['run_id']} · {status['episodes_done']} of {status['num_episodes']} episodes"
    )
    for column in ("episode", "rollouts", "scores", "learn", "tokens", "greedy", "sampled", "reverse KL"):
        stages.add_column(column, justify="right")
    for entry in status["episodes"]:
        scores = ", ".join(f"{name} {_progress(stage)}" for name, stage in entry["scores"].items()) or "-"
        learned = "done" if entry["learn"]["done"] else "-"
        if entry["learn"]["removed"]:
            learned = "done, policy removed by the retention rule"
        stages.add_row(
            str(entry["episode"]),
            _progress(entry["rollouts"]),
            scores,
            learned,
            f"{entry['rollouts']['tokens']:,}",
            *evaluation_cells(entry["eval"]),
        )
    failures = [_failures_table(status["failed_shards"])] if status["failed_shards"] else []
    warnings = [_warnings_table(status["warnings"], status["run_dir"])] if status["warnings"] else []
    return [stages, *failures, *warnings, results_table(status)]


def _failures_table(failed: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="failed shards; the stage's command tries them again")
    for column in ("shard", "error", "when", "where"):
        table.add_column(column, overflow="fold")
    for note in failed:
        error = f"{note['error']}: {note['message'].removeprefix(note['error'] + ': ')}"
        table.add_row(note["file"], error, note["time"], _process_of(note))
    return table


def _warnings_table(warnings: list[dict[str, Any]], run_dir: str) -> Any:
    from rich.table import Table

    table = Table(title="health", caption=f"see: {query_command(run_dir, 'QUERY')}")
    for column in ("episode", "stage", "warning", "QUERY"):
        table.add_column(column, justify="right" if column == "episode" else "left", overflow="fold")
    for warning in warnings:
        stage = " ".join(filter(None, (warning["stage"], warning["teacher"])))
        table.add_row(str(warning["episode"]), stage, warning["text"], warning["query"])
    return table


def _process_of(note: dict[str, Any]) -> str:
    """Where to look for the log of what wrote a note."""
    place = f"{note['host']}, process {note['pid']}"
    if "slurm_array_task_id" in note:
        return f"{place}, job {note['slurm_array_job_id']}_{note['slurm_array_task_id']}"
    return f"{place}, job {note['slurm_job_id']}" if "slurm_job_id" in note else place


def _progress(stage: dict[str, Any]) -> str:
    complete = stage["done"] == stage["shards"]
    return f"{stage['done']}/{stage['shards']}" + (" unsealed" if complete and not stage["sealed"] else "")


def results_table(status: dict[str, Any]) -> Any:
    """Student before, student now, teacher."""
    from rich.table import Table

    table = Table(title="held-out prompts")
    for column in ("", "greedy", "sampled", "reverse KL (nats/token)"):
        table.add_column(column, justify="left" if not column else "right")
    latest = next((entry for entry in reversed(status["episodes"]) if entry["eval"]), None)
    table.add_row("student before", *evaluation_cells(status["baseline"]))
    if latest:
        table.add_row(f"student after episode {latest['episode']}", *evaluation_cells(latest["eval"]))
    for name, evaluation in status["teachers"].items():
        table.add_row(f"teacher {name}", *evaluation_cells(evaluation))
    return table


def evaluation_cells(evaluation: dict[str, Any] | None) -> list[str]:
    keys = ("greedy_accuracy", "sampled_accuracy", "reverse_kl")
    values = [None if evaluation is None else evaluation[key] for key in keys]
    formats = ("{:.1%}", "{:.1%}", "{:.3f}")
    return ["-" if value is None else form.format(value) for value, form in zip(values, formats, strict=True)]
