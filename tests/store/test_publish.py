"""A file or folder under its final name is whole and never changes."""

import gc
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
from store_helpers import file_names, make_rollouts, rollout_set

from opd_cache.errors import CorruptShardError, MismatchError, MissingInputError
from opd_cache.store.publish import digest_file, publish_file, publish_folder, publish_json, read_json
from opd_cache.store.rows import rollout_batch


def writes(content: bytes):
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def accept(path: Path) -> None:
    assert path.exists()


def refuse(path: Path) -> None:
    raise CorruptShardError(f"{path}: not whole.")


def test_published_file_is_whole_and_alone_in_new_folders(tmp_path):
    final = tmp_path / "a" / "b" / "file"
    assert publish_file(final, writes(b"x" * 100_000), accept)
    assert final.read_bytes() == b"x" * 100_000
    assert file_names(final.parent) == ["file"]
    assert final.stat().st_nlink == 1


def test_second_writer_is_told_and_the_first_bytes_stay(tmp_path):
    final = tmp_path / "file"
    assert publish_file(final, writes(b"first"), accept)
    before = final.stat()
    assert not publish_file(final, writes(b"second"), accept)
    assert final.read_bytes() == b"first"
    assert (final.stat().st_ino, final.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert file_names(tmp_path) == ["file"]


def test_second_writer_checks_the_file_that_was_first(tmp_path):
    final = tmp_path / "file"
    final.write_bytes(b"damaged")

    def check(path: Path) -> None:
        if path.read_bytes() != b"whole":
            refuse(path)

    with pytest.raises(CorruptShardError, match="file: not whole"):
        publish_file(final, writes(b"whole"), check)
    assert file_names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_while_writing_leaves_no_file(tmp_path, error):
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        publish_file(tmp_path / "file", write, accept)
    assert file_names(tmp_path) == []


def test_file_that_does_not_read_back_is_not_published(tmp_path):
    with pytest.raises(CorruptShardError):
        publish_file(tmp_path / "file", writes(b"x"), refuse)
    assert file_names(tmp_path) == []


def test_exception_between_row_groups_publishes_no_short_shard_and_prints_nothing(tmp_path, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    shards = rollout_set(tmp_path)

    def batches():
        yield rollout_batch(make_rollouts(4), shards.schema)
        raise RuntimeError("the sampler died")

    with pytest.raises(RuntimeError, match="the sampler died"):
        shards.publish(0, batches)
    gc.collect()
    assert file_names(shards.folder) == []
    assert shards.missing() == [0]
    assert unraisable == []


def test_same_json_again_is_confirmed(tmp_path):
    final = tmp_path / "plan.json"
    content = {"seed": 1, "text": "ä", "nested": {"b": 1, "a": [1.5, None]}}
    digest = publish_json(final, content, "the plan", "Move it away.")
    assert publish_json(final, dict(reversed(content.items())), "the plan", "Move it away.") == digest
    assert digest == digest_file(final)
    assert read_json(final) == content
    assert file_names(tmp_path) == ["plan.json"]


def test_differing_json_is_refused_by_the_name_of_each_differing_key(tmp_path):
    final = tmp_path / "plan.json"
    publish_json(final, {"seed": 1, "shards": 4, "gone": True}, "the plan", "Move it away.")
    before = final.read_bytes()
    with pytest.raises(MismatchError) as caught:
        publish_json(final, {"seed": 2, "shards": 4, "new": "x"}, "the plan", "Move it away.")
    message = str(caught.value)
    assert f"{final}: the plan was made with " in message
    assert "seed = 1, now 2" in message
    assert "gone = true, now null" in message
    assert 'new = null, now "x"' in message
    assert "shards" not in message
    assert message.endswith("Move it away.")
    assert final.read_bytes() == before
    assert file_names(tmp_path) == ["plan.json"]


def test_nested_differences_are_named_by_dotted_path_and_nothing_else_is_shown(tmp_path):
    final = tmp_path / "plan.json"
    content = {
        "settings": {"learning_rate": 0.001, "batch": 8},
        "shards": [{"sha256": "a"}, {"sha256": "b"}],
        "loss": {"a": 1},
    }
    publish_json(final, content, "the plan", "Move it away.")
    changed = {
        "settings": {"learning_rate": 0.002, "batch": 8},
        "shards": [{"sha256": "a"}, {"sha256": "c"}],
        "loss": None,
    }
    with pytest.raises(MismatchError) as caught:
        publish_json(final, changed, "the plan", "Move it away.")
    assert str(caught.value) == (
        f"{final}: the plan was made with loss = {{1 keys}}, now null; settings.learning_rate = 0.001, now 0.002; "
        'shards[1].sha256 = "b", now "c". Move it away.'
    )


def test_no_more_than_five_differences_are_named(tmp_path):
    final = tmp_path / "plan.json"
    publish_json(final, {"settings": {f"k{index}": 0 for index in range(9)}}, "the plan", "Move it away.")
    with pytest.raises(MismatchError) as caught:
        publish_json(final, {"settings": {f"k{index}": 1 for index in range(9)}}, "the plan", "Move it away.")
    assert str(caught.value).endswith("settings.k4 = 0, now 1; ... Move it away.")
    assert str(caught.value).count(", now ") == 5


def test_only_the_compared_keys_of_json_must_agree(tmp_path):
    final = tmp_path / "facts.json"
    publish_json(final, {"seed": 1, "host": "a"}, "the run", "", compare=("seed",))
    publish_json(final, {"seed": 1, "host": "b"}, "the run", "", compare=("seed",))
    with pytest.raises(MismatchError, match="seed = 1, now 3"):
        publish_json(final, {"seed": 3, "host": "a"}, "the run", "", compare=("seed",))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1}}', b"\xff{}"])
def test_json_that_is_no_whole_object_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"plan\.json: "):
        read_json(tmp_path / "plan.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"plan\.json: no such file"):
        read_json(tmp_path / "plan.json")


def fill_with(text: str):
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(text)
        (folder / "b").write_text(text)

    return fill


def test_published_folder_is_whole_and_the_first_one_stays(tmp_path):
    final = tmp_path / "learn" / "policy"
    assert publish_folder(final, fill_with("first"))
    assert not publish_folder(final, fill_with("second"))
    assert (final / "inner" / "a").read_text() == (final / "b").read_text() == "first"
    assert file_names(final.parent) == ["policy"]
    assert file_names(final) == ["b", "inner"]


def test_exception_while_filling_leaves_no_folder(tmp_path):
    def fill(folder: Path) -> None:
        fill_with("half")(folder)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        publish_folder(tmp_path / "policy", fill)
    assert file_names(tmp_path) == []
