"""The learner on real joined rows: gradients, denominators, masks, metrics."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import complete, save_model, tiny_qwen2

from opd_cache.config import ModelConfig, Recipe, ScoreConfig, TeacherConfig
from opd_cache.errors import DivergedError, MismatchError
from opd_cache.learn.batch import MicroBatch, micro_batches, rows_to_learn
from opd_cache.learn.engines.torch import TorchEngine
from opd_cache.learn.losses import TokenLogprobs, TokenLoss, resolve_loss
from opd_cache.learn.objective import Objective, StepFacts
from opd_cache.learn.plan import LearnPlan
from opd_cache.learn.ranks import ALONE
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.learn.step import Trainer
from opd_cache.run import Run, open_run
from opd_cache.run_dir import CANARY
from opd_cache.schema import STEPS
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest
from opd_cache.store.join import Joined, join_stages
from opd_cache.store.manifest import check_files
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_shards


@pytest.fixture(scope="module")
def rows(finished_run: Run) -> list[Joined]:
    target = finished_run.dir.episode(0)
    plan = load_rollout_plan(target)
    return list(join_stages(rollout_shards(target, plan), score_shards(target, plan, "main")))


@pytest.fixture
def engine(finished_run: Run) -> TorchEngine:
    engine = new_engine(finished_run)
    engine.load(finished_run.policy_folder(0), with_optimizer=False)
    return engine


def gradients_of_a_step(
    run: Run, engine: TorchEngine, rows: list[Joined], **learn_options: object
) -> tuple[dict[str, torch.Tensor], dict]:
    recipe = copy.deepcopy(run.recipe)
    for key, value in learn_options.items():
        setattr(recipe.learn, key, value)
    taken: dict[str, torch.Tensor] = {}

    def keep_gradients(learning_rate: float) -> float:
        parameters = engine.student.module.named_parameters()
        taken.update({name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None})
        engine.optimizer.zero_grad()
        return 0.0

    engine.optimizer_step = keep_gradients  # type: ignore[method-assign]
    metrics = Trainer(recipe, engine, 0, ALONE).step(rows, 0, 1e-3, read_s=0.0)
    return taken, metrics


@pytest.mark.parametrize("loss", ["reverse_kl_pg", "reverse_kl_topk", "forward_kl_topk"])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(
    finished_run: Run, engine: TorchEngine, rows: list[Joined], loss: str
) -> None:
    options = {"loss": replace(finished_run.recipe.learn.loss, name=loss), "kl_coef": 0.1}
    whole, metrics = gradients_of_a_step(finished_run, engine, rows, max_tokens_per_micro_batch=10_000, **options)
    for budget in (1, 50, 123):
        parts, others = gradients_of_a_step(finished_run, engine, rows, max_tokens_per_micro_batch=budget, **options)
        assert parts.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(parts[name], expected, atol=1e-5, rtol=1e-4)
        for key in ("loss", "reverse_kl", "reverse_kl_p99", "entropy", "ratio_mean", "tokens"):
            assert others[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5)


def test_the_gradient_equals_the_plain_formula_over_full_logits(
    finished_run: Run, engine: TorchEngine, rows: list[Joined]
) -> None:
    """Each sequence alone, all logits, policy gradient on-policy; one mean over all tokens of the batch."""
    found, metrics = gradients_of_a_step(
        finished_run, engine, rows, loss=replace(finished_run.recipe.learn.loss, name="reverse_kl_pg")
    )
    module = engine.student.module
    total = sum(len(rollout.response_ids) for rollout, _ in rows)
    plain = torch.zeros(())
    for rollout, score in rows:
        ids = torch.tensor([[*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]])
        start, count = len(rollout.prompt_ids), len(rollout.response_ids)
        logprobs = module(input_ids=ids).logits[0, start - 1 : start - 1 + count].log_softmax(-1)
        own = logprobs.gather(-1, ids[0, start:, None]).squeeze(-1)
        advantage = torch.from_numpy(np.array(score.teacher_logprobs)) - own.detach()
        ratio = (own - torch.from_numpy(np.array(rollout.sampling_logprobs))).exp()
        plain = plain - (ratio * advantage).sum() / total
    module.zero_grad()
    plain.backward()
    assert metrics["tokens"] == total
    assert metrics["loss"] == pytest.approx(plain.item(), abs=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


def student_logprobs(run: Run, engine: TorchEngine, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of the sampled tokens [N], at the teacher's top k [N, K]) as a loss sees them."""
    loss = resolve_loss(run.recipe.learn.loss)
    seen: list[torch.Tensor] = []

    def compute(tokens: TokenLogprobs, options: object) -> TokenLoss:
        seen.extend([tokens.student_logprobs_N.detach(), tokens.student_topk_logprobs_NK.detach()])
        return TokenLoss(tokens.student_logprobs_N)

    facts = StepFacts(len(micro.target_ids_N))
    objective = Objective(replace(loss, compute=compute), run.recipe.learn, facts, micro, engine.vocab_size, None)
    engine.student(micro, objective)
    return seen[0], seen[1]


