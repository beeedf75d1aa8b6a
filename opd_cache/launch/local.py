"""Every stage as its own command on this machine. Knows command lines and numbers, nothing of what a stage does."""

import subprocess
import sys
from collections.abc import Sequence

from opd_cache.errors import OpdCacheError, TryAgainError, UnhealthyError
from opd_cache.stop import SIGNALS, noted_signals

# A signal that comes before a command can handle it ends it by itself.
TRY_AGAIN = {TryAgainError.exit_status, *(-number for number in SIGNALS)}


class StageFailedError(OpdCacheError):
    """A stage's command ended with an error that it has already printed."""


class StageUnhealthyError(StageFailedError):
    """It stopped the run by health.fail_on."""

    exit_status = UnhealthyError.exit_status


class SubprocessStages:
    """Runs `opd-cache STAGE RECIPE... --episode N`, with several processes sharing the shards where asked for."""

    def __init__(self, recipe_arguments: Sequence[str], num_workers: int) -> None:
        self.recipe_arguments, self.num_workers = list(recipe_arguments), num_workers

    def __call__(self, stage: str, number: int) -> None:
        workers = self.num_workers if stage in ("rollout", "score") else 1
        commands = [self._command(stage, number, task, workers) for task in range(workers)]
        processes: list[subprocess.Popen] = []
        with noted_signals(processes) as request:
            try:
                for command in commands:
                    processes.append(subprocess.Popen(command))
                if request.signal_name is not None:  # then some were not there yet
                    raise TryAgainError(f"stopped by {request.signal_name}; the same command goes on from here.")
                statuses = [process.wait() for process in processes]
            except BaseException:
                for process in processes:
                    process.terminate()
                raise
            if failed := [status for status in statuses if status]:
                if UnhealthyError.exit_status in failed:
                    raise StageUnhealthyError(f"{stage} {number} stopped the run by health.fail_on; see above.")
                kind = TryAgainError if TRY_AGAIN.issuperset(failed) else StageFailedError
                raise kind(
                    f"{stage} {number} ended with status {failed[0]}; see above. The same command goes on from what is published."
                )

    def _command(self, stage: str, number: int, task: int, workers: int) -> list[str]:
        which = ["--policy-version", str(number)] if stage == "eval" else ["--episode", str(number)]
        share = ["--task", str(task), "--num-tasks", str(workers)] if workers > 1 else []
        return [sys.executable, "-m", "opd_cache", stage, *self.recipe_arguments, *which, *share]
