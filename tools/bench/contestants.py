"""One contestant of opd_vs_trl.py: trains a student in this process and writes what it took.

    PYTHON tools/bench/contestants.py NAME SPEC.json

Each function imports what it needs, says so, and trains; everything heavy is inside, so that imports can be told from
work. TRL's trainers get the optimizer and the schedule of opd-cache, the same prompts in the same order, and count what
they sample in an overridden method.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peaks import device_peak_bytes, largest_child_bytes

Spec = dict[str, Any]
# Installed for other tests in one environment and not in the other; transformers and accelerate import what they find.
HIDDEN = ("deepspeed", "liger_kernel", "peft")


class Watch:
    """When imports ended, and when training did; and the peak of the largest process until then, or of the GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: dict[str, float] = {}
        self.peak_bytes = 0

    def imported(self) -> None:
        self.times["imported"] = time.time()

    def trained(self) -> None:
        self.times["trained"] = time.time()
        self.peak_bytes = device_peak_bytes(self.device)
        if self.device == "cpu":
            self.peak_bytes = max(self.peak_bytes, largest_child_bytes())


def opd_cache(spec: Spec, watch: Watch) -> dict[str, int]:
    """All stages in one process, models kept warm: `opd-cache run`."""
    from opd_cache.garbage import no_garbage_collection
    from opd_cache.pipeline import InlineStages, run_episodes
    from opd_cache.recipes import load_recipe
    from opd_cache.run import open_run

    with no_garbage_collection():  # as the stages import them
        import opd_cache.learn.engines.torch
        import opd_cache.learn.stage
        import opd_cache.rollout.samplers.hf
        import opd_cache.rollout.stage
        import opd_cache.score.scorers.hf
        import opd_cache.score.stage  # noqa: F401

    watch.imported()
    run = open_run(load_recipe(spec["recipe"]))
    run_episodes(run, InlineStages(run))
    watch.trained()
    return _finish(spec, run.dir.path)


def opd_cache_apart(spec: Spec, watch: Watch) -> dict[str, int]:
    """Every stage a process of its own: never are teacher and student in memory together."""
    from opd_cache.launch.local import SubprocessStages
    from opd_cache.pipeline import run_episodes
    from opd_cache.recipes import load_recipe
    from opd_cache.run import open_run

    watch.imported()
    recipe = load_recipe(spec["recipe"])
    run = open_run(recipe)
    run_episodes(run, SubprocessStages(tuple(spec["recipe"]), recipe.num_workers))
    watch.trained()
    return _finish(spec, run.dir.path)


def replay(spec: Spec, watch: Watch) -> dict[str, int]:
    """Another loss from the cache that `opd_cache` left."""
    from opd_cache.garbage import no_garbage_collection

    with no_garbage_collection():  # as the stages import them
        import opd_cache.learn.engines.torch
        import opd_cache.learn.stage  # noqa: F401
        from opd_cache.replay import replay_run

    watch.imported()
    into = Path(spec["out"]) / "replay"
    replay_run(Path(spec["out"]) / "run", into, None, spec["replay"])
    watch.trained()
    return _finish(spec, into)


def _finish(spec: Spec, path: Path) -> dict[str, int]:
    """Name the trained student; how much was sampled for it."""
    from opd_cache.run_dir import RunDir
    from opd_cache.status import run_status

    status = run_status(path)
    student = Path(spec["out"]) / "student"
    student.unlink(missing_ok=True)
    student.symlink_to(RunDir(path).policy_after(status["episodes_done"] - 1).absolute())
    rows = sum(entry["rollouts"]["rows"] for entry in status["episodes"])
    return {"rollouts": rows, "tokens": status["response_tokens"]}