def one_micro_batch(rows: list[Joined]) -> MicroBatch:
    (micro,) = micro_batches(rows, [0.0] * len(rows), 10**6)
    return micro


def test_the_sampler_and_the_learner_agree_on_the_students_logprobs(
    finished_run: Run, rows: list[Joined], engine: TorchEngine
) -> None:
    for micro in micro_batches(rows_to_learn(rows, mask_truncated=False), [0.0] * len(rows), 200):
        student, at_topk = student_logprobs(finished_run, engine, micro)
        torch.testing.assert_close(student, micro.sampling_logprobs_N, atol=2e-5, rtol=0)
        assert at_topk.shape == micro.topk_logprobs_NK.shape


def test_padding_equal_to_eos_changes_nothing(finished_run: Run, rows: list[Joined], engine: TorchEngine) -> None:
    micro = one_micro_batch(rows)
    padded = torch.where(micro.attention_mask_BT == 0, 1, micro.input_ids_BT)
    expected, _ = student_logprobs(finished_run, engine, micro)
    found, _ = student_logprobs(finished_run, engine, replace(micro, input_ids_BT=padded))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def _emptied(row: Joined) -> Joined:
    rollout, score = row
    none = np.zeros(0, np.float32)
    empty = replace(rollout, response_ids=np.zeros(0, np.int32), sampling_logprobs=none)
    return empty, replace(
        score,
        teacher_logprobs=none,
        teacher_rank=np.zeros(0, np.int32),
        topk_ids=np.zeros((0, 4), np.int32),
        topk_logprobs=np.zeros((0, 4), np.float32),
    )


def test_empty_error_and_masked_rows_carry_no_loss_and_are_counted(
    finished_run: Run, engine: TorchEngine, rows: list[Joined]
) -> None:
    cut = [row for row in rows if row[0].finish_reason == "length"]
    stopped = [row for row in rows if row[0].finish_reason == "stop"]
    assert cut
    assert len(stopped) > 4
    expected, _ = gradients_of_a_step(finished_run, engine, stopped[2:])
    unscored = (stopped[1][0], replace(_emptied(stopped[1])[1], error="too long"))
    batch = [_emptied(stopped[0]), unscored, *stopped[2:], *cut]
    found, metrics = gradients_of_a_step(finished_run, engine, batch, mask_truncated=True)
    assert metrics["tokens"] == sum(len(rollout.response_ids) for rollout, _ in stopped[2:])
    assert metrics["truncated_share"] == pytest.approx(len(cut) / len(batch))
    assert metrics["error_share"] == pytest.approx(1 / len(batch))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_batch_with_nothing_to_learn_is_a_zero_step(
    finished_run: Run, engine: TorchEngine, rows: list[Joined]
) -> None:
    before = {name: value.clone() for name, value in engine.student.module.state_dict().items()}
    metrics = Trainer(finished_run.recipe, engine, 0, ALONE).step([_emptied(rows[0])], 0, 1e-3, read_s=0.0)
    assert (metrics["loss"], metrics["tokens"], metrics["grad_norm"]) == (0.0, 0, 0.0)
    assert all(np.isfinite(value) for value in metrics.values() if value is not None)
    assert all(torch.equal(before[name], value) for name, value in engine.student.module.state_dict().items())


