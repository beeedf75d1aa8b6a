"""Symbolic links in a run directory: they are read through; nothing that lies behind one is moved, removed or written."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from doors import answered_or_refused, contents, ran, touching_only
from fault_log import DataLostError, FaultLog
from helpers import data_files

from opd_cache.config import Recipe
from opd_cache.launch.clusters import load_cluster
from opd_cache.launch.scripts import render_scripts, write_scripts
from opd_cache.learn.checkpoint import remove_checkpoints
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.run_dir import RunDir
from opd_cache.store.publish import append_line, publish_file, publish_json, replace_file
from opd_cache.store.query import query_rows
from opd_cache.verify.run import verify_run

ROW = "symbolic links"
LINKED = [
    "episode=1", "episode=1/rollouts", "episode=0/scores", "episode=0/scores/teacher=main", "episode=1/policy", "run.json",
    "prompts.parquet", "episode=0/rollouts/shard-00000-of-00003.parquet", "evals", "logs",
]  # fmt: skip


def moved_out(run: Path, name: str) -> Path:
    """Move a file or folder of the run to elsewhere, and leave a link in its place."""
    outside = run.parent / "elsewhere" / name
    outside.parent.mkdir(parents=True, exist_ok=True)
    os.rename(run / name, outside)
    (run / name).symlink_to(outside)
    return outside


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_part_is_read_like_any_other(faults: FaultLog, run_path: Path, finished_run: Run, name: str) -> None:
    moved_out(run_path, name)
    with faults.trial(ROW, f"{name} lies elsewhere"), touching_only(run_path):
        assert [found.problem for found in verify_run(run_path).findings] == []
        found, wanted = (json.loads(ran("status", path, "--json").out) for path in (run_path, finished_run.dir.path))
        assert {**found, "run_dir": ""} == {**wanted, "run_dir": ""}
        sql = "SELECT * FROM samples ORDER BY ALL"
        assert query_rows(run_path, sql) == query_rows(finished_run.dir.path, sql)


@pytest.mark.parametrize("name", ["episode=1", "episode=1/rollouts", "episode=0/scores"])
def test_repair_moves_nothing_that_lies_outside(faults: FaultLog, run_path: Path, name: str) -> None:
    outside = moved_out(run_path, name)
    shard = next(outside.rglob("shard-00001*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    before = contents(run_path.parent)
    with faults.trial(ROW, f"repair with {name} elsewhere"), touching_only(run_path):
        ended = answered_or_refused("repair", run_path)
        assert (ended.status, "lies outside of the run" in ended.err) == (2, True), ended
        if contents(run_path.parent) != before:
            raise DataLostError("something was moved")


def test_repair_does_not_move_into_a_linked_quarantine(faults: FaultLog, run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/episode=0").mkdir(parents=True)
    (run_path / "quarantine").symlink_to(tmp_path / "elsewhere")
    shard = run_path / "episode=0/rollouts/shard-00001-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    before = contents(tmp_path)
    for kind in ("the quarantine", "a folder of it"):
        with faults.trial(ROW, f"repair with {kind} elsewhere"), touching_only(run_path):
            ended = answered_or_refused("repair", run_path)
            assert (ended.status, "lies outside of the run" in ended.err) == (2, True), ended
            assert contents(tmp_path / "elsewhere") == {}
        if kind == "the quarantine":
            assert contents(tmp_path) == before
            (run_path / "quarantine").unlink()
            (run_path / "quarantine").mkdir()
            (run_path / "quarantine/episode=0").symlink_to(tmp_path / "elsewhere/episode=0")


def test_repair_of_a_linked_shard_moves_the_link_alone(
    faults: FaultLog, run_path: Path, finished_run: Run, make_recipe: Callable[..., Recipe]
) -> None:
    name = "episode=0/scores/teacher=main/shard-00001-of-00003.parquet"
    outside = moved_out(run_path, name)
    outside.write_bytes(outside.read_bytes()[:-9])
    before = outside.read_bytes()
    with faults.trial(ROW, "repair of a linked shard"), touching_only(run_path):
        assert answered_or_refused("repair", run_path).status == 0
        assert (run_path / "quarantine" / name).is_symlink()
        InlineStages(open_run(make_recipe(run_path))).score(0)
        assert not (run_path / name).is_symlink()
        if outside.read_bytes() != before:
            raise DataLostError("the file behind the link was changed")
    assert data_files(run_path) == data_files(finished_run.dir.path)


def test_gc_removes_links_and_not_what_they_lead_to(faults: FaultLog, run_path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    (outside / "inner").mkdir(parents=True)
    dead = f".x.{os.uname().nodename}.999999999.0123abcd.tmp"
    (outside / dead).write_text("a dead temporary of another run")
    (outside / "inner/file").write_text("x")
    (run_path / "episode=9").symlink_to(outside)
    (run_path / f"{dead}").symlink_to(outside)
    (run_path / "logs" / dead).symlink_to(outside / "inner/file")
    (run_path / "logs" / dead.replace("0123", "4567")).mkdir()
    (run_path / "logs" / dead.replace("0123", "4567") / "inner").symlink_to(outside / "inner")
    before = contents(outside)
    with faults.trial(ROW, "gc with links"), touching_only(run_path):
        assert answered_or_refused("gc", run_path, "--older-than", "0").status == 0
        if contents(outside) != before:
            raise DataLostError("gc removed what lies outside")
    assert not [path for path in run_path.rglob("*.tmp") if os.path.lexists(path)]


def test_nothing_is_written_through_a_link(faults: FaultLog, tmp_path: Path) -> None:
    outside = tmp_path / "victim"
    outside.write_text("mine")
    absent = tmp_path / "absent"
    for target in (outside, absent):
        for name, write in {
            "a note": lambda final: replace_file(final, "note"),
            "a line": lambda final: append_line(final, "line"),
            "a file": lambda final: publish_file(final, lambda file: file.write(b"x"), lambda path: None),
            "JSON": lambda final: publish_json(final, {"a": 1}, "it", "Move it."),
        }.items():
            final = tmp_path / "run" / name.replace(" ", "_") / target.name
            final.parent.mkdir(parents=True, exist_ok=True)
            final.symlink_to(target)
            with faults.trial(ROW, f"{name} in the place of a link to {target.name}"):
                with suppress(OSError, ValueError):
                    write(final)
                if outside.read_text() != "mine" or absent.exists():
                    raise DataLostError(f"{name} was written through a link")


def test_scripts_replace_a_link_and_not_what_it_leads_to(faults: FaultLog, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.job_script("learn").parent.mkdir(parents=True)
    (tmp_path / "profile").write_text("export A=1\n")
    for stage in ("rollout", "learn"):
        run.job_script(stage).symlink_to(tmp_path / ("profile" if stage == "rollout" else "absent"))
    with faults.trial(ROW, "batch scripts in the place of links"), touching_only(run.path):
        write_scripts(render_scripts(run, tmp_path, "python3", load_cluster("single_node")))
        assert (tmp_path / "profile").read_text() == "export A=1\n"
        assert not (tmp_path / "absent").exists()
    assert os.access(run.job_script("learn"), os.X_OK)


def test_old_checkpoints_that_are_links_stay(faults: FaultLog, tmp_path: Path) -> None:
    outside, learn = tmp_path / "outside", tmp_path / "learn"
    for folder in (outside, learn / "checkpoint-000020", learn / "checkpoint-notes"):
        folder.mkdir(parents=True)
        (folder / "_COMPLETE.json").write_text("{}")
    (learn / "checkpoint-000010").symlink_to(outside)
    with faults.trial(ROW, "a checkpoint that lies elsewhere"), touching_only(learn):
        remove_checkpoints(learn)
        remove_checkpoints(learn, keep_every=7)
        assert (outside / "_COMPLETE.json").exists()
    assert sorted(path.name for path in learn.iterdir()) == ["checkpoint-000010", "checkpoint-notes"]


def test_a_run_directory_that_is_a_link_is_a_run(
    faults: FaultLog, run_path: Path, tmp_path: Path, make_recipe: Callable[..., Recipe], finished_run: Run
) -> None:
    """As with a scratch file system: everything works, and repair moves inside of it."""
    link = tmp_path / "link"
    link.symlink_to(run_path)
    shard = run_path / "episode=0/scores/teacher=main/shard-00001-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with faults.trial(ROW, "the run directory itself"), touching_only(run_path, link):
        assert answered_or_refused("repair", link).status == 0
        InlineStages(open_run(make_recipe(link))).score(0)
        assert data_files(run_path) == data_files(finished_run.dir.path)
        assert json.loads(ran("verify", link, "--json").out)["findings"] == []


def test_a_linked_stage_folder_is_written_where_it_lies(
    faults: FaultLog, run_path: Path, make_recipe: Callable[..., Recipe], finished_run: Run
) -> None:
    """A user's own layout: the scores of an episode on another disk."""
    outside = moved_out(run_path, "episode=1/scores")
    shutil.rmtree(outside / "teacher=main")
    with faults.trial(ROW, "scores made on another disk"):
        InlineStages(open_run(make_recipe(run_path))).score(1)
        assert data_files(run_path) == data_files(finished_run.dir.path)
        assert (outside / "teacher=main/_SEALED.json").exists()


def test_a_link_in_a_circle_is_one_line(faults: FaultLog, run_path: Path) -> None:
    (run_path / "episode=7").symlink_to(run_path)
    (run_path / "episode=8").symlink_to("episode=8")
    (run_path / "evals/policy=9").symlink_to(run_path / "evals")
    for arguments in (("status", run_path), ("verify", run_path), ("gc", run_path), ("query", run_path, "SELECT 1")):
        with faults.trial(ROW, f"circles: {arguments[0]}"), touching_only(run_path):
            answered_or_refused(*arguments)
