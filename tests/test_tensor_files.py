"""A safetensors file that reads back otherwise than it was written is refused, wherever the difference lies."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opd_cache.errors import DiskError
from opd_cache.tensor_files import FORMAT, check_tensors, open_tensors, save_tensors

TENSORS = {"step": torch.tensor(3.0), "weight": torch.linspace(-1, 1, 12).reshape(3, 4), "ids": torch.arange(5)}


def test_what_was_written_is_accepted(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", TENSORS, FORMAT)
    assert check_tensors(tmp_path / "file", TENSORS, FORMAT) == set(TENSORS)


def test_any_flipped_bit_and_any_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file(TENSORS, path, FORMAT)
    whole = path.read_bytes()
    damaged = [whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :] for place in range(len(whole))]
    accepted = []
    for number, data in enumerate([*damaged, b"", whole[:-1], whole[: len(whole) // 2]]):
        path.write_bytes(data)
        try:
            names = check_tensors(path, TENSORS, FORMAT)
        except DiskError:
            continue
        if names == TENSORS.keys():
            accepted.append(number)
    assert accepted == []


def test_a_file_that_the_disk_changed_is_not_kept_for_good(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", {**TENSORS, "weight": TENSORS["weight"] + 1}, FORMAT)
    with pytest.raises(DiskError, match="reads back otherwise than it was written"):
        check_tensors(tmp_path / "file", TENSORS, FORMAT)


def test_what_cannot_be_opened_has_the_systems_reason(tmp_path: Path) -> None:
    """safetensors calls every such file missing."""
    path = tmp_path / "model.safetensors"
    path.symlink_to(path)
    with pytest.raises(OSError, match=r"model\.safetensors") as caught, open_tensors(path):
        pass
    assert caught.value.errno == errno.ELOOP
