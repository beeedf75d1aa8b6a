"""The command line: help, exit statuses, one line for every mistake, and nothing left behind by a refused command."""

import getpass
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import data_files, run_command, write_jsonl
from pyarrow import RecordBatch
from pyarrow.parquet import ParquetFile
from transformers import AutoTokenizer

from opd_cache.cli import cli, main
from opd_cache.config import Recipe
from opd_cache.errors import ConfigError
from opd_cache.logs import StageProgress
from opd_cache.recipes import packaged_recipes
from opd_cache.run import Run, open_run
from opd_cache.run_dir import RunDir
from opd_cache.stage import EVERYTHING, Figures, make_shards
from opd_cache.store.plans import load_rollout_plan, rollout_shards, stage_command

VERBS = sorted(cli.commands)


class Outcome(NamedTuple):
    """What a command left: its exit status, output and error lines."""

    status: int
    out: str
    errors: list[str]


@pytest.fixture
def opd_cache(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """Run the entry point in this process, where torch is loaded already."""
    logger = logging.getLogger("opd_cache")
    before = (list(logger.handlers), logger.level, logger.propagate)

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["opd-cache", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err.splitlines())

    yield call
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def refused(opd_cache: Callable[..., Outcome]) -> Callable[..., str]:
    """Run a command that must exit with status 2 after exactly one line on stderr; gives that line."""

    def call(*arguments: object) -> str:
        outcome = opd_cache(*arguments)
        assert (outcome.status, len(outcome.errors), outcome.out) == (2, 1, ""), outcome
        return outcome.errors[0]

    return call


@pytest.fixture
def recipe(task: Path) -> str:
    return str(task / "recipe.yaml")


@pytest.fixture
def run_copy(finished_run: Run, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run.dir.path, tmp_path / "copy"))


def files_below(folder: Path) -> dict[str, int]:
    """Every file and when it was last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# Help, and what light commands load


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example_of_that_verb(opd_cache: Callable[..., Outcome], verb: str) -> None:
    outcome = opd_cache(verb, "--help")
    assert (outcome.status, outcome.errors) == (0, [])
    assert f"Usage: opd-cache {verb} " in outcome.out
    assert f"Example: opd-cache {verb} " in " ".join(outcome.out.split())


def test_all_stages_and_tools_are_verbs() -> None:
    assert {
        "rollout",
        "score",
        "learn",
        "eval",
        "run",
        "replay",
        "status",
        "query",
        "export",
        "inspect",
        "config",
    } <= set(VERBS)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_verb_and_begins_with_examples(
    opd_cache: Callable[..., Outcome], arguments: tuple[str, ...]
) -> None:
    outcome = opd_cache(*arguments)
    assert (outcome.status, outcome.errors) == (0, [])
    assert "opd-cache run quickstart" in outcome.out
    listed = {line.split()[0] for line in outcome.out.partition("Commands:")[2].splitlines() if line.strip()}
    assert set(VERBS) <= listed


ENDING = """
import atexit, sys
from opd_cache import __main__, cli

class Whole:
    def __del__(self):
        print("taken apart")

def main():
    atexit.register(print, "put away")
    print("done")
    END

