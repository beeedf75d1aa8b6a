"""Evaluation: grading by hand-worked cases, and the shared run's own figures worked out again from its files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import write_jsonl

from opd_cache.config import Recipe
from opd_cache.errors import MismatchError
from opd_cache.evals.stage import _take_in_prompts, evaluate_policy, evaluate_teacher, summarize
from opd_cache.grade import extract, is_same_answer, pass_at_k
from opd_cache.recipes import load_recipe
from opd_cache.run import Run, open_run
from opd_cache.run_dir import RunDir
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.status import evaluated_subjects


@pytest.mark.parametrize(("text", "pattern", "answer"), [
    (" cdiopsuy\n", None, "cdiopsuy"),
    (r"so \boxed{7} no, \boxed{ 42 }.", r"\\boxed\{([^{}]*)\}", "42"),
    ("work\n#### 1,234", r"####\s*(\S+)", "1,234"),
    ("no answer here", r"####\s*(\S+)", None),
    ("a 12 b 13", r"\d+", "13"),
    ("", None, ""),
    ("a: 7, b", r"a: (\d+)|b", None),
])  # fmt: skip
def test_answers_are_extracted_from_the_last_match(text: str, pattern: str | None, answer: str | None) -> None:
    assert extract(text, pattern) == answer


@pytest.mark.parametrize(("found", "expected", "same"), [
    ("abc", "abc", True),
    ("abc", "abd", False),
    (None, "abc", False),
    ("57500", "57,500", True),
    (r"\$18", "18", True),
    ("$1,234.5", "1234.5", True),
    (r"50\%", "50", True),
    ("50%.", "50", True),
    ("-3.", "-3", True),
    ("3", "-3", False),
    # only plain numbers are undressed, and nothing is worked out
    ("$x", "x", False),
    ("a,b", "ab", False),
    ("1,2", "12", False),
    ("18.00", "18", False),
    ("18 dollars", "18", False),
])  # fmt: skip
def test_answers_are_the_same_text_or_the_same_plain_number(found: str | None, expected: str, same: bool) -> None:
    assert is_same_answer(found, expected) is same


def test_packaged_gsm8k_patterns_find_the_same_number_in_response_and_reference() -> None:
    options = load_recipe(["gsm8k_qwen"]).eval
    for response, reference, same in (
        (r"so it costs \boxed{57500}.", "He paid it.\n#### 57,500", True),
        (r"Each earns \boxed{\$18}", "9 * 2 = 18\n#### 18", True),
        (r"Each earns \boxed{19}", "9 * 2 = 18\n#### 18", False),
    ):
        expected = extract(reference, options.reference_pattern)
        assert expected is not None
        assert is_same_answer(extract(response, options.answer_pattern), expected) is same


def test_pass_at_k_is_the_chance_of_a_right_one_among_k() -> None:
    # Two prompts, 4 samples each, 1 and 0 right: one draw hits with 1/4, two draws with 1 − (3/4 · 2/3) = 1/2.
    assert pass_at_k([1, 0], 4, 1) == pytest.approx(1 / 8)
    assert pass_at_k([1, 0], 4, 2) == pytest.approx(1 / 4)
    assert pass_at_k([4, 1], 4, 4) == 1.0


def row(mode: str, prompt: int, correct: bool | None, tokens: int, kl: float | None, reason: str = "stop") -> dict:
    return {
        "mode": mode,
        "prompt_index": prompt,
        "correct": correct,
        "num_response_tokens": tokens,
        "reverse_kl_sum": kl,
        "finish_reason": reason,
    }


def test_a_summary_weighs_tokens_for_kl_and_responses_for_accuracy() -> None:
    rows = [row("greedy", 0, True, 3, None), row("greedy", 1, False, 3, None)]
    rows += [
        row("sampled", 0, True, 2, 1.0),
        row("sampled", 0, True, 0, 0.0),
        row("sampled", 1, False, 8, 4.0, "length"),
        row("sampled", 1, True, 4, None),
    ]
    found = summarize(rows)
    assert found["greedy_accuracy"] == 0.5
    assert found["sampled_accuracy"] == 0.75
    assert found["pass_at_k"] == {"1": 0.75, "2": 1.0}
    assert found["reverse_kl"] == pytest.approx(5.0 / 10)
    assert found["truncated_share"] == 0.25
    assert found["prompts"] == 2


def test_prompts_without_answers_give_reverse_kl_alone() -> None:
    found = summarize([row("sampled", 0, None, 4, 2.0)])
    assert (found["greedy_accuracy"], found["sampled_accuracy"], found["reverse_kl"]) == (None, None, 0.5)


def test_reverse_kl_of_an_evaluation_follows_from_its_shards(finished_run: Run) -> None:
    folder = finished_run.dir.evaluation("policy=2")
    target = folder / "mode=sampled"
    rollouts = pq.read_table(next((target / "rollouts").glob("*.parquet")), partitioning=None)
    scores = pq.read_table(next((target / "scores" / "teacher=main").glob("*.parquet")), partitioning=None)
    student, teacher = (
        sum(sum(values) for values in column.to_pylist())
        for column in (rollouts["sampling_logprobs"], scores["teacher_logprobs"])
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reverse_kl"] == pytest.approx(
        (student - teacher) / sum(rollouts["num_response_tokens"].to_pylist()), rel=1e-6
    )
    assert len(rollouts) == 6 * 2
    assert pq.read_metadata(folder / "results.parquet").num_rows == 6 + 12


def test_the_baseline_is_the_student_before_training_and_the_teacher_is_evaluated_once(finished_run: Run) -> None:
    folder = finished_run.dir.path / "evals"
    assert sorted(path.name for path in folder.iterdir()) == ["policy=0", "policy=1", "policy=2", "teacher=main"]
    plans = {
        path.name: json.loads((path / "mode=sampled" / "plan.json").read_text())["policy"] for path in folder.iterdir()
    }
    assert len(set(plans.values())) == 4


def test_other_held_out_prompts_in_the_same_run_are_refused(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = finished_run.dir.path
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "sort ba:", "answer": "ab"}])
    run = replace(finished_run, recipe=make_recipe(path, f"eval.path={other}"))
    with pytest.raises(
        MismatchError,
        match=r"eval_prompts.parquet: taken in with path = '.*heldout.jsonl', the recipe says '.*other.jsonl'",
    ):
        _take_in_prompts(run)


def test_no_eval_path_means_no_evaluation(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = open_run(make_recipe(tmp_path / "run", "eval.path=null"))
    assert not any(run.recipe.eval_is_due(version) for version in range(3))


class NoModel:
    """A sampler that must not be needed."""

    engine, dtype = "none", "float32"

    def load_policy(self, model: object) -> None:
        raise AssertionError("a model was loaded")


class NoTeacher(HFScorer):
    """A scorer that must not be needed."""

    def load(self) -> None:
        raise AssertionError("a model was loaded")


@pytest.fixture
def copied(finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Run]:
    """copied("eval.greedy=false"): the shared run in a folder of its own, opened with another recipe."""
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "copy"))
    return lambda *overrides: replace(finished_run, recipe=make_recipe(path, *overrides), dir=RunDir(path))


def evaluate(run: Run, version: int = 1) -> None:
    teacher = NoTeacher(run.recipe.teachers["main"], run.recipe.score)
    evaluate_policy(run, version, NoModel(), {"main": teacher})


def refusal(run: Run) -> str:
    with pytest.raises(MismatchError) as caught:
        evaluate(run)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_summary_says_whose_it_is_and_how_it_was_graded(finished_run: Run) -> None:
    summary = json.loads((finished_run.dir.evaluation("policy=1") / "summary.json").read_text())
    assert summary["policy"] == finished_run.policy_fingerprint(1)
    assert summary["grading"] == {
        "answer_pattern": None,
        "reference_pattern": None,
        "n_samples_per_prompt": 2,
        "greedy": True,
    }


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("eval.answer_pattern=.[a-c]*", "eval.answer_pattern = None, the recipe says '.[a-c]*'"),
        ("eval.reference_pattern=.[a-c]*", "eval.reference_pattern = None, the recipe says '.[a-c]*'"),
        ("eval.greedy=false", "eval.greedy = True, the recipe says False"),
    ],
)
def test_other_grading_is_refused_and_removing_the_figures_grades_the_same_responses_again(
    copied: Callable[..., Run], override: str, difference: str
) -> None:
    run = copied(override)
    folder = run.dir.evaluation("policy=1")
    assert refusal(run) == (
        f"{folder}/summary.json: graded with {difference}. Set it back, or remove {folder}/summary.json and "
        f"{folder}/results.parquet to grade the same responses again and run: opd-cache eval RECIPE --policy-version 1"
    )
    for name in ("summary.json", "results.parquet"):
        (folder / name).unlink()
    evaluate(run)
    key, _, _ = override.removeprefix("eval.").partition("=")
    assert json.loads((folder / "summary.json").read_text())["grading"][key] == getattr(run.recipe.eval, key)


def test_another_number_of_samples_is_refused_and_asks_for_another_folder(copied: Callable[..., Run]) -> None:
    run = copied("eval.n_samples_per_prompt=3")
    folder = run.dir.evaluation("policy=1")
    assert refusal(run) == (
        f"{folder}/summary.json: graded with eval.n_samples_per_prompt = 2, the recipe says 3. Set it back, or move "
        f"{folder} out of evals/ to evaluate again and run: opd-cache eval RECIPE --policy-version 1"
    )


def test_evaluation_of_another_policy_is_refused(copied: Callable[..., Run]) -> None:
    run = copied()
    folder = run.dir.evaluation("policy=1")
    shutil.rmtree(run.dir.policy_after(0))
    shutil.copytree(run.dir.policy_after(1), run.dir.policy_after(0))
    wanted, found = run.policy_fingerprint(2)[:12], json.loads((folder / "summary.json").read_text())["policy"][:12]
    assert refusal(run) == (
        f"{folder}/summary.json: the evaluation belongs to another policy: policy = {found}, policy=1 is now {wanted}. "
        f"Move {folder} out of evals/ and run: opd-cache eval RECIPE --policy-version 1"
    )


def test_results_left_by_a_kill_are_summed_up_as_they_are(copied: Callable[..., Run]) -> None:
    run = copied()
    folder = run.dir.evaluation("policy=1")
    before, results = (folder / "summary.json").read_bytes(), (folder / "results.parquet").read_bytes()
    (folder / "summary.json").unlink()
    evaluate(run)
    assert ((folder / "summary.json").read_bytes(), (folder / "results.parquet").read_bytes()) == (before, results)


def test_results_left_by_a_kill_are_never_summed_up_under_another_grading(copied: Callable[..., Run]) -> None:
    run = copied("eval.answer_pattern=.[a-c]*")
    folder = run.dir.evaluation("policy=1")
    (folder / "summary.json").unlink()
    assert refusal(run).startswith(f"{folder}/results.parquet: graded with eval.answer_pattern = None, ")
    assert not (folder / "summary.json").exists()


def test_finished_evaluation_on_other_prompts_is_not_taken_for_one_on_these(
    copied: Callable[..., Run], tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "sort ba:", "answer": "ab"}])
    assert "eval_prompts.parquet: taken in with path" in refusal(copied(f"eval.path={other}"))


def test_teacher_stops_at_its_own_eos_as_well_as_at_the_students(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(task / "teacher", tmp_path / "teacher"))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((teacher / name).read_text())
        (teacher / name).write_text(json.dumps({**content, "eos_token_id": [40, 41]}))
    run = open_run(
        make_recipe(tmp_path / "run", f"teachers.main.model={teacher}", "rollout.stop_token_ids=[1]", "eval.limit=1")
    )
    # The plan is published before the first response is sampled.
    with pytest.raises(AssertionError, match="a model was loaded"):
        evaluate_teacher(run, "main", NoModel())
    with pytest.raises(AssertionError, match="a model was loaded"):
        evaluate(run, version=0)
    stops = {
        subject: json.loads(run.dir.evaluation_set(subject, "greedy").plan.read_text())["sampling"]["stop_token_ids"]
        for subject in ("teacher=main", "policy=0")
    }
    assert stops == {"teacher=main": [1, 40, 41], "policy=0": [1]}


def test_folders_moved_aside_in_evals_are_no_evaluations(copied: Callable[..., Run]) -> None:
    run = copied()
    for name in ("policy=1.old", "teacher=main.old", "notes"):
        shutil.copytree(run.dir.evaluation("policy=1"), run.dir.evaluation(name))
    assert evaluated_subjects(run.dir) == ["policy=0", "policy=1", "policy=2", "teacher=main"]
