"""Training again from a run's cache: the same bits with the same settings, honest metrics with others, no teacher."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import assert_verified, complete, data_files, edit_json, run_command, save_model, tiny_qwen2

from opd_cache.compare import comparison_table
from opd_cache.config import Recipe
from opd_cache.errors import ConfigError, MismatchError, MissingInputError, OpdCacheError
from opd_cache.pipeline import InlineStages
from opd_cache.replay import replay_run
from opd_cache.run import Run, open_run
from opd_cache.schema import STEPS
from opd_cache.status import run_status
from opd_cache.store.publish import read_json
from opd_cache.store.query import query_rows

TIMINGS = {"read_s", "compute_s", "tokens_per_s"}
CHANGED = ("learn.loss.name=forward_kl_topk", "learn.learning_rate=0.01")


def steps_of(run: Path, episode: int) -> list[dict]:
    """The metrics of an episode without its timings."""
    columns = [column.name for column in STEPS if column.name not in TIMINGS]
    return pq.read_table(run / f"episode={episode}/learn/steps.parquet", columns=columns).to_pylist()


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file: when it was last written, and what it holds."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_learning(found: Path, expected: Path, episodes: tuple[int, ...] = (0, 1)) -> None:
    """Plans, shards, weights and optimizer states byte for byte, and the metrics."""
    wanted = tuple(f"episode={episode}/" for episode in episodes)
    ours, theirs = (
        {name: data for name, data in data_files(path).items() if name.startswith(wanted) or "/" not in name}
        for path in (found, expected)
    )
    assert len(theirs) > 10 * len(episodes)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    for episode in episodes:
        assert steps_of(found, episode) == steps_of(expected, episode)


@pytest.fixture
def run_copy(finished_run: Run, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run.dir.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def unchanged(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole finished run, replayed with its own settings. Shared: copy it before changing anything in it."""
    path = tmp_path_factory.mktemp("replays") / "unchanged"
    replay_run(finished_run.dir.path, path, None, [])
    return path


