"""The files of a policy are compared with its manifest, one after the other or side by side."""

import shutil
from pathlib import Path

import pytest

from opd_cache.errors import CorruptShardError
from opd_cache.run import Run
from opd_cache.store import manifest
from opd_cache.store.manifest import check_files


@pytest.mark.parametrize("side_by_side_bytes", [0, 1 << 40])
def test_a_changed_and_a_missing_file_are_named(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side_by_side_bytes: int
) -> None:
    monkeypatch.setattr(manifest, "SIDE_BY_SIDE_BYTES", side_by_side_bytes)
    folder = tmp_path / "policy"
    shutil.copytree(finished_run.policy_folder(1), folder)
    assert check_files(folder)["policy_version"] == 1
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptShardError, match=r"model\.safetensors: changed since it was published"):
        check_files(folder)
    weights.unlink()
    with pytest.raises(CorruptShardError, match=r"model\.safetensors: missing since it was published"):
        check_files(folder)
