"""Evaluating a policy or a teacher: held-out prompts go through the rollout and score stages into their own folder,
so an evaluation can be inspected token by token like any episode; then the responses are graded."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opd_cache.config import ModelConfig, PromptsConfig
from opd_cache.errors import ConfigError, CorruptShardError, MismatchError
from opd_cache.fingerprint import fingerprint_model, model_folder, num_embeddings
from opd_cache.grade import grade, pass_at_k, response_of
from opd_cache.learn.inputs import open_teaching
from opd_cache.notes import write_note
from opd_cache.prompts.intake import count_prompts, prompts_config_of, read_prompts, take_in_prompts
from opd_cache.rollout.samples import Sampler
from opd_cache.rollout.stage import sample_shards
from opd_cache.run import Run, eos_ids, load_tokenizer, stop_token_ids
from opd_cache.run_dir import RESULTS, SCHEMA_VERSION, SUMMARY, RolloutSet
from opd_cache.schema import EVALS, arrow_schema
from opd_cache.score.scores import Scorer
from opd_cache.score.stage import score_rollouts
from opd_cache.status import unfinished_stages
from opd_cache.store.arrays import record_batch
from opd_cache.store.join import join_teachers, read_rollouts
from opd_cache.store.plans import (
    RolloutPlan,
    SamplingPlan,
    publish_rollout_plan,
    rollout_shards,
    score_parts,
    stage_command,
)
from opd_cache.store.publish import digest_file, publish_json, read_json
from opd_cache.store.shards import footer_of, open_parquet, publish_table, read_row_groups
from opd_cache.types import Rollout

log = logging.getLogger(__name__)
GREEDY, SAMPLED = "greedy", "sampled"
GRADING = ("answer_pattern", "reference_pattern", "n_samples_per_prompt", "greedy")  # keys of eval


def evaluate_policy(run: Run, version: int, sampler: Sampler, scorers: Mapping[str, Scorer]) -> None:
    """Evaluate the student after `version` episodes, with its reverse KL to what it learns from: `scorers` by teacher.

    What is evaluated already is left alone. Raises MismatchError when that was another policy, or graded otherwise.
    """
    _evaluate(run, f"policy={version}", version, run.policy_config(version), sampler, scorers)


def check_evaluated(run: Run, version: int) -> None:
    """Confirm the evaluation of a policy that has been removed since. Raises MissingInputError where there is none,
    MismatchError where it was graded otherwise."""
    subject = f"policy={version}"
    path = run.dir.evaluation(subject) / SUMMARY
    if not path.exists():
        run.policy_folder(version)  # says that it is gone
    _check_about(run, subject, path, read_json(path), _about(run, subject, run.policy_fingerprint(version)))


def evaluate_teacher(run: Run, teacher: str, sampler: Sampler) -> None:
    """Evaluate a teacher's own responses: the mark that the student should reach. The same rules hold."""
    _evaluate(run, f"teacher={teacher}", -1, run.recipe.teachers[teacher], sampler, {})


def _evaluate(
    run: Run,
    subject: str,
    version: int,
    model: ModelConfig,
    sampler: Sampler,
    scorers: Mapping[str, Scorer],
) -> None:
    _take_in_prompts(run)
    folder = run.dir.evaluation(subject)
    about = _about(run, subject, fingerprint_model(model_folder(model)))
    if (folder / SUMMARY).exists():
        _check_about(run, subject, folder / SUMMARY, read_json(folder / SUMMARY), about)
    has_results = (folder / RESULTS).exists()
    is_whole = not any(unfinished_stages(run.dir.evaluation_set(subject, mode)) for mode in (GREEDY, SAMPLED))
    if is_whole and (folder / SUMMARY).exists() and has_results:
        return
    start = time.monotonic()
    run.check_policy(max(version, 0))  # a teacher has version -1
    if has_results:
        with open_parquet(folder / RESULTS) as file:
            _check_about(run, subject, folder / RESULTS, footer_of(file, folder / RESULTS), about)
    rows = _sampled_and_graded(run, subject, version, model, sampler, scorers)
    schema = arrow_schema(EVALS)
    results = record_batch({name: [row.get(name) for row in rows] for name in schema.names}, schema)
    if not has_results:
        publish_table(
            folder / RESULTS, results.schema, lambda: [results], {"stage": "eval", "run_id": run.run_id, **about}
        )
    _publish_summary(run, subject, about, results.to_pylist())
    seconds = round(time.monotonic() - start, 4)
    write_note(
        run.dir.log_folder("eval", subject) / "eval.json", {"stage": "eval", "subject": subject, "seconds": seconds}
    )