def refused(kind: type[OpdCacheError], source: Path, into: Path, episodes: str | None = None, *overrides: str) -> str:
    """The one line that refuses a replay which must leave everything as it is."""
    before = contents(into.parent)
    with pytest.raises(kind) as caught:
        replay_run(source, into, episodes, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert contents(into.parent) == before
    return message


# What comes of it


def test_with_unchanged_settings_the_weights_and_metrics_are_the_same_bits(unchanged: Path, finished_run: Run) -> None:
    assert_same_learning(unchanged, finished_run.dir.path)


def test_rollouts_and_scores_are_not_stored_twice(unchanged: Path, finished_run: Run) -> None:
    original = finished_run.dir.path
    linked = [
        path.relative_to(unchanged)
        for path in unchanged.rglob("*")
        if path.is_file() and (original / path.relative_to(unchanged)).exists() and "/" in str(path)
    ]
    shared = [name for name in linked if (unchanged / name).samefile(original / name)]
    assert {name.parts[1] for name in shared if len(name.parts) > 1} == {"plan.json", "rollouts", "scores"}
    assert sum(name.suffix == ".parquet" for name in shared) == 2 + 2 * (3 + 3)
    assert not list(unchanged.rglob("*.tmp"))


def test_the_comparison_says_what_each_run_made_of_each_episode(unchanged: Path, finished_run: Run) -> None:
    comparison = replay_run(finished_run.dir.path, unchanged, None, [])
    assert (comparison["run"], comparison["run_id"]) == (str(finished_run.dir.path), finished_run.run_id)
    assert (comparison["into"], comparison["overrides"]) == (str(unchanged), {})
    assert [entry["episode"] for entry in comparison["episodes"]] == [0, 1]
    for entry in comparison["episodes"]:
        assert entry["same_weights"] is True
        assert entry["original"] == entry["replay"]
        rows = steps_of(unchanged, entry["episode"])
        tokens = sum(row["tokens"] for row in rows)
        assert entry["replay"] == pytest.approx(
            {
                "steps": 3,
                "tokens": tokens,
                "loss": sum(row["loss"] * row["tokens"] for row in rows) / tokens,
                "reverse_kl_first": rows[0]["reverse_kl"],
                "reverse_kl_last": rows[2]["reverse_kl"],
                "ess": sum(row["ess"] for row in rows) / 3,
                "grad_norm": sum(row["grad_norm"] for row in rows) / 3,
            }
        )


def test_with_other_settings_it_learns_off_policy_and_the_ratios_say_so(finished_run: Run, tmp_path: Path) -> None:
    original, path = finished_run.dir.path, tmp_path / "replay"
    comparison = replay_run(original, path, "0-1", CHANGED)
    assert comparison["overrides"] == {"learn.loss.name": "forward_kl_topk", "learn.learning_rate": 0.01}
    assert [entry["same_weights"] for entry in comparison["episodes"]] == [False, False]
    # Both runs start from the same student, which sampled the first episode.
    assert steps_of(path, 0)[0]["ratio_mean"] == pytest.approx(1, abs=1e-4)
    # From the second episode on the replay learns from what another policy sampled.
    ours, theirs = steps_of(path, 1)[0], steps_of(original, 1)[0]
    assert theirs["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert theirs["ess"] > 0.9999
    assert abs(ours["ratio_mean"] - 1) > 0.01
    assert ours["ess"] < 0.99
    replayed, sampled = (json.loads((run / "episode=1/learn/plan.json").read_text()) for run in (path, original))
    assert replayed["sources"] == sampled["sources"]
    assert replayed["policy"] != sampled["policy"] == sampled["sources"][0]["policy"]


def test_it_needs_neither_sampler_nor_teacher_nor_prompts(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("teacher", "train.jsonl"):
        (shutil.copytree if (task / name).is_dir() else shutil.copy)(task / name, tmp_path / name)
    (tmp_path / "vanishing.py").write_text("from random_sampler import RandomSampler")
    monkeypatch.syspath_prepend(tmp_path)
    run = complete(
        make_recipe(
            tmp_path / "run",
            f"teachers.main.model={tmp_path}/teacher",
            f"prompts.path={tmp_path}/train.jsonl",
            "rollout.sampler=vanishing:RandomSampler",
            "eval.path=null",
        )
    )
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "vanishing.py").unlink()
    del sys.modules["vanishing"]
    replay_run(run.dir.path, tmp_path / "replay", None, [])
    assert_same_learning(tmp_path / "replay", run.dir.path)


def test_an_episode_in_the_middle_starts_from_the_runs_policy_and_optimizer(finished_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "replay"
    (entry,) = replay_run(finished_run.dir.path, path, "1", [])["episodes"]
    assert (entry["episode"], entry["same_weights"]) == (1, True)
    assert_same_learning(path, finished_run.dir.path, (1,))
    assert [row["step"] for row in steps_of(path, 1)] == [4, 5, 6]
    assert not (path / "episode=0/rollouts").exists()
    status = run_status(path)
    assert [(entry["episode"], entry["learn"]["done"]) for entry in status["episodes"]] == [(0, True), (1, True)]
    assert query_rows(path, "select count(*) from rollouts")[1] == [(24,)]


def test_older_episodes_that_the_learner_looks_back_on_are_linked_too(finished_run: Run, tmp_path: Path) -> None:
    (entry,) = replay_run(finished_run.dir.path, tmp_path / "replay", "1", ["learn.replay_episodes=1"])["episodes"]
    assert entry["replay"]["tokens"] > entry["original"]["tokens"]
    assert {row["staleness"] for row in steps_of(tmp_path / "replay", 1)} != {0.0}


def test_a_replay_can_be_replayed(unchanged: Path, finished_run: Run, tmp_path: Path) -> None:
    replay_run(unchanged, tmp_path / "second", None, [])
    assert_same_learning(tmp_path / "second", finished_run.dir.path)
    assert_verified(tmp_path / "second")


def test_an_episode_that_the_run_has_scored_but_not_learned_is_replayed(run_copy: Path, tmp_path: Path) -> None:
    for name in ("policy", "learn"):
        shutil.rmtree(run_copy / "episode=1" / name)
    comparison = replay_run(run_copy, tmp_path / "replay", None, [])
    first, second = comparison["episodes"]
    assert (first["same_weights"], second["same_weights"], second["original"]) == (True, None, None)
    assert second["replay"]["steps"] == 3
    assert comparison_table(comparison).row_count == 4


def test_it_learns_with_several_ranks(finished_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "replay"
    done = run_command("replay", finished_run.dir.path, "--into", path, "learn.num_ranks=2", "--json")
    assert done.returncode == 0, done.stderr
    for entry in json.loads(done.stdout)["episodes"]:
        for name, value in entry["original"].items():
            assert entry["replay"][name] == pytest.approx(value, rel=2e-2), name


# Going on, and what it refuses


def test_a_second_time_it_changes_nothing(unchanged: Path, finished_run: Run) -> None:
    before = contents(unchanged)
    replay_run(finished_run.dir.path, unchanged, None, [])
    replay_run(finished_run.dir.path, unchanged, "0-1", [])
    assert contents(unchanged) == before


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_file_operation_it_ends_with_the_same_bytes(finished_run: Run, tmp_path: Path, seed: int) -> None:
    path, script = tmp_path / "replay", str(Path(__file__).parent / "kill_chain.py")
    source = ["--replay", str(finished_run.dir.path), "learn.checkpoint_every_steps=1"]
    chain = subprocess.run(
        [sys.executable, script, str(seed), str(path), *source], capture_output=True, text=True, timeout=120
    )
    assert chain.returncode == 0, chain.stderr
    assert json.loads(chain.stdout)["kills"] >= 2
    assert_same_learning(path, finished_run.dir.path)


def test_on_another_file_system_it_copies(finished_run: Run, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    path = memory / f"opd-cache-{tmp_path.name}-{tmp_path.stat().st_ino}"
    try:
        replay_run(finished_run.dir.path, path, "1", [])
        assert_same_learning(path, finished_run.dir.path, (1,))
        assert not list(path.rglob("*.tmp"))
        before = contents(path)
        replay_run(finished_run.dir.path, path, "1", [])
        assert contents(path) == before
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize(
    ("episodes", "overrides", "difference"),
    [
        (None, ["learn.learning_rate=0.02"], "learn.learning_rate = as in the run, now 0.02"),
        (None, ["learn.loss.name=jsd_topk"], "learn.loss.name = as in the run, now 'jsd_topk'"),
        ("0", [], "episodes = [0, 1], now [0]"),
    ],
)
def test_another_replay_into_the_same_folder_is_refused(
    unchanged: Path, finished_run: Run, episodes: str | None, overrides: list[str], difference: str
) -> None:
    assert refused(MismatchError, finished_run.dir.path, unchanged, episodes, *overrides) == (
        f"{unchanged}/replay.json: the replay was made with {difference}. Set it back, or choose another folder with --into."
    )


def test_settings_that_change_no_number_may_change_on_the_way(
    unchanged: Path, finished_run: Run, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(unchanged, tmp_path / "replay"))
    for name in ("policy", "learn"):
        shutil.rmtree(path / "episode=1" / name)
    overrides = ["learn.max_tokens_per_micro_batch=96", "learn.checkpoint_every_steps=2", "torch_threads=1"]
    replay_run(finished_run.dir.path, path, None, overrides)
    assert_same_learning(path, finished_run.dir.path)


def test_another_run_of_the_same_identity_is_not_mixed_in(
    unchanged: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Two runs of one seed and one student have one run_id, but sampled with other settings they differ."""
    other = open_run(make_recipe(tmp_path / "other", "rollout.temperature=0.8", "num_episodes=1"))
    stages = InlineStages(other)
    stages.rollout(0)
    stages.score(0)
    path = Path(shutil.copytree(unchanged, tmp_path / "replay"))
    edit_json(path / "replay.json", episodes=[0])
    assert refused(MismatchError, tmp_path / "other", path, "0").startswith(
        f"{path}/episode=0/plan.json: another file than {tmp_path}/other/episode=0/plan.json."
    )


def test_it_refuses_a_place_that_is_not_its_own(finished_run: Run, run_copy: Path, tmp_path: Path) -> None:
    source = run_copy
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    suggestion = f"such as {source}-replay."
    for into, fault in (
        (source, "is the run itself. Choose another folder"),
        (source / "episode=0" / ".." / ".." / "copy", "is the run itself. Choose another folder"),
        (source / "replays" / "a", "lies inside the run. Choose another folder"),
        (tmp_path, "lies around the run. Choose another folder"),
        (tmp_path / "other", "holds other files. Choose a new or an empty folder"),
        (finished_run.dir.path, "is a run of its own, and no replay. Choose another folder"),
    ):
        assert refused(ConfigError, source, into) == f"--into {into}: {fault}, {suggestion}"


def test_it_refuses_what_is_no_run_and_episodes_that_are_not_there(run_copy: Path, tmp_path: Path) -> None:
    into, cases = tmp_path / "replay", tmp_path / "cases"
    message = refused(MissingInputError, tmp_path / "nope", into)
    assert message.startswith(f"{tmp_path}/nope: no run.json; this is no run directory.")
    assert refused(MissingInputError, run_copy, into, "0-2") == (
        f"{run_copy}/episode=2/plan.json: not there. Run: opd-cache rollout RECIPE --episode 2"
    )
    for text in ("0,1", "1-0", "-1", "a", "", "0-", "0-1-2", "1e3", "0-99999999999"):
        assert refused(ConfigError, run_copy, into, text) == (
            f"--episodes {text!r}: expected one number, or an unbroken range such as 0-4."
        )
    shutil.copytree(run_copy, cases / "unsealed")
    (cases / "unsealed/episode=1/rollouts/_SEALED.json").unlink()
    assert refused(MissingInputError, cases / "unsealed", into) == (
        f"{cases}/unsealed/episode=1/rollouts: 3 of 3 shards are there and no _SEALED.json. "
        "Run: opd-cache rollout RECIPE --episode 1"
    )
    shutil.copytree(run_copy, cases / "unscored")
    for episode in range(2):
        (cases / f"unscored/episode={episode}/scores/teacher=main/_SEALED.json").unlink()
    assert refused(MissingInputError, cases / "unscored", into) == (
        f"{cases}/unscored: no episode has sealed scores of the teacher 'main'. Run: opd-cache score RECIPE --episode 0"
    )
    shutil.copytree(run_copy, cases / "gap")
    (cases / "gap/episode=1").rename(cases / "gap/episode=3")
    assert refused(ConfigError, cases / "gap", into) == (
        f"{cases}/gap: of the episodes 0, 3 with scores, some between are missing. Choose a range: --episodes 0-0"
    )
    shutil.copytree(run_copy, cases / "unlearned")
    shutil.rmtree(cases / "unlearned/episode=0/policy")
    assert refused(MissingInputError, cases / "unlearned", into, "1") == (
        f"{cases}/unlearned/episode=0/policy: not there, and episode 1 starts from it. Replay from episode 0 on, or run: "
        "opd-cache learn RECIPE --episode 0"
    )


@pytest.mark.parametrize("override", ["seed=4", "rollout.temperature=0.5", "num_episodes=3", "run_dir=x", "learn={}"])
def test_it_refuses_to_change_what_the_cache_was_made_with(finished_run: Run, tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    assert refused(ConfigError, finished_run.dir.path, tmp_path / "replay", None, override) == (
        f"{key}: a replay changes only learn.*, health.* and torch_threads; all else is as in {finished_run.dir.path}. ({override})"
    )


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("learn.nope=1", "learn.nope is unknown. Known: adam_beta1, "),
        ("learn.learning_rate=fast", "learn.learning_rate = 'fast' must be a number. (learn.learning_rate=fast)"),
        ("learn.learning_rate=-1", "learn.learning_rate = -1.0 is too small; it must be at least 0."),
        ("learn.loss.name=nope", "learn.loss.name = 'nope' is unknown. Known: entropy_aware, "),
        ("learn.loss.name=own_rewards:NOPE", "learn.loss.name = 'own_rewards:NOPE' cannot be loaded: "),
        ("nope", "'nope' is not key=value."),
        ("learn.teacher=nope", "learn.teacher = 'nope' is unknown. Known: main."),
    ],
)
def test_overrides_are_checked_like_those_of_a_recipe(
    finished_run: Run, tmp_path: Path, override: str, fault: str
) -> None:
    message = refused(ConfigError, finished_run.dir.path, tmp_path / "replay", None, override)
    assert message.startswith(fault)


@pytest.mark.parametrize(
    ("overrides", "kind", "fault"),
    [
        (["learn.loss.name=reward_pg"], MismatchError, "learn.loss.name = 'reward_pg' needs task rewards, "),
        (["learn.loss.name=jsd_topk"], MismatchError, "learn.loss.name = 'jsd_topk' needs the teacher's top k, "),
    ],
)
def test_a_loss_that_needs_what_the_cache_lacks_is_refused_before_anything_is_written(
    make_recipe: Callable[..., Recipe], tmp_path: Path, overrides: list[str], kind: type[OpdCacheError], fault: str
) -> None:
    settings = ("score.top_k=0", "learn.loss.name=reverse_kl_pg", "rollout.sampler=random_sampler:RandomSampler")
    stages = InlineStages(open_run(make_recipe(tmp_path / "run", *settings)))
    stages.rollout(0)
    stages.score(0)
    assert refused(kind, tmp_path / "run", tmp_path / "replay", None, *overrides).startswith(fault)


def test_another_student_under_the_same_name_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    student = save_model(tiny_qwen2(seed=1), tmp_path / "student")
    settings = (f"student.model={student}", "rollout.sampler=random_sampler:RandomSampler")
    stages = InlineStages(open_run(make_recipe(tmp_path / "run", *settings)))
    stages.rollout(0)
    stages.score(0)
    shutil.rmtree(student)
    save_model(tiny_qwen2(seed=5), student)
    message = refused(MismatchError, tmp_path / "run", tmp_path / "replay")
    assert message.startswith(f"{tmp_path}/run/run.json: the run was made with student.weights = ")


# As a command


def test_the_command_prints_a_table_and_leaves_a_run_like_any_other(finished_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "replay"
    done = run_command("replay", finished_run.dir.path, "--episodes", "0", "--into", path, *CHANGED)
    assert done.returncode == 0, done.stderr
    for text in ("original", "replay", "differ", "ESS", "learn.loss.name=forward_kl_topk, learn.learning_rate=0.01"):
        assert text in " ".join(done.stdout.split())
    replay = read_json(path / "replay.json")
    assert replay == {
        "run": str(finished_run.dir.path),
        "run_id": finished_run.run_id,
        "episodes": [0],
        "overrides": {"learn.loss.name": "forward_kl_topk", "learn.learning_rate": 0.01},
    }
    recipe = json.loads((path / "run.json").read_text())["recipe"]
    assert (recipe["run_dir"], recipe["learn"]["loss"]["name"]) == (str(path), "forward_kl_topk")
    before = data_files(path)
    shutil.rmtree(path / "episode=0/policy")
    done = run_command("learn", path / "recipe.yaml", "--episode", "0")
    assert done.returncode == 0, done.stderr
    assert data_files(path) == before


def test_the_command_refuses_with_one_line_and_status_two(finished_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "replay"
    done = run_command("replay", finished_run.dir.path, "--into", path, "seed=4")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("ConfigError: seed: a replay changes only learn.*, health.* and torch_threads; ")
    assert list(tmp_path.iterdir()) == []
