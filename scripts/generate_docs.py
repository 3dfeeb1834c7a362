"""Writes docs/cli.md, the reference of the command line, from the commands' own definitions, and the table of GPU
profiles in docs/profiles.md from their files, triton_repo/ from the declaration of the tensors, and the chart's values
for each GPU.

    .venv/bin/python scripts/generate_docs.py [--check]

``--check`` writes nothing and exits with 1 when a page is not what would be written. The text depends on the
definitions only, not on the terminal: nothing in it is wrapped.
"""

import argparse
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from target_tables import with_target_table

from canvasrt import wire
from canvasrt.cli import main as cli
from canvasrt.cli import profiles
from canvasrt.profiles.helm_values import helm_files
from canvasrt.serve.metrics import FAMILIES
from canvasrt.serve.model_repository import repository_files
from canvasrt.serve.settings import ServeSettings

DOCS = Path(__file__).parents[1] / "docs"
MODELS = Path(__file__).parents[1] / "triton_repo"
VALUES = Path(__file__).parents[1] / "helm" / "canvasrt" / "profiles"
COMMAND = ".venv/bin/python scripts/generate_docs.py"
NAME = "canvasrt"


def render() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(cli.app)
    context = group.context_class(group, info_name=NAME)
    blocks = [
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        "# Command line",
        _sentences(group.help),
        *_usage(NAME, group, context),
        "## Exit codes",
        _table(("code", "meaning"), _exit_codes()),
    ]
    return "\n\n".join([*blocks, *_commands(NAME, group, context)]) + "\n"


def _commands(path: str, group: Any, context: Any) -> Iterator[str]:
    for name, command in group.commands.items():
        own = f"{path} {name}"
        inner = command.context_class(command, info_name=name, parent=context)
        yield from [f"## {own}", _sentences(command.help), *_usage(own, command, inner)]
        if hasattr(command, "commands"):  # a group, such as canvasrt profiles
            yield from _commands(own, command, inner)


def _usage(path: str, command: Any, context: Any) -> Iterator[str]:
    # "text" and not "sh": this is a pattern, not a command to run
    yield f"```text\n{' '.join([path, *command.collect_usage_pieces(context)])}\n```"
    for kind in ("argument", "option"):
        parameters = [each for each in command.get_params(context) if each.param_type_name == kind]
        rows = [row for each in parameters if (row := _row(each, context))]
        if rows:
            yield _table((kind, "default", "meaning"), rows)


def _row(parameter: Any, context: Any) -> tuple[str, str, str] | None:
    """Name, default and meaning, in the words of --help; None for a hidden parameter."""
    record = parameter.get_help_record(context)
    if record is None:
        return None
    name, told = record
    meaning = parameter.help or ""
    # --help puts what it knows beside the meaning behind it, as [default: 24; x>=1]
    facts = [fact for fact in told.removeprefix(meaning).strip(" []").split("; ") if fact]
    default = [fact.removeprefix("default: ") for fact in facts if fact.startswith("default: ")]
    required = [fact for fact in facts if fact == "required"]
    rest = [fact for fact in facts if not fact.startswith("default: ") and fact != "required"]
    shown = f"`{default[0]}`" if default else "".join(required)
    return f"`{name}`", shown, " ".join([_sentences(meaning), *(f"({fact})" for fact in rest)])


def _exit_codes() -> list[tuple[str, str]]:
    """From the sentence "Exit codes: 0 done, ..." of main()'s docstring, which must name every EXIT_ constant."""
    sentence = _sentences(inspect.getdoc(cli.main)).partition("Exit codes: ")[2].partition(".")[0]
    codes = dict(part.split(" ", 1) for part in sentence.split(", ") if " " in part)
    unnamed = [name for name, code in vars(cli).items() if name.startswith("EXIT_") and str(code) not in codes]
    if not codes or unnamed:
        sys.exit(
            f"{cli.__file__}: the docstring of main() must hold a sentence such as "
            f'"Exit codes: 0 done, 2 wrong input." with every code; missing: {", ".join(unnamed) or "the sentence"}'
        )
    return [(f"`{code}`", meaning) for code, meaning in codes.items()]


def _sentences(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def with_serving_tables(page: str) -> str:
    """docs/serving.md with its tables of inputs, outputs, settings and metrics, from where they are declared."""

    def tensors(declared: Iterable[wire.Tensor]) -> str:
        rows = [
            (f"`{each.name}`", each.dtype, "1" if each.size == wire.ONE else "any", each.meaning) for each in declared
        ]
        return _table(("name", "type", "values", "meaning"), rows)

    fields = ServeSettings.model_fields.items()
    settings = [
        (f"`{name}`", "" if field.default is None else f"`{field.default}`", str(field.description))
        for name, field in fields
        if name != "model"
    ]
    families = [(f"`{each.name}`", each.kind, ", ".join(each.labels), each.meaning) for each in FAMILIES]
    tables = {
        "inputs": tensors(wire.INPUTS),
        "outputs": tensors(wire.OUTPUTS),
        "settings": _table(("key", "default", "meaning"), settings),
        "metrics": _table(("name", "kind", "labels", "meaning"), families),
    }
    for name, table in tables.items():
        first, last = f"<!-- Table of {name}; do not edit. -->", f"<!-- End of {name}. -->"
        before, start, rest = page.partition(first)
        _, end, after = rest.partition(last)
        if not start or not end:
            sys.exit(f"docs/serving.md lacks {first} or {last}")
        page = f"{before}{first}\n{table}\n{last}{after}"
    return page


def main(arguments: list[str] | None = None, docs: Path = DOCS, models: Path = MODELS, values: Path = VALUES) -> int:
    parser = argparse.ArgumentParser(description="Write the generated files of docs/, triton_repo/ and helm/.")
    parser.add_argument("--check", action="store_true", help="only say whether the files are current")
    check = parser.parse_args(arguments).check
    table = docs / "profiles.md"
    pages = {docs / "cli.md": render()}
    if table.exists():
        pages[table] = profiles.with_table(table.read_text(encoding="utf-8"))
    serving = docs / "serving.md"
    if serving.exists():
        pages[serving] = with_serving_tables(serving.read_text(encoding="utf-8"))
    for page in sorted((docs / "targets").glob("*.md")):
        pages[page] = with_target_table(page.stem, page.read_text(encoding="utf-8"))
    names = {page: f"docs/{page.relative_to(docs)}" for page in pages}
    for name, text in repository_files().items():
        pages[models / name] = text
        names[models / name] = f"triton_repo/{name}"
    for name, text in helm_files().items():
        pages[values / name] = text
        names[values / name] = f"helm/canvasrt/profiles/{name}"
    stale = 0
    for page, text in pages.items():
        current = page.read_text(encoding="utf-8") if page.exists() else None
        if current == text:
            continue
        if check:
            state = "is missing" if current is None else "does not match its source"
            print(f"{names[page]} {state}. Write it: {COMMAND}", file=sys.stderr)
            stale = 1
        else:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
