"""Inside a Slurm array: which part of a stage's shards this task makes."""

from collections.abc import Mapping

from opd_cache.errors import ConfigError


def array_share(environment: Mapping[str, str]) -> tuple[int, int]:
    """(task, number of tasks) of the array that this process is a task of; (0, 1) outside one.

    `--array=0-7` are tasks 0 … 7 of 8, `--array=1-8` as well; `--array=0-7` sent again as `--array=3,5-7` makes what
    tasks 3 and 5 … 7 of 8 would. Raises ConfigError on what no array of Slurm's has.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    try:
        index, first, last, count = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{', '.join(names)} in the environment must all be whole numbers: {error}. Outside an array, unset SLURM_ARRAY_TASK_ID."
        ) from error
    # Without gaps it is a range of its own; with some, a part of one that began at 0.
    return (index - first, count) if last - first + 1 == count else (index, last + 1)