whole, cli.main = Whole(), main
__main__.command()
"""


@pytest.mark.parametrize(
    ("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit(None)", 0), ("sys.exit('why')", 1), ("1 / 0", 1)]
)
def test_a_command_puts_everything_away_and_ends_without_taking_python_apart(end: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.replace("END", end)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (status, "done\nput away\n")
    assert ("ZeroDivisionError" in done.stderr, "why" in done.stderr) == ("1 / 0" in end, "why" in end)


def test_a_closed_standard_output_is_no_fault() -> None:
    command = f"{sys.executable} -m opd_cache config --keys >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


LOADED = """
import sys
from opd_cache.cli import main
sys.argv = ["opd-cache", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "transformers", "tokenizers", "vllm", "duckdb", "pyarrow", "numpy", "datasets"}
    print("loaded:", *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["run", "--help"], set()),
        (["status", "RUN"], set()),
        (["status", "RUN", "--json"], set()),
        (["config", "quickstart"], set()),
        (["config", "--keys"], set()),
        (["query", "RUN", "select count(*) from rollouts"], {"duckdb", "pyarrow", "numpy"}),
        (["query", "--help"], set()),
        (["inspect", "RUN"], {"duckdb", "pyarrow", "numpy"}),
    ],
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value),
)
def test_light_commands_load_no_heavy_package(arguments: list[str], allowed: set[str], finished_run: Run) -> None:
    command = [str(finished_run.dir.path) if argument == "RUN" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", LOADED, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    (line,) = done.stderr.splitlines()
    assert set(line.split()[1:]) <= allowed


# One line and status 2


def test_refusals_are_one_line_and_status_two_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_command("run", "quickstart", "seed=x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ConfigError: seed = 'x' must be a whole number. (seed=x)\n"
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(opd_cache: Callable[..., Outcome]) -> None:
    with pytest.raises(ConfigError):
        opd_cache("--debug", "config", "nope")


def test_wrong_command_lines_are_refused(refused: Callable[..., str], recipe: str) -> None:
    assert refused("nope") == "UsageError: No such command 'nope'. See: opd-cache --help"
    assert refused("rollout", recipe) == "UsageError: Missing option '--episode'. See: opd-cache rollout --help"
    assert refused("run") == "UsageError: Missing argument 'RECIPE... [key=value...]'. See: opd-cache run --help"
    message = refused("rollout", recipe, "--episode", "-1")
    assert message == (
        "UsageError: Invalid value for '--episode': -1 is not in the range x>=0. See: opd-cache rollout --help"
    )


@pytest.mark.parametrize("verb", ["rollout", "score"])
@pytest.mark.parametrize(("number", "tasks"), [(1, 1), (2, 2), (7, 3)])
def test_task_number_beyond_the_tasks_is_refused(
    refused: Callable[..., str], recipe: str, verb: str, number: int, tasks: int
) -> None:
    message = refused(verb, recipe, "--episode", 0, "--task", number, "--num-tasks", tasks)
    assert message == f"UsageError: --task {number} must be below --num-tasks {tasks}. See: opd-cache {verb} --help"


@pytest.fixture
def bad_inputs(task: Path, tmp_path: Path) -> Path:
    """no-weights/, no-config/, and other/: a model whose tokenizer calls one id something else."""
    folder = tmp_path / "models"
    shutil.copytree(task / "student", folder / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "no-config").mkdir()
    path = Path(shutil.copytree(task / "teacher", folder / "other")) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["<other>"] = tokenizer["model"]["vocab"].pop("a")
    path.write_text(json.dumps(tokenizer))
    return folder


def test_bad_inputs_of_a_new_run_are_refused_and_leave_nothing(
    refused: Callable[..., str], recipe: str, task: Path, bad_inputs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "deep" / "run"
    letter = AutoTokenizer.from_pretrained(task / "student").convert_tokens_to_ids("a")
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"text": "b"}])
    before = files_below(tmp_path)
    cases = {
        "nope.key=1": "ConfigError: nope is unknown. Known: ",
        f"prompts.path={tmp_path}/nope.jsonl": f"PromptError: prompts.path = '{tmp_path}/nope.jsonl': no such file.",
        f"prompts.path={tmp_path}/bad.jsonl": (
            f"PromptError: {tmp_path}/bad.jsonl:2: no 'prompt' and no 'messages'; found: 'text'. "
            "Mend it, or set prompts.on_bad_prompt=skip."
        ),
        "student.model=./nope/folder": "ModelError: model './nope/folder' is neither a local folder nor ",
        f"student.model={bad_inputs}/no-config": (
            f"ModelError: {bad_inputs}/no-config: has no config.json; expected a model in the Hugging Face format."
        ),
        f"student.model={bad_inputs}/no-weights": (
            f"ModelError: {bad_inputs}/no-weights: has no weights (*.safetensors)."
        ),
        f"teachers.main.model={bad_inputs}/other": (
            f"ModelError: teacher 'main' has another vocabulary than the student: id {letter} is '<other>', the "
            "student's is 'a'. Log-probs of token ids would mean nothing; use a teacher with the same tokenizer."
        ),
    }
    for override, expected in cases.items():
        message = refused("rollout", recipe, f"run_dir={run_dir}", override, "--episode", 0)
        assert message.startswith(expected), override
        assert files_below(tmp_path) == before, override


def test_unknown_recipe_lists_the_packaged_ones(refused: Callable[..., str]) -> None:
    packaged = ", ".join(packaged_recipes())
    assert refused("run", "nope") == (
        f"ConfigError: recipe 'nope' is neither a file nor a packaged recipe. Packaged: {packaged}."
    )


