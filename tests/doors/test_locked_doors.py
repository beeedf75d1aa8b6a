"""Doors that stay locked: code in data, code of models, secrets in files, files of others. Each test fails when one opens."""

import ast
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from doors import Ended, answered_or_refused, contents, ran
from fault_log import FaultLog, SilentError
from helpers import save_model, tiny_qwen2
from served_teacher import LogprobsOf, ServedTeacher, always
from transformers import AutoModelForCausalLM

import opd_cache
from opd_cache.config import ModelConfig, Recipe
from opd_cache.errors import ModelError
from opd_cache.launch.clusters import load_cluster
from opd_cache.launch.scripts import render_scripts, write_scripts
from opd_cache.models import load_model
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, load_tokenizer, open_run
from opd_cache.run_dir import RunDir

ROW = "locked doors"
PACKAGE = Path(opd_cache.__file__).parent
KEY = "sk-Marker.7_of/the+doors"
MODULES = {"pickle", "cPickle", "shelve", "marshal", "joblib", "dill", "cloudpickle", "telnetlib", "xmlrpc"}
CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "pickle.load", "pickle.loads", "torch.jit.load", "torch.hub.load", "subprocess.getoutput",
}  # fmt: skip
# call: (keyword, the value that it must be given)
NEEDS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
# keyword: the value that no call may give it
NEVER = {"shell": True, "trust_remote_code": True, "verify": False, "allow_pickle": True, "weights_only": False}


