"""Scoring a sample of a run's rows again, by their teachers and by the policies that sampled them.

Digests say that a file is what was sealed; only the models can say that what was sealed is theirs. Nothing is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from random import Random

from opd_cache.config import Recipe, TeacherConfig
from opd_cache.errors import ConfigError, MismatchError, ModelError
from opd_cache.prompts.intake import read_prompt_ids
from opd_cache.recipes import stored_recipe
from opd_cache.run import Run
from opd_cache.run_dir import RunDir
from opd_cache.score.checks import repeat_differences, repeat_fault
from opd_cache.score.scores import Scorer, TokenScores
from opd_cache.score.stage import new_scorer, score_alone
from opd_cache.status import asked_teachers, read_identity
from opd_cache.store.join import join_shard, read_rollouts
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, rollout_shards, score_parts
from opd_cache.store.publish import digest_file, read_json
from opd_cache.store.shards import ShardSet
from opd_cache.types import Float32Array, Int32Array, Score, derive_seed
from opd_cache.verify.checks import Finding

DTYPES = ("float32", "bfloat16", "float16")
SIXTEEN_BITS = "another engine"  # has no tolerance of its own, so that it gets that of 16 bits


@dataclass
class Compared:
    """What was scored again by one model, or why nothing was."""

    who: str
    rows: int = 0
    tokens: int = 0
    largest: float = 0.0  # difference of a log-prob, nats
    mean: float = 0.0
    skipped: list[str] = field(default_factory=list)

    def add(self, stored: Float32Array, again: Float32Array) -> None:
        self.rows += 1
        if len(stored) and len(stored) == len(again):
            differences = repeat_differences(stored, again)
            self.largest = max(self.largest, float(differences.max()))
            self.mean = (self.mean * self.tokens + float(differences.sum())) / (self.tokens + len(stored))
            self.tokens += len(stored)


@dataclass(frozen=True)
class Source:
    """Sealed shards that rows are drawn from: rollouts, or a part of a teacher's scores beside them."""

    plan: RolloutPlan
    rollouts: ShardSet
    scores: ShardSet | None
    own_prompts: Path | None  # the teacher's, where it has some

    @property
    def shards(self) -> ShardSet:
        return self.scores or self.rollouts


Row = tuple[Source, int, int]  # shard, row


def score_again(path: Path, rows: int, seed: int, overrides: Sequence[str]) -> tuple[list[Compared], list[Finding]]:
    """Score `rows` rows of every teacher and of the student again, drawn from all episodes by `seed`.

    The run must be clean without this. overrides: `teachers.NAME.model=FOLDER`, where models lie elsewhere now. Raises
    ModelError, ConfigError or MismatchError when a teacher is not here, or is another one; TryAgainError when its server
    is not.
    """
    from opd_cache.models import set_torch_threads

    run = _opened(RunDir(path), overrides)
    set_torch_threads(run.recipe.torch_threads)
    compared: list[Compared] = []
    findings: list[Finding] = []
    for teacher in _teachers(run.dir):
        sources = list(_score_sources(run, teacher))
        drawn = _drawn(sources, rows, derive_seed(seed, "deep", teacher))
        found = Compared(f"teacher {teacher}")
        findings += _teacher_findings(run, teacher, drawn, found)
        compared.append(found)
    found = Compared("student")
    drawn = _drawn(list(_rollout_sources(run, found)), rows, derive_seed(seed, "deep"))
    findings += _student_findings(run, drawn, found)
    return [*compared, found], findings


def _opened(run: RunDir, overrides: Sequence[str]) -> Run:
    """The run as its own recipe describes it, without what a stage would make or check on opening it."""
    identity = read_identity(run)
    recipe: Recipe = stored_recipe(identity["recipe"], overrides, str(run.run_json))
    student = identity["student"]["fingerprint"]
    return Run(recipe, run, identity["run_id"], identity["prompts"]["sha256"], student)


def _teachers(run: RunDir) -> list[str]:
    return sorted({name for episode in run.episodes() for name in asked_teachers(run.episode(episode))})


def _score_sources(run: Run, teacher: str) -> Iterator[Source]:
    """The sealed scores of one teacher in all episodes."""
    for episode in run.dir.episodes():
        target = run.dir.episode(episode)
        if teacher not in asked_teachers(target):
            continue
        plan = load_rollout_plan(target)
        for scores in score_parts(target, plan, teacher):
            if scores.is_sealed():
                has_own = scores.about.get("teacher_prompts") is not None
                own = target.teacher_prompts(teacher) if has_own else None
                yield Source(plan, rollout_shards(target, plan), scores, own)


def _rollout_sources(run: Run, found: Compared) -> Iterator[Source]:
    """The sealed rollouts whose policy is here."""
    for episode in run.dir.episodes():
        target = run.dir.episode(episode)
        if not target.plan.exists():
            continue
        plan = load_rollout_plan(target)
        rollouts = rollout_shards(target, plan)
        if not rollouts.is_sealed():
            continue
        if reason := _policy_is_missing(run, plan):
            found.skipped.append(f"{target.label}: {reason}")
        else:
            yield Source(plan, rollouts, None, None)


def _policy_is_missing(run: Run, plan: RolloutPlan) -> str | None:
    if plan.imported is not None:
        return "imported; who sampled it is not known here"
    if run.is_replay:
        return "a replay; another run's policy sampled it"
    if run.is_removed(plan.policy_version):
        return f"policy {plan.policy_version} was removed by the retention rule"
    if not run.has_policy(plan.policy_version):
        return f"policy {plan.policy_version} is not there"
    return None


