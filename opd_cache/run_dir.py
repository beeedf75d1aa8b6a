"""Every name in a run directory. No other module spells one out; nothing here reads or writes.

RUN/
  run.json  prompts.parquet  eval_prompts.parquet  vocab.parquet
  teacher_prompts/teacher=main.parquet    eval_teacher_prompts/    only of teachers with a prompt of their own
  replay.json  recipe.yaml       only in a replay of another run
  episode=3/            unpadded, so that `where episode = 3` matches the hive partition
    plan.json           rollouts/   scores/teacher=main/   scores/teacher=main,from=256/   learn/   policy/
  evals/policy=4/mode=sampled/     the same layout: plan.json  rollouts/  scores/
  evals/policy=4/results.parquet  summary.json
  logs/rollout/episode=3/
  quarantine/episode=3/...   what `opd-cache repair` has taken out
  slurm/rollout.sh  recipe.yaml  jobs.jsonl     only of runs that were submitted; logs/slurm/ is what their jobs printed
"""

import re
from dataclasses import dataclass
from pathlib import Path

SCHEMA_VERSION = 1  # of the names, columns and JSON files of a run directory

SHARD_FILE = re.compile(r"shard-[0-9]{5,}-of-[0-9]{5,}\.parquet")
EPISODE_FOLDER = re.compile(r"episode=(0|[1-9][0-9]*)")
SEAL = "_SEALED.json"
COMPLETE = "_COMPLETE.json"
REMOVED = "_REMOVED.json"  # beside it, where learn.keep_policies has removed the policy; its record stays
PLAN = "plan.json"
RESULTS, SUMMARY = "results.parquet", "summary.json"  # of an evaluation
FAILED_SHARD = ".failed.json"  # ends the name of a note, under logs/, on why there is no such shard
TRAINER = "trainer"  # inside a policy or checkpoint: what learning goes on from
CANARY = f"{TRAINER}/canary.json"  # inside a policy: a sequence and its log-probs, for whoever loads the policy


def shard_name(shard: int, num_shards: int) -> str:
    """File name of one shard: shard-00012-of-00064.parquet."""
    return f"shard-{shard:05d}-of-{num_shards:05d}.parquet"


@dataclass(frozen=True)
class RolloutSet:
    """The folder of one plan with the rollouts and the scores made from it: an episode, or one evaluation."""

    path: Path
    label: str  # for people: "episode 3"
    log_name: str  # folder under logs/STAGE
    prompts: Path  # the file whose rows are the plan's prompts

    @property
    def scope(self) -> str:
        """First part of its rollout ids: the episode, or `policy=4-sampled`."""
        return self.log_name.removeprefix("episode=").removeprefix("eval-")

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    def scores(self, teacher: str, first_token: int = 0) -> Path:
        """The teacher's scores; those that were added later lie in folders of their own, by their first token."""
        return self.path / "scores" / (f"teacher={teacher}" + (f",from={first_token}" if first_token else ""))

    def teacher_prompts(self, teacher: str) -> Path:
        """The same prompts as this teacher sees them, where it has a prompt of its own."""
        folder = self.prompts.with_name(self.prompts.stem.replace("prompts", "teacher_prompts"))
        return folder / f"teacher={teacher}.parquet"


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.parquet"

    @property
    def eval_prompts(self) -> Path:
        return self.path / "eval_prompts.parquet"

    @property
    def vocab(self) -> Path:
        return self.path / "vocab.parquet"

    def episode(self, episode: int) -> RolloutSet:
        name = f"episode={episode}"
        return RolloutSet(self.path / name, f"episode {episode}", name, self.prompts)

    def learn(self, episode: int) -> Path:
        return self.path / f"episode={episode}" / "learn"

    def steps(self, episode: int) -> Path:
        return self.learn(episode) / "steps.parquet"

    def checkpoint(self, episode: int, step: int) -> Path:
        """State inside an episode, `step` optimizer steps after its start."""
        return self.learn(episode) / f"checkpoint-{step:06d}"

    def policy_after(self, episode: int) -> Path:
        """The student after this episode: policy version episode + 1."""
        return self.path / f"episode={episode}" / "policy"

    def evaluation(self, subject: str) -> Path:
        """Folder of the evaluations of `policy=N` or `teacher=NAME`."""
        return self.path / "evals" / subject

    def evaluation_set(self, subject: str, mode: str) -> RolloutSet:
        path, label = self.evaluation(subject) / f"mode={mode}", f"eval {subject} {mode}"
        return RolloutSet(path, label, f"eval-{subject}-{mode}", self.eval_prompts)

    @property
    def replay_json(self) -> Path:
        """Only in a replay: which run its rollouts and scores come from."""
        return self.path / "replay.json"

    @property
    def recipe_yaml(self) -> Path:
        """Only in a replay: its resolved recipe, to be given to other commands."""
        return self.path / "recipe.yaml"

    @property
    def submitted_recipe(self) -> Path:
        """The resolved recipe that Slurm's jobs read."""
        return self.path / "slurm" / "recipe.yaml"

    @property
    def submitted_jobs(self) -> Path:
        """One line a job that was sent to Slurm."""
        return self.path / "slurm" / "jobs.jsonl"

    def job_script(self, stage: str) -> Path:
        return self.path / "slurm" / f"{stage}.sh"

    @property
    def job_logs(self) -> Path:
        return self.logs / "slurm"

    def job_log(self, stage: str, job: str) -> Path:
        """What a job has printed; `job` is its id, and ID_TASK of an array's task."""
        return self.job_logs / f"{stage}-{job}.log"

    @property
    def quarantine(self) -> Path:
        """Where `repair` moves damaged files, under their paths in the run. Nothing in it is read."""
        return self.path / "quarantine"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def health_note(self, episode: int, stage: str, teacher: str | None = None) -> Path:
        """What the figures of a complete stage say, and what was warned of."""
        name = stage if teacher is None else f"{stage}-teacher={teacher}"
        return self.log_folder("health", f"episode={episode}") / f"{name}.json"

    def health_notes(self) -> list[Path]:
        return sorted(self.logs.glob("health/episode=*/*.json"))

    def log_folder(self, stage: str, log_name: str) -> Path:
        return self.logs / stage / log_name

    def episodes(self) -> list[int]:
        """Numbers of the episodes that have a folder, in order."""
        if not self.path.is_dir():
            return []
        matches = (EPISODE_FOLDER.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)
