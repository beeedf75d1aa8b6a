"""What the cache costs a learner: a step fed from sealed Parquet shards against the same step fed from memory.

    python tools/bench/cache.py [--model quickstart|medium] [--loss reverse_kl_topk] [--json]

From shards: what `opd-cache learn` does (read ahead, check, join; micro-batches, loss, metrics, optimizer). From memory:
the same rows as a list, micro-batches, the bare loss without metrics, optimizer. Every batch both ways, in turns, pass
after pass. `overhead` is the ratio of a batch's two steps less 1: its median over the passes, its mean over the batches,
since only some steps open a file. `waiting` is the share of its time that the learner spent without data,
`read_tokens_per_s` what the data path gives one thread with nothing else to do. The rollouts and scores are random: what
they hold does not matter here.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
from models import save_random_model
from torch import Tensor

from opd_cache.config import ModelConfig, RolloutConfig, ScoreConfig, TeacherConfig
from opd_cache.learn.batch import global_batches, micro_batches
from opd_cache.learn.inputs import open_sources, with_known_ids
from opd_cache.learn.losses import TokenLogprobs
from opd_cache.learn.objective import Objective, StepFacts
from opd_cache.learn.ranks import ALONE
from opd_cache.learn.step import Trainer
from opd_cache.learn.stream import planned_rows, read_ahead
from opd_cache.pipeline import InlineStages
from opd_cache.quickstart.sort_letters import byte_tokenizer
from opd_cache.recipes import load_recipe
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.run import open_run
from opd_cache.score.scores import ScoreRequest, TokenScores
from opd_cache.store.join import Joined
from opd_cache.store.plans import SamplingPlan

EPISODES = {
    "quickstart": {"prompts": 640, "batch": 64, "response": 16, "passes": 7},
    "medium": {"prompts": 40, "batch": 4, "response": 128, "passes": 4},
}


class RandomSampler:
    """Uniform tokens."""

    engine, dtype = "random", "float32"

    def __init__(self, student: ModelConfig, options: RolloutConfig) -> None:
        pass

    def load_policy(self, config: ModelConfig) -> None:
        pass

    def close(self) -> None:
        """Nothing to give back."""

    def sample(self, requests: Sequence[SampleRequest], plan: SamplingPlan) -> Iterator[Sample]:
        for request in requests:
            rng = np.random.default_rng(request.seed)
            ids = rng.integers(2, 250, plan.max_new_tokens).astype(np.int32)
            yield Sample(request.key, ids, -rng.uniform(4, 6, len(ids)).astype(np.float32), None, "length")


class RandomScorer:
    """Random log-probs, top-k mass one half."""

    engine, dtype, window = "random", "float32", 256

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None:
        pass

    def fingerprint(self) -> str:
        return "random"

    def load(self) -> None:
        pass

    def close(self) -> None:
        pass

    def score(self, requests: Sequence[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        rng = np.random.default_rng(0)
        for request in requests:
            size = len(request.response_ids)
            ids = np.stack([rng.permutation(200)[:top_k] for _ in range(size)]).astype(np.int32)
            topk = np.log(rng.dirichlet(np.ones(max(top_k, 1)), size)[:, :top_k] / 2).astype(np.float32)
            logprobs, ranks = -rng.uniform(4, 6, size).astype(np.float32), np.ones(size, np.int32)
            yield TokenScores(request.key, logprobs, ranks, ids, topk)


def make_episode(folder: Path, model: str, loss: str, threads: int) -> InlineStages:
    """A run whose first episode is sampled and scored."""
    episode = EPISODES[model]
    save_random_model(model, folder / "student")
    byte_tokenizer().save_pretrained(folder / "student")
    lines = (json.dumps({"prompt": f"sort {index:09d}:"}) + "\n" for index in range(episode["prompts"]))
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(f"""
run_dir: {folder}/run
torch_threads: {threads}
student: {{model: {folder}/student, device: cpu}}
teachers: {{main: {{model: {folder}/student, device: cpu}}}}
prompts: {{path: {folder}/prompts.jsonl}}
rollout: {{sampler: "cache:RandomSampler", prompts_per_episode: {episode["prompts"]}, n_samples_per_prompt: 1,
          prompts_per_shard: {max(episode["prompts"] // 2, 1)}, max_new_tokens: {episode["response"]}, stop_token_ids: [1]}}
score: {{scorer: "cache:RandomScorer", top_k: 8}}
learn: {{loss: {{name: {loss}}}, train_batch_size: {episode["batch"]}, learning_rate: 1.0e-5}}
""")
    stages = InlineStages(open_run(load_recipe([str(folder / "recipe.yaml")])))
    stages.rollout(0)
    stages.score(0)
    return stages


class BareObjective(Objective):
    """The loss without the figures."""

    def __call__(self, rows: slice, logprobs_NM: Tensor, entropy_N: Tensor) -> Tensor:
        batch = self.batch
        tokens = TokenLogprobs(
            batch.target_ids_N[rows], logprobs_NM[:, 0], batch.sampling_logprobs_N[rows], batch.teacher_logprobs_N[rows],
            self.topk_ids_NK[rows], self.topk_logprobs_NK[rows], logprobs_NM[:, 1:], batch.row_N[rows],
            batch.reward_advantages_N[rows],
        )  # fmt: skip
        return self.loss.compute(tokens, self.config.loss).loss_N.sum() / self.facts.num_tokens


def from_memory(trainer: Trainer, rows: list[Joined]) -> float:
    """Seconds of one step."""
    config, engine, start = trainer.config, trainer.engine, time.perf_counter()
    facts = StepFacts(sum(len(rollout.response_ids) for rollout, _ in rows))
    micros = list(micro_batches(rows, [0.0] * len(rows), trainer.max_tokens, engine.layout))
    for index, micro in enumerate(micros):
        objective = BareObjective(trainer.loss, config, facts, micro, engine.vocab_size, None)
        engine.forward_backward(micro, objective, is_last=index == len(micros) - 1)
    engine.optimizer_step(config.learning_rate)
    return time.perf_counter() - start


def from_shards(trainer: Trainer, batches: Iterator[list[Joined]]) -> tuple[float, float]:
    """(seconds, those of them spent waiting for data) of one step, the reading included."""
    start = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - start
    trainer.step(batch, 0, trainer.config.learning_rate, waited)
    return time.perf_counter() - start, waited


def measure(model: str, loss: str, threads: int, passes: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        stages = make_episode(Path(name), model, loss, threads)
        run, engine = stages.run, stages.engine
        engine.load(run.policy_folder(0), with_optimizer=False)
        trainer = Trainer(run.recipe, engine, 0, ALONE)
        sources, _ = open_sources(run, 0, trainer.loss)
        episode = EPISODES[model]
        sizes = [episode["batch"]] * (episode["prompts"] // episode["batch"])
        start = time.perf_counter()
        rows = list(planned_rows(sources, 1, 0))
        reading = time.perf_counter() - start
        batches = list(global_batches(rows, sizes))
        memory, shards = [], []
        for turn in range((passes or episode["passes"]) + 1):
            with read_ahead(global_batches(planned_rows(sources, 1, 0), sizes)) as coming:
                checked = with_known_ids(
                    coming, engine.vocab_size, trainer.loss, run.recipe.learn.loss.teacher_only_ids
                )
                for index, batch in enumerate(batches):
                    if (
                        index % 2 == 0
                    ):  # each goes first in every other pair; the reading starts before the first step, as in the learner
                        bare, whole = from_memory(trainer, batch), from_shards(trainer, checked)
                    else:
                        whole, bare = from_shards(trainer, checked), from_memory(trainer, batch)
                    if turn:  # the first pass warms up
                        memory.append(bare)
                        shards.append(whole)
        seconds, waits = zip(*shards, strict=True)
        ratios = list(map(truediv, seconds, memory))
        by_batch = [statistics.median(ratios[index :: len(sizes)]) for index in range(len(sizes))]
        tokens = sum(len(rollout.response_ids) for rollout, _ in rows)
        return {
            "model": model, "loss": loss, "threads": threads, "steps": len(seconds), "tokens_per_step": tokens / len(sizes),
            "step_from_memory_s": statistics.median(memory), "step_from_shards_s": statistics.median(seconds),
            "overhead": statistics.mean(by_batch) - 1, "waiting": sum(waits) / sum(seconds),
            "read_tokens_per_s": tokens / reading,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=EPISODES, help="default: each in turn")
    parser.add_argument("--loss", default="reverse_kl_topk")
    parser.add_argument("--passes", type=int, help="over the episode, each way, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [
        measure(model, options.loss, options.threads, options.passes)
        for model in ([options.model] if options.model else EPISODES)
    ]
    if options.json:
        print(json.dumps(found))
        return
    print(
        "| student | tokens a step | from memory | from shards | overhead | waiting | data path alone |\n|" + "---|" * 7
    )
    for row in found:
        print(
            f"| {row['model']} | {row['tokens_per_step']:.0f} | {row['step_from_memory_s']:.3f} s | {row['step_from_shards_s']:.3f} s | {row['overhead']:+.1%} | {row['waiting']:.2%} | {row['read_tokens_per_s'] / 1e6:.2f} M tokens/s |"
        )


if __name__ == "__main__":
    main()
