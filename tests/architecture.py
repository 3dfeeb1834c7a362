"""Which module may import what, checked on the imports that a package's sources spell out.

Reads sources and never imports them. A conditional import, one inside a function and one under TYPE_CHECKING count
like any other, and so does `import_module("literal")`. Knows nothing of pytest.
"""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

# A module may import itself, the package root (which holds only the version) and what its row lists.
# A dotted entry opens that one file of another module and nothing else of it.
LAYERS = {
    "__init__": "",
    "errors": "",
    "spec": "errors",
    "wire": "errors",
    "settings": "errors",
    "profiles": "errors spec formats settings",
    "fingerprint": "errors tensorfile",
    "engine_weights": "errors checkpoint",
    "bundle": "errors settings profiles fingerprint",
    "inputs": "errors",
    "tensorfile": "errors",
    "formats": "errors",
    "layout": "errors spec formats tensorfile",
    "checkpoint": "errors spec formats layout tensorfile",
    "diffusion": "errors",
    "ops": "errors spec formats layout tensorfile checkpoint engine_weights",
    "network": "errors spec ops.protocol",
    "runtime": "errors spec bundle engine_weights checkpoint diffusion network ops",
    "scheduler": "errors spec diffusion runtime.protocol runtime.rows",
    "quality": "errors spec tensorfile checkpoint diffusion runtime",
    "quantize": "errors spec formats inputs settings tensorfile checkpoint ops.torch_formats reference serve",
    "compile": (
        "errors spec fingerprint engine_weights formats inputs settings layout tensorfile checkpoint network ops "
        "profiles bundle quantize.recipe"
    ),
    "serve": "errors spec wire bundle checkpoint diffusion runtime scheduler",
    "pipeline": "errors settings fingerprint tensorfile checkpoint profiles bundle inputs",
    "doctor": "errors spec formats settings profiles bundle compile",
    "client": "errors wire",
    "gateway": "errors wire",
    "reference": "errors spec checkpoint diffusion runtime ops network serve",
    "cli": "*",
}

# Third parties with weight, and the only files that import them. A name ending in / is a folder.
THIRD_PARTIES = {
    "torch": "ops/torch*.py runtime/torch*.py reference/ quantize/",
    "transformers": "serve/tokenizer.py reference/",
    "numba": "ops/cpu_kernels.py",
    "tensorrt": "ops/tensorrt_api.py",
    "tensorrt_rtx": "ops/tensorrt_api.py",
    "cuda": "runtime/cuda_device.py",
    "modelopt": "quantize/modelopt_model.py",
    "triton_python_backend_utils": "serve/triton_model.py",
    "fastapi": "gateway/app.py",
    "grpc": "client/connection.py",
    "tritonclient": "client/connection.py",
    "matplotlib": "cli/bench_plot.py",
    "boto3": "pipeline/s3.py",
    "botocore": "pipeline/s3.py",
    "huggingface_hub": "pipeline/hub.py",
    "oras": "pipeline/oci.py",
    "typer": "cli/",
    "rich": "cli/",
}

# Files that import, besides the package and the standard library, nothing but this. The first row that fits holds.
NOTHING_BUT = {
    "diffusion/params.py": "numpy pydantic",
    "diffusion/": "numpy",
}

ENVIRONMENT = "cli/"
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}

MAX_LINES = 400


def violations(root: Path) -> list[str]:
    """Every broken rule in the package whose folder is `root`, as `package/file.py:line: what`."""
    files = sorted(root.rglob("*.py"))
    if not files:
        return [f"{root}: no Python file found, so nothing was checked"]
    modules = _modules(root, files)
    found: list[str] = []
    unplaced: set[str] = set()
    for file in files:
        path = file.relative_to(root).as_posix()
        source = file.read_text(encoding="utf-8")
        owner = path.split("/")[0].removesuffix(".py")
        complaints: list[tuple[int, str]] = []
        if owner not in LAYERS and owner not in unplaced:
            unplaced.add(owner)
            complaints.append((1, f"no row of LAYERS places {owner}"))
        lines = len(source.splitlines())
        if lines > MAX_LINES:
            complaints.append((MAX_LINES + 1, f"{lines} lines, and a file has at most {MAX_LINES}"))
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            complaints.append((error.lineno or 1, f"cannot be parsed: {error.msg}"))
        else:
            for line, target in _imports(tree, root.name, path, modules):
                complaints += [(line, what) for what in _judge(root.name, path, owner, target)]
            complaints += _environment_uses(tree, path)
        found += [f"{root.name}/{path}:{line}: {what}" for line, what in sorted(set(complaints))]
    return found


def _modules(root: Path, files: list[Path]) -> set[str]:
    """Dotted names that are modules, not names inside one: those on disk and those that the tables speak of."""
    modules = {f"{root.name}.{entry}" for row in [*LAYERS, *LAYERS.values()] for entry in row.split()}
    for file in files:
        dotted = [root.name, *file.relative_to(root).with_suffix("").parts]
        modules |= {".".join(dotted[:end]) for end in range(1, len(dotted) + 1)}
    return modules


def _imports(tree: ast.AST, package: str, path: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """The line and full dotted name of every module that is imported; `from a import b` is a.b if that is a module."""
    parents = [package, *path.split("/")[:-1]]

    def absolute(name: str, level: int) -> str:
        if level == 0:
            return name
        return ".".join(parents[: max(len(parents) - level + 1, 0)] + [name] * bool(name))

    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = absolute(module or "", level)
                for alias in names:
                    inner = f"{base}.{alias.name}"
                    yield alias.lineno, inner if inner in modules else base
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                bare = name.lstrip(".")
                yield node.lineno, absolute(bare, len(name) - len(bare))


def _judge(package: str, path: str, owner: str, target: str) -> Iterator[str]:
    """What is wrong with the file at `path`, in module `owner`, importing `target`."""
    top, _, inside = target.partition(".")
    if top == package:
        row = LAYERS.get(owner, "*").split()
        own = inside.split(".")[0] in (owner, "")
        if not own and row != ["*"] and not any(_is_or_is_in(inside, entry) for entry in row):
            yield f"{owner} may not import {target}; it may import: {', '.join(row) or 'nothing'}"
        return
    for name, allowed in THIRD_PARTIES.items():
        if _is_or_is_in(target, name) and not _fits(path, allowed):
            yield f"{name} may be imported only in: {allowed}"
    for scope, allowed in NOTHING_BUT.items():
        if _fits(path, scope):
            if top not in sys.stdlib_module_names and top not in allowed.split():
                yield f"{scope} may not import {target}; of third parties it may import: {allowed}"
            break


def _environment_uses(tree: ast.AST, path: str) -> list[tuple[int, str]]:
    if _fits(path, ENVIRONMENT):
        return []
    nodes = list(ast.walk(tree))
    names_of_os = {
        alias.asname or "os"
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os" or (alias.name.startswith("os.") and alias.asname is None)
    }
    uses: list[tuple[int, str]] = []
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in names_of_os:
                uses.append((node.lineno, name))
            case ast.ImportFrom(module="os", names=names, level=0):
                uses += [(alias.lineno, alias.name) for alias in names]
    return [(line, f"os.{name} may be used only in: {ENVIRONMENT}") for line, name in uses if name in ENVIRONMENT_NAMES]


def _is_or_is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _fits(path: str, patterns: str) -> bool:
    return any(fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns.split())
