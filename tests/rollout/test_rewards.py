"""Task rewards: computed when a response is sampled, stored with it, refused where they are no numbers."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import complete, data_files, run_command, write_jsonl

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError, MismatchError, StoreError
from opd_cache.grade import Response, exact_match
from opd_cache.pipeline import InlineStages
from opd_cache.quickstart.sort_letters import byte_tokenizer
from opd_cache.run import Run, open_run
from opd_cache.store.join import read_rollouts, rollout_fault
from opd_cache.store.plans import load_rollout_plan, publish_rollout_plan, rollout_shards
from opd_cache.store.publish import read_json, signed_json
from opd_cache.store.query import query_rows
from opd_cache.types import Rollout

QUICK = ("rollout.sampler=random_sampler:RandomSampler", "eval.path=null")
MIXED = ("learn.loss.name=mixed", "learn.loss.terms={reverse_kl_topk: 1.0, reward_pg: 0.5}", "eval.path=null")


def sampled(run: Run, episode: int = 0) -> list[Rollout]:
    """The rollouts of an episode, as every later stage reads them."""
    target = run.dir.episode(episode)
    plan = load_rollout_plan(target)
    shards = rollout_shards(target, plan)
    return [row for shard in range(plan.num_shards) for row in read_rollouts(shards, shard)]


def even_share(ids: np.ndarray) -> float | None:
    even = sum(1 for token in ids.tolist() if token % 2 == 0)
    return float(np.float32(even / len(ids))) if even else None


@pytest.fixture(scope="module")
def rewarded(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run that learns from the teacher and from a reward of the tests' own."""
    path = tmp_path_factory.mktemp("rewarded") / "run"
    return complete(make_recipe(path, "rollout.reward=own_rewards:even_share", *MIXED))


def response(
    text: str, answer: str | None, answer_pattern: str | None = None, reference: str | None = None
) -> Response:
    return Response(text, answer, "p0", np.zeros(1, np.int32), "stop", answer_pattern, reference)


@pytest.mark.parametrize(
    ("graded", "reward"),
    [
        (response("42", "42"), 1.0),
        (response("42", "43"), 0.0),
        (response("so it is 3, no: 1,042.", "A lot. #### 1042", r"(-?[0-9.,]+)", r"#### (.*)"), 1.0),
        (response("I do not know", "#### 1042", r"(-?[0-9.,]+)", r"#### (.*)"), 0.0),
        (response("42", None), None),
        (response("42", "the source forgot it", None, r"#### (.*)"), None),
    ],
)
def test_exact_match_is_right_wrong_or_unknown(graded: Response, reward: float | None) -> None:
    assert exact_match(graded) == reward


def test_every_reward_is_stored_with_its_rollout_and_can_be_queried(rewarded: Run) -> None:
    rows = [row for episode in range(2) for row in sampled(rewarded, episode)]
    expected = [even_share(row.response_ids) for row in rows]
    assert [row.reward for row in rows] == expected
    assert None in expected
    known = [value for value in expected if value is not None]
    assert len(set(known)) > 5
    _, ((mean, count),) = query_rows(rewarded.dir.path, "select avg(reward), count(reward) from rollouts")
    assert mean == pytest.approx(np.mean(known))
    assert count == len(known)


def test_steps_carry_the_mean_reward_of_their_rollouts(rewarded: Run) -> None:
    for episode in range(2):
        rows, start = sampled(rewarded, episode), 0
        for step in pq.read_table(rewarded.dir.steps(episode)).to_pylist():
            known = [r.reward for r in rows[start : start + step["rollouts"]] if r.reward is not None]
            assert step["reward"] == pytest.approx(sum(known) / len(known), rel=1e-6)
            start += step["rollouts"]
        assert start == len(rows)


