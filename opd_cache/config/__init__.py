"""Recipes: what a run is asked to do. Dataclasses say which keys exist, their types, defaults and ranges.

How recipe files are read and merged is in recipes.py; how values are checked, one by one in values.py, as a whole in
recipe_checks.py. Run-time state never enters a recipe.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

from opd_cache.config.data import EvalConfig, PromptsConfig, TaskConfig
from opd_cache.config.health import HealthConfig
from opd_cache.config.learning import DeepSpeedOptions, KeepPolicies, LearnConfig, LoraOptions, LossConfig
from opd_cache.config.models import ModelConfig, TeacherConfig, TeacherPrompt, VllmOptions
from opd_cache.config.options import field_types, option
from opd_cache.config.stages import HttpOptions, PipelineConfig, RolloutConfig, ScoreConfig

__all__ = [
    "DeepSpeedOptions",
    "EvalConfig",
    "HealthConfig",
    "HttpOptions",
    "KeepPolicies",
    "LearnConfig",
    "LoraOptions",
    "LossConfig",
    "ModelConfig",
    "PipelineConfig",
    "PromptsConfig",
    "Recipe",
    "RolloutConfig",
    "ScoreConfig",
    "TaskConfig",
    "TeacherConfig",
    "TeacherPrompt",
    "VllmOptions",
    "describe_keys",
    "field_types",
]

# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class Recipe:
    """A whole run."""

    run_dir: str = option(MISSING, "Everything that the run writes is in here.")
    seed: int = option(0, "Every random choice derives from it.", min=0, max=2**63 - 1)
    num_episodes: int = option(10, "Rounds of rollout, score and learn.", min=1)
    launcher: str = option(
        "inline",
        "run: stages in one process, or each its own command.",
        choices=("inline", "subprocess"),
    )
    keep_models: Optional[bool] = option(
        None,
        "launcher=inline: keep the models of all stages in memory from one stage to the next, or only those of the stage that runs; null: all, where student and teachers have less than 50 million parameters together.",
    )
    num_workers: int = option(1, "launcher=subprocess: processes that share the shards of a stage.", min=1)
    torch_threads: Optional[int] = option(
        None,
        "CPU threads of torch in each process; null: torch chooses. Fix it to get the same bits on other machines.",
        min=1,
    )
    stall_timeout_s: Optional[float] = option(
        3600.0,
        "A stage that shows no progress for so long (no rollout, no step, no end of loading a model) ends with exit status 75. Too short: a slow batch is taken for a hang, every time again. null: never.",
        above=0,
    )
    task: TaskConfig = option(TaskConfig, "A made task.")
    student: ModelConfig = option(ModelConfig, "The student before training.")
    teachers: dict[str, TeacherConfig] = option(dict, "Teachers by name; the name becomes scores/teacher=NAME.")
    prompts: PromptsConfig = option(PromptsConfig, "Training prompts.")
    pipeline: PipelineConfig = option(PipelineConfig, "The order of the stages.")
    rollout: RolloutConfig = option(RolloutConfig, "The rollout stage.")
    score: ScoreConfig = option(ScoreConfig, "The score stage.")
    learn: LearnConfig = option(LearnConfig, "The learn stage.")
    eval: EvalConfig = option(EvalConfig, "Evaluation.")
    health: HealthConfig = option(HealthConfig, "What warns of a run gone wrong.")

    def learning_teachers(self) -> list[str]:
        """Whose scores the student learns from."""
        learn = self.learn
        if learn.routes:
            return list(dict.fromkeys(learn.routes.values()))
        return list(learn.teachers or [learn.teacher or next(iter(self.teachers))])

    def teachers_to_score(self) -> list[str]:
        """The teachers that the score stage asks."""
        return [self.score.teacher] if self.score.teacher is not None else list(self.teachers)

    def sampling_version(self, episode: int) -> int:
        """The policy that samples an episode. Learning it always goes on from policy version `episode`."""
        return max(0, episode - self.pipeline.lookahead)

    def eval_is_due(self, version: int) -> bool:
        """Whether this policy is to be evaluated."""
        return self.eval.path is not None and (version % self.eval.every_episodes == 0 or version == self.num_episodes)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in run.json."""
        return dataclasses.asdict(self)


def describe_keys(config_type: type = Recipe, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(key, default, documentation) of every recipe key, in order."""
    rows: list[tuple[str, Any, str]] = []
    hints = field_types(config_type)
    for f in dataclasses.fields(config_type):
        kind, key = hints[f.name], f"{prefix}{f.name}"
        if key == "teachers":
            rows += describe_keys(TeacherConfig, f"{key}.NAME.")
        elif dataclasses.is_dataclass(kind):
            rows += describe_keys(typing.cast(type, kind), f"{key}.")
        else:
            default = f.default if f.default is not dataclasses.MISSING else typing.cast(Any, f.default_factory)()
            limits = f.metadata
            names = limits.get("choices") or limits.get("table")
            doc = limits["doc"] + (f" One of: {', '.join(names)}." if names else "")
            rows.append((key, "(required)" if default == MISSING else default, doc))
    return rows