def open_doors(source: str) -> list[str]:
    """What a module does that none of ours may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            needed = NEEDS.get(name)
            if name in CALLS or (needed and given.get(needed[0]) is not needed[1]):
                found.append(name)
            found += [f"{key}={value}" for key, value in NEVER.items() if given.get(key) is value]
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib as j", "eval('1')", "exec('1')", "os.system('x')",
        "yaml.load(x, Loader=yaml.SafeLoader)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)",
        "np.load(p, allow_pickle=True)", "subprocess.run('x', shell=True)", "tempfile.mktemp()", "httpx.get(u, verify=False)",
        "AutoModel.from_pretrained(m, trust_remote_code=True)", "import marshal", "import shelve",
    ],
)  # fmt: skip
def test_an_open_door_is_seen(code: str) -> None:
    assert open_doors(code) != []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert open_doors(path.read_text()) == []


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch opened",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_pickle_among_outside_rollouts_is_not_run(
    faults: FaultLog, task: Path, run_path: Path, here: Path, tmp_path: Path
) -> None:
    torch.save({"samples": [Attack()]}, tmp_path / "rollouts.pt")
    with faults.trial(ROW, "a pickle that runs a program, in a .pt file"):
        ended = answered_or_refused(
            "import", task / "recipe.yaml", f"run_dir={run_path}", "--episode", "2", tmp_path / "rollouts.pt"
        )
        assert ended.status == 2
        assert contents(here) == {}


def with_code(folder: Path) -> Path:
    """A model whose configuration names Python code beside it."""
    save_model(tiny_qwen2(seed=1), folder)
    config = (folder / "config.json").read_text()
    auto_map = '"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, "model_type": "own",'
    (folder / "config.json").write_text(config.replace("{", "{" + auto_map, 1).replace('"model_type": "qwen2",', ""))
    (folder / "own.py").write_text("from pathlib import Path\nPath('opened').touch()\n")
    return folder


def test_a_models_own_code_is_not_run(faults: FaultLog, here: Path, tmp_path: Path) -> None:
    model = ModelConfig(model=str(with_code(tmp_path / "own")))
    assert not model.trust_remote_code
    with faults.trial(ROW, "a model that brings code"):
        with pytest.raises(ModelError, match="Set trust_remote_code=true for this model if you know it"):
            load_model(model, "student")
        load_tokenizer(model)
        assert contents(here) == {}


def test_a_program_in_weights_is_not_run(faults: FaultLog, here: Path, tmp_path: Path) -> None:
    folder = save_model(tiny_qwen2(seed=1), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Attack()}, folder / "pytorch_model.bin")
    with faults.trial(ROW, "weights in a pickle"):
        with pytest.raises(ModelError, match="Weights only load failed"):
            load_model(ModelConfig(model=str(folder)), "student")
        assert contents(here) == {}


# Secrets


@pytest.fixture
def logprobs_of(task: Path) -> LogprobsOf:
    teacher = AutoModelForCausalLM.from_pretrained(task / "teacher", dtype=torch.float32).eval()

    @torch.no_grad()
    def compute(ids: list[int]) -> np.ndarray:
        return teacher(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    return compute


@pytest.fixture
def private_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def said(ended: Ended) -> str:
    return ended.out + ended.err


def test_the_key_is_in_no_file_and_in_no_output_and_files_are_as_private_as_the_umask(
    faults: FaultLog, task: Path, make_recipe: Callable[..., Recipe], logprobs_of: LogprobsOf, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, private_umask: None,
) -> None:  # fmt: skip
    """A whole episode with a key, then every command that shows it; then a server that repeats the key in its refusal."""
    caplog.set_level("DEBUG", "opd_cache")
    monkeypatch.setenv("DOORS_KEY", KEY)
    path, outputs = tmp_path / "run", []
    with ServedTeacher(logprobs_of, "vllm_generate", key=KEY) as served, faults.trial(ROW, "an API key"):
        settings = (
            "num_episodes=1", "eval.path=null", "score.scorer=http", "score.http.api_key_env=DOORS_KEY",
            f"score.http.urls=['{served.url}']", "score.http.max_retries=1", "score.http.retry_base_delay_s=0.01",
        )  # fmt: skip
        stages = InlineStages(open_run(make_recipe(path, *settings)))
        for stage in ("rollout", "score", "learn"):
            stages(stage, 0)
        commands = [
            ("status", path), ("status", path, "--json"), ("verify", path), ("inspect", path),
            ("query", path, "SELECT * FROM shards", "--format", "json"),
            ("report", path, "--output", tmp_path / "report.html"),
            ("config", task / "recipe.yaml", f"run_dir={path}", *settings),
            ("submit", task / "recipe.yaml", "single_node", f"run_dir={path}", *settings, "num_episodes=2", "--dry-run"),
            ("export", "jsonl", path, tmp_path / "rows.jsonl"),
        ]  # fmt: skip
        outputs += [said(ran(*command)) for command in commands]
        served.fault = always("400")
        other = tmp_path / "refused"
        stages = InlineStages(open_run(make_recipe(other, *settings)))
        stages.rollout(0)
        for fault in ("400", "page with key"):
            served.fault = always(fault)
            outputs.append(
                said(
                    answered_or_refused("score", task / "recipe.yaml", f"run_dir={other}", *settings, "--episode", "0")
                )
            )
        everything = "".join([*outputs, caplog.text]).encode() + b"".join(
            file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()
        )
        if KEY.encode() in everything or KEY[3:].encode() in everything:
            raise SilentError("the key was written somewhere")
        assert "***" in "".join(outputs)
    shared = [str(file) for file in tmp_path.rglob("*") if file.stat().st_mode & 0o077 and file != tmp_path]
    assert shared == []
    assert (tmp_path / "report.html").exists()


def test_a_recipe_cannot_hold_the_key(faults: FaultLog, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOORS_KEY", KEY)
    for place in ("prompts.system_prompt", "score.http.model", "run_dir", "prompts.chat_template_kwargs.a"):
        with faults.trial(ROW, f"the key in {place}, from the environment"):
            ended = answered_or_refused(
                "config",
                task / "recipe.yaml",
                "run_dir=r",
                "score.http.api_key_env=DOORS_KEY",
                f"{place}=${{oc.env:DOORS_KEY}}",
            )
            assert ended.status == 2
            assert "holds the key" in ended.err
            assert KEY not in said(ended)


# Files


def test_files_are_as_readable_as_the_umask_says(finished_run: Run, faults: FaultLog) -> None:
    """So that a project's group can go on with a run; nothing in it is secret."""
    umask = os.umask(0)
    os.umask(umask)
    with faults.trial(ROW, "modes of files"):
        for path in finished_run.dir.path.rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(mode))


def test_a_batch_script_is_run_by_no_more_than_may_read_it(tmp_path: Path, private_umask: None) -> None:
    run = RunDir(tmp_path / "run")
    write_scripts(render_scripts(run, tmp_path, "python3", load_cluster("single_node")))
    assert {stat.S_IMODE(path.stat().st_mode) for path in (run.path / "slurm").iterdir()} == {0o700}