def test_the_reward_changes_what_is_learned(rewarded: Run, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The same first episode without the reward's term gives other weights."""
    path = Path(shutil.copytree(rewarded.dir.path, tmp_path / "run"))
    for name in ("policy", "learn"):
        shutil.rmtree(path / "episode=0" / name)
    run = open_run(make_recipe(path, "rollout.reward=own_rewards:even_share", *MIXED, "learn.loss.terms.reward_pg=0"))
    InlineStages(run).learn(0)
    assert run.policy_fingerprint(1) != rewarded.policy_fingerprint(1)


def test_a_second_run_with_rewards_gives_the_same_bytes(
    rewarded: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    again = complete(make_recipe(tmp_path / "again", "rollout.reward=own_rewards:even_share", *MIXED))
    expected, found = data_files(rewarded.dir.path), data_files(again.dir.path)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_a_run_with_exact_match_learns_from_teacher_and_reward(task: Path, tmp_path: Path) -> None:
    """As a user would: in processes of their own, with the packaged reward."""
    path = tmp_path / "run"
    options = (
        "rollout.reward=exact_match",
        "num_episodes=1",
        "eval.answer_pattern=([a-j])",
        "eval.reference_pattern=([a-j])",
    )
    done = run_command("run", str(task / "recipe.yaml"), f"run_dir={path}", *options, *MIXED)
    assert done.returncode == 0, done.stderr
    answers = dict(duckdb.sql(f"select prompt_index, answer from '{path}/prompts.parquet'").fetchall())
    _, rows = query_rows(path, "select prompt_index, response_ids, reward from rollouts")
    letters = {byte_tokenizer().convert_tokens_to_ids(letter): letter for letter in "abcdefghij"}
    for index, ids, reward in rows:
        found = [letters[token] for token in ids if token in letters]
        assert reward == float(found[-1:] == [answers[index][-1]])
    rewards = [reward for _, _, reward in rows]
    done = run_command("query", str(path), "select avg(reward) as reward from rollouts", "--json")
    assert json.loads(done.stdout)["reward"] == pytest.approx(np.mean(rewards))
    steps = pq.read_table(path / "episode=0/learn/steps.parquet").to_pylist()
    assert sum(step["reward"] * step["rollouts"] for step in steps) == pytest.approx(sum(rewards))


def test_the_plan_and_every_footer_say_which_reward(rewarded: Run) -> None:
    facts = {"name": "own_rewards:even_share", "answer_pattern": None, "reference_pattern": None}
    target = rewarded.dir.episode(0)
    assert read_json(target.plan)["reward"] == facts
    assert read_json(target.rollouts / "_SEALED.json")["reward"] == facts
    with rollout_shards(target, load_rollout_plan(target)).open(0) as file:
        assert json.loads(file.metadata.metadata[b"opd_cache"])["reward"] == facts


def test_a_function_sees_prompt_answer_and_how_the_response_ended(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    for record in records[::2]:
        del record["answer"]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    run = open_run(make_recipe(tmp_path / "run", f"prompts.path={prompts}", "rollout.reward=own_rewards:seen", *QUICK))
    InlineStages(run).rollout(0)
    # The random sampler's responses are all cut.
    assert [row.reward for row in sampled(run)] == [
        row.prompt_index + 1000 * (row.prompt_index % 2) + 0.5 for row in sampled(run)
    ]


def test_prompts_without_an_answer_have_no_reward_by_exact_match(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    records = [{"prompt": f"sort {i}:", **({"answer": str(i)} if i % 2 else {})} for i in range(12)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    run = open_run(make_recipe(tmp_path / "run", f"prompts.path={prompts}", "rollout.reward=exact_match", *QUICK))
    InlineStages(run).rollout(0)
    assert [row.reward for row in sampled(run)] == [0.0 if row.prompt_index % 2 else None for row in sampled(run)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("nothing", "nan"), ("infinite", "-inf"), ("beyond_float32", "1e[+]39"), ("beyond_float64", "10+[.]{3}"), ("words", r"'very\\ngood'")],
)  # fmt: skip
def test_a_reward_that_is_no_finite_number_is_refused_and_nothing_is_published(
    make_recipe: Callable[..., Recipe], tmp_path: Path, name: str, value: str
) -> None:
    run = open_run(make_recipe(tmp_path / "run", f"rollout.reward=own_rewards:{name}", *QUICK))
    with pytest.raises(
        StoreError,
        match=rf"^3 of 3 shards failed \(0, 1, 2\): rollout.reward = 'own_rewards:{name}' gave {value} for 0/\d+/0, expected a finite number or None; nothing was published. Mend the function and run the same command again.$",
    ):
        InlineStages(run).rollout(0)
    assert not run.dir.episode(0).rollouts.exists() or not list(run.dir.episode(0).rollouts.iterdir())


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("own_rewards:absent", "cannot be loaded: module 'own_rewards' has no attribute 'absent'"),
        ("own_rewards:NO_FUNCTION", "is a float, expected a function"),
    ],
)
def test_a_reward_that_is_no_function_is_refused_before_anything_is_planned(
    make_recipe: Callable[..., Recipe], tmp_path: Path, name: str, fault: str
) -> None:
    run = open_run(make_recipe(tmp_path / "run", f"rollout.reward={name}", *QUICK))
    with pytest.raises(ConfigError, match=f"rollout.reward = '{name}' {fault}"):
        InlineStages(run).rollout(0)
    assert not run.dir.episode(0).path.exists()


def test_another_reward_inside_an_episode_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "run"
    InlineStages(open_run(make_recipe(path, "rollout.reward=exact_match", *QUICK))).rollout(0)
    (path / "episode=0/rollouts/_SEALED.json").unlink()
    stages = InlineStages(open_run(make_recipe(path, "rollout.reward=own_rewards:seen", *QUICK)))
    with pytest.raises(
        MismatchError,
        match=r'the plan of episode 0 was made with reward.name = "exact_match", now "own_rewards:seen". Set it back, or move',
    ):
        stages.rollout(0)


def test_caches_without_rewards_stay_as_they_were(finished_run: Run, tmp_path: Path) -> None:
    """No key in seal and footer, no column; and a plan from before there were rewards means the same."""
    target = finished_run.dir.episode(0)
    assert "reward" not in read_json(target.rollouts / "_SEALED.json")
    plan = load_rollout_plan(target)
    assert "reward" not in rollout_shards(target, plan).schema.names
    assert {row.reward for row in sampled(finished_run)} == {None}
    old = replace(target, path=tmp_path)
    content = {key: value for key, value in read_json(target.plan).items() if key != "reward"}
    old.plan.write_bytes(signed_json(content))
    assert asdict(load_rollout_plan(old)) == asdict(plan)
    publish_rollout_plan(old, plan, "")


def test_a_loss_on_rewards_needs_a_cache_with_rewards(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))
    shutil.rmtree(path / "episode=1" / "policy")
    shutil.rmtree(path / "episode=1" / "learn")
    for loss in (("learn.loss.name=reward_pg",), MIXED):
        with pytest.raises(
            MismatchError,
            match=r"^learn.loss.name = '\w+' needs task rewards, but the rollouts of episode 1 carry none. Set rollout.reward=exact_match [^\n]*$",
        ):
            InlineStages(open_run(make_recipe(path, *loss))).learn(1)


def test_a_batch_that_would_part_the_samples_of_a_prompt_is_refused(
    rewarded: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(rewarded.dir.path, tmp_path / "run"))
    for name in ("policy", "learn"):
        shutil.rmtree(path / "episode=1" / name)
    with pytest.raises(
        ConfigError,
        match=r"^learn.train_batch_size = 9 would part the 2 samples of a prompt, whose rewards are compared with each other. Use a multiple of 2.$",
    ):
        InlineStages(open_run(make_recipe(path, *MIXED, "learn.train_batch_size=9"))).learn(1)


def test_a_stored_reward_that_is_no_number_is_damage(rewarded: Run) -> None:
    row = sampled(rewarded)[0]
    assert rollout_fault(row) is None
    assert rollout_fault(replace(row, reward=math.nan)) == "reward is nan; expected a finite number"