def _about(run: Run, subject: str, fingerprint: str) -> dict[str, Any]:
    """What the figures follow from, beside the sampled responses: whose they are and how they are graded."""
    options = run.recipe.eval
    return {
        "subject": subject,
        "policy": fingerprint,
        "grading": {key: getattr(options, key) for key in GRADING},
    }


def _check_about(run: Run, subject: str, path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse an evaluation of another policy, or one that was graded otherwise. Raises MismatchError."""
    folder = run.dir.evaluation(subject)
    again = stage_command("eval", run.dir.evaluation_set(subject, SAMPLED))
    if found.get("policy") != wanted["policy"]:
        raise MismatchError(
            f"{path}: the evaluation belongs to another policy: policy = {str(found.get('policy'))[:12]}, {subject} is now {wanted['policy'][:12]}. Move {folder} out of evals/ and run: {again}"
        )
    graded, now = found.get("grading", {}), wanted["grading"]
    key = next((key for key in GRADING if graded.get(key) != now[key]), None)
    if key is None:
        return
    # More or fewer samples are another sampling plan; all else is graded from the same sealed responses.
    remedy = (
        f"move {folder} out of evals/ to evaluate again"
        if key == "n_samples_per_prompt"
        else f"remove {folder / SUMMARY} and {folder / RESULTS} to grade the same responses again"
    )
    raise MismatchError(
        f"{path}: graded with eval.{key} = {graded.get(key)!r}, the recipe says {now[key]!r}. Set it back, or {remedy} and run: {again}"
    )


def _sampled_and_graded(
    run: Run,
    subject: str,
    version: int,
    model: ModelConfig,
    sampler: Sampler,
    scorers: Mapping[str, Scorer],
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tokenizer = load_tokenizer(run.recipe.student)
    for _ in read_row_groups(run.dir.eval_prompts):
        pass  # with its checksums, before a plan vouches for the file
    for mode in (GREEDY, SAMPLED) if run.recipe.eval.greedy else (SAMPLED,):
        target = run.dir.evaluation_set(subject, mode)
        plan = _plan(run, subject, mode, version, model, sampler.dtype)
        publish_rollout_plan(
            target, plan, f"Set it back, or move {run.dir.evaluation(subject)} out of evals/ to evaluate again."
        )
        sample_shards(run, target, plan, run.dir.eval_prompts, sampler, lambda: sampler.load_policy(model))
        for teacher, scorer in scorers.items() if mode == SAMPLED else ():
            score_rollouts(run, target, teacher, scorer, top_k=0)
        rows += _graded(run, target, plan, subject, mode, bool(scorers), tokenizer)
    return rows


def _take_in_prompts(run: Run) -> None:
    options = run.recipe.eval
    if options.path is None:
        raise ConfigError("eval.path is not set; give held-out prompts, such as eval.path=heldout.jsonl.")
    config: PromptsConfig = replace(run.recipe.prompts, path=options.path, split=options.split, limit=options.limit)
    final = run.dir.eval_prompts
    if not final.exists():
        student = run.recipe.student
        take_in_prompts(config, load_tokenizer(student), num_embeddings(model_folder(student)), final)
    elif (found := prompts_config_of(final)) != asdict(config):
        key = next(key for key, value in asdict(config).items() if found.get(key) != value)
        raise MismatchError(
            f"{final}: taken in with {key} = {found.get(key)!r}, the recipe says {asdict(config)[key]!r}. Set it back, or move the file and evals/ away to evaluate on other prompts."
        )


def _plan(run: Run, subject: str, mode: str, version: int, model: ModelConfig, dtype: str) -> RolloutPlan:
    options, rollout = run.recipe.eval, run.recipe.rollout
    stop = stop_token_ids(run.recipe, model_folder(run.recipe.student))
    if version < 0:
        # A teacher ends its responses with its own EOS, which may be none of the student's.
        stop = sorted({*stop, *eos_ids(model_folder(model))})
    greedy = mode == GREEDY
    sampling = SamplingPlan(
        0.0 if greedy else rollout.temperature,
        1.0 if greedy else rollout.top_p,
        None if greedy else rollout.top_k,
        rollout.max_new_tokens,
        stop,
    )
    return RolloutPlan(
        run_id=run.run_id,
        scope=f"{subject}-{mode}",
        seed=run.recipe.seed,
        policy_version=version,
        policy=fingerprint_model(model_folder(model)),
        sampler=rollout.sampler,
        dtype=dtype,
        prompts=digest_file(run.dir.eval_prompts),
        prompt_indices=list(range(count_prompts(run.dir.eval_prompts))),
        n_samples_per_prompt=1 if greedy else options.n_samples_per_prompt,
        prompts_per_shard=options.prompts_per_shard,
        sampling=sampling,
    )


def _graded(
    run: Run, target: RolloutSet, plan: RolloutPlan, subject: str, mode: str, is_scored: bool, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    options = run.recipe.eval
    prompts = read_prompts(run.dir.eval_prompts, plan.prompt_indices)
    for rollout, reverse_kl in _rollouts_with_kl(run, target, plan, is_scored and mode == SAMPLED):
        prompt = prompts[rollout.prompt_index]
        is_correct, found = grade(
            response_of(rollout, prompt, tokenizer, options.answer_pattern, options.reference_pattern)
        )
        yield {
            "subject": subject,
            "policy_version": plan.policy_version if plan.policy_version >= 0 else None,
            "mode": mode,
            "prompt_index": rollout.prompt_index,
            "sample_index": rollout.sample_index,
            "correct": is_correct,
            "response_answer": found,
            "num_response_tokens": len(rollout.response_ids),
            "finish_reason": rollout.finish_reason,
            "reverse_kl_sum": reverse_kl,
        }


def _rollouts_with_kl(
    run: Run, target: RolloutSet, plan: RolloutPlan, is_scored: bool
) -> Iterator[tuple[Rollout, float | None]]:
    """Every rollout with its summed student − teacher log-prob, where it was scored."""
    shards = rollout_shards(target, plan)
    if not is_scored:
        for shard in range(plan.num_shards):
            yield from ((rollout, None) for rollout in read_rollouts(shards, shard))
        return
    teaching = open_teaching(run.recipe, target, plan, needs_topk=False)
    scores = [score_parts(target, plan, name) for name in teaching.names]
    for shard in range(plan.num_shards):
        for rollout, row in join_teachers(shards, scores, shard):
            score = teaching.combine(rollout, row)
            student = rollout.student_logprobs
            difference = None
            if student is not None and score.error is None:
                difference = student.astype("f8") - score.teacher_logprobs
            yield rollout, None if difference is None else float(difference.sum())


def _publish_summary(run: Run, subject: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Sum up the published results: ours, another process's, or those of a start that was killed before its summary.
    What they hold must be what the sealed responses give: no digest vouches for them yet."""
    folder = run.dir.evaluation(subject)
    if [row for table in read_row_groups(folder / RESULTS) for row in table.to_pylist()] != rows:
        again = stage_command("eval", run.dir.evaluation_set(subject, SAMPLED))
        raise CorruptShardError(
            f"{folder / RESULTS}: holds other results than the sealed responses give. Move it away and run: {again}"
        )
    summary = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "results": digest_file(folder / RESULTS),
        **summarize(rows),
    }
    publish_json(
        folder / SUMMARY, summary, f"the evaluation of {subject}", f"Move {folder} out of evals/ to evaluate again."
    )
    known = ((key, summary[key]) for key in ("greedy_accuracy", "sampled_accuracy", "reverse_kl"))
    log.info("eval    %s | %s", subject, " | ".join(f"{key} {value:.4f}" for key, value in known if value is not None))


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies (None where no prompt has an answer), pass@k, and reverse KL a token on sampled responses."""
    sampled = [row for row in rows if row["mode"] == SAMPLED]
    by_prompt: dict[int, list[bool]] = defaultdict(list)
    for row in sampled:
        if row["correct"] is not None:
            by_prompt[row["prompt_index"]].append(row["correct"])
    scored = [row for row in sampled if row["reverse_kl_sum"] is not None]
    scored_tokens = sum(row["num_response_tokens"] for row in scored)
    samples = max((len(marks) for marks in by_prompt.values()), default=0)
    counts = [sum(marks) for marks in by_prompt.values()]
    return {
        "greedy_accuracy": _share([row["correct"] for row in rows if row["mode"] == GREEDY]),
        "sampled_accuracy": _share([row["correct"] for row in sampled]),
        "pass_at_k": {str(k): pass_at_k(counts, samples, k) for k in range(1, samples + 1)},
        "reverse_kl": sum(row["reverse_kl_sum"] for row in scored) / scored_tokens if scored_tokens else None,
        "response_length": sum(row["num_response_tokens"] for row in sampled) / max(1, len(sampled)),
        "truncated_share": sum(row["finish_reason"] == "length" for row in sampled) / max(1, len(sampled)),
        "prompts": len({row["prompt_index"] for row in rows}),
        "samples_per_prompt": samples,
    }


def _share(marks: list[bool | None]) -> float | None:
    known = [mark for mark in marks if mark is not None]
    return sum(known) / len(known) if known else None
