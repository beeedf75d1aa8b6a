"""Refusing a recipe whose parts do not fit together. Single values are checked in config/values.py."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from opd_cache import registry
from opd_cache.config import (
    LossConfig,
    ModelConfig,
    Recipe,
    TeacherConfig,
    TeacherPrompt,
    VllmOptions,
    field_types,
)
from opd_cache.config.values import check_limits, shown, shown_key
from opd_cache.errors import ConfigError

ENVIRONMENT_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
SHORTEST_KEY = 8  # a shorter one is in half of all texts
POLICY = re.compile(r"current|0|[1-9][0-9]{0,5}", re.ASCII)
TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# What apply_chat_template takes beside the template's own variables and would change the ids: the intake sets these.
CHAT_TEMPLATE_ARGUMENTS = (
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


def check_recipe(recipe: Recipe) -> None:
    """Refuse values out of range and sections that do not fit together. Raises ConfigError."""
    _check_no_key(recipe)  # before anything else quotes a value
    check_limits(recipe, "")
    if not recipe.teachers:
        raise ConfigError("the recipe names no teacher. Add teachers.main.model=FOLDER_OR_NAME.")
    for name, teacher in recipe.teachers.items():
        for key in teacher.vllm:
            if key not in (known := field_types(VllmOptions)):
                raise ConfigError(
                    f"teachers.{name}.vllm.{shown_key(key)} is unknown. Known: {', '.join(sorted(known))}."
                )
        if not TEACHER_NAME.fullmatch(name):
            raise ConfigError(
                f"teachers.{shown_key(name)}: a teacher's name has 1-64 letters, digits, '_', '-' or '.' and starts with a letter or digit, since it names a folder."
            )
    _check_known_teacher(recipe, "score.teacher", recipe.score.teacher)
    _check_learning_teachers(recipe)
    _check_servers(recipe)
    _check_support(recipe)
    _check_loss(recipe.learn.loss)
    learn = recipe.learn
    # DeepSpeed's stage-3 linear layers add their bias in place to the very product that would be kept.
    if learn.gradient_checkpointing == "selective" and learn.engine == "deepspeed" and learn.deepspeed.zero_stage == 3:
        raise ConfigError(
            "learn.gradient_checkpointing = 'selective' gives wrong gradients under learn.deepspeed.zero_stage = 3. Use full, or none."
        )
    for key, pattern in (
        ("eval.answer_pattern", recipe.eval.answer_pattern),
        ("eval.reference_pattern", recipe.eval.reference_pattern),
    ):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ConfigError(f"{key} = {shown(pattern)} is not a regular expression: {error}.") from error
    _check_chat_template_kwargs(recipe.prompts.chat_template_kwargs, "prompts")
    for name, teacher in recipe.teachers.items():
        _check_policy_teacher(teacher, f"teachers.{name}")
        _check_teacher_prompt(teacher.prompt, f"teachers.{name}.prompt")


def _check_no_key(recipe: Recipe) -> None:
    """Refuse a recipe into which the API key has come, such as by ${oc.env:...}: run.json would keep it."""
    key = os.environ.get(recipe.score.http.api_key_env or "", "")
    if len(key) < SHORTEST_KEY:
        return
    for place, text in _texts(recipe.to_dict(), ""):
        if key in text:
            raise ConfigError(
                f"{place} holds the key that the variable of score.http.api_key_env holds, and run.json would keep it. Leave it out; it is sent by itself."
            )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a value."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{place}[{index}]")


def _check_chat_template_kwargs(kwargs: dict[str, Any], section: str) -> None:
    if reserved := sorted(set(kwargs) & set(CHAT_TEMPLATE_ARGUMENTS)):
        raise ConfigError(
            f"{section}.chat_template_kwargs.{reserved[0]} is set by opd-cache itself; give only the template's own variables, such as enable_thinking."
        )


def _check_servers(recipe: Recipe) -> None:
    """Refuse a served teacher without a server, and every secret that run.json would keep. No secret is shown."""
    for name, teacher in recipe.teachers.items():
        for index, url in enumerate(teacher.urls or []):
            _check_url(url, f"teachers.{name}.urls[{index}]")
        is_served = (teacher.scorer or recipe.score.scorer) == "http"
        if is_served and not (teacher.urls or recipe.score.http.urls):
            raise ConfigError(
                f"teacher {name!r} is scored over HTTP and has no server. Set score.http.urls=[http://HOST:PORT], or teachers.{name}.urls."
            )
    for index, url in enumerate(recipe.score.http.urls or []):
        _check_url(url, f"score.http.urls[{index}]")
    # Keys have small letters or dashes, names of variables by custom have not.
    variable = recipe.score.http.api_key_env
    if variable is not None and not ENVIRONMENT_NAME.fullmatch(variable):
        raise ConfigError(
            "score.http.api_key_env must be the name of an environment variable, in capitals, such as TEACHER_API_KEY; the key itself belongs into that variable."
        )


def _check_support(recipe: Recipe) -> None:
    score = recipe.score
    if score.support == "teacher":
        return
    if not 0 < score.top_k <= recipe.rollout.student_top_k:
        raise ConfigError(
            f"score.support = 'student' needs 0 < score.top_k <= rollout.student_top_k, here {score.top_k} and {recipe.rollout.student_top_k}. Set rollout.student_top_k=8 score.top_k=8."
        )
    for name, teacher in recipe.teachers.items():
        if (teacher.scorer or score.scorer) == "http":
            raise ConfigError(
                f"score.support = 'student': teacher {name!r} is scored over HTTP, and servers give only their own top k. Use score.scorer=hf or vllm."
            )
    names = [recipe.learn.loss.name, *(recipe.learn.loss.terms if recipe.learn.loss.name == "mixed" else [])]
    if "entropy_aware" in names:
        raise ConfigError(
            "learn.loss.name = 'entropy_aware' takes the teacher's entropy from its own top k; score.support = 'student' caches another. Use reverse_kl_topk, or score.support=teacher."
        )


def _check_url(url: str, key: str) -> None:
    if "@" in url or "?" in url or "#" in url:
        raise ConfigError(
            f"{key} holds a user, a password or a query, which run.json would keep. Leave it out; score.http.api_key_env names the variable of an API key."
        )
    try:
        parts = urlsplit(url)
        is_root = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is no number
        is_root = False
    if not is_root or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{key} = {shown(url)} is no URL of a server; expected http://HOST:PORT or https://HOST.")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigError(f"{key} = {shown(url)}: give the server's root, without /v1; the paths below it are added.")


def _check_policy_teacher(teacher: TeacherConfig, section: str) -> None:
    if teacher.policy is None:
        return
    if not POLICY.fullmatch(teacher.policy):
        raise ConfigError(
            f"{section}.model = {shown(teacher.model)}: expected policy:current, the policy that sampled the episode, or a version such as policy:0."
        )
    for f in dataclasses.fields(ModelConfig):
        if f.name != "model" and (value := getattr(teacher, f.name)) != f.default:
            raise ConfigError(
                f"{section}.{f.name} = {shown(value)} has no effect: a policy of the run is loaded like the student. Leave it out."
            )


def _check_teacher_prompt(prompt: TeacherPrompt, section: str) -> None:
    """Refuse settings that would have no effect."""
    _check_chat_template_kwargs(prompt.chat_template_kwargs, section)
    if prompt.template is None and prompt != TeacherPrompt():
        key = next(key for key, value in dataclasses.asdict(TeacherPrompt()).items() if getattr(prompt, key) != value)
        raise ConfigError(
            f"{section}.{key} is set, but not {section}.template: the teacher sees the student's ids. Give a template, such as '{{prompt}}'."
        )
    if not prompt.apply_chat_template and (prompt.system_prompt is not None or prompt.chat_template_kwargs):
        key = "chat_template_kwargs" if prompt.system_prompt is None else "system_prompt"
        raise ConfigError(f"{section}.{key} needs {section}.apply_chat_template=true.")


def _check_known_teacher(recipe: Recipe, key: str, name: str | None) -> None:
    if name is not None and name not in recipe.teachers:
        raise ConfigError(f"{key} = {shown(name)} is unknown. Known: {', '.join(recipe.teachers)}.")


def _check_learning_teachers(recipe: Recipe) -> None:
    """Refuse a recipe that says in no way, or in two ways, whom the student learns from."""
    learn = recipe.learn
    _check_known_teacher(recipe, "learn.teacher", learn.teacher)
    for name in learn.teachers or {}:
        _check_known_teacher(recipe, "learn.teachers", name)
    for value, name in (learn.routes or {}).items():
        _check_known_teacher(recipe, f"learn.routes.{shown_key(value)}", name)
    for key in ("teachers", "routes"):
        if getattr(learn, key) == {}:
            raise ConfigError(f"learn.{key} = {{}} is empty; leave it out, or name a teacher.")
    ways = [f"learn.{key}" for key in ("teacher", "teachers", "routes") if getattr(learn, key) is not None]
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} are both set; keep the one that is meant, and set {ways[0]}=null.")
    if not ways and len(recipe.teachers) > 1:
        raise ConfigError(f"learn.teacher must name one of the teachers: {', '.join(recipe.teachers)}.")
    if (learn.routes is None) != (learn.route_by is None):
        given, lacking = ("routes", "route_by") if learn.route_by is None else ("route_by", "routes")
        raise ConfigError(f"learn.{given} needs learn.{lacking}: a field of the prompts, and a teacher for its values.")


def _check_loss(loss: LossConfig) -> None:
    if loss.name == "mixed" and not any(loss.terms.values()):
        raise ConfigError(
            "learn.loss.name = 'mixed' needs learn.loss.terms, such as {reverse_kl_topk: 1.0, reward_pg: 0.5}."
        )
    if loss.name != "mixed" and loss.terms:
        raise ConfigError(
            f"learn.loss.terms is set, but learn.loss.name = {loss.name!r} has no terms. Set learn.loss.name=mixed, or leave the terms out."
        )
    for name in loss.terms:
        if name == "mixed":
            raise ConfigError("learn.loss.terms.mixed: a mixed loss cannot be a term of itself.")
        registry.check_name(registry.LOSSES, name, "learn.loss.terms")
