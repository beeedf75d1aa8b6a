"""The figures of the overview: one list a column, ready to be drawn. Episodes and policy versions count from 0."""

from typing import Any

from opd_cache.queries import example_sql
from opd_cache.report.live import LiveRun, RunState
from opd_cache.status import run_status

MAX_STEPS = 1_500  # points of a curve; more steps are averaged in groups
ENTROPY_RESPONSES = 100  # an episode and teacher, of whose tokens the teacher's entropy is taken

EPISODES = """
    SELECT episode, count(*) AS responses, sum(num_response_tokens)::BIGINT AS tokens,
        avg(num_response_tokens) AS mean_tokens, quantile_disc(num_response_tokens, 0.95) AS p95_tokens,
        avg((finish_reason = 'length')::INTEGER) AS truncated_share
    FROM rollouts GROUP BY episode ORDER BY episode"""
SCORED = """
    SELECT episode, teacher, sum(reverse_kl_sum) / sum(num_scored_tokens) AS reverse_kl, avg(reward) AS reward
    FROM {rows} GROUP BY ALL ORDER BY episode, teacher"""
EVALS = """
    SELECT subject, policy_version, mode, avg(correct::INTEGER) AS accuracy,
        sum(reverse_kl_sum) / sum(num_response_tokens) FILTER (reverse_kl_sum IS NOT NULL) AS reverse_kl,
        avg(num_response_tokens) AS mean_tokens, avg((finish_reason = 'length')::INTEGER) AS truncated_share,
        count(*) AS responses
    FROM evals GROUP BY ALL ORDER BY policy_version, subject, mode"""
STEPS = """
    SELECT max(step) AS step, max(episode) AS episode, avg(loss) AS loss, avg(reverse_kl) AS reverse_kl,
        avg(entropy) AS entropy, avg(ess) AS ess, avg(tokens_per_s) AS tokens_per_s
    FROM steps GROUP BY (step - 1) // greatest(1, ceil((SELECT max(step) FROM steps) / {max})::INTEGER) ORDER BY step"""
SPEED = """
    SELECT episode, stage, sum(tokens) / sum(seconds) AS tokens_per_s FROM (
        SELECT episode, stage, tokens, seconds FROM shards WHERE episode IS NOT NULL
        UNION ALL SELECT episode, 'learn' AS stage, tokens, read_s + compute_s AS seconds FROM steps
    ) WHERE seconds > 0 AND tokens IS NOT NULL GROUP BY ALL ORDER BY episode, stage"""
TEACHER_ENTROPY = """
    WITH few AS (
        SELECT episode, teacher, rollout_id FROM {rows}
        QUALIFY row_number() OVER (PARTITION BY episode, teacher ORDER BY hash(rollout_id)) <= {responses}
    )
    SELECT episode, teacher, avg(teacher_entropy) AS entropy
    FROM tokens SEMI JOIN few USING (episode, teacher, rollout_id)
    WHERE teacher_entropy IS NOT NULL GROUP BY ALL ORDER BY episode, teacher"""


def run_overview(run: LiveRun) -> dict[str, Any]:
    """All figures of one run."""
    state, status = run.state(), run_status(run.path)
    rows = state.keep("sample_rows")
    return {
        "name": run.name,
        "run_id": status["run_id"],
        "num_episodes": status["num_episodes"],
        "episodes_done": status["episodes_done"],
        "response_tokens": status["response_tokens"],
        "bytes": status["bytes"],
        "episodes": state.columns(EPISODES),
        "scored": state.columns(SCORED.format(rows=rows)),
        "evals": state.columns(EVALS),
        "steps": state.columns(STEPS.format(max=MAX_STEPS)),
        "speed": state.columns(SPEED),
        "teacher_entropy": _teacher_entropy(state, rows),
        "cost": state.columns(example_sql("cost-by-stage")),
    }


def _teacher_entropy(state: RunState, rows: str) -> dict[str, list[Any]]:
    """Nothing where no top-k is cached."""
    if not any(stage.facts.get("top_k") for stage in state.found.scores):
        return {}
    return state.columns(TEACHER_ENTROPY.format(rows=rows, responses=ENTROPY_RESPONSES))
