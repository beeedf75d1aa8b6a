"""Outside rollouts become an episode: their formats, what is refused, and that they are scored and learned like our own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers import STOP_IDS, assert_verified, complete, data_files, run_command, write_jsonl

from opd_cache.config import Recipe
from opd_cache.errors import MismatchError, RolloutFileError
from opd_cache.exports.jsonl import write_lines
from opd_cache.exports.rows import chosen_responses
from opd_cache.imports.stage import import_episode
from opd_cache.learn.batch import micro_batches, rows_to_learn
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, load_tokenizer, open_run
from opd_cache.store.join import join_shard, read_rollouts
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_shards
from opd_cache.store.query import query_rows
from opd_cache.types import Rollout, Score

NO_EVAL = "eval.path=null"


@pytest.fixture
def new_run(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Run]:
    return lambda *settings: open_run(make_recipe(tmp_path / "run", NO_EVAL, *settings))


def rollouts(run: Run) -> list[Rollout]:
    target = run.dir.episode(0)
    plan = load_rollout_plan(target)
    shards = rollout_shards(target, plan)
    return [row for shard in range(plan.num_shards) for row in read_rollouts(shards, shard)]


def prompts(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.dir.prompts, partitioning=None).to_pylist()


def imported(run: Run, path: Path, records: list[dict]) -> list[Rollout]:
    assert import_episode(run, 0, [write_jsonl(path, records)], "auto")
    return rollouts(run)


def weights(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in data_files(run).items() if name.endswith(".safetensors")}


# Like our own


@pytest.mark.parametrize("loss", ["reverse_kl_topk", "reverse_kl_pg"])
def test_an_imported_copy_of_a_run_trains_to_the_same_weights(
    make_recipe: Callable[..., Recipe], tmp_path: Path, loss: str
) -> None:
    settings = (NO_EVAL, f"learn.loss.name={loss}", "num_episodes=1")
    ours = open_run(make_recipe(tmp_path / "ours", *settings))
    stages = InlineStages(ours)
    for stage in ("rollout", "score", "learn"):
        stages(stage, 0)
    exported = tmp_path / "ours.jsonl"
    with open(exported, "wb") as file:
        write_lines(chosen_responses(ours.dir.path, None, "main"), file)
    shards = sorted((ours.dir.path / "episode=0/rollouts").glob("shard*"))
    for name, files in (("export", [exported]), ("shards", shards)):
        run = open_run(make_recipe(tmp_path / name, *settings))
        assert import_episode(run, 0, files, "auto")
        own, theirs = rollouts(ours), rollouts(run)
        assert [row.rollout_id for row in own] == [row.rollout_id for row in theirs]
        assert [row.ids_hash for row in own] == [row.ids_hash for row in theirs]
        for row, copy in zip(own, theirs, strict=True):
            assert np.array_equal(row.sampling_logprobs, copy.sampling_logprobs)
            assert (row.finish_reason, row.policy_version) == (copy.finish_reason, copy.policy_version)
        stages = InlineStages(run)
        for stage in ("score", "learn"):
            stages(stage, 0)
        assert weights(tmp_path / name) == weights(tmp_path / "ours") != {}


def test_the_command_takes_files_in_and_a_run_goes_on_from_them(
    finished_run: Run, make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path
) -> None:
    shards = sorted((finished_run.dir.path / "episode=0/rollouts").glob("shard*"))
    settings = (NO_EVAL, "num_episodes=1")
    done = run_command("import", task / "recipe.yaml", f"run_dir={tmp_path}/run", *settings, *shards, "--episode", "0")
    assert done.returncode == 0, done.stderr
    seal = json.loads((tmp_path / "run/episode=0/rollouts/_SEALED.json").read_text())
    assert (seal["sampler"], seal["policy"], seal["rows"]) == ("imported", "imported", 24)
    assert [one["name"] for one in seal["imported"]["files"]] == [path.name for path in shards]
    run = open_run(make_recipe(tmp_path / "run", *settings))
    # The same again is done already; other files are another import.
    assert import_episode(run, 0, shards, "auto")
    with pytest.raises(MismatchError, match=r"Move .*episode=0 away to import the episode again"):
        import_episode(run, 0, shards[:1], "auto")
    assert complete(run.recipe).has_policy(1)
    assert_verified(run.dir.path)


def test_files_that_are_none_are_refused(task: Path, tmp_path: Path) -> None:
    recipe = (str(task / "recipe.yaml"), f"run_dir={tmp_path}/run")
    done = run_command("import", *recipe, "--episode", "0")
    assert done.returncode == 2
    assert "found no file of rollouts among" in done.stderr
    done = run_command("import", *recipe, "nowhere.jsonl", "--episode", "0")
    assert done.stderr == "ConfigError: nowhere.jsonl: no such file.\n"
    assert not (tmp_path / "run").exists()


# What rows may say


def test_a_text_is_encoded_and_ends_with_the_eos_unless_it_was_cut(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run()
    known, tokenizer = prompts(run), load_tokenizer(run.recipe.student)
    first, second, third = imported(run, tmp_path / "a.jsonl", [
        {"prompt_id": "p3", "response": "abc"}, {"prompt": known[5]["text"], "response": "", "finish_reason": "stop"},
        {"prompt_index": 3, "response": "abc", "finish_reason": "length"},
    ])  # fmt: skip
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert (first.response_ids.tolist(), first.finish_reason, first.rollout_id) == ([*ids, 1], "stop", "0/3/0")
    assert (second.response_ids.tolist(), second.prompt_index) == ([1], 5)
    assert (third.response_ids.tolist(), third.finish_reason, third.rollout_id) == (ids, "length", "0/3/1")
    assert first.prompt_ids.tolist() == known[3]["prompt_ids"]
    assert first.sampling_logprobs is None


def test_a_file_of_prompts_with_responses_is_both(
    task: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "both.jsonl", [{"prompt": f"say {i}:", "response": "abc"} for i in range(12)])
    run = open_run(make_recipe(tmp_path / "run", NO_EVAL, f"prompts.path={path}"))
    assert import_episode(run, 0, [path], "auto")
    assert [row.prompt_index for row in rollouts(run)] == list(range(12))


def test_whole_groups_stay_groups_and_others_become_single_rollouts(
    new_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = new_run("learn.loss.name=reward_pg", "score.top_k=0")
    imported(run, tmp_path / "a.jsonl", [{"prompt_index": i, "response": "a", "reward": i} for i in (4, 4, 2, 2, 9, 9)])
    plan = load_rollout_plan(run.dir.episode(0))
    assert (plan.prompt_indices, plan.n_samples_per_prompt, plan.reward) == ([4, 2, 9], 2, {"name": "imported"})
    import_episode(run, 1, [write_jsonl(tmp_path / "b.jsonl", [{"prompt_index": i, "response_ids": [7], "sampling_logprobs": [-1.0], "reward": 1} for i in (4, 4, 2)])], "auto")  # fmt: skip
    plan = load_rollout_plan(run.dir.episode(1))
    assert (plan.prompt_indices, plan.n_samples_per_prompt) == ([4, 4, 2], 1)
    stages = InlineStages(run)
    for episode in (0, 1):
        assert stages.score(episode)
    assert_verified(run.dir.path)
    with pytest.raises(MismatchError, match="imported without sampling_logprobs"):
        stages.learn(0)
    from opd_cache.learn.inputs import open_source
    from opd_cache.learn.losses import resolve_loss

    with pytest.raises(MismatchError, match="do not hold equally many of each prompt"):
        open_source(run.recipe, run.dir.episode(1), 1, resolve_loss(run.recipe.learn.loss))


# Several turns


def turns(run: Run, logprobs: bool = True) -> list[dict[str, Any]]:
    """Two sampled turns with a tool's answer between them; the log-probs there are nonsense, as in a real dump."""
    rng, records = np.random.default_rng(0), []
    for prompt in prompts(run)[:10]:
        ids = [*rng.integers(100, 250, 9).tolist(), STOP_IDS[0]]
        values = (-rng.random(10)).tolist()
        values[3:6] = [0.0, None, 5.0]
        records.append({
            "prompt_ids": prompt["prompt_ids"], "response_ids": ids, "loss_mask": [1, 1, 1, 0, 0, 0, 1, 1, 1, 1],
            **({"sampling_logprobs": values} if logprobs else {}),
        })  # fmt: skip
    return records