def test_part_that_cannot_be_imported_is_refused(refused: Callable[..., str], recipe: str, tmp_path: Path) -> None:
    for part, reason in (
        ("opd_cache.nope:Sampler", "No module named 'opd_cache.nope'"),
        ("opd_cache.types:Sampler", "module 'opd_cache.types' has no attribute 'Sampler'"),
    ):
        assert refused("rollout", recipe, f"run_dir={tmp_path}/run", f"rollout.sampler={part}", "--episode", 0) == (
            f"ConfigError: rollout.sampler = {part!r} cannot be loaded: {reason}."
        )
    assert list(tmp_path.glob("run/episode=*")) == []


@pytest.mark.parametrize("verb", ["status", "query"])
def test_folder_that_is_no_run_is_refused(refused: Callable[..., str], tmp_path: Path, verb: str) -> None:
    sql = ("select 1",) if verb == "query" else ()
    for folder in (tmp_path, tmp_path / "nope"):
        message = refused(verb, folder, *sql)
        assert message.startswith(f"MissingInputError: {folder}: no run.json; this is no run directory.")
    assert list(tmp_path.iterdir()) == []


def test_run_directory_below_a_file_is_refused(refused: Callable[..., str], recipe: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused("rollout", recipe, f"run_dir={tmp_path}/file", "--episode", 0) == (
        f"FileExistsError: {tmp_path}/file: File exists."
    )
    assert refused("rollout", recipe, f"run_dir={tmp_path}/file/run", "--episode", 0) == (
        f"FileExistsError: {tmp_path}/file: File exists."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Run directories made with something else


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=4", "seed = 3, the recipe says 4"),
        ("prompts.limit=20", "prompts.limit = None, the recipe says 20"),
        ("prompts.system_prompt=hi", "prompts.system_prompt = None, the recipe says 'hi'"),
        ("student.model={task}/teacher", "student.model = '{task}/student', the recipe says '{task}/teacher'"),
    ],
)
def test_run_directory_of_another_run_is_refused(
    refused: Callable[..., str], recipe: str, task: Path, finished_run: Run, override: str, difference: str
) -> None:
    path = finished_run.dir.path
    before = files_below(path)
    override, difference = override.replace("{task}", str(task)), difference.replace("{task}", str(task))
    for command in (["run"], ["rollout", "--episode", 0], ["learn", "--episode", 0]):
        assert refused(command[0], recipe, f"run_dir={path}", override, *command[1:]) == (
            f"MismatchError: {path}/run.json: the run was made with {difference}. Set it back, or choose another run_dir."
        )
    assert files_below(path) == before


@pytest.fixture
def half_sampled(opd_cache: Callable[..., Outcome], recipe: str, tmp_path: Path) -> Path:
    """A run directory with one of the three rollout shards of episode 0."""
    path = tmp_path / "half"
    done = opd_cache("rollout", recipe, f"run_dir={path}", "--episode", 0, "--shard", 0)
    assert done.status == 0, done.errors
    assert len(list(path.glob("episode=0/rollouts/shard-*"))) == 1
    return path


def test_changing_num_shards_mid_episode_is_refused(
    refused: Callable[..., str], recipe: str, half_sampled: Path
) -> None:
    before = files_below(half_sampled)
    message = refused("rollout", recipe, f"run_dir={half_sampled}", "rollout.prompts_per_shard=6", "--episode", 0)
    assert message == (
        f"MismatchError: {half_sampled}/episode=0/plan.json: the plan of episode 0 was made with prompts_per_shard = 4, "
        f"now 6. Set it back, or move {half_sampled}/episode=0 away to sample the episode again."
    )
    assert files_below(half_sampled) == before


def test_changing_how_it_is_sampled_mid_episode_is_refused(
    refused: Callable[..., str], recipe: str, half_sampled: Path
) -> None:
    before = files_below(half_sampled)
    for override in ("rollout.temperature=0.5", "rollout.max_new_tokens=8", "rollout.n_samples_per_prompt=3"):
        message = refused("rollout", recipe, f"run_dir={half_sampled}", override, "--episode", 0)
        assert message.startswith(
            f"MismatchError: {half_sampled}/episode=0/plan.json: the plan of episode 0 was made with "
        )
    assert files_below(half_sampled) == before


