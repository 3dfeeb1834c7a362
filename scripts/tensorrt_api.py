"""Writes tests/fixtures/tensorrt-11.4-api.json: the names that the Python API of datacenter TensorRT has.

    .venv/bin/python scripts/tensorrt_api.py tensorrt_cu13_bindings-11.4.0.106-cp311-none-manylinux_2_28_x86_64.whl
    .venv/bin/python scripts/tensorrt_api.py --installed tensorrt_rtx

The wheel is the one on PyPI. Reading it wants gcc, nm and readelf, no TensorRT and no GPU: it is imported next to
libraries that hold nothing but the symbols it asks for. The second form prints the same of an installed package, to
compare; ``--types`` prints instead of writing, with the types. Knows what the bindings declare, which pybind11 writes
into docstrings, and not what the library behind them does. Methods that are only there to be overridden in Python and
that the bindings do not declare are missing.
"""

import argparse
import ctypes
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
OPENING, CLOSING = "([{", ")]}"


def from_wheel(wheel: Path, types: bool) -> dict[str, Any]:
    """The surface of a bindings wheel of TensorRT; nothing is installed and nothing of it is left behind."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        found = [path for path in Path(folder).glob("*/*.so") if path.stem.startswith("tensorrt")]
        if len(found) != 1:
            sys.exit(f"{wheel.name}: not a bindings wheel of TensorRT for Linux")
        _make_stubs(found[0])
        child = [sys.executable, __file__, "--installed", found[0].parent.name, *["--types"] * types]
        env = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(child, env=env, stdout=subprocess.PIPE, text=True, check=True)
    surface: dict[str, Any] = json.loads(done.stdout)
    return surface


def _make_stubs(binding: Path) -> None:
    """The libraries that `binding` was linked with, beside it, where its run path looks first.

    Each exports every unversioned symbol that the interpreter does not have already: those of TensorRT have no version,
    those of the C and C++ libraries do.
    """
    undefined = _output("nm", "-D", "--undefined-only", str(binding))
    here = ctypes.CDLL(None)
    symbols = [
        name
        for kind, name in (line.split()[-2:] for line in undefined.splitlines())
        if kind == "U" and "@" not in name and not hasattr(here, name)
    ]
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in symbols)
    for library in re.findall(r"\[(libnv\S+)\]", _output("readelf", "-d", str(binding))):
        build = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{library}", "-o", library]
        subprocess.run(build, input=source, text=True, cwd=binding.parent, check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def surface_of(name: str, types: bool = False) -> dict[str, Any]:
    """Every public name of the module `name`: its functions, its constants, and its classes with their members."""
    module = importlib.import_module(name)
    functions: dict[str, list[str]] = {}
    constants: list[str] = []
    classes: dict[str, Any] = {}

    def add_class(path: str, kind: type) -> None:
        classes[path] = _members(kind, types)
        for key, value in vars(kind).items():
            # an alias, such as Logger.Severity, has the name of another class
            if isinstance(value, type) and not key.startswith("_") and value.__qualname__ == f"{path}.{key}":
                add_class(f"{path}.{key}", value)

    for key, value in vars(module).items():
        if key.startswith("_") or inspect.ismodule(value):
            continue
        if isinstance(value, type):
            add_class(key, value)
        elif callable(value):
            functions[key] = _overloads(value, types)
        elif hasattr(type(value), "__members__"):
            constants.append(key)
    return {
        "version": module.__version__,
        "constants": sorted(constants),
        "functions": dict(sorted(functions.items())),
        "classes": dict(sorted(classes.items())),
    }


def _members(kind: type, types: bool) -> dict[str, Any]:
    """What the class adds to its bases. Groups that are empty are left out."""
    bases = [base.__qualname__ for base in kind.__bases__ if not base.__module__.startswith(("pybind11", "builtins"))]
    enum = getattr(kind, "__members__", {})
    groups: dict[str, Any] = {"bases": bases, "members": sorted(enum), "constants": [], "read": [], "write": []}
    methods: dict[str, list[str]] = {}
    for key, value in sorted(vars(kind).items()):
        if (key.startswith("_") and key != "__init__") or key in enum:
            continue
        if isinstance(value, property) or inspect.isdatadescriptor(value):
            label = f"{key}: {_returned(value)}" if types else key
            groups["write" if getattr(value, "fset", None) else "read"].append(label)
        elif isinstance(value, type) or not callable(getattr(kind, key)):
            groups["constants"].append(key)
        elif key != "__init__" or not enum:
            methods[key] = _overloads(getattr(kind, key), types)
    if methods.get("__init__") == ["args kwargs"]:
        del methods["__init__"]  # what a class without a constructor inherits
    groups["methods"] = methods
    return {key: group for key, group in groups.items() if group}


def _returned(value: Any) -> str:
    return _short((getattr(value.fget, "__doc__", None) or "").partition("-> ")[2].partition("\n")[0])


def _overloads(function: Any, types: bool) -> list[str]:
    """Each signature as its parameters, blank between them, `=` after one with a default."""
    document = function.__doc__ or ""
    lines = document.lstrip().splitlines()
    numbered = [line for line in lines if re.match(r"\d+\. \w+\(", line)]
    signatures = numbered or [line for line in lines[:1] if re.match(r"\w+\(.*\) -> ", line)]
    if signatures:
        return [_parameters(line, types) for line in signatures]
    try:
        names = inspect.signature(function).parameters.values()
    except ValueError:
        return []
    return [" ".join(each.name + "=" * (each.default is not each.empty) for each in names if each.name != "self")]


def _parameters(line: str, types: bool) -> str:
    """The parameters in a signature of pybind11, such as `f(self: a.b.T, x: int, y: a.b.E = <E.A: 0>) -> None`."""
    parts, depth = [""], 0
    for letter in line[line.index("(") + 1 :]:
        depth += (letter in OPENING) - (letter in CLOSING)
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    named = [part.strip() for part in parts if part.strip() and not part.strip().startswith("self:")]
    if types:
        return f"{', '.join(map(_short, named))} -> {_short(line.rpartition(' -> ')[2])}"
    return " ".join(part.partition(":")[0] + "=" * (" = " in part) for part in named)


def _short(text: str) -> str:
    return re.sub(r"\b(?:\w+\.)+(?=\w+)", "", text) if "'" not in text else text


def text_of(surface: dict[str, Any]) -> str:
    """JSON with one line for a class and one for a function."""

    def row(key: str, value: Any) -> str:
        return f"{json.dumps(key)}: {json.dumps(value)}"

    def table(rows: dict[str, Any]) -> str:
        return "{\n" + ",\n".join(f"  {row(*each)}" for each in rows.items()) + "\n }"

    parts = [
        f" {json.dumps(key)}: {table(value) if isinstance(value, dict) else json.dumps(value)}"
        for key, value in surface.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the names that the Python API of TensorRT has.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("wheel", nargs="?", type=Path, help="a tensorrt_cu13_bindings wheel")
    what.add_argument("--installed", metavar="PACKAGE", help="print those of an installed package instead")
    parser.add_argument("--types", action="store_true", help="write nothing; print, with the types")
    options = parser.parse_args(arguments)
    if options.installed:
        print(text_of(surface_of(options.installed, options.types)), end="")
        return 0
    surface = from_wheel(options.wheel, options.types)
    if options.types:
        print(text_of(surface), end="")
        return 0
    FIXTURES.mkdir(exist_ok=True)
    version = ".".join(surface["version"].split(".")[:2])
    page = FIXTURES / f"tensorrt-{version}-api.json"
    page.write_text(text_of(surface), encoding="utf-8")
    print(f"{page.relative_to(FIXTURES.parents[1])}: {len(surface['classes'])} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