def test_normalized_advantages_use_the_moments_of_the_global_batch(
    finished_run: Run, engine: TorchEngine, rows: list[Joined]
) -> None:
    loss = replace(finished_run.recipe.learn.loss, name="reverse_kl_pg", normalize_advantages=True)
    one, _ = gradients_of_a_step(finished_run, engine, rows, loss=loss, max_tokens_per_micro_batch=10_000)
    many, _ = gradients_of_a_step(finished_run, engine, rows, loss=loss, max_tokens_per_micro_batch=60)
    for name, gradient in one.items():
        torch.testing.assert_close(many[name], gradient, atol=1e-5, rtol=1e-4)


def test_every_row_is_learned_once_and_the_ragged_last_batch_counts(finished_run: Run) -> None:
    table = pq.read_table(finished_run.dir.steps(0)).to_pylist()
    assert [row["rollouts"] for row in table] == [10, 10, 4]
    assert [row["step"] for row in table] == [1, 2, 3]
    assert [row["step"] for row in pq.read_table(finished_run.dir.steps(1)).to_pylist()] == [4, 5, 6]
    assert set(table[0]) == {column.name for column in STEPS}
    assert all(np.isfinite(value) for row in table for value in row.values() if value is not None)
    rollouts = pq.read_table(finished_run.dir.episode(0).rollouts, columns=["num_response_tokens"], partitioning=None)
    assert sum(row["tokens"] for row in table) == sum(rollouts["num_response_tokens"].to_pylist())


