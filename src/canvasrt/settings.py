"""YAML files of settings: read once, validated by a pydantic model, every fault named with file and key.

Knows nothing of what the settings mean.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from canvasrt.errors import InputError


class Settings(BaseModel):
    """Base of every settings file: unknown keys are refused, values are not converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


S = TypeVar("S", bound=Settings)


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that is written twice, YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice} is written twice")
        return super().construct_mapping(node, deep)


def load_settings(file: Path, model: type[S], what: str) -> S:
    """The content of a YAML file as ``model``; ``what`` is what messages call it ("recipe", "profile").

    Raises InputError that names the file, the key and what is allowed.
    """
    try:
        content: Any = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {file} can't be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{what} {file} must be a mapping with the keys {', '.join(model.model_fields)}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{what} {file}: " + "; ".join(_problem(model, detail) for detail in error.errors())) from None


def _problem(model: type[BaseModel], detail: Any) -> str:
    path = [part for part in detail["loc"] if part != "[key]"]
    where = ".".join(str(part) for part in path)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        return f"unknown key {where}" + (f": the keys are {', '.join(known)}" if known else "")
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _fields_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    """Field names of the section of ``model`` that ``path`` leads to; none where it leads through something else."""
    for part in path:
        field = model.model_fields.get(str(part))
        sections = [] if field is None else _models_in(field.annotation)
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names: itself, or those inside ``X | None`` and ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
