"""A run: its recipe, its directory and its identity. Opening one takes the prompts in and publishes run.json, once."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_cache import registry
from opd_cache.config import ModelConfig, Recipe, TeacherConfig
from opd_cache.errors import ConfigError, CorruptShardError, MismatchError, MissingInputError, ModelError
from opd_cache.fingerprint import fingerprint_model, model_folder, num_embeddings
from opd_cache.prompts.intake import prompts_config_of, take_in_prompts
from opd_cache.run_dir import COMPLETE, REMOVED, SCHEMA_VERSION, RunDir
from opd_cache.schema import VOCAB, arrow_schema
from opd_cache.store.arrays import record_batch
from opd_cache.store.disk import disk_error
from opd_cache.store.manifest import check_model_files, check_place, read_manifest
from opd_cache.store.publish import digest_file, make_folder, publish_json, read_json
from opd_cache.store.shards import publish_table, read_row_groups

log = logging.getLogger(__name__)
IDENTITY = ("schema_version", "run_id", "seed", "student", "prompts")


@dataclass(frozen=True)
class Run:
    """An opened run."""

    recipe: Recipe
    dir: RunDir
    run_id: str
    prompts_digest: str
    student_fingerprint: str

    def policy_folder(self, version: int) -> Path:
        """The student after `version` episodes. Raises MissingInputError when that episode has not been learned, or the
        policy was removed."""
        if version == 0:
            return model_folder(self.recipe.student)
        folder = self.dir.policy_after(version - 1)
        if not self.has_policy(version):
            raise MissingInputError(
                f"{folder}: policy version {version} is not there. Run: opd-cache learn RECIPE --episode {version - 1}"
            )
        if (folder / REMOVED).exists():
            raise MissingInputError(
                f"{folder}: policy version {version} was removed by the retention rule (learn.keep_policies). To have it again, the same bits: opd-cache replay {self.dir.path} --episodes 0-{version - 1} --into ANOTHER_FOLDER"
            )
        return folder

    def policy_config(self, version: int) -> ModelConfig:
        """How to load that policy: like the student, from its own folder."""
        return ModelConfig(
            **{**asdict(self.recipe.student), "model": str(self.policy_folder(version)), "revision": None}
        )

    def teacher_config(self, name: str, version: int) -> TeacherConfig:
        """How to load a teacher for what policy `version` sampled: one that is a policy itself, from that policy's folder.

        Raises MissingInputError when that policy has not been learned.
        """
        teacher = self.recipe.teachers[name]
        if teacher.policy is None:
            return teacher
        policy = self.policy_config(_version_of(teacher.policy, version))
        return TeacherConfig(**asdict(policy), scorer=teacher.scorer, prompt=teacher.prompt)

    def has_policy(self, version: int) -> bool:
        """Whether that policy has been learned; it may have been removed since. Raises CorruptShardError when it has lost
        its manifest."""
        folder = self.dir.policy_after(version - 1)
        return version == 0 or (folder.is_dir() and bool(read_manifest(folder)))

    def policy_fingerprint(self, version: int) -> str:
        """Which weights that policy has, or had. Raises MissingInputError when that episode has not been learned,
        MismatchError when another policy lies in its place."""
        if version == 0:
            return self.student_fingerprint
        if not self.has_policy(version):
            self.policy_folder(version)
        folder = self.dir.policy_after(version - 1)
        manifest = read_manifest(folder)
        check_place(manifest, self.run_id, version, folder)
        return str(manifest["fingerprint"])

    def is_removed(self, version: int) -> bool:
        """Whether that policy was there, and learn.keep_policies has removed it."""
        return version > 0 and (self.dir.policy_after(version - 1) / REMOVED).exists()

    def check_policy(self, version: int) -> None:
        """Compare every byte that a model of that policy is loaded from with its manifest. Raises CorruptShardError."""
        if version > 0:
            check_model_files(self.policy_folder(version))

    def check_teacher_policy(self, name: str, version: int) -> None:
        """The same for a teacher that is a policy of the run, for what policy `version` sampled."""
        if (policy := self.recipe.teachers[name].policy) is not None:
            self.check_policy(_version_of(policy, version))

    @property
    def is_replay(self) -> bool:
        """Whether the rollouts are another run's, sampled by its policies and not by this one's."""
        return self.dir.replay_json.exists()

    def is_learned(self, episode: int) -> bool:
        """Whether the episode's policy and its metrics are there. Raises MismatchError when it was trained from another
        policy than the one that is there now."""
        if not self.has_policy(episode + 1):
            return False
        folder = self.dir.policy_after(episode)
        parent, now = read_json(folder / COMPLETE)["parent"], self.policy_fingerprint(episode)
        if parent != now:
            raise MismatchError(
                f"{folder}: trained from policy {parent[:12]}, but policy version {episode} is now {now[:12]}. Move {folder.parent} and all later episodes away and run again."
            )
        return self.dir.steps(episode).exists()


def _version_of(policy: str, current: int) -> int:
    return current if policy == "current" else int(policy)


def open_run(recipe: Recipe) -> Run:
    """Open the recipe's run directory, making it on first use.

    Raises MismatchError when the directory belongs to another run, PromptError and ModelError on bad input; a
    directory that could not be made leaves nothing behind.
    """
    run = RunDir(Path(recipe.run_dir))
    # A replay needs neither the teacher nor the problems that a task would make.
    if recipe.task.name is not None and not run.replay_json.exists():
        registry.load(registry.TASKS, recipe.task.name, "task.name")(
            Path(recipe.task.dir), recipe.task.seed, recipe.torch_threads
        )
    if not run.run_json.exists():
        with _removed_when_empty(run.path):
            _make(recipe, run)
    found = read_json(run.run_json)
    check_same_run(recipe, found, run.run_json)
    if digest_file(run.prompts) != found["prompts"]["sha256"]:
        raise CorruptShardError(
            f"{run.prompts}: changed since the run was made. Put it back, or choose another run_dir."
        )
    return Run(recipe, run, found["run_id"], found["prompts"]["sha256"], found["student"]["fingerprint"])


def check_same_run(recipe: Recipe, found: dict[str, Any], run_json: Path) -> None:
    """Refuse a recipe of another run than the one that `run_json` holds. Raises MismatchError, ModelError."""
    wanted = {"seed": recipe.seed, "prompts": asdict(recipe.prompts)}
    recorded = {"seed": found["seed"], "prompts": found["prompts"]["config"]}
    student = found["student"]
    if (fingerprint := fingerprint_model(model_folder(recipe.student))) != student["fingerprint"]:
        wanted["student"] = {**_student_source(recipe), "weights": fingerprint[:12]}
        recorded["student"] = {**student["source"], "weights": student["fingerprint"][:12]}
    for key, value in wanted.items():
        if value != recorded[key]:
            raise MismatchError(
                f"{run_json}: the run was made with {_difference(key, recorded[key], value)}. Set it back, or choose another run_dir."
            )


def _difference(key: str, recorded: Any, wanted: Any) -> str:
    if isinstance(recorded, dict):
        name = next(name for name in {**recorded, **wanted} if recorded.get(name) != wanted.get(name))
        return f"{key}.{name} = {recorded.get(name)!r}, the recipe says {wanted.get(name)!r}"
    return f"{key} = {recorded!r}, the recipe says {wanted!r}"


def _student_source(recipe: Recipe) -> dict[str, Any]:
    return {"model": recipe.student.model, "revision": recipe.student.revision}


@contextlib.contextmanager
def _removed_when_empty(folder: Path) -> Iterator[None]:
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _make(recipe: Recipe, run: RunDir) -> None:
    student = model_folder(recipe.student)
    tokenizer = load_tokenizer(recipe.student)
    table = token_table(tokenizer)
    fingerprint = fingerprint_model(student)
    for name, teacher in recipe.teachers.items():
        if teacher.policy is None:
            check_same_vocabulary(table, teacher, name)
    # Either file may be there from a start that was cut short, then perhaps with other settings.
    if not run.prompts.exists():
        take_in_prompts(recipe.prompts, tokenizer, num_embeddings(student), run.prompts)
    elif prompts_config_of(run.prompts) != asdict(recipe.prompts):
        raise _left_over(run.prompts, "other prompts settings")
    if not run.vocab.exists():
        _publish_vocab(run.vocab, tokenizer, table)
    elif read_vocabulary(run) != table:
        raise _left_over(run.vocab, "another tokenizer")
    tokens = hashlib.sha256(json.dumps(table).encode()).hexdigest()[:32]
    prompts = digest_file(run.prompts)
    identity = [SCHEMA_VERSION, recipe.seed, fingerprint, tokens, prompts]
    content = {
        "schema_version": SCHEMA_VERSION,
        "run_id": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
        "seed": recipe.seed,
        "student": {"source": _student_source(recipe), "fingerprint": fingerprint, "tokenizer": tokens},
        "prompts": {"config": asdict(recipe.prompts), "sha256": prompts},
        "vocab": digest_file(run.vocab),
        "recipe": recipe.to_dict(),
    }
    make_folder(run.path)
    publish_json(run.run_json, content, "the run", "Choose another run_dir.", compare=IDENTITY)


def _left_over(path: Path, made_with: str) -> MismatchError:
    return MismatchError(
        f"{path}: left with {made_with} by a start that was cut short (there is no run.json). Remove {path.parent}, or choose another run_dir."
    )


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    folder = model_folder(config, with_weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if failing := disk_error(error, folder):
            raise failing from error
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({str(error).strip().splitlines()[0]}).") from error


def token_table(tokenizer: Any) -> list[str]:
    """Token name by id; ids without a token are empty strings."""
    table = [""] * len(tokenizer)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id >= len(table):
            table.extend([""] * (token_id + 1 - len(table)))
        table[token_id] = token
    return table


def check_same_vocabulary(student: list[str], teacher: ModelConfig, name: str) -> None:
    """Compare id → token tables. A teacher that has more ids than the student is fine. Raises ModelError."""
    table = token_table(load_tokenizer(teacher))
    for token_id, (ours, theirs) in enumerate(zip(student, table, strict=False)):
        if ours != theirs:
            raise ModelError(
                f"teacher {name!r} has another vocabulary than the student: id {token_id} is {theirs!r}, the student's is {ours!r}. Log-probs of token ids would mean nothing; use a teacher with the same tokenizer."
            )
    if len(table) < len(student):
        raise ModelError(
            f"teacher {name!r} has another vocabulary than the student: {len(table)} tokens, the student has {len(student)}; the first one it lacks is {student[len(table)]!r}."
        )


def _publish_vocab(final: Path, tokenizer: Any, table: list[str]) -> None:
    texts = [tokenizer.convert_tokens_to_string([token]) if token else "" for token in table]
    schema = arrow_schema(VOCAB)
    columns = {"token_id": range(len(table)), "token": table, "text": texts}
    publish_table(final, schema, lambda: [record_batch(columns, schema)], {"stage": "vocab"})


def read_vocabulary(run: RunDir) -> list[str]:
    """The student's id → token table, as taken in."""
    return [token for table in read_row_groups(run.vocab, ["token"]) for token in table["token"].to_pylist()]


def stop_token_ids(recipe: Recipe, folder: Path) -> list[int]:
    """The ids that end a response: the recipe's, else the student's EOS ids. Raises ConfigError when there is none."""
    ids = recipe.rollout.stop_token_ids or eos_ids(folder)
    if not ids:
        raise ConfigError(f"{folder}: the model names no eos_token_id. Set rollout.stop_token_ids=[ID, ...].")
    return sorted(ids)


def eos_ids(folder: Path) -> list[int]:
    """EOS ids that a model's own files name: generation_config.json first, then config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if value is not None:
            return [value] if isinstance(value, int) else list(value)
    return []
