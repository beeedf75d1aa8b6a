"""Which files of a model are fetched."""

from pathlib import Path

import pytest

from opd_cache.config import TeacherConfig
from opd_cache.fingerprint import model_folder
from opd_cache.run import load_tokenizer


def test_for_a_tokenizer_no_weights_are_fetched_from_the_hub(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[list[str]] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(task / "teacher")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = TeacherConfig(model="somebody/teacher")
    load_tokenizer(config)
    model_folder(config)
    assert ["*.safetensors" in patterns for patterns in fetched] == [False, True]
    assert all("*.json" in patterns for patterns in fetched)
