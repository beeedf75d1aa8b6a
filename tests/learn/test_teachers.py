"""Learning from several teachers: mixtures and routes against slow formulas, rows left out, and what is refused."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import save_model, tiny_qwen2

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError, MismatchError, MissingInputError, OpdCacheError
from opd_cache.learn import stage
from opd_cache.learn.batch import rows_to_learn
from opd_cache.learn.inputs import open_source
from opd_cache.learn.losses import REVERSE_KL_PG, REVERSE_KL_TOPK
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.learn.step import Trainer
from opd_cache.learn.stream import planned_rows
from opd_cache.learn.teachers import Teaching, mix_logprobs, mix_scores, topk_fault
from opd_cache.pipeline import InlineStages
from opd_cache.replay import replay_run
from opd_cache.run import Run, open_run
from opd_cache.types import Rollout, Score

RNG = np.random.default_rng(0)


def likely(*shape: int) -> np.ndarray:
    return (-RNG.exponential(3, shape)).astype(np.float32)


def score(ids: np.ndarray, logprobs: np.ndarray, rollout_id: str = "0/0/0", error: str | None = None) -> Score:
    """A score of as many tokens as `ids` has rows."""
    sampled = likely(len(ids))
    return Score(rollout_id, 1, sampled, np.ones(len(ids), np.int32), ids.astype(np.int32), logprobs, error)


ROLLOUT = Rollout("0/5/0", 5, 0, np.ones(2, np.int32), np.ones(7, np.int32), likely(7), "stop", 0)

# The arithmetic


@pytest.mark.parametrize("mixing", ["probability", "log"])
def test_a_mixture_is_what_the_formula_says_token_by_token(mixing: str) -> None:
    weights, logprobs = [0.6, 0.3, 0.1], [likely(20) for _ in range(3)]
    mixed = mix_logprobs(logprobs, weights, mixing)
    for t in range(20):
        pairs = [(weight, float(column[t])) for weight, column in zip(weights, logprobs, strict=True)]
        if mixing == "probability":
            expected = math.log(sum(weight * math.exp(logprob) for weight, logprob in pairs))
        else:
            expected = sum(weight * logprob for weight, logprob in pairs)
        assert mixed[t] == pytest.approx(expected, rel=1e-6)
    assert mixed.dtype == np.float32


def test_a_mixture_of_distributions_sums_to_one_and_a_product_of_experts_to_less() -> None:
    logits = RNG.normal(size=(2, 5, 30)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mixture = mix_logprobs(list(logprobs), [0.5, 0.5], "probability")
    product = mix_logprobs(list(logprobs), [0.5, 0.5], "log")
    np.testing.assert_allclose(np.exp(mixture.astype(np.float64)).sum(-1), 1, rtol=1e-5)
    assert (np.exp(product.astype(np.float64)).sum(-1) < 0.99).all()


def test_impossible_and_sure_tokens_stay_numbers() -> None:
    impossible, sure = np.float32([-np.inf, -np.inf, 0, 0]), np.float32([-np.inf, -1, -1, 0])
    mixed = mix_logprobs([impossible, sure], [0.25, 0.75], "probability")
    np.testing.assert_allclose(
        mixed, [-np.inf, -1 + math.log(0.75), math.log(0.25 + 0.75 * math.exp(-1)), 0], rtol=1e-6
    )
    np.testing.assert_allclose(mix_logprobs([impossible, sure], [0.25, 0.75], "log"), [-np.inf, -np.inf, -0.75, 0])
    (sure_of_all,) = mix_logprobs([np.zeros(1, np.float32)] * 10, [0.1] * 10, "probability")
    assert -1e-6 < sure_of_all <= 0


@pytest.mark.parametrize("mixing", ["probability", "log"])
def test_lists_of_the_same_ids_in_another_order_are_mixed_by_id(mixing: str) -> None:
    ids = np.stack([RNG.permutation(50)[:4] for _ in range(7)])
    places = np.stack([RNG.permutation(4) for _ in range(7)])
    first, second = likely(7, 4), likely(7, 4)
    a, b = score(ids, first), score(np.take_along_axis(ids, places, 1), np.take_along_axis(second, places, 1))
    assert topk_fault([a, b]) is None
    mixed = mix_scores([a, b], [0.7, 0.3], mixing)
    for t in range(7):
        expected = dict(zip(ids[t], mix_logprobs([first[t], second[t]], [0.7, 0.3], mixing), strict=True))
        assert dict(zip(mixed.topk_ids[t], mixed.topk_logprobs[t], strict=True)) == expected
        assert (np.diff(mixed.topk_logprobs[t]) <= 0).all()
    assert (mixed.teacher_rank == 0).all()


def test_lists_of_other_ids_are_not_mixed_for_a_top_k_loss_alone() -> None:
    ids = np.arange(28).reshape(7, 4)
    other = ids.copy()
    other[5, 2] = 99
    scores = [score(ids, likely(7, 4)), score(other, likely(7, 4))]
    assert topk_fault(scores) == "hold other ids at response token 5"
    assert topk_fault([scores[0], score(ids[:, :3], likely(7, 3))]) == "hold 4 and 3 ids a token"
    teaching = Teaching(("a", "b"), (0.5, 0.5))
    with pytest.raises(MismatchError, match=r"^scores of 0/5/0: the top k of the teachers a, b hold other ids at resp"):
        teaching.combine(ROLLOUT, scores)
    combined = Teaching(("a", "b"), (0.5, 0.5), keeps_topk=False).combine(ROLLOUT, scores)
    assert combined.topk_ids.shape == combined.topk_logprobs.shape == (7, 0)
    expected = mix_logprobs([one.teacher_logprobs for one in scores], (0.5, 0.5), "probability")
    np.testing.assert_array_equal(combined.teacher_logprobs, expected)


def test_a_row_that_a_needed_teacher_could_not_score_trains_nothing() -> None:
    ids = np.zeros((7, 0), np.int32)
    good, bad = score(ids, likely(7, 0)), score(ids[:0], likely(0, 0), error="too long")
    mixture = Teaching(("a", "b"), (0.5, 0.5), keeps_topk=False)
    combined = mixture.combine(ROLLOUT, [good, bad])
    assert combined.error == "too long"
    assert rows_to_learn([(ROLLOUT, combined)], mask_truncated=False) == []
    for place, error in ((0, None), (1, "too long")):
        assert Teaching(("a", "b"), routes={5: place}).combine(ROLLOUT, [good, bad]).error == error


# In a run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting that adds a second teacher."""
    folder = save_model(tiny_qwen2(seed=7, hidden_size=48), tmp_path_factory.mktemp("other") / "teacher")
    return f"teachers.other={{model: {folder}, dtype: float32, device: cpu}}"


