"""Working off all checks of a run on all cores, and moving what they found out of the run."""

import itertools
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_cache.errors import StoreError
from opd_cache.logs import StageProgress
from opd_cache.run_dir import RunDir
from opd_cache.store.publish import append_line, fsync_folder, make_folder
from opd_cache.verify.walk import Check, Finding, checks_of


@dataclass(frozen=True)
class Verdict:
    """What a run's files say of each other."""

    run: RunDir
    files: int
    bytes: int
    seconds: float
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.run.path),
            "files": self.files,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "findings": [
                {"file": self.name(found.file), "problem": found.problem, "moves": list(map(self.name, found.moves)), "again": list(found.again)}
                for found in self.findings
            ],
        }  # fmt: skip

    def name(self, path: Path) -> str:
        """A file's path inside the run directory."""
        return str(path.relative_to(self.run.path))


def verify_run(path: Path) -> Verdict:
    """Read every file of a run and compare it with what the others say of it. Nothing is written.

    Memory: one row group a core, and 8 bytes a prompt. Raises MissingInputError, MismatchError, CorruptShardError
    where run.json does not say what run this is.
    """
    run, start = RunDir(path), time.monotonic()
    checks = list(checks_of(run))
    sizes = [sum(file.stat().st_size for file in check.files if file.exists()) for check in checks]
    found: dict[int, list[Finding]] = {}
    with (
        StageProgress("verify", str(path), sum(sizes) >> 20, "MiB") as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        # The largest first, so that no core is left with one at the end.
        order = sorted(range(len(checks)), key=lambda index: -sizes[index])
        futures = {pool.submit(_findings, checks[index]): index for index in order}
        read = 0
        for future in as_completed(futures):
            index = futures[future]
            found[index] = future.result()
            progress.advance(((read + sizes[index]) >> 20) - (read >> 20), 0)
            read += sizes[index]
    findings = [finding for index in range(len(checks)) for finding in found[index]]
    return Verdict(run, sum(len(check.files) for check in checks), sum(sizes), time.monotonic() - start, findings)


def _findings(check: Check) -> list[Finding]:
    return list(check.find())


def quarantine(verdict: Verdict) -> list[tuple[Path, Path]]:
    """Move what the findings name into RUN/quarantine, where nothing reads it; returns (from, to) of each. Nothing is
    deleted; the stages' own commands then make it anew.

    Raises StoreError, before anything is moved, where a folder on the way is a link that leads out of the run.
    """
    moved = []
    wanted = [
        path for path in _outermost({path for found in verdict.findings for path in found.moves}) if path.exists()
    ]
    targets = [_free_name(verdict.run.quarantine / path.relative_to(verdict.run.path)) for path in wanted]
    for path in (*wanted, *targets):
        _check_inside(verdict.run, path)
    for path, target in zip(wanted, targets, strict=True):
        make_folder(target.parent)
        os.rename(path, target)
        fsync_folder(target.parent)
        fsync_folder(path.parent)
        moved.append((path, target))
        entry = {"from": verdict.name(path), "to": verdict.name(target), "time": int(time.time())}
        append_line(verdict.run.quarantine / "moved.jsonl", json.dumps(entry))
    return moved


def _check_inside(run: RunDir, path: Path) -> None:
    if not path.parent.resolve().is_relative_to(run.path.resolve()):
        raise StoreError(
            f"{path}: lies outside of the run, at {path.parent.resolve()}, where a link leads. Nothing was moved; move it away by hand."
        )


def _outermost(paths: set[Path]) -> Sequence[Path]:
    """Those that lie in no other of them."""
    return sorted(path for path in paths if not any(parent in paths for parent in path.parents))


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))
