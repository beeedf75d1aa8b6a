"""The rows of the view `shards`: what the seals say of every shard, and what the logs say of making it."""

import os
from pathlib import Path
from typing import Any

from opd_cache.run_dir import RunDir
from opd_cache.store.publish import read_plain_json
from opd_cache.store.sealed import RunFiles, StageFiles

FROM_SEAL = ("rows", "tokens", "bytes", "sha256")
FROM_NOTE = ("seconds", "host", "engine")


def shard_rows(found: RunFiles) -> list[dict[str, Any]]:
    """One row a shard, as schema.SHARDS names the columns."""
    stages = [*found.rollouts, *found.scores, *found.evaluations]
    return [row for stage in stages for row in _rows_of(found.dir, stage)]


def _rows_of(run: RunDir, stage: StageFiles) -> list[dict[str, Any]]:
    sealed = {entry["file"]: entry for entry in stage.facts["shards"]} if stage.is_sealed else {}
    rows, place = [], str(stage.folder.relative_to(run.path))
    logs = os.path.join(run.log_folder(stage.stage, stage.log_name), stage.folder.name)
    for name in stage.names:
        stem, number, *_ = name.split("-")
        note = _note(f"{logs}-{stem}-{number}.json")
        rows.append({
            "stage": stage.stage,
            "scope": stage.facts["scope"],
            "episode": stage.episode,
            "teacher": stage.teacher,
            "first_token": stage.first_token,
            "shard": int(number),
            "file": f"{place}/{name}",
            "is_sealed": stage.is_sealed,
            **{key: sealed.get(name, {}).get(key) for key in FROM_SEAL},
            "plan": stage.facts["plan"] if stage.is_sealed else None,
            "inputs": stage.facts.get("rollouts"),
            **{key: note.get(key) for key in FROM_NOTE},
        })  # fmt: skip
    return rows


def _note(path: str) -> dict[str, Any]:
    """What the shard's maker wrote down; a replay's shards, which are another run's, have none."""
    return read_plain_json(Path(path)) if os.path.exists(path) else {}
