"""Who may import whom, read from the source: the stages stay apart, and light commands stay light."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "opd_cache"
MODULES = sorted(PACKAGE.rglob("*.py"))
STAGES = ("rollout", "score", "learn")

# Where these may be imported when a module is loaded. Everywhere else only inside the function that needs them.
HOMES = {
    "torch": (
        "inference.py",
        "models.py",
        "sequences.py",
        "shared_attention.py",
        "shared_prompts.py",
        "tensor_files.py",
        "vllm_worker.py",
        "learn/",
        "rollout/samplers/",
        "score/scorers/",
        "evals/",
        "quickstart/",
    ),
    "transformers": (
        "inference.py",
        "models.py",
        "shared_attention.py",
        "learn/engines/",
        "rollout/samplers/",
        "score/scorers/",
        "quickstart/",
    ),
    "tokenizers": ("quickstart/",),
    "duckdb": ("store/query.py",),
    "deepspeed": ("learn/engines/",),
    "vllm": ("vllm_engine.py",),
    "httpx": ("score/scorers/",),
    "datasets": (),
    "matplotlib": ("plots/draw.py",),
}
# These serve --help, config, status, query and every other module: nothing heavy, not even by way of another module.
LIGHT = (
    "__init__.py",
    "__main__.py",
    "capacity.py",
    "cli.py",
    "compare.py",
    "commands/",
    "config/",
    "errors.py",
    "estimate.py",
    "exports/",
    "fingerprint.py",
    "grade.py",
    "health/",
    "imports/",
    "inspection/",
    "limits.py",
    "logs.py",
    "notes.py",
    "pipeline.py",
    "plots/__init__.py",
    "plots/data.py",
    "registry.py",
    "replay.py",
    "retention.py",
    "run.py",
    "run_dir.py",
    "schema.py",
    "shortage.py",
    "stage.py",
    "stall.py",
    "status.py",
    "stop.py",
    "types.py",
    "launch/",
    "prompts/",
    "queries/",
    "report/",
    "store/",
)
HEAVY = {"torch", "transformers", "tokenizers", "deepspeed", "vllm", "httpx", "datasets", "matplotlib"}


class Import(NamedTuple):
    """One imported module, and whether loading the importing module loads it."""

    name: str
    on_load: bool
    line: int


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, on_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, on_load, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import, which this test cannot follow"
                yield Import(child.module or "", on_load, child.lineno)
                # `from opd_cache.store import shards` imports a module, too.
                yield from (Import(f"{child.module}.{alias.name}", on_load, child.lineno) for alias in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, on_load and not inside)

    return walk(ast.parse(path.read_text()), True)


def is_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or (place.endswith("/") and name.startswith(place)) for place in places)


def test_the_walk_sees_imports_in_functions_and_at_the_top() -> None:
    found = {*imports_of(PACKAGE / "store" / "query.py"), *imports_of(PACKAGE / "commands" / "output.py")}
    assert ("duckdb", True) in {(name, on_load) for name, on_load, _ in found}
    assert ("rich.table", False) in {(name, on_load) for name, on_load, _ in found}
    assert len(MODULES) > 30


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_each_other(stage: str) -> None:
    others = tuple(f"opd_cache.{other}" for other in STAGES if other != stage)
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path in sorted((PACKAGE / stage).rglob("*.py"))
        for name, _, line in imports_of(path)
        if any(name == other or name.startswith(f"{other}.") for other in others)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(HOMES))
def test_heavy_packages_are_imported_on_load_only_in_their_homes(package: str) -> None:
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path in MODULES
        for name, on_load, line in imports_of(path)
        if on_load and name.split(".")[0] == package and not is_in(name_of(path), HOMES[package])
    ]
    assert wrong == []


def test_light_modules_load_nothing_heavy_even_by_way_of_others() -> None:
    by_name = {
        "opd_cache." + name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in MODULES
    }

    def loaded_by(path: Path, seen: set[Path]) -> set[str]:
        seen.add(path)
        names = {name for name, on_load, _ in imports_of(path) if on_load}
        return names.union(
            *(loaded_by(by_name[name], seen) for name in sorted(names) if name in by_name and by_name[name] not in seen)
        )

    wrong = {
        name_of(path): found
        for path in MODULES
        if is_in(name_of(path), LIGHT)
        and (found := sorted(HEAVY & {name.split(".")[0] for name in loaded_by(path, set())}))
    }
    assert wrong == {}


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def test_nothing_stored_is_ever_run_as_code() -> None:
    wrong = []
    for path in MODULES:
        wrong += [
            f"{name_of(path)}:{line} imports {name}"
            for name, _, line in imports_of(path)
            if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
        ]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            safe_load = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if called in FORBIDDEN_CALLS or (called == "torch.load" and not safe_load) or called == "yaml.load":
                wrong.append(f"{name_of(path)}:{node.lineno} calls {called}")
    assert wrong == []


def test_no_broad_except_swallows_an_error() -> None:
    """`except BaseException` is only for cleaning up before raising on. What a shard's attempt meets, a reward's error too,
    is written down and raised when the other shards are done."""
    wrong = []
    writes_down = "notes.py"
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            raises_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            is_kept = caught == "Exception" and name_of(path) == writes_down
            if caught in {"everything", "Exception", "BaseException"} and not raises_on and not is_kept:
                wrong.append(f"{name_of(path)}:{node.lineno} catches {caught}")
    assert wrong == []
