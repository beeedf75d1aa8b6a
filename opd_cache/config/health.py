"""When a stage's figures are worth a warning, and when they stop the run."""

from dataclasses import dataclass
from typing import Optional

from opd_cache.config.options import option

# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class HealthConfig:
    """Thresholds on the figures of each stage, looked at where the stage is complete. null: not looked at."""

    truncated_share: Optional[float] = option(
        0.5, "rollout: warn when more of the responses were cut at max_new_tokens.", min=0, max=1
    )
    empty_share: Optional[float] = option(
        0.05, "rollout: warn when more of the responses have no token before their EOS.", min=0, max=1
    )
    eos_share: Optional[float] = option(
        0.0, "rollout: warn when no more of the responses than this end with an EOS. 0: when none does.", min=0, max=1
    )
    loop_share: Optional[float] = option(
        0.1,
        "rollout: warn when more of the responses were cut in a loop: their last 16 tokens stand in them three times or more.",
        min=0,
        max=1,
    )
    unlikely_share: Optional[float] = option(
        0.02,
        "score: warn when the teacher gives more of the tokens a probability below 1e-6: another tokenizer, template or EOS.",
        min=0,
        max=1,
    )
    advantage_low: Optional[float] = option(
        -4.0, "score: warn when the mean teacher − student log-prob is below this many nats."
    )
    advantage_high: Optional[float] = option(
        0.1, "score: warn when it is above: the mean over the student's own samples is minus a KL, so at most 0."
    )
    ess: Optional[float] = option(
        0.5,
        "learn: warn when the mean effective sample size of the steps is below: the policy is far from the one that sampled.",
        min=0,
        max=1,
    )
    entropy_ratio: Optional[float] = option(
        0.02,
        "learn: warn when the student's mean entropy is below this share of that of the first two episodes. It falls by itself where the teacher is surer: to 0.07 in the quickstart.",
        min=0,
    )
    fail_on: Optional[list[str]] = option(
        None,
        "Which of these stop the run with exit status 3 before the next stage, such as [truncated_share, eos_share]; null: none.",
        choices=(
            "truncated_share",
            "empty_share",
            "eos_share",
            "loop_share",
            "unlikely_share",
            "advantage_low",
            "advantage_high",
            "ess",
            "entropy_ratio",
        ),
    )
