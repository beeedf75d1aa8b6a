"""What a scorer is asked for and what it gives: the seam between the stage and its backends."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.types import Rollout, Score


class Scorer(Protocol):
    """A backend of the score stage. The constructor does not load the model; the first use does."""

    engine: str  # name and version, for the logs
    dtype: str  # the teacher's compute dtype, part of what a score is
    window: int  # rows handed over at once: bounds memory, and within it rows may be reordered

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None: ...

    def load(self) -> None:
        """Load the teacher, unless it is."""

    def score(self, rows: Sequence[Rollout], top_k: int) -> Iterator[tuple[int, Score]]:
        """(index in rows, score) of every row, in any order."""


def empty_score(rollout: Rollout, top_k: int, error: str | None = None) -> Score:
    """The score of a response without tokens, or of one that cannot be scored."""
    return Score(
        rollout.rollout_id,
        rollout.ids_hash,
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        np.zeros((0, top_k), np.int32),
        np.zeros((0, top_k), np.float32),
        error,
    )