def test_the_first_step_of_an_episode_is_on_policy(finished_run: Run) -> None:
    for episode in range(2):
        first = pq.read_table(finished_run.dir.steps(episode)).to_pylist()[0]
        assert first["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        assert first["ratio_max"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [0.5, 1.0, 1.0, 1.0]), ("linear", [0.5, 0.75, 0.5, 0.25]), ("cosine", [0.5, 0.853553, 0.5, 0.146447]),
])  # fmt: skip
def test_learning_rate_schedules(finished_run: Run, schedule: str, expected: list[float]) -> None:
    config = replace(finished_run.recipe.learn, learning_rate=1.0, lr_schedule=schedule, warmup_steps=1)
    plan = LearnPlan(first_step=0, num_steps=4, total_steps=4, batch_size=1, rows_per_epoch=4)
    assert [plan.learning_rate(step, config) for step in range(4)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradient_checkpointing_keeps_less_and_does_not_change_the_gradient(
    finished_run: Run, engine: TorchEngine, rows: list[Joined], how: str
) -> None:
    expected, _ = gradients_of_a_step(finished_run, engine, rows)
    options = replace(finished_run.recipe.learn, gradient_checkpointing=how)
    other = TorchEngine(options, finished_run.recipe.student, ALONE)
    other.load(finished_run.policy_folder(0), with_optimizer=False)
    found, _ = gradients_of_a_step(finished_run, other, rows)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    assert kept_bytes(other, rows) < {"selective": 0.7, "full": 0.3}[how] * kept_bytes(engine, rows)


def kept_bytes(engine: TorchEngine, rows: list[Joined]) -> int:
    """Memory that the body's forward takes and does not give back before the backward."""
    batch = one_micro_batch(rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        hidden = engine.student.model.hidden(batch.input_ids_BT, batch.attention_mask_BT)
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def test_a_policy_is_a_plain_hugging_face_folder_with_a_whole_manifest(finished_run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished_run.policy_folder(2)
    assert check_files(folder)["policy_version"] == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(folder).decode([67, 68, 69]) == AutoTokenizer.from_pretrained(
        finished_run.recipe.student.model
    ).decode([67, 68, 69])


def test_a_policy_carries_a_sequence_with_its_logprobs(finished_run: Run) -> None:
    """By which an engine that loads the policy can prove that it has."""
    folder = finished_run.policy_folder(2)
    canary = json.loads((folder / CANARY).read_text())
    scorer = HFScorer(TeacherConfig(str(folder), device="cpu"), ScoreConfig())
    ids = (np.array(canary[key], np.int32) for key in ("prompt_ids", "response_ids"))
    (scores,) = scorer.score([ScoreRequest(0, *ids, 0)], 0)
    assert len(scores.logprobs) > 0
    np.testing.assert_allclose(canary["logprobs"], scores.logprobs, atol=1e-5, rtol=0)


def test_bfloat16_autocast_learns_with_float32_weights(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = complete(make_recipe(tmp_path / "run", "num_episodes=1", "learn.precision=bfloat16", "eval.path=null"))
    (row, *_) = pq.read_table(run.dir.steps(0)).to_pylist()
    assert np.isfinite(row["loss"])
    assert row["ratio_mean"] == pytest.approx(1.0, abs=0.05)


def test_kl_penalty_pulls_towards_the_initial_student(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = complete(make_recipe(tmp_path / "run", "learn.kl_coef=0.5", "eval.path=null"))
    first = pq.read_table(run.dir.steps(0)).to_pylist()
    assert first[0]["kl_penalty"] == pytest.approx(0.0, abs=1e-6)
    assert first[-1]["kl_penalty"] > 0


def test_changed_settings_inside_an_episode_are_refused(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    shutil.rmtree(path / "episode=1" / "policy")
    changed = replace(
        finished_run, dir=replace(finished_run.dir, path=path), recipe=make_recipe(path, "learn.learning_rate=0.5")
    )
    with pytest.raises(
        MismatchError, match=r"episode=1/learn/plan.json: the learning of episode 1 was made with settings"
    ):
        learn_episode(changed, 1, new_engine(changed))
    assert not (path / "episode=1" / "policy").exists()


def test_top_k_ids_beyond_the_students_vocabulary_are_impossible_for_it(
    finished_run: Run, rows: list[Joined], engine: TorchEngine
) -> None:
    micro = one_micro_batch(rows)
    expected, at_topk = student_logprobs(finished_run, engine, micro)
    ids = micro.topk_ids_NK.clone()
    ids[:, 1] = 258
    found, shifted = student_logprobs(finished_run, engine, replace(micro, topk_ids_NK=ids))
    torch.testing.assert_close(found, expected)
    assert (shifted[:, 1] == -torch.inf).all()
    torch.testing.assert_close(shifted[:, [0, 2, 3]], at_topk[:, [0, 2, 3]])


def test_gradient_checkpointing_leaves_no_dropout_on(finished_run: Run, rows: list[Joined], tmp_path: Path) -> None:
    folder = save_model(tiny_qwen2(seed=1, attention_dropout=0.3), tmp_path / "student")
    options = replace(finished_run.recipe.learn, gradient_checkpointing="selective")
    engine = TorchEngine(options, ModelConfig(model=str(folder), device="cpu"), ALONE)
    engine.load(folder, with_optimizer=False)
    assert engine.student.module.training
    micro = one_micro_batch(rows)
    found, _ = student_logprobs(finished_run, engine, micro)
    torch.testing.assert_close(found, micro.sampling_logprobs_N, atol=2e-5, rtol=0)


def test_a_step_that_is_not_finite_ends_the_episode_without_a_policy(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"the gradient norm is (nan|inf); nothing was published"):
        complete(make_recipe(tmp_path / "run", "learn.learning_rate=1e30", "eval.path=null"))
    assert not list(tmp_path.rglob("policy"))


def test_contradicting_generation_settings_travel_with_the_policy(
    task: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Older checkpoints ship settings that transformers refuses to save; they are not ours to judge or to lose."""
    student = Path(shutil.copytree(task / "student", tmp_path / "student"))
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
    (student / "generation_config.json").write_text(json.dumps(settings))
    run = complete(make_recipe(tmp_path / "run", f"student.model={student}", "num_episodes=1", "eval.path=null"))
    assert json.loads((run.policy_folder(1) / "generation_config.json").read_text()) == settings


def test_a_student_from_an_earlier_run_starts_with_a_fresh_optimizer(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    student = f"student.model={finished_run.policy_folder(1)}"
    run = complete(
        make_recipe(tmp_path / "run", student, "num_episodes=1", "learn.lr_schedule=linear", "eval.path=null")
    )
    steps = pq.read_table(run.dir.steps(0)).to_pylist()
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[0]["learning_rate"] == pytest.approx(1e-3)


def test_more_episodes_may_be_asked_for_inside_an_episode_at_a_constant_rate(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    shutil.rmtree(path / "episode=1" / "policy")
    assert learn_episode(open_run(make_recipe(path, "num_episodes=7")), 1, new_engine(finished_run))
