"""The responses of a run with texts, ids and log-probs, shard by shard. Nothing larger than a row group is in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from opd_cache.errors import ConfigError, MissingInputError
from opd_cache.prompts.intake import read_prompt_table
from opd_cache.replay import parse_episodes
from opd_cache.run_dir import SEAL, RolloutSet, RunDir
from opd_cache.schema import EXPORTED, arrow_schema
from opd_cache.status import asked_teachers, read_identity
from opd_cache.store.arrays import record_batch
from opd_cache.store.join import join_teachers, read_rollouts
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, rollout_shards, score_parts
from opd_cache.store.shards import ShardSet, read_row_groups
from opd_cache.types import Rollout, Score

SCHEMA = arrow_schema(EXPORTED)
ROWS_AT_ONCE = 256  # their texts, as Python objects, take many times the ids


@dataclass(frozen=True)
class Piece:
    """One shard of an episode's rollouts, with one teacher's scores of them where it has some."""

    episode: int
    target: RolloutSet
    plan: RolloutPlan
    shard: int
    teacher: str | None

    @property
    def name(self) -> str:
        """Distinct among the pieces of a run, in the order of their rows."""
        scored = "" if self.teacher is None else f"-{self.teacher}"
        return f"episode-{self.episode:05d}{scored}-shard-{self.shard:05d}"

    @property
    def num_rows(self) -> int:
        return self.plan.shard_rollouts(self.shard)


@dataclass(frozen=True)
class Responses:
    """What of a run is exported."""

    run: RunDir
    pieces: list[Piece]
    texts: list[str]  # of each token of the vocabulary

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.pieces)


def chosen_responses(run_dir: Path, episodes: str | None, teacher: str | None) -> Responses:
    """The sealed responses of a run: of `"FIRST-LAST"` episodes or all, as one teacher or as each scored them.

    Raises MissingInputError where nothing of it is sealed, ConfigError on a teacher that scored none, and what opening
    the seals raises.
    """
    run = RunDir(run_dir)
    read_identity(run)
    numbers = run.episodes() if episodes is None else parse_episodes(episodes)
    pieces = [piece for number in numbers for piece in _pieces(run, number, teacher)]
    if not pieces:
        known = sorted({name for number in numbers for name in asked_teachers(run.episode(number))})
        if teacher is not None and teacher not in known:
            raise ConfigError(
                f"--teacher {teacher!r} scored none of these episodes. Known: {', '.join(known) or 'none'}."
            )
        raise MissingInputError(f"{run_dir}: no sealed responses of these episodes. See: opd-cache status {run_dir}")
    texts = [text or "" for table in read_row_groups(run.vocab, ["text"]) for text in table["text"].to_pylist()]
    return Responses(run, pieces, texts)


def _pieces(run: RunDir, episode: int, teacher: str | None) -> Iterator[Piece]:
    target = run.episode(episode)
    if not (target.rollouts / SEAL).exists():
        return
    plan = load_rollout_plan(target)
    rollout_shards(target, plan).open_seal()
    scored = [
        name for name in asked_teachers(target) if all(part.is_sealed() for part in score_parts(target, plan, name))
    ]
    names: list[str | None] = [name for name in scored if teacher in (None, name)]
    for name in names or ([None] if teacher is None else []):
        for part in score_parts(target, plan, name) if name is not None else ():
            part.open_seal()
        for shard in range(plan.num_shards):
            yield Piece(episode, target, plan, shard, name)


def piece_batches(responses: Responses, piece: Piece) -> Iterator[pa.RecordBatch]:
    """A piece's rows as record batches of SCHEMA, every row checked as the learner checks it."""
    rollouts = rollout_shards(piece.target, piece.plan)
    prompts = read_prompt_table(piece.target.prompts, piece.plan.shard_prompts(piece.shard))
    known = {row["prompt_index"]: row for row in prompts.select(["prompt_index", "prompt_id", "text", "answer"]).to_pylist()}  # fmt: skip
    rows = _joined(piece, rollouts)
    while group := list(islice(rows, ROWS_AT_ONCE)):
        yield _batch(group, piece, known, responses.texts)


def _joined(piece: Piece, rollouts: ShardSet) -> Iterator[tuple[Rollout, Score]]:
    if piece.teacher is None:
        no_floats, no_ids = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32)
        for rollout in read_rollouts(rollouts, piece.shard):
            yield rollout, Score(rollout.rollout_id, 0, no_floats.ravel(), no_ids.ravel(), no_ids, no_floats)
        return
    parts = score_parts(piece.target, piece.plan, piece.teacher)
    for rollout, (score,) in join_teachers(rollouts, [parts], piece.shard):
        yield rollout, score


def _batch(rows: list[tuple[Rollout, Score]], piece: Piece, known: dict[int, dict], texts: list[str]) -> pa.RecordBatch:
    rollouts, scores = [rollout for rollout, _ in rows], [score for _, score in rows]
    prompts = [known[rollout.prompt_index] for rollout in rollouts]
    columns: dict[str, Iterable] = {
        "episode": [piece.episode] * len(rows),
        "rollout_id": [r.rollout_id for r in rollouts],
        "teacher": [piece.teacher] * len(rows),
        "prompt_id": [prompt["prompt_id"] for prompt in prompts],
        "prompt_index": [r.prompt_index for r in rollouts],
        "sample_index": [r.sample_index for r in rollouts],
        "policy_version": [r.policy_version for r in rollouts],
        "prompt": [prompt["text"] for prompt in prompts],
        "response": [_text(r, texts) for r in rollouts],
        "answer": [prompt["answer"] for prompt in prompts],
        "finish_reason": [r.finish_reason for r in rollouts],
        "reward": [r.reward for r in rollouts],
        "error": [s.error for s in scores],
        "prompt_ids": [r.prompt_ids for r in rollouts],
        "response_ids": [r.response_ids for r in rollouts],
        "sampling_logprobs": [_present(r.sampling_logprobs) for r in rollouts],
        "student_logprobs": [_present(r.student_logprobs) for r in rollouts],
        "loss_mask": [_present(r.loss_mask) for r in rollouts],
        "teacher_logprobs": [s.teacher_logprobs for s in scores],
        "teacher_rank": [s.teacher_rank for s in scores],
        "top_k": [s.topk_ids.shape[1] for s in scores],
        "topk_ids": [s.topk_ids.reshape(-1) for s in scores],
        "topk_logprobs": [s.topk_logprobs.reshape(-1) for s in scores],
    }
    return record_batch(columns, SCHEMA)


def _present(values: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, np.float32) if values is None else values


def _text(rollout: Rollout, texts: list[str]) -> str:
    # A model may have more embeddings than its tokenizer has tokens.
    return "".join(texts[token] for token in rollout.response_ids.tolist() if token < len(texts))
