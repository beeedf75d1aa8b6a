"""Functions that several tests use: tiny real models, whole runs, the command line, a run's reproducible files."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from opd_cache.config import Recipe
from opd_cache.pipeline import InlineStages, run_episodes
from opd_cache.quickstart.sort_letters import byte_tokenizer
from opd_cache.run import Run, open_run
from opd_cache.schema import STEPS
from opd_cache.store.publish import read_json, signed_json
from opd_cache.verify.run import verify_run

# Random tiny models seldom sample the one EOS id; with these, responses have many lengths, one and zero-like included.
STOP_IDS = [1, *range(60, 90)]
TIMINGS = {"read_s", "compute_s", "tokens_per_s"}  # columns of steps


def tiny_qwen2(seed: int, hidden_size: int = 32, **options: object) -> PreTrainedModel:
    """A real Qwen2 of some 40 k random parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        **{"vocab_size": 258, "tie_word_embeddings": True, "max_position_embeddings": 64, **options},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Sharper than the usual initialisation, so that log-probs differ from uniform.
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
    return model.eval()


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def complete(recipe: Recipe) -> Run:
    """Run all stages of all episodes in this process."""
    run = open_run(recipe)
    run_episodes(run, InlineStages(run))
    return run


def edit_json(path: Path, **values: object) -> None:
    """Other top-level values in a published JSON file, whose digest fits again."""
    path.write_bytes(signed_json({**read_json(path), **values}))


def assert_verified(path: Path) -> None:
    """`opd-cache verify` finds nothing wrong."""
    assert [found.problem for found in verify_run(path).findings] == []


def opd_cache_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "opd_cache", *map(str, arguments)]


def run_command(*arguments: str, **options: object) -> subprocess.CompletedProcess:
    """Run `opd-cache ...` as a user would; the output is text."""
    return subprocess.run(opd_cache_command(*arguments), capture_output=True, text=True, timeout=300, **options)


def data_files(run_path: Path) -> dict[str, bytes]:
    """Everything that must be the same in two runs of one recipe: shards, seals, plans and weights, but no timings."""
    names = ["prompts.parquet", "vocab.parquet", "episode=*/plan.json", "episode=*/rollouts/*", "episode=*/scores/*/*"]
    names += ["episode=*/policy/*.safetensors", "episode=*/policy/trainer/*.safetensors", "episode=*/learn/plan.json"]
    found = (path for name in names for path in sorted(run_path.glob(name)) if path.suffix != ".tmp")
    return {str(path.relative_to(run_path)): path.read_bytes() for path in found}


def differences(found: Path, expected: Path) -> list[str]:
    """Names of what differs between two runs of one recipe, is in one of them alone, or was learned otherwise."""
    ours, theirs = ({**data_files(path), **_summaries(path)} for path in (found, expected))
    files = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    names = {
        str(path.relative_to(run)) for run in (found, expected) for path in run.glob("episode=*/learn/steps.parquet")
    }
    return files + [name for name in sorted(names) if _steps(found / name) != _steps(expected / name)]


def _summaries(run_path: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_path)): path.read_bytes() for path in run_path.glob("evals/*/summary.json")}


def _steps(path: Path) -> list[dict] | None:
    columns = [column.name for column in STEPS if column.name not in TIMINGS]
    return pq.read_table(path, columns=columns).to_pylist() if path.exists() else None