def test_shard_number_beyond_the_shards_is_refused(
    refused: Callable[..., str], recipe: str, half_sampled: Path
) -> None:
    before = files_below(half_sampled)
    assert refused("rollout", recipe, f"run_dir={half_sampled}", "--episode", 0, "--shard", 3) == (
        f"ConfigError: --shard 3: {half_sampled}/episode=0/rollouts has 3 shards, numbered from 0. "
        "Run: opd-cache rollout RECIPE --episode 0 --shard 2"
    )
    assert files_below(half_sampled) == before


def test_shard_that_another_process_made_meanwhile_is_not_made_again(
    make_recipe: Callable[..., Recipe], finished_run: Run, half_sampled: Path
) -> None:
    run = open_run(make_recipe(half_sampled))
    target = run.dir.episode(0)
    plan = load_rollout_plan(target)
    shards, made = rollout_shards(target, plan), []
    whole = rollout_shards(finished_run.dir.episode(0), plan)

    def make(shard: int, progress: StageProgress, figures: Figures) -> Iterator[RecordBatch]:
        made.append(shard)
        # While this process makes shard 1, another one makes shard 2.
        shutil.copy(whole.path(2), shards.path(2))
        return iter(ParquetFile(whole.path(shard)).iter_batches())

    assert make_shards("rollout", run.dir, target, plan, shards, EVERYTHING, make, {})
    assert made == [1]


def test_remedy_for_an_evaluation_names_the_policy_version() -> None:
    found = {
        subject: stage_command("score", RunDir(Path("r")).evaluation_set(subject, "sampled"))
        for subject in ("policy=3", "teacher=main")
    }
    assert found == {
        "policy=3": "opd-cache eval RECIPE --policy-version 3",
        "teacher=main": "opd-cache eval RECIPE --policy-version 0",
    }


def test_stages_ask_for_what_must_come_first(refused: Callable[..., str], recipe: str, half_sampled: Path) -> None:
    before = files_below(half_sampled)
    episode = half_sampled / "episode=0"
    assert refused("score", recipe, f"run_dir={half_sampled}", "--episode", 0) == (
        f"MissingInputError: {episode}/rollouts: 1 of 3 shards are there and no _SEALED.json. "
        "Run: opd-cache rollout RECIPE --episode 0"
    )
    assert refused("score", recipe, f"run_dir={half_sampled}", "--episode", 1) == (
        f"MissingInputError: {half_sampled}/episode=1: no rollouts yet. Run: opd-cache rollout RECIPE --episode 1"
    )
    assert refused("learn", recipe, f"run_dir={half_sampled}", "--episode", 0) == (
        f"MissingInputError: {episode}/scores/teacher=main/plan.json: not there. Run: opd-cache score RECIPE --episode 0"
    )
    assert refused("rollout", recipe, f"run_dir={half_sampled}", "--episode", 1) == (
        f"MissingInputError: {episode}/policy: policy version 1 is not there. Run: opd-cache learn RECIPE --episode 0"
    )
    assert refused("eval", recipe, f"run_dir={half_sampled}", "eval.teacher=false", "--policy-version", 1) == (
        f"MissingInputError: {episode}/policy: policy version 1 is not there. Run: opd-cache learn RECIPE --episode 0"
    )
    assert refused("score", recipe, f"run_dir={half_sampled}", "--episode", 0, "--teacher", "nope") == (
        "ConfigError: score.teacher = 'nope' is unknown. Known: main."
    )
    after = files_below(half_sampled)
    assert {name for name in after if name not in before} <= {"eval_prompts.parquet"}


