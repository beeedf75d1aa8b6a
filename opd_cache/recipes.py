"""Reading recipes: several YAML files merge left to right, then `key=value` from the command line.

What a recipe may say is in config/; what is refused, in config/values.py and recipe_checks.py.
"""

import errno
import io
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_cache.config import Recipe
from opd_cache.config.values import check_section, shown
from opd_cache.errors import ConfigError
from opd_cache.recipe_checks import check_recipe

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=", re.ASCII)
MAX_YAML_DEPTH = 32
MAX_NAMED = 200  # characters of an override in a message


def packaged_configs(kind: str) -> dict[str, Path]:
    """The YAML files of a kind (recipes, clusters) that travel with the package, by name: inside it in a wheel, beside
    it in a checkout."""
    inside = Path(__file__).parent / "configs"
    folder = (inside if inside.is_dir() else Path(__file__).parent.parent / "configs") / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def packaged_recipes() -> dict[str, Path]:
    """Recipe names that `opd-cache run NAME` knows without a file, and their files."""
    return packaged_configs("recipes")


def find_config(kind: str, name: str) -> Path:
    """The file that an argument means: a path, else the name of a packaged one."""
    if _is_file(name):
        return Path(name)
    packaged = packaged_configs(kind)
    # A checkout's path works without the checkout: configs/recipes/quickstart.yaml means the packaged one.
    stem = name.removeprefix(f"configs/{kind}/").removesuffix(".yaml")
    if stem in packaged:
        return packaged[stem]
    raise ConfigError(
        f"{kind[:-1]} {name!r} is neither a file nor a packaged {kind[:-1]}. Packaged: {', '.join(packaged)}."
    )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError as error:
        # Such as prompts.template=... with a long text: no file can have that name.
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def load_recipe(arguments: list[str] | tuple[str, ...]) -> Recipe:
    """Read recipe files and `key=value` overrides, in that order, into a checked Recipe.

    Raises ConfigError, naming the key, what was found and what is known.
    """
    files = [argument for argument in arguments if "=" not in argument or _is_file(argument)]
    overrides = [argument for argument in arguments if argument not in files]
    if not files:
        raise ConfigError(
            f"no recipe was given. Packaged: {', '.join(packaged_recipes())}; or the path of a YAML file."
        )
    merged = OmegaConf.structured(Recipe)
    for argument in files:
        path = find_config("recipes", argument)
        merged = _merge(merged, read_yaml(path), str(path))
    for override in overrides:
        merged = _merge(merged, read_override(override), cut(override))
    return _checked(merged)


def stored_recipe(content: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """The recipe that `Recipe.to_dict` gave, with `key=value` overrides on top, checked like one written by hand."""
    merged = _merge(OmegaConf.structured(Recipe), OmegaConf.create(_escaped(content)), where)
    for override in overrides:
        merged = _merge(merged, read_override(override), cut(override))
    return _checked(merged)


def cut(override: str) -> str:
    """What names an override in a message: itself, where it is not too long for a line."""
    return override if len(override) <= MAX_NAMED else f"{override[: MAX_NAMED - 3]}..."


def read_yaml(path: Path) -> DictConfig:
    """The keys of a YAML file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_yaml_extras(text, str(path), has_lines=True)
        content = OmegaConf.load(io.StringIO(text))
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}{f':{mark.line + 1}' if mark else ''}: not YAML: {_yaml_fault(error)}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}.") from error
    except ValueError as error:  # YAML takes 0x_ for a number, and Python does not
        raise ConfigError(f"{path}: holds what only looks like a number: {_first_line(error)}.") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: expected keys with values, found a list.")
    return content


def _yaml_fault(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return ", ".join(part for part in (error.context, error.problem) if part)
    return " ".join(str(error).split())


def _refuse_yaml_extras(text: str, source: str, has_lines: bool) -> None:
    """Refuse what a recipe does not need and what a parser can be blown up with: aliases, tags, deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = f"{source}:{event.start_mark.line + 1}" if has_lines else source
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"{place}: YAML aliases (*{event.anchor}) are not read; refer to a key as ${{section.key}}."
            )
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{place}: YAML tags ({event.tag}) are not read; write a plain value.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise ConfigError(f"{place}: nested more than {MAX_YAML_DEPTH} levels deep.")


def read_override(override: str) -> DictConfig:
    """The keys of one `key=value`. Raises ConfigError."""
    if not OVERRIDE.match(override):
        raise ConfigError(f"{shown(override)} is not key=value.")
    try:
        _refuse_yaml_extras(override.partition("=")[2], cut(override), has_lines=False)
        return OmegaConf.from_dotlist([override])
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown(override)} is not key=value: {_yaml_fault(error)}.") from error
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{shown(override)} is not key=value: {_first_line(error)}.") from error


def _merge(base: DictConfig, update: DictConfig, where: str) -> DictConfig:
    check_section(OmegaConf.to_container(update), Recipe, "", where)
    try:
        return typing.cast(DictConfig, OmegaConf.merge(base, update))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}. ({where})") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _checked(merged: DictConfig) -> Recipe:
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"the recipe does not say {', '.join(missing)}. Add what is missing, or give {missing[0]}=... after the recipe."
            )
        recipe = typing.cast(Recipe, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be resolved: {_first_line(error)}.") from error
    check_recipe(recipe)
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, for people. Given back as a recipe, it means the same."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(recipe.to_dict())))


def recipe_json(recipe: Recipe) -> str:
    """The resolved recipe as JSON, for programs. Given back as a recipe, it means the same."""
    # A recipe is read as YAML, which knows no surrogate pairs: \ud83d\ude00 would be two characters.
    return json.dumps(_escaped(recipe.to_dict()), indent=2, ensure_ascii=False)


def _escaped(value: Any) -> Any:
    """The value with every `${` of a text as `\\${`, so that reading it does not take it for a reference."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
