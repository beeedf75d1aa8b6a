"""Tensors in safetensors files, compared with what they were written from before anybody else sees them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_cache.store.disk import unlike_written

FORMAT = {"format": "pt"}  # in the header of a model's weights


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one file. Raises DiskError when it reads back otherwise."""
    save_file(dict(tensors), path, metadata)
    if check_tensors(path, tensors, metadata) != tensors.keys():
        raise unlike_written(path)


def check_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> set[str]:
    """The names in a file, after the tensors of these names were compared bit by bit. Raises DiskError."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            known = sorted(names & tensors.keys())  # one at a time in memory
            is_same = file.metadata() == metadata and all(
                _is_same(file.get_tensor(name), tensors[name]) for name in known
            )
    except SafetensorError as error:
        raise unlike_written(path) from error
    if not is_same:
        raise unlike_written(path)
    return names


def _is_same(found: Tensor, wanted: Tensor) -> bool:
    """Shape, type and every bit."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return torch.equal(_bytes(found), _bytes(wanted.detach().to(found.device)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