def test_loss_on_top_k_of_a_cache_without_it_is_refused(
    opd_cache: Callable[..., Outcome], refused: Callable[..., str], recipe: str, half_sampled: Path
) -> None:
    where = f"run_dir={half_sampled}"
    for verb in ("rollout", "score"):
        assert opd_cache(verb, recipe, where, "score.top_k=0", "--episode", 0).status == 0
    before = files_below(half_sampled)
    assert refused("learn", recipe, where, "score.top_k=0", "--episode", 0) == (
        f"MismatchError: learn.loss.name = 'reverse_kl_topk' needs the teacher's top k, but {half_sampled}/episode=0/scores/teacher=main "
        "was scored with score.top_k=0. Use reverse_kl_pg, or score again with score.top_k=8 in another run_dir."
    )
    assert files_below(half_sampled) == before


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root is refused nothing")
def test_folder_that_may_not_be_written_is_named(recipe: str, task: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    # As root, without the right to pass over permissions.
    plain = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if getpass.getuser() == "root" else []
    command = [*plain, sys.executable, "-m", "opd_cache", "rollout", recipe, f"run_dir={locked}/run", "--episode", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (2, f"PermissionError: {locked}/run: Permission denied.\n")
    assert list(locked.iterdir()) == []


# status and query


EVALUATION = {"greedy_accuracy", "sampled_accuracy", "reverse_kl", "pass_at_k", "response_length", "truncated_share"}


def test_status_as_json_has_what_programs_rely_on(opd_cache: Callable[..., Outcome], finished_run: Run) -> None:
    path = finished_run.dir.path
    outcome = opd_cache("status", path, "--json")
    assert (outcome.status, outcome.errors) == (0, [])
    status = json.loads(outcome.out)
    assert (status["run_dir"], status["run_id"]) == (str(path), finished_run.run_id)
    assert (status["num_episodes"], status["episodes_done"]) == (2, 2)
    assert [entry["episode"] for entry in status["episodes"]] == [0, 1]
    for entry in status["episodes"]:
        for stage in (entry["rollouts"], entry["scores"]["main"]):
            assert (stage["shards"], stage["done"], stage["sealed"], stage["rows"]) == (3, 3, True, 24)
            assert stage["bytes"] > 0
        assert entry["rollouts"]["tokens"] == entry["scores"]["main"]["tokens"] > 0
        assert entry["learn"] == {"done": True, "removed": False, "steps": 3}
        assert entry["eval"].keys() >= EVALUATION
        assert 0 <= entry["eval"]["greedy_accuracy"] <= 1
        assert 0 <= entry["eval"]["sampled_accuracy"] <= 1
        assert entry["eval"]["reverse_kl"] is not None
    assert status["baseline"].keys() >= EVALUATION
    assert status["baseline"]["subject"] == "policy=0"
    assert status["teacher"] == status["teachers"]["main"]
    assert status["teacher"]["subject"] == "teacher=main"
    assert status["teacher"]["reverse_kl"] is None
    assert status["response_tokens"] == sum(entry["rollouts"]["tokens"] for entry in status["episodes"])
    assert set(status["seconds"]) == {"rollout", "score", "learn", "eval"}
    assert all(seconds > 0 for seconds in status["seconds"].values())


def test_status_for_people_shows_every_episode(opd_cache: Callable[..., Outcome], finished_run: Run) -> None:
    outcome = opd_cache("status", finished_run.dir.path)
    assert (outcome.status, outcome.errors) == (0, [])
    assert outcome.out.count("3/3") == 4  # rollouts and scores of two episodes
    for row in ("student before", "student after episode 1", "teacher main"):
        assert row in outcome.out


def test_status_of_a_half_done_episode_counts_its_shards(opd_cache: Callable[..., Outcome], half_sampled: Path) -> None:
    status = json.loads(opd_cache("status", half_sampled, "--json").out)
    (entry,) = status["episodes"]
    assert entry["rollouts"] == {"shards": 3, "done": 1, "sealed": False, "rows": 0, "tokens": 0, "bytes": 0}
    assert (entry["scores"], entry["learn"], entry["eval"]) == (
        {},
        {"done": False, "removed": False, "steps": None},
        None,
    )
    assert (status["episodes_done"], status["baseline"], status["teacher"]) == (0, None, None)


@pytest.mark.parametrize(
    ("view", "rows"),
    [
        ("prompts", 24),
        ("rollouts", 2 * 24),
        ("scores", 2 * 24),
        ("steps", 2 * 3),
        # 6 held-out prompts, greedy once and sampled twice, by three policies and the teacher
        ("evals", 6 * 3 * 4),
        ("samples", 2 * 24),
        ("vocab", 258),
    ],
)
def test_every_view_can_be_asked(opd_cache: Callable[..., Outcome], finished_run: Run, view: str, rows: int) -> None:
    path = finished_run.dir.path
    counted = opd_cache("query", path, f"select count(*) as n from {view}", "--json")
    assert (counted.status, counted.errors, json.loads(counted.out)) == (0, [], {"n": rows})
    shown = opd_cache("query", path, f"select * from {view} limit 2", "--json")
    assert len(shown.out.splitlines()) == 2
    assert opd_cache("query", path, f"select * from {view} limit 2").status == 0


def test_rollouts_and_scores_join_row_by_row_in_sql(opd_cache: Callable[..., Outcome], finished_run: Run) -> None:
    sql = """
        select count(*) as n, bool_and(r.ids_hash = s.ids_hash) as same,
               bool_and(len(r.response_ids) = len(s.teacher_logprobs)) as aligned
        from rollouts r join scores s using (episode, rollout_id) where teacher = 'main'
    """
    outcome = opd_cache("query", finished_run.dir.path, sql, "--json")
    assert json.loads(outcome.out) == {"n": 48, "same": True, "aligned": True}


def test_fields_of_the_source_are_asked_for_as_json(opd_cache: Callable[..., Outcome], finished_run: Run) -> None:
    sql = "select bool_and(fields->>'answer' = answer and fields->>'prompt' = text) as same from prompts"
    assert json.loads(opd_cache("query", finished_run.dir.path, sql, "--json").out) == {"same": True}


def test_views_of_stages_that_are_not_there_yet_are_empty(
    opd_cache: Callable[..., Outcome], half_sampled: Path
) -> None:
    # The one rollout shard is published but not sealed: it may still be replaced by hand, so it is not shown.
    for view, rows in (("prompts", 24), ("rollouts", 0), ("scores", 0), ("steps", 0), ("evals", 0)):
        assert (
            opd_cache("query", half_sampled, f"select count(*) as n from {view}", "--json").out == f'{{"n": {rows}}}\n'
        )


def test_folders_moved_aside_are_neither_counted_nor_queried(opd_cache: Callable[..., Outcome], run_copy: Path) -> None:
    before = opd_cache("status", run_copy, "--json").out
    for name in ("evals/policy=1", "evals/teacher=main", "episode=0/scores/teacher=main"):
        shutil.copytree(run_copy / name, run_copy / f"{name}.old")
    assert opd_cache("status", run_copy, "--json").out == before
    for view, rows in (("scores", 48), ("evals", 72)):
        assert opd_cache("query", run_copy, f"select count(*) as n from {view}", "--json").out == f'{{"n": {rows}}}\n'


@pytest.mark.parametrize("text", ["[red]a[/red]", "[/b]", "[1, 2]", ":smile:"])
def test_texts_are_shown_as_they_are(opd_cache: Callable[..., Outcome], finished_run: Run, text: str) -> None:
    outcome = opd_cache("query", finished_run.dir.path, f"select '{text}' as x, '{text}' as x")
    assert outcome.status == 0
    assert outcome.out.count(text) == 2


def test_columns_of_one_name_would_be_lost_in_json_and_are_refused(
    refused: Callable[..., str], finished_run: Run
) -> None:
    assert refused("query", finished_run.dir.path, "select 1 as a, 2 as a", "--json") == (
        "ConfigError: the query gives two columns named 'a'; rename one with AS."
    )


FAILED = "ConfigError: the query failed: "
# (statement, how the line begins); {run} and {outside} are folders
REFUSED_QUERIES = [
    ("selec 1", f'{FAILED}Parser Error: syntax error at or near "selec"'),
    ("select nope from steps", f'{FAILED}Binder Error: Referenced column "nope" not found in FROM clause!'),
    ("select * from nope", f"{FAILED}Catalog Error: Table with name nope does not exist!"),
    ("", "ConfigError: the query holds 0 statements; expected one SELECT."),
    ("select 1; select 2", "ConfigError: the query holds 2 statements; expected one SELECT."),
    ("copy (select 1) to '{run}/run.json'", "ConfigError: the query is COPY; expected SELECT, since a query only reads."),
    ("copy (select 1) to '{run}/new.csv'", "ConfigError: the query is COPY; expected SELECT, since a query only reads."),
    ("copy (select 1) to '{outside}/new.csv'", "ConfigError: the query is COPY; expected SELECT, since a query only reads."),
    ("explain analyze copy (select 1) to '{run}/new.csv'", "ConfigError: the query is EXPLAIN; expected SELECT, since a query only reads."),
    ("export database '{run}/new'", "ConfigError: the query is EXPORT; expected SELECT, since a query only reads."),
    ("attach '{run}/new.db'", "ConfigError: the query is ATTACH; expected SELECT, since a query only reads."),
    ("create table t (a int)", "ConfigError: the query is CREATE; expected SELECT, since a query only reads."),
    ("drop view rollouts", "ConfigError: the query is DROP; expected SELECT, since a query only reads."),
    ("install httpfs", "ConfigError: the query is LOAD; expected SELECT, since a query only reads."),
    ("load httpfs", "ConfigError: the query is LOAD; expected SELECT, since a query only reads."),
    ("set enable_external_access = true", "ConfigError: the query is SET; expected SELECT, since a query only reads."),
    ("select * from read_csv('/etc/passwd')", f'{FAILED}Permission Error: Cannot access file "/etc/passwd"'),
    ("select * from read_text('{outside}/secret.csv')", f'{FAILED}Permission Error: Cannot access file "{{outside}}/secret.csv"'),
    ("select * from read_text('{run}/../secret.csv')", f'{FAILED}Permission Error: Cannot access file "{{run}}/../secret.csv"'),
    ("select * from glob('{outside}/*')", f'{FAILED}Permission Error: Cannot access file "{{outside}}/*"'),
    ("select * from read_text('{run}/run.json')", f'{FAILED}Permission Error: Cannot access file "{{run}}/run.json"'),
    ("select * from '{run}/episode=0/rollouts/*.parquet'", f'{FAILED}Permission Error: Cannot access file'),
    ("with x as (copy (select 1) to '{run}/prompts.parquet' (use_tmp_file false)) select 1", "ConfigError: the query holds COPY; expected SELECT alone"),
    ("select * from (with x as (insert into shards (shard) values (1)) select 1)", "ConfigError: the query holds INSERT; expected SELECT alone"),
    ("with x as (delete from shards) select 1", "ConfigError: the query holds DELETE; expected SELECT alone"),
    ("select * from json_execute_serialized_sql('{{}}')", "ConfigError: the query calls json_execute_serialized_sql(); known table functions: "),
    ("select * from query('select 1')", "ConfigError: the query calls query(); known table functions: "),
    ("select getenv('HOME')", f"{FAILED}Catalog Error: Scalar Function with name getenv does not exist!"),
    ("pragma threads=1", "ConfigError: the query is "),
    ("reset threads", "ConfigError: the query is "),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "expected"), REFUSED_QUERIES, ids=[sql for sql, _ in REFUSED_QUERIES])
def test_query_that_fails_writes_or_reads_outside_is_refused(
    refused: Callable[..., str], run_copy: Path, sql: str, expected: str
) -> None:
    outside = run_copy.parent
    (outside / "secret.csv").write_text("a,b\n1,2\n")
    before = files_below(outside)
    places = {"{run}": str(run_copy), "{outside}": str(outside)}
    for name, path in places.items():
        sql, expected = sql.replace(name, path), expected.replace(name, path)
    message = refused("query", run_copy, sql)
    assert message.startswith(expected)
    assert "LINE 1" not in message
    assert files_below(outside) == before


def test_query_over_a_damaged_shard_is_refused(refused: Callable[..., str], run_copy: Path) -> None:
    shard = next(run_copy.glob("episode=0/rollouts/shard-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    message = refused("query", run_copy, "select count(*) from rollouts")
    assert message.startswith(FAILED)
    assert shard.name in message


# Whole runs


def test_finished_run_is_not_touched_by_running_it_again(
    opd_cache: Callable[..., Outcome], recipe: str, run_copy: Path
) -> None:
    before = files_below(run_copy)
    outcome = opd_cache("run", recipe, f"run_dir={run_copy}")
    assert (outcome.status, outcome.errors) == (0, [])
    assert f"opd-cache status {run_copy}" in outcome.out
    assert files_below(run_copy) == before


@pytest.mark.slow
def test_stages_in_processes_of_their_own_give_the_same_bytes(recipe: str, finished_run: Run, tmp_path: Path) -> None:
    options = ("launcher=subprocess", "num_workers=2", "num_episodes=1", "eval.path=null")
    done = run_command("run", recipe, f"run_dir={tmp_path}/run", *options)
    assert done.returncode == 0, done.stderr
    found = data_files(tmp_path / "run")
    expected = {
        name: data for name, data in data_files(finished_run.dir.path).items() if not name.startswith("episode=1")
    }
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