def trl_distillation(spec: Spec, watch: Watch) -> dict[str, int]:
    """TRL's DistillationTrainer: reverse KL over the whole vocabulary, head and loss in chunks."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    watch.imported()
    counts: Counter[str] = Counter()

    class Counting(DistillationTrainer):
        def _generate(self, prompts: list) -> Any:
            found = super()._generate(prompts)
            counts.update(rollouts=len(found[1]), tokens=sum(map(len, found[1])))
            return found

    torch.set_num_threads(spec["threads"])
    student, teacher = _models(spec)
    arguments = DistillationConfig(
        **_training_arguments(spec, micro_batch=spec["batch"]),
        beta=1.0, temperature=1.0, top_p=1.0, top_k=0, max_completion_length=spec["max_new_tokens"], shuffle_dataset=False,
    )  # fmt: skip
    trainer = Counting(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in _rows(spec)]),
        processing_class=AutoTokenizer.from_pretrained(spec["student"], padding_side="left"),
        optimizers=_optimizer(student, spec),
    )
    return _train(trainer, spec, watch, counts)


def trl_gkd(spec: Spec, watch: Watch) -> dict[str, int]:
    """TRL's GKDTrainer, fully on-policy: reverse KL over the whole vocabulary, all logits of both models at once."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    watch.imported()
    counts: Counter[str] = Counter()

    class Counting(GKDTrainer):
        @staticmethod
        def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: Any) -> Any:
            found = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
            counts.update(rollouts=len(found[0]), tokens=int((found[2] != -100).sum()))
            return found

        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(train_dataset or self.train_dataset)

    torch.set_num_threads(spec["threads"])
    student, teacher = _models(spec)
    tokenizer = AutoTokenizer.from_pretrained(spec["student"], padding_side="left")
    arguments = GKDConfig(
        **_training_arguments(spec, micro_batch=spec["gkd_micro_batch"]),
        lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=spec["max_new_tokens"],
    )  # fmt: skip
    trainer = Counting(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_list([_with_completion(row, tokenizer, spec) for row in _rows(spec)]),
        processing_class=tokenizer,
        optimizers=_optimizer(student, spec),
    )
    return _train(trainer, spec, watch, counts)


def _with_completion(row: dict[str, str], tokenizer: Any, spec: Spec) -> dict[str, Any]:
    """GKD wants a reference completion though it samples its own, and divides its loss by the reference's length: here
    the right answer, or as many tokens as are sampled."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    eos = tokenizer.eos_token_id
    answer = [*tokenizer(row["answer"])["input_ids"], eos] if row["answer"] else [eos] * spec["max_new_tokens"]
    mask = [0] * len(prompt) + [1] * len(answer)
    return {"prompt": row["prompt"], "input_ids": prompt + answer, "completion_mask": mask}


def _rows(spec: Spec) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(spec["prompts"]).read_text().splitlines()]


def _models(spec: Spec) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    # On a GPU as opd-cache: weights that are trained in float32, the others in bfloat16.
    dtypes = {"student": torch.float32, "teacher": torch.float32 if spec["device"] == "cpu" else torch.bfloat16}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(spec[name], dtype=dtype).to(spec["device"])
        for name, dtype in dtypes.items()
    )
    return student, teacher


def _training_arguments(spec: Spec, micro_batch: int) -> dict[str, Any]:
    return {
        "output_dir": f"{spec['out']}/trl", "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": spec["batch"] // micro_batch, "max_steps": spec["steps"],
        "max_grad_norm": spec["max_grad_norm"], "gradient_checkpointing": False,
        "bf16": spec["device"] == "cuda", "use_cpu": spec["device"] == "cpu",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": spec["seed"],
    }  # fmt: skip


def _optimizer(student: Any, spec: Spec) -> tuple[Any, Any]:
    """AdamW and the learning rates of opd-cache's recipe."""
    import torch

    warmup, steps = spec["warmup_steps"], spec["steps"]
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=spec["learning_rate"], betas=spec["betas"], weight_decay=0.0, fused=True
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)) * max(0.0, 1 - step / steps)
    )
    return optimizer, rates


def _train(trainer: Any, spec: Spec, watch: Watch, counts: Counter[str]) -> dict[str, int]:
    trainer.train()
    watch.trained()
    trainer.model.save_pretrained(f"{spec['out']}/student")
    return dict(counts)


CONTESTANTS: dict[str, Callable[[Spec, Watch], dict[str, int]]] = {
    "opd-cache": opd_cache,
    "opd-cache-apart": opd_cache_apart,
    "replay": replay,
    "trl-distillation": trl_distillation,
    "trl-gkd": trl_gkd,
}


def main() -> None:
    name, path = sys.argv[1:]
    sys.modules.update(dict.fromkeys(HIDDEN))
    spec = json.loads(Path(path).read_text())
    watch = Watch(spec["device"])
    counts = CONTESTANTS[name](spec, watch)
    Path(spec["out"], "result.json").write_text(json.dumps({**watch.times, **counts, "peak_bytes": watch.peak_bytes}))


if __name__ == "__main__":
    main()
