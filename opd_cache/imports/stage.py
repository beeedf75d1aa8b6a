"""The import of an episode: a look at all rows, the plan, then shards like those of the rollout stage."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from opd_cache.errors import MismatchError, RolloutFileError
from opd_cache.fingerprint import model_folder, num_embeddings
from opd_cache.health.figures import rollout_figures
from opd_cache.imports.rows import PromptBook, Reader
from opd_cache.logs import StageProgress
from opd_cache.prompts.intake import read_prompt_ids
from opd_cache.run import Run, load_tokenizer, stop_token_ids
from opd_cache.stage import EVERYTHING, Figures, make_shards
from opd_cache.store.plans import RolloutPlan, SamplingPlan, publish_rollout_plan, rollout_shards
from opd_cache.store.publish import digest_file
from opd_cache.store.rows import group_limit, group_sizes, rollout_batch
from opd_cache.store.shards import ShardSet
from opd_cache.types import Int32Array, Rollout

log = logging.getLogger(__name__)
IMPORTED = "imported"  # the sampler, and the policy, of rollouts that came from outside
OPTIONAL = ("sampling_logprobs", "loss_mask", "reward")


@dataclass
class Survey:
    """What the rows hold, found in a first pass."""

    prompt_indices: list[int] = field(default_factory=list)
    present: Counter[str] = field(default_factory=Counter)
    longest: int = 1


def import_episode(run: Run, episode: int, files: Sequence[Path], format: str) -> bool:
    """Publish outside rollouts as an episode's; True when they are sealed. The same call goes on after an interruption.

    Raises RolloutFileError with file and row, before anything is written; MismatchError when the episode was sampled, or
    imported from other files.
    """
    target = run.dir.episode(episode)
    folder = model_folder(run.recipe.student)
    tokenizer = load_tokenizer(run.recipe.student)
    stops = stop_token_ids(run.recipe, folder)
    version = run.recipe.sampling_version(episode)
    book = PromptBook.of(run.dir.prompts, tokenizer)
    reader = Reader(
        files, format, str(episode), version, book, run.dir.prompts, tokenizer, stops, num_embeddings(folder)
    )
    plan = _plan(run, episode, version, reader, _survey(reader))
    publish_rollout_plan(target, plan, f"Move {target.path} away to import the episode again.")
    shards = rollout_shards(target, plan)
    rows = _Cursor(reader)

    def make(shard: int, progress: StageProgress, figures: Figures) -> Iterator[pa.RecordBatch]:
        return _row_groups(rows, run.dir.prompts, plan, shard, shards, progress, figures)

    return make_shards("rollout", run.dir, target, plan, shards, EVERYTHING, make, {"engine": IMPORTED})


def _survey(reader: Reader) -> Survey:
    """Read and check every row. Raises RolloutFileError."""
    found = Survey()
    for rollout in reader.rollouts():
        found.prompt_indices.append(rollout.prompt_index)
        found.longest = max(found.longest, len(rollout.response_ids))
        found.present.update(name for name in OPTIONAL if getattr(rollout, name) is not None)
    if not found.prompt_indices:
        raise RolloutFileError(f"{', '.join(map(str, reader.files))}: no rollout in it.")
    count = len(found.prompt_indices)
    if 0 < found.present["sampling_logprobs"] < count:
        raise RolloutFileError(
            f"{', '.join(map(str, reader.files))}: {found.present['sampling_logprobs']} of {count} rollouts have sampling_logprobs; expected all or none. Import them as two episodes."
        )
    return found


def _plan(run: Run, episode: int, version: int, reader: Reader, found: Survey) -> RolloutPlan:
    columns = sorted(name for name in OPTIONAL if found.present[name])
    prompts, samples = _groups(found.prompt_indices)
    options = run.recipe.rollout
    # As many rollouts a shard as the recipe's sampled ones have.
    per_shard = options.prompts_per_shard if samples > 1 else options.prompts_per_shard * options.n_samples_per_prompt
    return RolloutPlan(
        run_id=run.run_id,
        scope=str(episode),
        seed=run.recipe.seed,
        policy_version=version,
        policy=IMPORTED,
        sampler=IMPORTED,
        dtype="float32",
        prompts=run.prompts_digest,
        prompt_indices=prompts,
        n_samples_per_prompt=samples,
        prompts_per_shard=per_shard,
        sampling=SamplingPlan(1.0, 1.0, None, found.longest, list(reader.stop_token_ids)),
        reward={"name": IMPORTED} if "reward" in columns else None,
        imported={
            "files": [{"name": path.name, "sha256": digest_file(path)} for path in reader.files],
            "format": reader.format,
            "columns": columns,
        },
    )


def _groups(indices: list[int]) -> tuple[list[int], int]:
    """(prompts, samples of each): whole groups of one size, one behind the other; else every rollout by itself."""
    runs = [(index, len(list(group))) for index, group in itertools.groupby(indices)]
    prompts, sizes = [index for index, _ in runs], {size for _, size in runs}
    if len(sizes) == 1 and len(set(prompts)) == len(prompts):
        return prompts, sizes.pop()
    return indices, 1


class _Cursor:
    """The rollouts from any place on, as long as places only grow; one before that begins again."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.rows, self.place = reader, reader.rollouts(), 0

    def take(self, start: int, count: int) -> list[Rollout]:
        if start < self.place:
            self.rows, self.place = self.reader.rollouts(), 0
        taken = list(itertools.islice(self.rows, start - self.place, start - self.place + count))
        self.place = start + len(taken)
        return taken


def _row_groups(
    rows: _Cursor,
    prompts: Path,
    plan: RolloutPlan,
    shard: int,
    shards: ShardSet,
    progress: StageProgress,
    figures: Figures,
) -> Iterator[pa.RecordBatch]:
    ids = read_prompt_ids(prompts, plan.shard_prompts(shard))
    start = shard * plan.prompts_per_shard * plan.n_samples_per_prompt
    for size in group_sizes(
        plan.shard_rollouts(shard), plan.n_samples_per_prompt, group_limit(plan.sampling.max_new_tokens)
    ):
        group = [_completed(row, ids[row.prompt_index], plan) for row in rows.take(start, size)]
        if len(group) != size:
            raise MismatchError(
                f"{', '.join(map(str, rows.reader.files))}: changed while being read. Run the same command again."
            )
        start += size
        figures.update(rollout_figures(group))
        progress.advance(size, sum(len(row.response_ids) for row in group))
        yield rollout_batch(group, shards.schema)


def _completed(row: Rollout, prompt_ids: Int32Array, plan: RolloutPlan) -> Rollout:
    """The row with its prompt; where others have a mask, one that leaves nothing out."""
    has_mask = plan.imported is not None and "loss_mask" in plan.imported["columns"]
    mask = np.ones(len(row.response_ids), np.bool_) if has_mask and row.loss_mask is None else row.loss_mask
    return replace(row, prompt_ids=prompt_ids, loss_mask=mask)
