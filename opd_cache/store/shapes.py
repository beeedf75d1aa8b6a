"""What each kind of JSON in a run directory must hold before anything is made of it: types, ranges, names of files.

A digest says that a file is as it was written, not by whom; and what these say becomes SQL, paths and sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from opd_cache.config.values import shown, shown_key
from opd_cache.errors import CorruptShardError, MismatchError
from opd_cache.run_dir import (
    COMPLETE,
    EPISODE_FOLDER,
    FAILED_SHARD,
    PLAN,
    SCHEMA_VERSION,
    SEAL,
    SHARD_FILE,
    SUMMARY,
)

LARGEST = 2**63 - 1
LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Is:
    """A value that passes a test; `what` names it in messages."""

    what: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A list, or an object, all of whose values have one shape."""

    kind: type
    shape: "Shape"


@dataclass(frozen=True)
class Only:
    """An object with these keys and no other."""

    keys: dict[str, "Shape"]


# An object's keys; those that end in ? may be missing or null.
Shape: TypeAlias = "Is | Each | Only | dict[str, Shape]"


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= LARGEST_ID for item in value)


def _is_inside(value: Any) -> bool:
    """Whether it names a file below a folder and not beside it."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts


def _is_manifest(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_inside(name) and isinstance(digest, str) for name, digest in value.items()
    )


TEXT = Is("text", lambda value: isinstance(value, str))
WHOLE = Is("a whole number", _whole(-LARGEST, LARGEST))
COUNT = Is("a whole number from 0", _whole(0, LARGEST))
SIZE = Is("a whole number from 0", _whole(0, LARGEST_ID))
POSITIVE = Is("a whole number from 1", _whole(1, LARGEST_ID))
NUMBER = Is("a number", lambda value: type(value) in (int, float))
IDS = Is("a list of whole numbers from 0", _is_ids)
OBJECT = Is("an object", lambda value: isinstance(value, dict))
NAMED = Is("an object with at least one key", lambda value: isinstance(value, dict) and len(value) > 0)
SHARD = Is("a shard's name", lambda value: isinstance(value, str) and SHARD_FILE.fullmatch(value) is not None)
STAGE = Is("a stage", lambda value: value in ("rollout", "score", "learn"))
FILE = Is("a path inside the run", _is_inside)
FILES = Is("an object of paths inside the folder and their digests", _is_manifest)

SAMPLING = Only({
    "temperature": NUMBER, "top_p": NUMBER, "top_k?": SIZE, "max_new_tokens": SIZE, "stop_token_ids": IDS,
    "student_top_k?": SIZE,
})  # fmt: skip
IMPORTED: Shape = {"columns": Each(list, TEXT)}
RUN: Shape = {
    "run_id": TEXT,
    "seed": COUNT,
    "student": {"fingerprint": TEXT, "source": OBJECT},
    "prompts": {"config": OBJECT, "sha256": TEXT},
    "vocab": TEXT,
    "recipe": {
        "num_episodes": COUNT,
        "teachers": NAMED,
        "learn": {"teacher?": TEXT, "teachers?": OBJECT, "routes?": Each(dict, TEXT)},
    },
}
ROLLOUT_PLAN: Shape = {
    **dict.fromkeys(("run_id", "scope", "policy", "sampler", "dtype", "prompts"), TEXT),
    "seed": COUNT,
    "policy_version": WHOLE,
    "prompt_indices": IDS,
    "n_samples_per_prompt": POSITIVE,
    "prompts_per_shard": POSITIVE,
    "sampling": SAMPLING,
    "reward?": OBJECT,
    "imported?": IMPORTED,
}
SCORE_FACTS: dict[str, Shape] = {
    **dict.fromkeys(("run_id", "scope", "teacher", "teacher_fingerprint", "scorer", "dtype", "rollouts"), TEXT),
    "top_k": SIZE,
    "first_token?": SIZE,
    "horizon?": SIZE,
    "teacher_prompts?": TEXT,
    "support?": TEXT,
}
SHARDS: dict[str, Shape] = {
    **dict.fromkeys(("run_id", "stage", "scope", "plan"), TEXT),
    "rows": COUNT,
    "tokens": COUNT,
    "bytes": COUNT,
    "shards": Each(
        list,
        {
            "file": SHARD,
            "rows": COUNT,
            "tokens": COUNT,
            "bytes": COUNT,
            "sha256": TEXT,
            "figures?": Each(dict, NUMBER),
        },
    ),
}
ROLLOUT_SEAL: Shape = {**SHARDS, "sampling": SAMPLING, "imported?": IMPORTED}
SCORE_SEAL: Shape = {**SHARDS, **SCORE_FACTS}
LEARN_PLAN: Shape = {
    "run_id": TEXT,
    "num_steps": COUNT,
    "sources?": Each(list, {"episode": COUNT, "rollouts": TEXT}),
}
MANIFEST: Shape = {"fingerprint": TEXT, "plan": TEXT, "parent": TEXT, "files": FILES}
EVALUATION: Shape = {
    "subject": TEXT,
    "results": TEXT,
    "grading?": OBJECT,
    **dict.fromkeys(("greedy_accuracy?", "sampled_accuracy?", "reverse_kl?"), NUMBER),
}
STATE: Shape = Only({"step": COUNT, "cursor": COUNT, "steps": Each(list, OBJECT)})
REPLAY: Shape = {"run_id": TEXT, "episodes": Each(list, COUNT), "overrides": OBJECT}
FAILURE: Shape = {
    **dict.fromkeys(("stage", "error", "message", "time", "host"), TEXT),
    "file": FILE,
    "pid": WHOLE,
}
HEALTH: Shape = {
    "stage": STAGE,
    "episode": COUNT,
    "teacher?": TEXT,
    "warnings": Each(list, {"text": TEXT, "query": TEXT}),
}
NOTE: Shape = {"seconds": NUMBER, "host?": TEXT, "engine?": TEXT}
VERSIONED = (RUN, ROLLOUT_PLAN, SCORE_FACTS, ROLLOUT_SEAL, SCORE_SEAL)


def check_shape(content: dict[str, Any], path: Path) -> None:
    """Refuse a file whose place in a run says what it must hold, and that does not.

    Raises MismatchError when another version wrote it, CorruptShardError.
    """
    shape = _shape_of(path)
    if shape is None:
        return
    if shape in VERSIONED:
        check_version(content.get("schema_version"), path)
    if fault := _fault(content, shape):
        raise CorruptShardError(
            f"{path}: {(fault.place.removeprefix('.') + fault.text).lstrip()}; opd-cache did not write this. Move the file away and run the stage again."
        )


def check_version(found: Any, path: Path) -> None:
    """Refuse what another version of opd-cache wrote. Raises MismatchError."""
    if found != SCHEMA_VERSION:
        raise MismatchError(
            f"{path}: schema version {shown(found)}, this opd-cache reads {SCHEMA_VERSION}. Use the version that wrote it."
        )


def _shape_of(path: Path) -> "Shape | None":
    """By the names in run_dir.py."""
    folder = path.parent.name
    is_score, is_set = folder.startswith("teacher="), EPISODE_FOLDER.fullmatch(folder) or folder.startswith("mode=")
    plan = LEARN_PLAN if folder == "learn" else SCORE_FACTS if is_score else ROLLOUT_PLAN if is_set else None
    seal = SCORE_SEAL if is_score else ROLLOUT_SEAL if folder == "rollouts" else None
    by_name = {"run.json": RUN, PLAN: plan, SEAL: seal, COMPLETE: MANIFEST, SUMMARY: EVALUATION, "replay.json": REPLAY}
    if path.name in by_name:
        return by_name[path.name]
    if (folder, path.name) == ("trainer", "state.json"):
        return STATE
    if path.parent.parent.parent.name != "logs":
        return None
    if path.name.endswith(FAILED_SHARD):
        return FAILURE
    return HEALTH if path.parent.parent.name == "health" else NOTE


class _Fault(NamedTuple):
    place: str
    text: str

    def inside(self, place: str) -> "_Fault":
        return _Fault(place + self.place, self.text)


def _fault(value: Any, shape: Shape) -> _Fault | None:
    """The first that is found. Its place is put together on the way out: a seal holds many thousands without any."""
    if isinstance(shape, Is):
        return None if shape.holds(value) else _Fault("", f" = {shown(value)} is not {shape.what}")
    if isinstance(shape, Each):
        return _fault_of_each(value, shape)
    keys = shape.keys if isinstance(shape, Only) else shape
    return _fault_of_keys(value, keys, is_closed=isinstance(shape, Only))


def _fault_of_each(value: Any, shape: Each) -> _Fault | None:
    if isinstance(value, list) and shape.kind is list:
        for index, item in enumerate(value):
            if fault := _fault(item, shape.shape):
                return fault.inside(f"[{index}]")
    elif isinstance(value, dict) and shape.kind is dict:
        for key, item in value.items():
            if fault := _fault(item, shape.shape):
                return fault.inside(f".{shown_key(key)}")
    else:
        return _Fault("", f" = {shown(value)} is not {'a list' if shape.kind is list else 'an object'}")
    return None


def _fault_of_keys(value: Any, keys: dict[str, Shape], is_closed: bool) -> _Fault | None:
    if not isinstance(value, dict):
        return _Fault("", f" = {shown(value)} is not an object")
    if is_closed and (unknown := set(value) - {key.removesuffix("?") for key in keys}):
        return _Fault("", f" has the unknown key {shown_key(min(unknown))}")
    for key, shape in keys.items():
        name = key.removesuffix("?")
        if value.get(name) is None and name != key:
            continue
        if name not in value:
            return _Fault(f".{name}", " is missing")
        if fault := _fault(value[name], shape):
            return fault.inside(f".{name}")
    return None
