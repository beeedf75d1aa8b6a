"""Every error a user can meet: one line that says what was found, what was expected, where, and what to do.

The command line prints the line without a traceback and exits with the class's `exit_status`.
"""

import os
from collections.abc import Iterator


def error_line(kind: str, message: str) -> str:
    """An error as one line, whatever names and texts it quotes; behind the number of its rank where that is not 0."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    prefix = "" if rank == "0" else f"[rank {rank}] "
    return visible("\\n".join(f"{prefix}{kind}: {message}".splitlines()))


def visible(text: str) -> str:
    """The text with escapes in place of what a terminal would obey: what files and servers say is quoted in messages."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class OpdCacheError(Exception):
    """A mistake that the user can mend."""

    exit_status = 2


class ConfigError(OpdCacheError, ValueError):
    """A recipe or a command line that cannot be followed."""


class PromptError(OpdCacheError, ValueError):
    """A prompts file with a line that cannot be used."""


class RolloutFileError(OpdCacheError, ValueError):
    """A file of outside rollouts with a row that cannot be used."""


class ModelError(OpdCacheError, ValueError):
    """A model or tokenizer that is missing, unreadable or unfit for its role."""


class StoreError(OpdCacheError):
    """Something in the run directory is not what it should be."""


class DiskError(StoreError):
    """A disk that fails or lies. Trying again is of no use before somebody has seen to it."""


class CorruptShardError(StoreError, ValueError):
    """A shard or manifest is damaged: truncated, flipped bits, wrong rows."""


class AlignmentError(StoreError, ValueError):
    """A score row does not belong to the rollout row beside it."""


class MismatchError(StoreError, ValueError):
    """What is on disk was made from other inputs or other settings than those at hand."""


class MissingInputError(StoreError, FileNotFoundError):
    """A stage was asked for before the stage that feeds it was complete."""


class EngineOutputError(OpdCacheError, RuntimeError):
    """An inference engine or server gave something else than it was asked for; nothing of it was published."""


class DivergedError(OpdCacheError, ArithmeticError):
    """A model's numbers are no longer finite; going on would publish a broken policy."""


class TryAgainError(OpdCacheError):
    """Nothing is wrong with the request; the same command may succeed later (full disk, busy server)."""

    exit_status = 75


class LostRanksError(TryAgainError):
    """Other ranks have died or do not answer. The process ends with this at once: what connects it with them waits for
    them even while it is taken down."""


class UnhealthyError(OpdCacheError):
    """A figure that health.fail_on names is beyond its threshold: before it goes on, somebody has to look."""

    exit_status = 3


class FirstRankFailedError(OpdCacheError):
    """The first rank of several has failed and says why; this one ends with it, in silence."""

    def __init__(self, exit_status: int) -> None:
        super().__init__("the first rank failed")
        self.exit_status = exit_status
