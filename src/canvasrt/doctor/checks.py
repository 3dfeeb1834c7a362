"""One check, and the reading of answers that may be anything: what is not understood is skipped, with the reason."""

import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from canvasrt.doctor.machine import Answer

Status = Literal["ok", "warning", "fault", "skipped"]
GB = 10**9
_MOST_CHARACTERS = 600  # of a sentence, which may quote what a program printed


@dataclass(frozen=True, slots=True)
class Check:
    """``finding`` and ``fix`` are sentences without a final dot; ``fix`` is empty where nothing is to be done."""

    group: str
    name: str
    status: Status
    finding: str
    fix: str = ""


class Group:
    """Collects the checks of one part."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.checks: list[Check] = []

    def add(self, status: Status, name: str, finding: str, fix: str = "") -> None:
        self.checks.append(Check(self.name, _line(name), status, _line(finding), _line(fix)))

    def ok(self, name: str, finding: str) -> None:
        self.add("ok", name, finding)

    def warning(self, name: str, finding: str, fix: str) -> None:
        self.add("warning", name, finding, fix)

    def fault(self, name: str, finding: str, fix: str) -> None:
        self.add("fault", name, finding, fix)

    def skipped(self, name: str, finding: str, fix: str = "") -> None:
        self.add("skipped", name, finding, fix)


class Said(BaseModel):
    """Part of a program's JSON, in its own camelCase; whatever else it says is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True)


class NotUnderstoodError(Exception):
    """An answer that is none; the message is for a finding."""


S = TypeVar("S", bound=Said)


def understood(answer: Answer, form: type[S]) -> S:
    """The JSON that a command printed. Raises NotUnderstoodError where it failed or printed something else."""
    if not answer.ok:
        raise NotUnderstoodError(answer.said)
    return parsed(answer.out, form)


def parsed(text: str, form: type[S]) -> S:
    """Raises NotUnderstoodError."""
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise NotUnderstoodError(
            f"its output is not understood: {where + ': ' if where else ''}{first['msg']}"[:200]
        ) from None


def _line(text: str) -> str:
    """Without line ends and escape sequences, which others' output may have."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:_MOST_CHARACTERS]


def numbers(text: str) -> tuple[int, ...]:
    """(13, 0) of "13.0", "v13.0.1+x"[:2]; empty where there is none."""
    found = re.search(r"(\d{1,9})\.(\d{1,9})", text)
    return () if found is None else (int(found[1]), int(found[2]))


def gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 10**6:.1f} MB"