@pytest.fixture(scope="module")
def two(
    make_recipe: Callable[..., Recipe], finished_run: Run, other: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose first episode is scored by two teachers and not learned. Shared: copy it before learning."""
    path = tmp_path_factory.mktemp("two") / "run"
    shutil.copytree(finished_run.dir.path, path, ignore=shutil.ignore_patterns("learn", "policy", "episode=1", "evals"))
    stages = InlineStages(open_run(make_recipe(path, other, "learn.teacher=main")))
    assert stages.score(0)
    return path


@pytest.fixture
def opened(make_recipe: Callable[..., Recipe], two: Path, other: str, tmp_path: Path) -> Callable[..., Run]:
    """A copy of that run, opened with these settings."""

    def make(*settings: str) -> Run:
        path = Path(shutil.copytree(two, tmp_path / "run", dirs_exist_ok=True))
        return open_run(make_recipe(path, other, "learn.loss.name=reverse_kl_pg", *settings))

    return make


def learned(run: Run) -> list[dict]:
    assert learn_episode(run, 0, new_engine(run))
    return pq.read_table(run.dir.steps(0)).to_pylist()


def plan_of(run: Run) -> dict:
    return json.loads((run.dir.learn(0) / "plan.json").read_text())


def rows(run: Run, loss=REVERSE_KL_PG) -> list[tuple[Rollout, Score]]:  # type: ignore[no-untyped-def]
    source, _ = open_source(run.recipe, run.dir.episode(0), 0, loss)
    return list(planned_rows([source], epochs=1, cursor=0))


def stored(run: Run, teacher: str) -> dict[str, dict]:
    folder = run.dir.episode(0).scores(teacher)
    read = (pq.read_table(path).to_pylist() for path in sorted(folder.glob("shard-*")))
    return {row["rollout_id"]: row for table in read for row in table}


def weights_of(run: Run) -> bytes:
    return (run.policy_folder(1) / "model.safetensors").read_bytes()


def test_a_mixture_is_learned_from_the_mixed_logprobs_of_both_teachers(opened: Callable[..., Run]) -> None:
    run = opened("learn.teachers={main: 3, other: 1}")
    main, second = stored(run, "main"), stored(run, "other")
    for rollout, found in rows(run):
        a, b = (np.float64(one[rollout.rollout_id]["teacher_logprobs"]) for one in (main, second))
        np.testing.assert_allclose(found.teacher_logprobs, np.log(0.75 * np.exp(a) + 0.25 * np.exp(b)), rtol=1e-5)
    steps = learned(run)
    tokens = sum(len(found.teacher_logprobs) for _, found in rows(run))
    assert sum(row["tokens"] for row in steps) == tokens
    assert plan_of(run)["teachers"] == {"main": 3.0, "other": 1.0}
    assert set(plan_of(run)["sources"][0]["scores"]) == {"teacher=main", "teacher=other"}


def test_a_mixture_of_one_is_that_teacher(opened: Callable[..., Run], tmp_path: Path) -> None:
    learned(alone := opened("learn.teachers={other: 2}"))
    expected = weights_of(alone)
    shutil.rmtree(tmp_path / "run")
    learned(named := opened("learn.teacher=other"))
    assert weights_of(named) == expected


def test_each_prompt_is_learned_from_the_teacher_of_its_route(opened: Callable[..., Run]) -> None:
    prompts = pq.read_table(opened("learn.teacher=main").dir.prompts).to_pylist()
    some = {row["prompt_id"] for row in prompts[::2]}
    routes = ", ".join([*(f"{prompt_id}: other" for prompt_id in sorted(some)), "'*': main"])
    run = opened(f"learn.routes={{{routes}}}", "learn.route_by=id", "learn.loss.name=reverse_kl_topk")
    by_teacher = {name: stored(run, name) for name in ("main", "other")}
    used = set()
    for rollout, found in rows(run, REVERSE_KL_TOPK):
        name = "other" if prompts[rollout.prompt_index]["prompt_id"] in some else "main"
        row = by_teacher[name][rollout.rollout_id]
        assert found.teacher_logprobs.tolist() == row["teacher_logprobs"]
        assert found.topk_ids.ravel().tolist() == row["topk_ids"]
        used.add(name)
    assert used == {"main", "other"}
    learned(run)
    assert plan_of(run)["route_by"] == "id"
    assert plan_of(run)["routes"]["*"] == "main"


def test_a_top_k_loss_on_a_mixture_is_refused_unless_the_lists_are_the_same(
    opened: Callable[..., Run], task: Path
) -> None:
    settings = ("learn.teachers={main: 1, other: 1}", "learn.loss.name=reverse_kl_topk")
    run = opened(*settings)
    message = refused(MismatchError, run)
    assert re.match(
        r"scores of 0/\d+/\d: the top k of the teachers main, other hold other ids at response token", message
    )
    same = opened(*settings, f"teachers.other.model={task}/teacher")
    shutil.rmtree(same.dir.episode(0).scores("other"))
    assert InlineStages(same).score(0)
    for (_, found), row in zip(rows(same, REVERSE_KL_TOPK), stored(same, "main").values(), strict=True):
        np.testing.assert_allclose(found.topk_logprobs.ravel(), row["topk_logprobs"], rtol=1e-6, atol=1e-7)
        assert found.topk_ids.ravel().tolist() == row["topk_ids"]
    learned(same)


def refused(kind: type[OpdCacheError], run: Run) -> str:
    """The one line that refuses to learn, before anything is written."""
    before = sorted(run.dir.path.rglob("*"))
    with pytest.raises(kind) as caught:
        learn_episode(run, 0, new_engine(run))
    assert sorted(run.dir.path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_prompt_without_a_route_is_named_with_its_value(opened: Callable[..., Run]) -> None:
    message = refused(ConfigError, opened("learn.routes={p0: main}", "learn.route_by=id"))
    assert re.fullmatch(
        r"prompt (\d+) \('p\1'\) has id = 'p\1', which has no route\. Known: p0\. Add it to learn\.routes, or a teacher "
        r"for all others as '\*'\.",
        message,
    )
    message = refused(ConfigError, opened("learn.routes={p0: main}", "learn.route_by=level"))
    assert "has no field 'level', which has no route" in message


def test_scores_that_a_mixture_lacks_are_named(opened: Callable[..., Run]) -> None:
    run = opened("learn.teachers={main: 1, other: 1}")
    shutil.rmtree(run.dir.episode(0).scores("other"))
    message = refused(MissingInputError, run)
    assert message.endswith("teacher=other/plan.json: not there. Run: opd-cache score RECIPE --episode 0")


# Rows left out


def test_rows_where_the_condition_holds_carry_no_loss_and_are_counted(
    opened: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Rollout, Score]] = []

    class Watched(Trainer):
        def step(self, batch, *arguments):  # type: ignore[no-untyped-def]
            seen.extend(batch)
            return super().step(batch, *arguments)

    monkeypatch.setattr(stage, "Trainer", Watched)
    condition = "list_avg(s.teacher_logprobs) < -9 or p.fields->>'answer' like 'a%' or r.num_response_tokens = 2"
    run = opened("learn.teacher=main", f'learn.drop_where="{condition}"')
    steps = learned(run)
    answers = {row["prompt_index"]: row["answer"] for row in pq.read_table(run.dir.prompts).to_pylist()}
    dropped = []
    for rollout, found in seen:
        length = len(rollout.response_ids)
        is_unlikely = length > 0 and np.float64(found.teacher_logprobs).mean() < -9
        expected = is_unlikely or answers[rollout.prompt_index].startswith("a") or length == 2
        assert found.is_dropped is bool(expected), rollout.rollout_id
        dropped.append(found.is_dropped)
    assert 0 < sum(dropped) < len(dropped) == 24
    assert sum(row["dropped_share"] * row["rollouts"] for row in steps) == pytest.approx(sum(dropped))
    kept = [len(rollout.response_ids) for (rollout, _), out in zip(seen, dropped, strict=True) if not out]
    assert sum(row["tokens"] for row in steps) == sum(kept)
    assert plan_of(run)["drop_where"] == condition


def test_a_condition_that_never_holds_changes_no_bit(opened: Callable[..., Run], tmp_path: Path) -> None:
    learned(run := opened("learn.teacher=main", 'learn.drop_where="r.num_response_tokens > 99 or null"'))
    expected, steps = weights_of(run), pq.read_table(run.dir.steps(0)).to_pylist()
    assert {row["dropped_share"] for row in steps} == {0.0}
    shutil.rmtree(tmp_path / "run")
    learned(plain := opened("learn.teacher=main"))
    assert weights_of(plain) == expected


def test_a_condition_sees_every_teacher_of_a_mixture_and_only_the_routed_one(opened: Callable[..., Run]) -> None:
    condition = "learn.drop_where=\"s.teacher = 'other'\""
    mixture = rows(opened("learn.teachers={main: 1, other: 1}", condition))
    assert all(found.is_dropped for _, found in mixture)
    run = opened("learn.routes={p1: other, p3: other, '*': main}", "learn.route_by=id", condition)
    ids = {row["prompt_index"]: row["prompt_id"] for row in pq.read_table(run.dir.prompts).to_pylist()}
    for rollout, found in rows(run):
        assert found.is_dropped is (ids[rollout.prompt_index] in ("p1", "p3"))


def test_any_cursor_gives_the_same_marks(opened: Callable[..., Run]) -> None:
    run = opened("learn.teacher=main", 'learn.drop_where="s.teacher_logprobs[1] < -5"')
    source, _ = open_source(run.recipe, run.dir.episode(0), 0, REVERSE_KL_PG)
    whole = [found.is_dropped for _, found in planned_rows([source], 2, 0)]
    assert 0 < sum(whole) < len(whole)
    for cursor in (1, 9, 23, 24, 31):
        assert [found.is_dropped for _, found in planned_rows([source], 2, cursor)] == whole[cursor:]


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        ("r.nope > 1", 'fails: Binder Error: Values list "r" does not have a column named "nope"'),
        ("num_response_tokens > 1", "fails: Binder Error: Ambiguous reference to column name"),
        ("r.num_response_tokens", "fails: Binder Error: No function matches the given name and argument types"),
        ("random() < 0.5", "holds random, which may change from one reading to the next; expected a condition"),
        ("current_date > '2026-01-01'", "holds current_date, which may change from one reading to the next"),
        ("exists (select 1)", "holds a subquery; expected a condition on the columns of one row."),
        ("avg(r.num_response_tokens) over () > 1", "holds a window function; expected a condition"),
        ("max(r.num_response_tokens) > 1", "fails: Binder Error: aggregate function calls cannot be nested"),
        ("true; select 1", "is no SQL (syntax error"),
        ("true) from r; copy r to 'x.csv'; select (true", "is no SQL ("),
        ("true) from read_csv('/etc/passwd') as r where (true", "fails: "),
    ],
)
def test_what_is_no_condition_on_one_row_is_refused(opened: Callable[..., Run], condition: str, fault: str) -> None:
    escaped = condition.replace('"', '\\"')
    message = refused(ConfigError, opened("learn.teacher=main", f'learn.drop_where="{escaped}"'))
    assert message.startswith(f"learn.drop_where = {condition!r} {fault}")


# Replays and recipes


@pytest.mark.parametrize(
    "settings",
    [
        ["learn.teacher=null", "learn.teachers={main: 1, other: 3}", "learn.mixing=log"],
        ["learn.teacher=null", "learn.routes={p1: main, '*': other}", "learn.route_by=id"],
        ['learn.drop_where="len(r.response_ids) < 4"'],
    ],
)
def test_a_replay_learns_the_same_from_the_linked_scores(
    opened: Callable[..., Run], tmp_path: Path, settings: list[str]
) -> None:
    base = opened("learn.teacher=main")
    run = open_run(Recipe(**vars(base.recipe)))
    learned(run)
    first = replay_run(
        run.dir.path, tmp_path / "first", "0", ["learn.teacher=main", *settings, "learn.loss.name=reverse_kl_pg"]
    )
    assert [entry["same_weights"] for entry in first["episodes"]] == [False]
    again = replay_run(tmp_path / "first", tmp_path / "again", "0", [])
    assert [entry["same_weights"] for entry in again["episodes"]] == [True]
    for name in ("main", "other"):
        assert (tmp_path / f"again/episode=0/scores/teacher={name}/_SEALED.json").exists()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["learn.teacher=main", "learn.teachers={main: 1}"], "learn.teacher and learn.teachers are both set; keep "),
        (["learn.teachers={nope: 1}"], "learn.teachers = 'nope' is unknown. Known: main, other."),
        (["learn.teachers={main: 0}"], "learn.teachers.main = 0.0 is too small; it must be above 0."),
        (["learn.teachers={main: .inf}"], "learn.teachers.main = inf is not a finite number."),
        (["learn.teachers={}"], "learn.teachers = {} is empty; leave it out, or name a teacher."),
        (["learn.routes={a: main}"], "learn.routes needs learn.route_by: a field of the prompts"),
        (["learn.routes={a: nope}", "learn.route_by=x"], "learn.routes.a = 'nope' is unknown. Known: main, other."),
        (["learn.route_by=x", "learn.teacher=main"], "learn.route_by needs learn.routes: a field"),
        (["learn.mixing=mean"], "learn.mixing = 'mean' is unknown. Known: probability, log."),
        ([], "learn.teacher must name one of the teachers: main, other."),
    ],
)
def test_recipes_that_say_it_twice_or_not_at_all_are_refused(
    make_recipe: Callable[..., Recipe], other: str, tmp_path: Path, settings: list[str], fault: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe(tmp_path / "run", other, *settings)
    assert str(caught.value).startswith(fault)
