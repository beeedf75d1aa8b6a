"""Stages in Python environments of their own: the sampler's and the teacher's packages need not fit the learner's."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError


def python_of(recipe: Recipe, stage: str) -> str | None:
    """The interpreter that a stage wants, None for this one. Evaluation samples, so it goes where the rollout goes.

    Raises ConfigError when there is none.
    """
    name = "rollout" if stage == "eval" else stage
    wanted: str | None = getattr(recipe, name).python
    if wanted is None or os.path.abspath(wanted) == os.path.abspath(sys.executable):
        return None
    if not os.access(wanted, os.X_OK) or Path(wanted).is_dir():
        raise ConfigError(
            f"{name}.python = {wanted!r}: no program there. Give the python of an environment that has opd-cache, such as .venv-vllm/bin/python."
        )
    return os.path.abspath(wanted)


def enter(recipe: Recipe, stage: str, arguments: Sequence[str]) -> None:
    """Go on as `opd-cache ARGUMENTS` in the stage's environment; returns when this is it."""
    if (python := python_of(recipe, stage)) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(python, [python, "-m", "opd_cache", *arguments])
