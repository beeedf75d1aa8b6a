"""plan.json: what one episode or evaluation was asked to do. Immutable, so restarts and array widths cannot change it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_cache.errors import CorruptShardError, MismatchError, MissingInputError
from opd_cache.run_dir import PLAN, SCHEMA_VERSION, SEAL, RolloutSet
from opd_cache.status import scored_parts
from opd_cache.store.publish import digest_file, publish_json, read_json
from opd_cache.store.rows import imported_schema, rollouts_schema, scores_schema
from opd_cache.store.shards import ShardSet

# In a scoring plan only where they say something: sha256 of the teacher's own prompts; and which tokens of a response
# are scored, from first_token (else 0) up to the horizon (else the end); and whose top k is scored, if not the teacher's.
OPTIONAL_SCORE_FACTS = ("teacher_prompts", "first_token", "horizon", "support")


@dataclass(frozen=True)
class SamplingPlan:
    """How responses are sampled. temperature 0 is greedy (evaluations only)."""

    temperature: float
    top_p: float
    top_k: int | None
    max_new_tokens: int
    stop_token_ids: list[int]
    student_top_k: int = 0  # of the student's likeliest tokens, cached at every position

    @property
    def cuts_distribution(self) -> bool:
        """Whether tokens are drawn from something else than the model's own distribution."""
        return self.temperature > 0 and (self.temperature != 1 or self.top_p != 1 or self.top_k is not None)


