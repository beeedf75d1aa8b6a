"""Which model a name means, and a short digest that tells two models apart. No torch in here."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from opd_cache.config import ModelConfig
from opd_cache.errors import ModelError

WHOLE_FILE_BYTES = 64 << 20
BLOCK_BYTES = 64 << 10
BLOCKS = 256
WEIGHTS = (".safetensors", ".bin")
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")


def model_folder(config: ModelConfig, with_weights: bool = True) -> Path:
    """The local folder of a model: itself, or a snapshot from the Hugging Face hub. Raises ModelError.

    Without weights, a hub model's tokenizer and configuration are enough: those of a teacher behind a server.
    """
    folder = Path(config.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: has no config.json; expected a model in the Hugging Face format.")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                config.model,
                revision=config.revision,
                allow_patterns=[*SMALL_FILES, *(["*.safetensors"] if with_weights else [])],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {config.model!r} is neither a local folder nor reachable on the Hugging Face hub ({reason})."
        ) from error


def fingerprint_model(folder: Path) -> str:
    """Digest of a model's weights; two trainings of one model differ in it.

    Small files whole; of a large weight file 256 evenly spaced blocks, so that 15 GB take a second. It tells models
    apart; it does not prove every byte (a policy's manifest does).
    """
    digest = hashlib.sha256()
    names = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHTS)
    if not any((folder / name).is_file() for name in names):
        raise ModelError(f"{folder}: has no weights (*.safetensors).")
    for name in names:
        digest.update(name.encode() + b"\0" + _sampled_digest(folder / name))
    return digest.hexdigest()[:32]


def _sampled_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE_FILE_BYTES:
            digest.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1), os.SEEK_SET)
                digest.update(file.read(BLOCK_BYTES))
    return digest.digest()


def num_parameters(folder: Path) -> int | None:
    """How many weights its *.safetensors hold, from their headers; None where there are none. Tied weights count once."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(map(_parameters_of, files)) if files else None


def _parameters_of(path: Path) -> int:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def num_embeddings(folder: Path) -> int:
    """How many token ids a model has an embedding for, from its configuration. Raises ModelError."""
    value = text_config(folder).get("vocab_size")
    if not isinstance(value, int):
        raise ModelError(f"{folder}/config.json: names no vocab_size; expected a causal language model.")
    return value


def context_length(folder: Path) -> int | None:
    """How many tokens a model can see at once, from its configuration; None where that does not say."""
    value = text_config(folder).get("max_position_embeddings")
    return value if isinstance(value, int) else None


def text_config(folder: Path) -> dict[str, Any]:
    """What config.json says of the language model. Raises ModelError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        return dict(config.get("text_config", config))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not a model's configuration ({error}).") from error
