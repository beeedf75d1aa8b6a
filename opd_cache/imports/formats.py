"""Rows of outside rollouts as others write them, brought into one form. What a row must hold is checked in rows.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_cache.errors import RolloutFileError
from opd_cache.prompts.sources import FILE_SUFFIXES, read_file

TORCH_SUFFIX = ".pt"
SUFFIXES = (*FILE_SUFFIXES, TORCH_SUFFIX)
# Of slime's Sample.Status: what is an end by EOS and what a cut. Others were not sampled to an end.
SLIME_ENDS = {"completed": "stop", "truncated": "length"}


@dataclass(frozen=True)
class OutsideRow:
    """One response and where it stood. Of the fields of each group at least one is there."""

    place: str
    rollout_id: Any = None  # of an exported row
    # Which prompt of the run: its ids, its number, its id, its text, or its text without special tokens.
    prompt_ids: Any = None
    prompt_index: Any = None
    prompt_id: Any = None
    prompt: Any = None  # a text, or chat messages
    decoded_prompt: Any = None
    # The response.
    response_ids: Any = None
    response: Any = None  # a text
    sampling_logprobs: Any = None
    loss_mask: Any = None
    finish_reason: Any = None
    reward: Any = None


def read_rows(path: Path, format: str) -> Iterator[OutsideRow]:
    """The rows of a file. Raises RolloutFileError, PromptError (a damaged file)."""
    records = _read_torch(path) if path.suffix == TORCH_SUFFIX else read_file(path)
    for place, record in records:
        if isinstance(record, str):
            raise RolloutFileError(f"{place}: {record}.")
        yield FORMATS[format_of(record, place) if format == "auto" else format](place, record)


def format_of(record: dict[str, Any], place: str) -> str:
    """Which of FORMATS a row is, by the names of its fields. Raises RolloutFileError."""
    if "response_ids" in record or ("response" in record and "tokens" not in record):
        return "opd"
    for name, needed in (("slime", {"tokens", "response_length"}), ("verl", {"input", "output"}), ("trl", {"prompt", "completion"})):  # fmt: skip
        if needed <= record.keys():
            return name
    found = ", ".join(sorted(map(str, record))[:8]) or "no field"
    raise RolloutFileError(
        f"{place}: found {found}; expected response_ids or response, or the fields of a dump by TRL (prompt, completion), verl (input, output) or slime (tokens, response_length)."
    )


def _own(place: str, record: dict[str, Any]) -> OutsideRow:
    """Our own names: those of an exported row, and of a shard of rollouts."""
    names = (
        "prompt_ids", "prompt_index", "prompt_id", "prompt", "response_ids", "response", "sampling_logprobs", "loss_mask",
        "finish_reason", "reward", "rollout_id",
    )  # fmt: skip
    values = {name: record.get(name) for name in names}
    # An exported row says with an empty list what it does not have.
    for name in ("sampling_logprobs", "loss_mask"):
        values[name] = None if values[name] == [] and record.get("response_ids") else values[name]
    return OutsideRow(place, **values)


def _trl(place: str, record: dict[str, Any]) -> OutsideRow:
    """A row of completions/completions_*.parquet, which TRL's GRPOTrainer writes with log_completions=True.

    Its rewards are columns named by the reward functions, and are left behind. Source: GRPOTrainer.log of TRL 1.16.
    """
    completion = record["completion"]
    if isinstance(completion, list):
        if len(completion) != 1 or not isinstance(completion[0], dict) or completion[0].get("role") != "assistant":
            raise RolloutFileError(
                f"{place}: the completion has {len(completion)} messages; text of several turns does not say which tokens were sampled. Give response_ids and loss_mask."
            )
        completion = completion[0].get("content")
    return OutsideRow(place, prompt=record["prompt"], response=completion)


def _verl(place: str, record: dict[str, Any]) -> OutsideRow:
    """A line of N.jsonl, which verl writes with trainer.rollout_data_dir: texts decoded without special tokens.

    Source: RayPPOTrainer._dump_generations and _log_rollout_data.
    """
    return OutsideRow(place, decoded_prompt=record["input"], response=record["output"], reward=record.get("score"))


def _slime(place: str, record: dict[str, Any]) -> OutsideRow:
    """A sample of --save-debug-rollout-data: Sample.to_dict(). tokens are the prompt and, behind it, the response.

    Source: slime/utils/types.py and slime's guide to debugging.
    """
    tokens, length = record["tokens"], record["response_length"]
    if not isinstance(tokens, list) or not isinstance(length, int) or not 0 <= length <= len(tokens):
        raise RolloutFileError(f"{place}: response_length = {length!r} does not fit its tokens.")
    if record.get("status") not in SLIME_ENDS:
        raise RolloutFileError(
            f"{place}: status = {record.get('status')!r}, expected {' or '.join(SLIME_ENDS)}: such a sample was not sampled to its end. Leave it out of the file."
        )
    reward = record.get("reward")
    start = len(tokens) - length
    return OutsideRow(
        place,
        prompt_ids=tokens[:start],
        response_ids=tokens[start:],
        sampling_logprobs=record.get("rollout_log_probs"),
        loss_mask=record.get("loss_mask"),
        reward=reward if isinstance(reward, int | float) else None,
    )


FORMATS: dict[str, Callable[[str, dict[str, Any]], OutsideRow]] = {
    "opd": _own,
    "trl": _trl,
    "verl": _verl,
    "slime": _slime,
}


def _read_torch(path: Path) -> Iterator[tuple[str, Any]]:
    """The samples of one of slime's files, which hold plain values; anything else in it is refused by torch itself."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (torch.serialization.pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise RolloutFileError(
            f"{path}: cannot be read as plain values ({' '.join(str(error).split())[:120]})."
        ) from error
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list):
        raise RolloutFileError(f"{path}: expected a file of slime's --save-debug-rollout-data, with 'samples'.")
    for number, sample in enumerate(samples, 1):
        yield f"{path} sample {number}", sample if isinstance(sample, dict) else "expected the fields of a sample"
