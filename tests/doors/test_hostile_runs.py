"""Run directories that somebody else has made: signed JSON that was changed, and JSON with a fitting digest that lies."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doors import answered_or_refused, contents, examples, ran, touching_only
from fault_log import DataLostError, FaultLog, SilentError, is_full
from helpers import edit_json
from hypothesis import given
from hypothesis import strategies as st

from opd_cache.errors import OpdCacheError
from opd_cache.store.publish import publish_folder, read_json, signed_json

ROW = "hostile run directories"
SIGNED = [
    "run.json", "episode=0/plan.json", "episode=0/rollouts/_SEALED.json", "episode=0/scores/teacher=main/plan.json",
    "episode=0/scores/teacher=main/_SEALED.json", "episode=0/learn/plan.json", "episode=0/policy/_COMPLETE.json",
    "evals/policy=1/summary.json", "evals/policy=1/mode=greedy/plan.json",
]  # fmt: skip
PLAIN = [
    "logs/rollout/episode=0/rollouts-shard-00000.json", "logs/health/episode=0/rollout.json",
    "episode=0/policy/trainer/state.json", "episode=0/policy/config.json",
]  # fmt: skip
VICTIM = "secret-of-the-victim"
INJECTION = "0) AS x; COPY (SELECT 1) TO '/tmp/opd-cache-doors-injected.csv'; --"
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**200, -(2**63), 1e308, -0.5, "", "x", "0", "../../victim/data.parquet", "/etc/passwd",
    "a\0b", "\x1b[31m\n", INJECTION, "'; DROP TABLE x; --", [], {}, [[]], {"x": []}, [None], ["../x"], {"../../x": "y"}, "${seed}",
    [1] * 5, {"a": {"b": {"c": {}}}},
]  # fmt: skip
# Of these every one reads what was changed, or what is made of it.
COMMANDS: list[Callable[[Path], tuple[object, ...]]] = [
    lambda run: ("status", run),
    lambda run: ("status", run, "--json"),
    lambda run: ("verify", run),
    lambda run: ("query", run, "SELECT s.*, f.file FROM samples s, shards f LIMIT 3", "--format", "json"),
    lambda run: (
        "query",
        run,
        "SELECT t.*, e.subject, x.loss FROM tokens t, evals e, steps x LIMIT 3",
        "--partial",
        "--format",
        "json",
    ),
    lambda run: ("inspect", run),
    lambda run: ("repair", run, "--dry-run"),
    lambda run: ("gc", run, "--dry-run"),
    lambda run: ("replay", run, "--into", run.parent / "replay", "--episodes", "1"),
]


@pytest.fixture(scope="module")
def victim(shared_run: Path) -> Path:
    """A folder beside the run that nobody may touch or show."""
    folder = shared_run.parent / "victim"
    folder.mkdir()
    pq.write_table(pa.table({"rollout_id": [VICTIM], "text": [VICTIM]}), folder / "data.parquet")
    (folder / "run.json").write_text(f'{{"x": "{VICTIM}"}}')
    return folder


def holds(faults: FaultLog, fault: str, run: Path, victim: Path, which: Sequence[int] = range(len(COMMANDS))) -> None:
    """Every command works or is one line; nothing of the run or of the victim is changed, and nothing of it is shown."""
    untouched = contents(victim), contents(run)
    for command in which:
        arguments = COMMANDS[command](run)
        with faults.trial(ROW, f"{fault}: {arguments[0]}"), touching_only(run, run.parent / "replay"):
            ended = answered_or_refused(*arguments, statuses=(2, 3))
            if VICTIM in ended.out:
                raise SilentError(f"{arguments}: {ended.out[:500]}")
        shutil.rmtree(run.parent / "replay", ignore_errors=True)
    if (contents(victim), contents(run)) != untouched:
        raise DataLostError(f"{fault}: changed by a command that only reads")
    assert not Path("/tmp/opd-cache-doors-injected.csv").exists()


def test_a_whole_run_passes_all_commands(faults: FaultLog, shared_run: Path, victim: Path) -> None:
    for command in COMMANDS:
        ended = ran(*command(shared_run))
        assert (ended.status, command(shared_run)[0]) in [(0, command(shared_run)[0]), (2, "replay")], ended
    shutil.rmtree(shared_run.parent / "replay", ignore_errors=True)
    holds(faults, "none", shared_run, victim)


@pytest.mark.parametrize("name", SIGNED)
def test_any_change_of_signed_json_is_refused(faults: FaultLog, shared_run: Path, name: str) -> None:
    path = shared_run / name
    data, content = path.read_bytes(), read_json(path)
    rng = random.Random(name)
    for _ in range(2000 if is_full() else 150):
        changed = bytearray(data)
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at : at + rng.randrange(1, 20)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randrange(1, 4))
            case 3:
                del changed[at:]
        if changed == data:
            continue
        path.write_bytes(changed)
        with faults.trial(ROW, "signed JSON: changed bytes"), pytest.raises(OpdCacheError):
            raise_unless_refused(path, content)
    path.write_bytes(data)


def raise_unless_refused(path: Path, content: dict[str, Any]) -> None:
    found = read_json(path)
    raise SilentError(f"{path} was read as {'the same' if found == content else 'something else'}")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, and one item of each list."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    return found + [place for key, item in items for place in places(item, (*path, key))]


def replaced(content: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def written(name: str, content: dict[str, Any]) -> bytes:
    return signed_json(content) if name in SIGNED else json.dumps(content).encode()


@pytest.mark.parametrize("name", SIGNED + PLAIN)
def test_lies_with_a_fitting_digest_are_one_line(faults: FaultLog, shared_run: Path, victim: Path, name: str) -> None:
    """Of every file: some places, each with some of the hostile values; with FAULTS=full every place with all of them."""
    path = shared_run / name
    before = path.read_bytes()
    content = read_json(path) if name in SIGNED else json.loads(before)
    rng = random.Random(name)
    cases = [(place, value) for place in places(content) for value in HOSTILE]
    for place, value in cases if is_full() else rng.sample(cases, 12):
        try:
            path.write_bytes(written(name, replaced(content, place, value)))
            few = [0, 2, rng.randrange(3, len(COMMANDS))]
            commands = range(len(COMMANDS)) if is_full() else few
            holds(faults, f"{path.name}: {'.'.join(map(str, place))} = {value!r:.40}", shared_run, victim, commands)
        finally:
            path.write_bytes(before)


@examples(15, 1500)
@given(data=st.data())
def test_missing_and_strange_keys_are_one_line(
    faults: FaultLog, shared_run: Path, victim: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(SIGNED + PLAIN))
    path = shared_run / name
    before = path.read_bytes()
    content = read_json(path) if name in SIGNED else json.loads(before)
    place = data.draw(st.sampled_from(places(content)))
    changed = replaced(content, place, None)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner[data.draw(st.text(max_size=5).filter(lambda text: text.isascii()))] = data.draw(st.sampled_from(HOSTILE))
    try:
        path.write_bytes(written(name, changed))
        commands = [*range(3), data.draw(st.integers(3, len(COMMANDS) - 1))]
        holds(faults, f"{path.name}: without {'.'.join(map(str, place))}", shared_run, victim, commands)
    finally:
        path.write_bytes(before)


def test_a_seal_cannot_bring_a_file_from_elsewhere_into_a_view(
    faults: FaultLog, run_path: Path, shared_run: Path, victim: Path
) -> None:
    seal = run_path / "episode=0/rollouts/_SEALED.json"
    content = read_json(seal)
    shards = content["shards"]
    for file in (str(victim / "data.parquet"), "../../../victim/data.parquet", "x/../shard-00000-of-00003.parquet"):
        seal.write_bytes(signed_json({**content, "shards": [{**shards[0], "file": file}, *shards[1:]]}))
        with faults.trial(ROW, f"a seal that lists {file[-30:]}"):
            ended = answered_or_refused("query", run_path, "SELECT * FROM rollouts", "--format", "json")
            assert ended.status == 2
            assert "is not a shard's name" in ended.err


def test_a_seal_cannot_bring_sql_into_a_view(faults: FaultLog, run_path: Path, tmp_path: Path) -> None:
    seal, target = run_path / "episode=0/scores/teacher=main/_SEALED.json", tmp_path / "written.csv"
    sql = f"0::INTEGER AS top_k, rollout_id FROM (SELECT 1); COPY (SELECT 1) TO '{target}'; CREATE VIEW main.x AS SELECT 1"
    edit_json(seal, top_k=sql)
    with faults.trial(ROW, "SQL in a seal"):
        ended = answered_or_refused("query", run_path, "SELECT 1")
        assert ended.status == 2
        assert not target.exists()


@pytest.mark.parametrize("name", ["../../escaped.txt", "trainer/../../../escaped.txt", "/tmp/escaped.txt", "", "a\0b"])
def test_a_manifest_cannot_write_beside_the_policy(faults: FaultLog, run_path: Path, tmp_path: Path, name: str) -> None:
    manifest = run_path / "episode=0/policy/_COMPLETE.json"
    (run_path / "escaped.txt").write_text("from the run")
    edit_json(manifest, files={**read_json(manifest)["files"], name: "0" * 64})
    with faults.trial(ROW, f"a manifest that lists {name!r}"), touching_only(run_path, tmp_path / "replay"):
        ended = answered_or_refused("replay", run_path, "--into", tmp_path / "replay", "--episodes", "1")
        assert ended.status == 2
        assert "files = " in ended.err
        assert not (tmp_path / "escaped.txt").exists()
        assert not (tmp_path / "replay/escaped.txt").exists()


def test_a_torn_note_of_a_job_is_one_line(faults: FaultLog, run_path: Path, task: Path) -> None:
    (run_path / "slurm").mkdir()
    (run_path / "slurm/recipe.yaml").write_text(
        (task / "recipe.yaml").read_text().replace("num_episodes: 2", f"num_episodes: 3\nrun_dir: {run_path}")
    )
    good = {"job": "7", "stage": "rollout", "number": 2, "width": 2, "tasks": "0-1", "after": [], "time": 1}
    for line in (
        json.dumps(good)[:20], "", "[]", "null", json.dumps({**good, "tasks": "0-99999999999"}), json.dumps({**good, "tasks": 3}),
        json.dumps({**good, "job": "../../x"}), json.dumps({**good, "width": 0}), json.dumps({**good, "stage": "../x"}), "\xff",
    ):  # fmt: skip
        (run_path / "slurm/jobs.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
        with faults.trial(ROW, f"jobs.jsonl: {line[:30]}"):
            ended = answered_or_refused("status", run_path)
            assert ended.status == 2
            assert "jobs.jsonl:2: no note of a job" in ended.err


def test_a_folder_is_published_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "weights").write_bytes(b"x")
        (folder / "weights").chmod(0o600)

    publish_folder(tmp_path / "folder", fill)
    assert (tmp_path / "folder/weights").stat().st_mode & 0o777 == (tmp_path / "folder").stat().st_mode & 0o666