def _drawn(sources: Sequence[Source], rows: int, seed: int) -> list[Row]:
    """So many different rows of all, each as likely as any other."""
    places = [
        (source, shard, entry["rows"])
        for source in sources
        for shard, entry in enumerate(read_json(source.shards.seal_path)["shards"])
    ]
    total = sum(count for _, _, count in places)
    wanted = sorted(Random(seed).sample(range(total), min(rows, total)))
    drawn, start = [], 0
    for source, shard, count in places:
        drawn += [(source, shard, number - start) for number in wanted if start <= number < start + count]
        start += count
    return drawn


def _teacher_findings(run: Run, teacher: str, drawn: Sequence[Row], found: Compared) -> Iterator[Finding]:
    if drawn and teacher not in run.recipe.teachers:
        raise ConfigError(
            f"teacher {teacher!r} has scored, but {run.dir.run_json} does not say where its model is. Add teachers.{teacher}.model=FOLDER_OR_NAME to the command."
        )
    with _Scorers(run) as scorers:
        for source, shard, row in drawn:
            assert source.scores is not None
            scores = source.scores
            rollout, score = next(islice(join_shard(source.rollouts, scores, shard, row), 1))
            scorer = scorers.of(
                _teacher_config(run, teacher, source), scores.about["teacher_fingerprint"], f"teacher {teacher}"
            )
            own_ids = _own_ids(source, rollout.prompt_index)
            again = score_alone(rollout, own_ids, scorer, scores.about)
            found.add(score.teacher_logprobs, again.logprobs)
            if fault := _score_fault(score, again, _tolerance(scorer, scores.about["dtype"])):
                yield _finding(scores, shard, row, f"{score.rollout_id} scored again alone {fault}")


def _teacher_config(run: Run, teacher: str, source: Source) -> TeacherConfig:
    """How the teacher was asked, as far as this machine can: in the dtype of then."""
    assert source.scores is not None
    config, dtype = run.teacher_config(teacher, source.plan.policy_version), source.scores.about["dtype"]
    return replace(config, dtype=dtype) if dtype in DTYPES else config


def _own_ids(source: Source, prompt: int) -> Mapping[int, Int32Array]:
    if source.own_prompts is None or source.scores is None:
        return {}
    if not source.own_prompts.exists() or digest_file(source.own_prompts) != source.scores.about["teacher_prompts"]:
        raise MismatchError(f"{source.own_prompts}: not what the scores in {source.scores.folder} were made with.")
    return read_prompt_ids(source.own_prompts, [prompt])


def _score_fault(score: Score, again: TokenScores, dtype: str) -> str | None:
    if (score.error is None) != (again.error is None):
        return f"gives {again.error or 'log-probs'!r}, stored is {score.error or 'log-probs'!r}"
    if fault := repeat_fault(score.teacher_logprobs, again.logprobs, dtype):
        return fault
    # By rank: where two are as likely, their ids may come in either order.
    fault = repeat_fault(score.topk_logprobs.reshape(-1), again.topk_logprobs.reshape(-1), dtype)
    return None if fault is None else f"{fault} in its top k"


def _student_findings(run: Run, drawn: Sequence[Row], found: Compared) -> Iterator[Finding]:
    with _Scorers(run) as scorers:
        for source, shard, row in drawn:
            rollout = next(read_rollouts(source.rollouts, shard, row))
            if (stored := rollout.student_logprobs) is None or not len(stored):
                continue
            plan, about = source.plan, {"top_k": 0}
            policy = run.policy_config(plan.policy_version)
            config = TeacherConfig(**{**asdict(policy), "dtype": plan.dtype}, scorer="hf")
            try:
                scorer = scorers.of(config, plan.policy, f"policy {plan.policy_version}")
            except ModelError as error:  # the initial student lies outside the run, and may have stayed elsewhere
                found.skipped.append(f"{rollout.rollout_id}: {error}")
                continue
            again = score_alone(rollout, {}, scorer, about)
            found.add(stored, again.logprobs)
            dtype = plan.dtype if plan.sampler == "hf" else SIXTEEN_BITS
            if fault := repeat_fault(stored, again.logprobs, dtype):
                yield _finding(
                    source.rollouts, shard, row, f"the student's log-probs: {rollout.rollout_id} scored again {fault}"
                )


def _tolerance(scorer: Scorer, dtype: str) -> str:
    """The dtype whose rounding explains a difference."""
    return dtype if scorer.dtype == dtype else SIXTEEN_BITS


class _Scorers:
    """One model in memory at a time."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._config: TeacherConfig | None = None
        self._scorer: Scorer | None = None

    def __enter__(self) -> "_Scorers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._scorer is not None:
            self._scorer.close()

    def of(self, config: TeacherConfig, fingerprint: str, who: str) -> Scorer:
        """The model that `config` names, loaded. Raises MismatchError when it has other weights."""
        if self._scorer is None or config != self._config:
            self.__exit__()
            scorer = new_scorer(self._run, config)
            if (now := scorer.fingerprint()) != fingerprint:
                raise MismatchError(
                    f"{who} is {config.model} with weights {now[:12]}, its log-probs are of weights {fingerprint[:12]}. Give the model of then, such as teachers.NAME.model=FOLDER."
                )
            scorer.load()
            self._config, self._scorer = config, scorer
        return self._scorer


def _finding(shards: ShardSet, shard: int, row: int, problem: str) -> Finding:
    path = shards.path(shard)
    return Finding(
        path, f"{path} row {row}: {problem}", (path, shards.seal_path), (f"{shards.remedy} --shard {shard}",)
    )