def test_tokens_that_a_mask_leaves_out_are_context_and_never_learned(
    new_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = new_run("learn.train_batch_size=10", "num_episodes=1")
    rows = imported(run, tmp_path / "a.jsonl", turns(run))
    assert all(row.loss_mask.tolist() == [True] * 3 + [False] * 3 + [True] * 4 for row in rows)
    assert all(row.sampling_logprobs[3:6].tolist() == [0, 0, 0] for row in rows)
    stages = InlineStages(run)
    assert stages.score(0)
    assert stages.learn(0)
    path = run.dir.path
    # One step by the policy that sampled: its metrics are the cache's own means over the sampled tokens.
    ((tokens, reverse_kl),) = query_rows(path, "SELECT tokens, reverse_kl FROM steps")[1]
    assert tokens == 70
    sql = "SELECT count(*) FILTER (NOT is_sampled), count(teacher_logprob), count(advantage) FROM tokens"
    assert query_rows(path, sql)[1] == [(30, 100, 70)]
    sql = "SELECT bool_and(num_scored_tokens = 7), bool_and(abs(reverse_kl_sum + t.s) < 1e-4) FROM samples JOIN (SELECT rollout_id, sum(advantage) AS s FROM tokens GROUP BY 1) t USING (rollout_id)"
    assert query_rows(path, sql)[1] == [(True, True)]
    assert reverse_kl == pytest.approx(expected_reverse_kl(run, rows, run.recipe.student.model), abs=1e-4)
    assert_verified(path)


def expected_reverse_kl(run: Run, rows: list[Rollout], model: str) -> float:
    """Mean of student − teacher over the sampled tokens, by plain forward passes."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(model).eval()
    target = run.dir.episode(0)
    plan = load_rollout_plan(target)
    shards, scores = rollout_shards(target, plan), score_shards(target, plan, "main")
    gaps = []
    for shard in range(plan.num_shards):
        for row, score in join_shard(shards, scores, shard):
            ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids]))[None].long()
            with torch.no_grad():
                logprobs = student(ids).logits[0].double().log_softmax(-1)
            for place in np.flatnonzero(row.loss_mask):
                at = len(row.prompt_ids) + place
                gaps.append(logprobs[at - 1, ids[0, at]].item() - score.teacher_logprobs[place])
    assert len(gaps) == sum(row.num_loss_tokens for row in rows)
    return float(np.mean(gaps))


def test_a_masked_row_has_the_tensors_of_its_sampled_tokens() -> None:
    mask = np.array([True, False, True])
    row = Rollout("0/0/0", 0, 0, np.int32([5, 6]), np.int32([7, 8, 9]), np.float32([-1, 0, -3]), "length", 0, loss_mask=mask)  # fmt: skip
    score = Score("0/0/0", row.ids_hash, np.float32([-4, -5, -6]), np.ones(3, np.int32), np.int32([[1], [2], [3]]), np.float32([[-1], [-2], [-3]]))  # fmt: skip
    (micro,) = micro_batches([(row, score)], [0.5], max_tokens=10)
    assert micro.input_ids_BT.tolist() == [[5, 6, 7, 8]]  # the last token predicts nothing
    assert (micro.target_ids_N.tolist(), micro.predictor_N.tolist()) == ([7, 9], [1, 3])
    assert (micro.sampling_logprobs_N.tolist(), micro.teacher_logprobs_N.tolist()) == ([-1, -3], [-4, -6])
    assert (micro.topk_ids_NK.tolist(), micro.reward_advantages_N.tolist()) == ([[1], [3]], [0.5, 0.5])
    nothing = Rollout(
        "0/0/0", 0, 0, row.prompt_ids, row.response_ids, None, "length", 0, loss_mask=np.zeros(3, np.bool_)
    )
    assert rows_to_learn([(nothing, score)], mask_truncated=False) == []


def test_without_log_probs_only_losses_without_a_ratio_learn(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run("learn.train_batch_size=10", "num_episodes=1", "learn.loss.name=reverse_kl_pg")
    rows = imported(run, tmp_path / "a.jsonl", turns(run, logprobs=False))
    assert all(row.sampling_logprobs is None for row in rows)
    stages = InlineStages(run)
    assert stages.score(0)
    with pytest.raises(
        MismatchError, match=r"'reverse_kl_pg' weighs tokens by their ratio.*Use a loss without a ratio"
    ):
        stages.learn(0)
    run.recipe.learn.loss.name = "reverse_kl_topk"
    assert stages.learn(0)
    path = run.dir.path
    ((*ratios, tokens, reverse_kl),) = query_rows(
        path, "SELECT ratio_mean, ratio_max, ess, tokens, reverse_kl FROM steps"
    )[1]
    assert (ratios, tokens) == ([None] * 3, 70)
    assert reverse_kl == pytest.approx(expected_reverse_kl(run, rows, run.recipe.student.model), abs=1e-4)
    sql = "SELECT count(*), count(student_logprob), count(advantage), count(teacher_logprob) FROM tokens"
    assert query_rows(path, sql)[1] == [(100, 0, 0, 100)]
    assert query_rows(path, "SELECT count(*), count(reverse_kl_sum) FROM samples")[1] == [(10, 0)]
    status = json.loads(run_command("status", path, "--json").stdout)
    assert [warning["name"] for warning in status["warnings"] if warning["stage"] != "rollout"] == []


# Dumps of others


def test_a_dump_of_trl_is_taken_in(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run, path = new_run(), tmp_path / "completions_00010.parquet"
    texts = [prompt["text"] for prompt in prompts(run)]
    # As GRPOTrainer.log makes it.
    table = {"step": [10] * 3, "prompt": texts[:3], "completion": ["ab", "c", "d"], "my_reward": [1.0, 0, 1], "advantage": [0.1] * 3}  # fmt: skip
    pd.DataFrame(table).to_parquet(path)
    assert import_episode(run, 0, [path], "auto")
    assert [(row.prompt_index, len(row.response_ids)) for row in rollouts(run)] == [(0, 3), (1, 2), (2, 2)]
    spoken = {"prompt": texts[0], "completion": [{"role": "assistant", "content": "ab"}]}
    other = new_run()
    assert import_episode(other, 1, [write_jsonl(tmp_path / "chat.jsonl", [spoken])], "trl")
    many = {**spoken, "completion": spoken["completion"] * 2}
    with pytest.raises(RolloutFileError, match=r"many.jsonl:1: the completion has 2 messages"):
        import_episode(run, 2, [write_jsonl(tmp_path / "many.jsonl", [many])], "auto")


def test_a_dump_of_verl_is_taken_in(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run()
    tokenizer = load_tokenizer(run.recipe.student)
    decoded = [tokenizer.decode(prompt["prompt_ids"], skip_special_tokens=True) for prompt in prompts(run)]
    lines = [{"input": decoded[i], "output": "ab", "gts": "ab", "score": i / 2, "step": 7} for i in (5, 5, 6, 6)]
    rows = imported(run, tmp_path / "7.jsonl", lines)
    assert [(row.rollout_id, row.reward) for row in rows] == [
        ("0/5/0", 2.5),
        ("0/5/1", 2.5),
        ("0/6/0", 3),
        ("0/6/1", 3),
    ]


def test_a_dump_of_slime_is_taken_in_with_masks_and_log_probs(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run, path = new_run(), tmp_path / "rollout_3.pt"
    records = turns(run)
    samples = [
        {
            "group_index": 0, "index": index, "prompt": "", "tokens": [*record["prompt_ids"], *record["response_ids"]],
            "response": "", "response_length": 10, "label": None, "reward": 0.5, "loss_mask": record["loss_mask"],
            "rollout_log_probs": record["sampling_logprobs"], "status": "completed", "metadata": {}, "spec_info": {},
        }
        for index, record in enumerate(records)
    ]  # fmt: skip
    torch.save({"rollout_id": 3, "samples": samples}, path)
    assert import_episode(run, 0, [path], "auto")
    assert [row.response_ids.tolist() for row in rollouts(run)] == [record["response_ids"] for record in records]
    assert all(row.num_loss_tokens == 7 and row.reward == 0.5 for row in rollouts(run))
    samples[1]["status"] = "aborted"
    torch.save({"rollout_id": 3, "samples": samples}, path)
    with pytest.raises(
        RolloutFileError, match=r"rollout_3.pt sample 2: status = 'aborted', expected completed or truncated"
    ):
        import_episode(run, 1, [path], "auto")
    torch.save({"samples": [Path("x")]}, path)
    with pytest.raises(RolloutFileError, match=r"rollout_3.pt: cannot be read as plain values"):
        import_episode(run, 1, [path], "auto")


# What is refused

GOOD = {"prompt_index": 0, "response_ids": [7, 1]}


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"a": 1}, "found a; expected response_ids or response, or the fields of a dump"),
        ({"response_ids": [7, 1]}, "names no prompt"),
        ({**GOOD, "prompt_index": 99}, "prompt_id = None, prompt_index = 99 is none of the run's prompts"),
        ({**GOOD, "prompt_ids": [3, 4]}, "its 2 prompt_ids are none of the run's prompts"),
        ({"prompt": "who?", "response": "a"}, "prompt = 'who\\?' is none of the run's prompts"),
        ({**GOOD, "response_ids": [7, 258]}, "response_ids holds 258, the student has 258 embeddings"),
        ({**GOOD, "response_ids": [7, 1.5]}, r"response_ids = \[7, 1.5\], expected a list of token ids"),
        ({**GOOD, "response_ids": [7, True]}, r"response_ids = \[7, True\], expected a list of token ids"),
        ({**GOOD, "finish_reason": "eos"}, "finish_reason = 'eos', expected stop or length"),
        ({**GOOD, "response_ids": [7], "finish_reason": "stop"}, "its last id is not one of the student's EOS"),
        ({**GOOD, "finish_reason": "length"}, "its last id is one of the student's EOS"),
        ({**GOOD, "sampling_logprobs": [-1]}, "sampling_logprobs has 1 values, response_ids has 2"),
        ({**GOOD, "sampling_logprobs": [-1, 0.5]}, r"sampling_logprobs\[1\] = 0.5, expected a log-prob"),
        ({**GOOD, "sampling_logprobs": [None, -1]}, r"sampling_logprobs\[0\] = None, expected a log-prob"),
        ({**GOOD, "loss_mask": [1]}, "loss_mask has 1 values, expected a 0 or 1 for each of 2"),
        ({**GOOD, "loss_mask": [1, 2]}, "loss_mask has 2 values, expected a 0 or 1 for each of 2"),
        ({**GOOD, "reward": "nan"}, "reward = 'nan', expected a finite number"),
        ({"prompt_index": 0, "response": "ab", "loss_mask": [1, 1]}, "log-probs or a mask of a text"),
        ({**GOOD, "rollout_id": "0/0/0"}, "rollout '0/0/0' was there before, at .*:1. An export holds one row a teacher"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line_and_nothing_is_written(
    record: dict, fault: str, new_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = new_run()
    path = write_jsonl(tmp_path / "rows.jsonl", [{**GOOD, "rollout_id": "0/0/0"}, record])
    with pytest.raises(RolloutFileError, match=rf"^{path}:2: .*{fault}"):
        import_episode(run, 0, [path], "auto")
    assert not run.dir.episode(0).path.exists()


def test_files_that_hold_no_whole_answer_are_refused(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run()
    for text, fault in (("{", r"bad.jsonl:1: not JSON"), ("", "no rollout in it")):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(RolloutFileError, match=fault):
            import_episode(run, 0, [tmp_path / "bad.jsonl"], "auto")
    mixed = [{**GOOD, "sampling_logprobs": [-1, -1]}, GOOD]
    with pytest.raises(RolloutFileError, match="1 of 2 rollouts have sampling_logprobs; expected all or none"):
        import_episode(run, 0, [write_jsonl(tmp_path / "mixed.jsonl", mixed)], "auto")
    assert not run.dir.episode(0).path.exists()


def test_an_interrupted_import_goes_on(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run, path = new_run("rollout.prompts_per_shard=2"), tmp_path / "rows.jsonl"
    records = [{"prompt_index": i, "response_ids": [100 + i, 1], "sampling_logprobs": [-1, -2]} for i in range(9)]
    first = imported(run, path, records)
    folder = run.dir.episode(0).rollouts
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    assert len(before) == 4
    (folder / "_SEALED.json").unlink()
    (folder / "shard-00001-of-00003.parquet").unlink()
    assert import_episode(run, 0, [path], "auto")
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    assert [row.response_ids.tolist() for row in rollouts(run)] == [row.response_ids.tolist() for row in first]