@dataclass(frozen=True)
class RolloutPlan:
    """Which prompts, in which order and shards, sampled how and by whom."""

    run_id: str
    scope: str  # first part of rollout ids and of seeds: the episode, or the evaluation
    seed: int
    policy_version: int
    policy: str  # fingerprint of the model that samples
    sampler: str
    dtype: str  # in which it computes
    prompts: str  # sha256 of the prompts file
    prompt_indices: list[int]
    n_samples_per_prompt: int
    prompts_per_shard: int
    sampling: SamplingPlan
    reward: dict[str, Any] | None = None  # the task reward: name, answer_pattern, reference_pattern
    imported: dict[str, Any] | None = None  # of outside rollouts: their files, their format, which optional columns

    @property
    def num_shards(self) -> int:
        return -(-len(self.prompt_indices) // self.prompts_per_shard)

    @property
    def num_rollouts(self) -> int:
        return len(self.prompt_indices) * self.n_samples_per_prompt

    def shard_prompts(self, shard: int) -> list[int]:
        """The prompt indices of one shard, in order."""
        return self.prompt_indices[shard * self.prompts_per_shard : (shard + 1) * self.prompts_per_shard]

    def shard_rollouts(self, shard: int) -> int:
        return len(self.shard_prompts(shard)) * self.n_samples_per_prompt


def publish_rollout_plan(target: RolloutSet, plan: RolloutPlan, remedy: str) -> None:
    """Publish the plan, or confirm that the published one is the same."""
    publish_json(
        target.path / PLAN, {"schema_version": SCHEMA_VERSION, **asdict(plan)}, f"the plan of {target.label}", remedy
    )


def load_rollout_plan(target: RolloutSet) -> RolloutPlan:
    """The published plan. Raises MissingInputError, CorruptShardError, MismatchError (another schema
    version, or the plan of another episode)."""
    content = read_json(target.plan)
    content.pop("schema_version")
    try:
        plan = RolloutPlan(**{**content, "sampling": SamplingPlan(**content["sampling"])})
    except (TypeError, KeyError) as error:
        raise CorruptShardError(f"{target.plan}: not a plan ({error}).") from error
    if plan.scope != target.scope:
        raise MismatchError(
            f"{target.plan}: the plan of {plan.scope!r}, expected that of {target.scope!r}. Move the file away and run: {stage_command('rollout', target)}"
        )
    return plan


def rollout_shards(target: RolloutSet, plan: RolloutPlan) -> ShardSet:
    """The rollout shards of a plan."""
    about = {
        "run_id": plan.run_id,
        "stage": "rollout",
        "scope": plan.scope,
        "plan": digest_file(target.plan),
        "policy_version": plan.policy_version,
        "policy": plan.policy,
        "sampler": plan.sampler,
        "dtype": plan.dtype,
        "sampling": asdict(plan.sampling),
        **({} if plan.reward is None else {"reward": plan.reward}),
        **({} if plan.imported is None else {"imported": plan.imported}),
    }
    if plan.imported is not None:
        schema = imported_schema(plan.imported["columns"])
    else:
        sampling = plan.sampling
        schema = rollouts_schema(sampling.cuts_distribution, plan.reward is not None, sampling.student_top_k > 0)
    return ShardSet(
        target.rollouts,
        plan.num_shards,
        schema,
        about,
        stage_command("rollout", target),
    )


def score_parts(target: RolloutSet, plan: RolloutPlan, teacher: str) -> tuple[ShardSet, ...]:
    """All score shards of one teacher: those of the first tokens, then those of the tokens behind them."""
    return tuple(score_shards(target, plan, teacher, first) for first in scored_parts(target, teacher))


def first_token_to_score(target: RolloutSet, teacher: str, horizon: int | None) -> int:
    """0, or behind sealed scores of fewer tokens the first one that they lack. Raises MismatchError when they have more
    than the horizon, MissingInputError when they are not complete."""
    parts = scored_parts(target, teacher)
    if not parts:
        return 0
    folder = target.scores(teacher, parts[-1])
    reach = read_json(folder / PLAN).get("horizon")
    if reach == horizon:
        return parts[-1]
    wanted = "null" if horizon is None else horizon
    if reach is None or (horizon is not None and horizon < reach):
        scored = "all tokens" if reach is None else f"the first {reach} tokens"
        raise MismatchError(
            f"{folder / PLAN}: {scored} of the responses are scored, score.horizon = {wanted} is fewer. Set score.horizon={'null' if reach is None else reach}; scores are never cut."
        )
    if not (folder / SEAL).exists():
        raise MissingInputError(
            f"{folder}: not complete with score.horizon = {reach}, which comes before score.horizon = {wanted}. Run: {stage_command('score', target, teacher)} score.horizon={reach}"
        )
    return int(reach)


def score_shards(target: RolloutSet, plan: RolloutPlan, teacher: str, first_token: int = 0) -> ShardSet:
    """The score shards of one teacher from this token on, as their published plan describes them.

    Raises MissingInputError, CorruptShardError, MismatchError (the plan of another teacher or episode).
    """
    path = target.scores(teacher, first_token) / PLAN
    content = read_json(path)
    place = {"run_id": plan.run_id, "scope": plan.scope, "teacher": teacher, "first_token": first_token or None}
    for key, wanted in place.items():
        if (found := content.get(key)) != wanted:
            raise MismatchError(
                f"{path}: made for {key} = {found!r}, expected {wanted!r}: it belongs elsewhere. Move {path.parent} away and run: {stage_command('score', target, teacher)}"
            )
    about = {
        "run_id": plan.run_id,
        "stage": "score",
        "scope": plan.scope,
        "plan": digest_file(path),
        **_score_facts(content),
    }
    return ShardSet(
        path.parent,
        plan.num_shards,
        scores_schema(content["top_k"]),
        about,
        stage_command("score", target, teacher),
    )


def _score_facts(content: dict[str, Any]) -> dict[str, Any]:
    facts = {key: content[key] for key in ("teacher", "teacher_fingerprint", "scorer", "dtype", "top_k", "rollouts")}
    return {**facts, **{key: content[key] for key in OPTIONAL_SCORE_FACTS if content.get(key) is not None}}


def publish_score_plan(target: RolloutSet, plan: RolloutPlan, facts: dict[str, Any]) -> None:
    """Publish what a teacher is asked for, or confirm that it was asked for the same before.

    `facts`: teacher, teacher_fingerprint, scorer, dtype, top_k, rollouts (digest of the rollouts' seal), and those of
    OPTIONAL_SCORE_FACTS that are not None.
    """
    folder = target.scores(facts["teacher"], facts.get("first_token") or 0)
    if facts.get("first_token"):
        _check_same_teacher(target.scores(facts["teacher"]) / PLAN, facts)
    content = {"schema_version": SCHEMA_VERSION, "run_id": plan.run_id, "scope": plan.scope, **_score_facts(facts)}
    publish_json(
        folder / PLAN, content, f"the scoring of {target.label}", f"Set it back, or move {folder} away to score again."
    )


def _check_same_teacher(first_part: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on behind tokens that were scored otherwise. Raises MismatchError."""
    found = read_json(first_part)
    for key in {**_score_facts(found), **_score_facts(facts)}:
        if key not in ("first_token", "horizon") and found.get(key) != facts.get(key):
            raise MismatchError(
                f"{first_part}: the first tokens were scored with {key} = {found.get(key)!r}, now {facts.get(key)!r}. Set it back, or move {first_part.parent} away to score again."
            )


def stage_command(stage: str, target: RolloutSet, teacher: str | None = None) -> str:
    """The command that makes a stage's missing shards."""
    kind, _, value = target.path.name.partition("=")
    if kind == "episode":
        return f"opd-cache {stage} RECIPE --episode {value}" + (f" --teacher {teacher}" if teacher else "")
    # An evaluation lies in evals/policy=N/mode=...; a teacher is evaluated along with any version.
    subject, _, value = target.path.parent.name.partition("=")
    return f"opd-cache eval RECIPE --policy-version {value if subject == 'policy' else 0}"
