"""Figures of a stage against the thresholds of the recipe. Pure; where the figures come from is in stage.py."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_cache.config import HealthConfig


@dataclass(frozen=True)
class Check:
    """One figure and one side on which it may lie; its threshold is the key of `health` with the check's name."""

    stage: str
    figure: str
    is_bad: Callable[[float, float], bool]  # (figure, threshold)
    allows: str  # what the threshold means
    meaning: str
    query: str  # the ready query that shows the figure


CHECKS = {
    "truncated_share": Check(
        "rollout",
        "truncated_share",
        operator.gt,
        "at most",
        "responses that were cut before their EOS",
        "truncated-share",
    ),
    "empty_share": Check(
        "rollout",
        "empty_share",
        operator.gt,
        "at most",
        "responses without a token before their EOS",
        "empty-responses",
    ),
    "eos_share": Check(
        "rollout", "eos_share", operator.le, "more than", "responses that end with an EOS", "truncated-share"
    ),
    "loop_share": Check("rollout", "loop_share", operator.gt, "at most", "responses that were cut in a loop", "loops"),
    "unlikely_share": Check(
        "score",
        "unlikely_share",
        operator.gt,
        "at most",
        "tokens with a teacher probability below 1e-6",
        "unlikely-tokens",
    ),
    "advantage_low": Check(
        "score", "advantage", operator.lt, "at least", "mean teacher − student log-prob, nats", "reverse-kl-by-episode"
    ),
    "advantage_high": Check(
        "score", "advantage", operator.gt, "at most", "mean teacher − student log-prob, nats", "reverse-kl-by-episode"
    ),
    "ess": Check(
        "learn",
        "ess",
        operator.lt,
        "at least",
        "effective sample size ÷ tokens, mean of the steps",
        "sampler-learner-mismatch",
    ),
    "entropy_ratio": Check(
        "learn",
        "entropy_ratio",
        operator.lt,
        "at least",
        "the student's entropy ÷ that of the first episodes",
        "entropy-by-episode",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A figure beyond its threshold."""

    name: str
    value: float
    threshold: float

    @property
    def query(self) -> str:
        return CHECKS[self.name].query

    @property
    def text(self) -> str:
        check = CHECKS[self.name]
        return f"{check.figure} = {self.value:.4g}, expected {check.allows} health.{self.name} = {self.threshold:.4g}: {check.meaning}"


def findings(stage: str, figures: Mapping[str, float], health: HealthConfig) -> list[Finding]:
    """What is beyond its threshold. A figure that is not known is not looked at, nor is one without a threshold."""
    found = []
    for name, check in CHECKS.items():
        threshold: float | None = getattr(health, name)
        value = figures.get(check.figure)
        if check.stage == stage and threshold is not None and value is not None and check.is_bad(value, threshold):
            found.append(Finding(name, value, threshold))
    return found


def rollout_shares(sums: Mapping[str, float]) -> dict[str, float]:
    """What the checks of a rollout look at, from the sums over its shards."""
    responses = sums.get("responses", 0)
    if not responses:
        return {}
    eos = sums["eos_responses"] / responses
    return {
        "truncated_share": 1 - eos,
        "empty_share": sums["empty_responses"] / responses,
        "eos_share": eos,
        "loop_share": sums["looping_responses"] / responses,
    }


def score_means(sums: Mapping[str, float]) -> dict[str, float]:
    """The same of the scores of one teacher."""
    found = {}
    if scored := sums.get("scored_tokens", 0):
        found["unlikely_share"] = sums["unlikely_tokens"] / scored
    if compared := sums.get("compared_tokens", 0):
        found["advantage"] = sums["advantage_sum"] / compared
    return found


def learn_means(steps: Sequence[Mapping[str, Any]], first_steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The same of an episode's optimizer steps. first_steps: those of the first episodes; empty in one of these."""
    found = {}
    if (ess := _mean(steps, "ess")) is not None:
        found["ess"] = ess
    entropy, first = _mean(steps, "entropy"), _mean(first_steps, "entropy")
    if entropy is not None and first:
        found["entropy_ratio"] = entropy / first
    return found


def _mean(steps: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """Over the steps that had a token to learn from; None where there is none, or where they are older than the column."""
    values = [step[column] for step in steps if step.get("tokens") and step.get(column) is not None]
    return sum(values) / len(values) if values else None


def markdown_checks() -> str:
    """The README's table of thresholds."""
    rows = ["| key of `health` | default | after | what | ready query |", "|---|---|---|---|---|"]
    for name, check in CHECKS.items():
        default = getattr(HealthConfig(), name)
        rows.append(f"| `{name}` | {check.allows} {default:g} | {check.stage} | {check.meaning} | `{check.query}` |")
    return "\n".join(rows)
