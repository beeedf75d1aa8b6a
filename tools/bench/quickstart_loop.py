"""The quickstart against the same loop written by hand in memory: sample, score, one step, nothing kept.

    python tools/bench/quickstart_loop.py [--repeats 3] [--json] [TASK_DIR]

Same models, prompts, number of rollouts, loss, optimizer and schedule; the loop samples afresh for every step (fully
on-policy), opd-cache for ten. Seconds are wall time in this process, models' loading included, evaluation excluded;
runs are interleaved. Accuracy: sampled, on the held-out prompts.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_cache.config import Recipe
from opd_cache.pipeline import InlineStages, run_episodes
from opd_cache.recipes import load_recipe
from opd_cache.run import open_run


def by_hand(recipe: Recipe) -> tuple[float, torch.nn.Module]:
    """(seconds, trained student) of the plain loop."""
    start = time.monotonic()
    torch.manual_seed(recipe.seed)
    student = AutoModelForCausalLM.from_pretrained(recipe.student.model, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teachers["main"].model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.model)
    records = [json.loads(line) for line in Path(recipe.prompts.path).read_text().splitlines()]
    prompts = torch.tensor(tokenizer([record["prompt"] for record in records])["input_ids"])
    learn, k = recipe.learn, recipe.score.top_k
    betas = (learn.adam_beta1, learn.adam_beta2)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=learn.learning_rate, betas=betas, weight_decay=0.0, fused=True
    )
    size = learn.train_batch_size
    steps = recipe.num_episodes * recipe.rollout.prompts_per_episode // size
    order = torch.randperm(len(prompts))
    for step in range(steps):
        batch = prompts[order[step * size : (step + 1) * size]]
        start_of_response = batch.shape[1]
        with torch.no_grad():
            ids = student.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=recipe.rollout.max_new_tokens,
                do_sample=True,
                top_k=0,
            )
            targets = ids[:, start_of_response:]
            ended = (targets == tokenizer.eos_token_id).int()
            mask = (ended.cumsum(1) - ended == 0).float()
            teacher_logprobs = teacher(input_ids=ids).logits[:, start_of_response - 1 : -1].log_softmax(-1)
            teacher_topk = teacher_logprobs.topk(k, -1)
        student_logprobs = student(input_ids=ids).logits[:, start_of_response - 1 : -1].log_softmax(-1)
        listed = student_logprobs.gather(-1, teacher_topk.indices)
        student_all, teacher_all = (
            torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))], -1)
            for x in (listed, teacher_topk.values)
        )
        kl = (student_all.exp() * (student_all - teacher_all)).sum(-1)
        loss = (kl * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), learn.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learn.learning_rate * min(1.0, (step + 1) / (learn.warmup_steps + 1)) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - start, student


@torch.no_grad()
def accuracy(model: torch.nn.Module, recipe: Recipe, sampled: bool = True) -> float:
    """Share of the held-out prompts that are answered right."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.model)
    records = [json.loads(line) for line in Path(recipe.eval.path or "").read_text().splitlines()]
    prompts = torch.tensor(tokenizer([record["prompt"] for record in records])["input_ids"])
    output = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=recipe.rollout.max_new_tokens,
        do_sample=sampled,
        top_k=0 if sampled else None,
    )
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    return sum(text == record["answer"] for text, record in zip(texts, records, strict=True)) / len(records)


def with_opd_cache(recipe: Recipe) -> tuple[float, torch.nn.Module]:
    """(seconds, trained student) of the three stages."""
    start = time.monotonic()
    run = open_run(recipe)
    run_episodes(run, InlineStages(run))
    seconds = time.monotonic() - start
    return seconds, AutoModelForCausalLM.from_pretrained(run.policy_folder(recipe.num_episodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task_dir", nargs="?", default="quickstart")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"by hand": [], "opd-cache": []}
    accuracies: dict[str, list[float]] = {"by hand": [], "opd-cache": []}
    held_out = f"eval.path={options.task_dir}/heldout.jsonl"
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["quickstart", f"task.dir={options.task_dir}", f"run_dir={folder}/run"]
            recipe = load_recipe([*arguments, "eval.path=null"])
            open_run(load_recipe([*arguments, f"run_dir={folder}/warm"]))  # the task itself is made outside the clock
            graded = load_recipe([*arguments, held_out])
            torch.set_num_threads(recipe.torch_threads or torch.get_num_threads())
            runners = [("by hand", by_hand), ("opd-cache", with_opd_cache)]
            for name, runner in runners if repeat % 2 == 0 else reversed(runners):
                taken, model = runner(recipe)
                seconds[name].append(taken)
                accuracies[name].append(accuracy(model, graded))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["opd-cache"] / medians["by hand"]
    if options.json:
        print(json.dumps({"seconds": seconds, "accuracy": accuracies, "time_ratio": ratio}))
        return
    print(f"{'':<12}{'seconds':>10}{'sampled accuracy':>20}")
    for name, value in medians.items():
        print(f"{name:<12}{value:>10.1f}{statistics.median(accuracies[name]):>20.1%}")
    print(f"opd-cache ÷ by hand: {ratio:.2f}")


if __name__ == "__main__":
    main()
