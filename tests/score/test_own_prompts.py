"""Teachers with prompts of their own: their ids, what is stored of them, and that the response ids stay the student's."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import run_command, save_model, tiny_qwen2, write_jsonl
from transformers import AutoModelForCausalLM

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError, MismatchError, OpdCacheError, PromptError
from opd_cache.pipeline import InlineStages
from opd_cache.quickstart.sort_letters import byte_tokenizer
from opd_cache.run import Run, open_run
from opd_cache.store.publish import digest_file

HINT = "teachers.main.prompt.template='{prompt} {answer} '"
PLAIN = "teachers.main.prompt.template='{prompt}'"


@pytest.fixture
def sampled(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Run]:
    """A run whose first episode is sampled, opened with these settings."""

    def make(*settings: str) -> Run:
        run = open_run(make_recipe(tmp_path / "run", "eval.path=null", *settings))
        InlineStages(run).rollout(0)
        return run

    return make


def scores_of(run: Run, teacher: str = "main") -> list[dict]:
    folder = run.dir.episode(0).scores(teacher)
    return [row for path in sorted(folder.glob("shard-*")) for row in pq.read_table(path).to_pylist()]


def rollouts_of(run: Run) -> list[dict]:
    folder = run.dir.episode(0).rollouts
    return [row for path in sorted(folder.glob("shard-*")) for row in pq.read_table(path).to_pylist()]


def own_prompts(run: Run, teacher: str = "main") -> list[dict]:
    return pq.read_table(run.dir.path / f"teacher_prompts/teacher={teacher}.parquet").to_pylist()


def refused(kind: type[OpdCacheError], run: Run) -> str:
    before = sorted(run.dir.path.rglob("*"))
    with pytest.raises(kind) as caught:
        InlineStages(run).score(0)
    assert "\n" not in str(caught.value)
    left = [path for path in sorted(run.dir.path.rglob("*")) if path not in before]
    assert [path for path in left if path.is_file()] == []
    return str(caught.value)


def test_the_teacher_scores_the_students_tokens_after_its_own_prompt(sampled: Callable[..., Run], task: Path) -> None:
    """Against a log-softmax in float64 of the whole sequence, one row at a time."""
    run = sampled(HINT)
    assert InlineStages(run).score(0)
    prompts, problems = own_prompts(run), [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    for row, problem in zip(prompts, problems, strict=True):
        assert row["text"] == f"{problem['prompt']} {problem['answer']} "
        assert row["prompt_ids"] == byte_tokenizer()(row["text"])["input_ids"]
        assert row["num_prompt_tokens"] == len(row["prompt_ids"])
    teacher = AutoModelForCausalLM.from_pretrained(task / "teacher", dtype=torch.float64)
    for rollout, score in zip(rollouts_of(run), scores_of(run), strict=True):
        prompt, response = prompts[rollout["prompt_index"]]["prompt_ids"], rollout["response_ids"]
        assert prompt != rollout["prompt_ids"]
        assert (score["ids_hash"], score["num_response_tokens"]) == (rollout["ids_hash"], len(response))
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + response])).logits[0]
        expected = [float(logits[len(prompt) + t - 1].log_softmax(-1)[token]) for t, token in enumerate(response)]
        np.testing.assert_allclose(score["teacher_logprobs"], expected, atol=2e-4)


def test_its_scores_say_which_prompts_they_were_made_with_and_train_the_student(sampled: Callable[..., Run]) -> None:
    run = sampled(HINT)
    stages = InlineStages(run)
    stages.score(0)
    plan = json.loads((run.dir.episode(0).scores("main") / "plan.json").read_text())
    assert plan["teacher_prompts"] == digest_file(run.dir.path / "teacher_prompts/teacher=main.parquet")
    assert stages.learn(0)


def test_a_template_that_gives_the_students_prompt_gives_the_same_scores(
    make_recipe: Callable[..., Recipe], finished_run: Run, sampled: Callable[..., Run]
) -> None:
    run = sampled(PLAIN)
    InlineStages(run).score(0)
    plan = json.loads((finished_run.dir.episode(0).scores("main") / "plan.json").read_text())
    assert "teacher_prompts" not in plan
    assert scores_of(run) == scores_of(finished_run)


def test_the_chat_template_is_the_teachers_own(make_recipe: Callable[..., Recipe], tmp_path: Path, task: Path) -> None:
    save_model(tiny_qwen2(seed=2), tmp_path / "teacher")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mark }}"
    tokenizer.save_pretrained(tmp_path / "teacher")
    settings = [f"teachers.main.model={tmp_path}/teacher", HINT, "teachers.main.prompt.apply_chat_template=true"]
    settings += ["teachers.main.prompt.system_prompt=hi", "teachers.main.prompt.chat_template_kwargs={mark: '>'}"]
    run = open_run(make_recipe(tmp_path / "run", *settings))
    stages = InlineStages(run)
    stages.rollout(0)
    stages.score(0)
    row = own_prompts(run)[3]
    assert tokenizer.decode(row["prompt_ids"]) == f"[system]hi[user]{row['text']}>"


def test_evaluations_have_the_teachers_own_prompts_too(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = open_run(make_recipe(tmp_path / "run", HINT))
    InlineStages(run).eval(0)
    rows = pq.read_table(tmp_path / "run/eval_teacher_prompts/teacher=main.parquet").to_pylist()
    problems = pq.read_table(run.dir.eval_prompts).to_pylist()
    assert [row["text"] for row in rows] == [f"{problem['text']} {problem['answer']} " for problem in problems]
    assert not (tmp_path / "run/teacher_prompts").exists()


def test_another_template_is_refused_and_a_teacher_of_another_name_is_not(
    sampled: Callable[..., Run], task: Path
) -> None:
    InlineStages(sampled(HINT)).score(0)
    run = sampled("teachers.main.prompt.template='{prompt} ? '")
    message = refused(MismatchError, run)
    path = run.dir.path / "teacher_prompts/teacher=main.parquet"
    assert message == (
        f"{path}: made with teachers.main.prompt.template = '{{prompt}} {{answer}} ', the recipe says '{{prompt}} ? '. "
        "Set it back, or give the teacher with the other prompt a name of its own."
    )
    other = f"teachers.other={{model: {task}/teacher, dtype: float32, device: cpu, prompt: {{template: '? '}}}}"
    assert InlineStages(sampled(HINT, other, "learn.teacher=main")).score(0)


def test_taking_the_template_away_inside_an_episode_is_refused(sampled: Callable[..., Run]) -> None:
    InlineStages(sampled(HINT)).score(0)
    message = refused(MismatchError, sampled())
    assert "the scoring of episode 0 was made with teacher_prompts = " in message
    assert message.endswith("away to score again.")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{solution}", "teachers.main.prompt.template needs the field 'solution'; found: 'id', 'prompt', 'answer'"),
        (" ", "the prompt is empty"),
    ],
)
def test_a_template_that_a_prompt_cannot_fill_is_refused(
    sampled: Callable[..., Run], template: str, fault: str
) -> None:
    run = sampled(f"teachers.main.prompt.template='{template}'")
    assert refused(PromptError, run) == f"prompt 0 ('p0'): {fault}. Mend the template."


def test_a_prompt_without_the_answer_that_the_template_wants_is_named(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    records = [{"prompt": "sort ba:", "answer": "ab"}, {"id": "p7", "prompt": "sort dc:"}]
    settings = [f"prompts.path={write_jsonl(tmp_path / 'two.jsonl', records)}", "rollout.prompts_per_episode=2", HINT]
    run = open_run(make_recipe(tmp_path / "run", *settings))
    InlineStages(run).rollout(0)
    message = refused(PromptError, run)
    assert message.startswith("prompt 1 ('p7'): 'answer' must be a text or a number, since teachers.main.prompt")


def test_prompts_of_an_opd_cache_without_fields_are_refused(sampled: Callable[..., Run]) -> None:
    run = sampled(HINT)
    table = pq.read_table(run.dir.prompts)
    metadata = pq.read_metadata(run.dir.prompts).metadata
    run.dir.prompts.unlink()
    pq.write_table(table.drop_columns(["fields"]).replace_schema_metadata(metadata), run.dir.prompts)
    assert "prompts.parquet: has no column 'fields'; an older opd-cache took the prompts in." in refused(
        MismatchError, run
    )


def test_a_prompt_beyond_the_teachers_context_is_an_error_row(sampled: Callable[..., Run]) -> None:
    run = sampled(f"teachers.main.prompt.template='{{prompt}}{'x' * 50}'")
    InlineStages(run).score(0)
    rows = list(zip(rollouts_of(run), own_prompts_of_rows(run), scores_of(run), strict=True))
    assert any(score["error"] is None for _, _, score in rows)
    assert any(score["error"] is not None for _, _, score in rows)
    for rollout, prompt, score in rows:
        tokens = prompt["num_prompt_tokens"] + rollout["num_response_tokens"]
        too_long = tokens > 64 and rollout["num_response_tokens"] > 0
        assert score["error"] == (f"{tokens} tokens, the teacher's context is 64" if too_long else None)


def own_prompts_of_rows(run: Run) -> list[dict]:
    prompts = own_prompts(run)
    return [prompts[row["prompt_index"]] for row in rollouts_of(run)]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["system_prompt=hi"], "teachers.main.prompt.system_prompt is set, but not teachers.main.prompt.template"),
        (["template=x", "system_prompt=hi"], "teachers.main.prompt.system_prompt needs "),
        (["template=x", "chat_template_kwargs={a: 1}"], "teachers.main.prompt.chat_template_kwargs needs "),
        (
            ["template=x", "chat_template_kwargs={tokenize: false}"],
            "teachers.main.prompt.chat_template_kwargs.tokenize",
        ),
    ],
)
def test_settings_without_effect_are_refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path, settings: list[str], fault: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe(tmp_path / "run", *(f"teachers.main.prompt.{setting}" for setting in settings))
    assert str(caught.value).startswith(fault)


def test_the_command_line_takes_a_template(task: Path, tmp_path: Path) -> None:
    done = run_command("config", task / "recipe.yaml", f"run_dir={tmp_path}/run", HINT, "--json")
    assert json.loads(done.stdout)["teachers"]["main"]["prompt"]["template"] == "{prompt} {answer} "
