"""The module boundaries hold, and every rule that says so is shown to fail when it is broken."""

from collections.abc import Mapping
from pathlib import Path

import pytest

import canvasrt
from architecture import LAYERS, MAX_LINES, THIRD_PARTIES, violations

ANYWHERE = "a_file_that_no_rule_names.py"


def plant(tmp_path: Path, files: Mapping[str, str]) -> Path:
    root = tmp_path / "canvasrt"
    for path, source in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return root


def test_the_package_keeps_its_boundaries() -> None:
    assert violations(Path(canvasrt.__file__).parent) == []


def test_an_empty_folder_is_a_violation(tmp_path: Path) -> None:
    (violation,) = violations(tmp_path)
    assert violation == f"{tmp_path}: no Python file found, so nothing was checked"


def test_every_row_speaks_of_modules_that_have_a_row() -> None:
    listed = {entry.split(".")[0] for row in LAYERS.values() for entry in row.split()} - {"*"}
    assert listed <= LAYERS.keys()
    assert "cli" not in listed


@pytest.mark.parametrize("owner", [name for name, row in LAYERS.items() if row != "*"])
def test_a_module_imports_only_what_its_row_lists(tmp_path: Path, owner: str) -> None:
    row = LAYERS[owner].split()
    forbidden = [name for name in LAYERS if name not in {"__init__", owner, *row}]
    allowed = [name for name in row if "." not in name]
    source = "".join(f"import canvasrt.{name}\n" for name in forbidden + allowed)
    path = f"{owner}.py" if owner == "__init__" else f"{owner}/deep/file.py"
    found = violations(plant(tmp_path, {path: source}))
    assert len(found) == len(forbidden)
    for line, (violation, name) in enumerate(zip(found, forbidden, strict=True), start=1):
        assert violation.startswith(f"canvasrt/{path}:{line}: {owner} may not import canvasrt.{name}; ")


@pytest.mark.parametrize("name", THIRD_PARTIES)
def test_a_heavy_third_party_is_imported_only_where_its_row_says(tmp_path: Path, name: str) -> None:
    allowed = [
        f"{pattern}any.py" if pattern.endswith("/") else pattern.replace("*", "_any")
        for pattern in THIRD_PARTIES[name].split()
    ]
    places = {"errors.py", "ops/protocol.py", "runtime/fake.py", "serve/model.py", "compile/plan.py", "gateway/grpc.py"}
    root = plant(tmp_path, dict.fromkeys([*places, *allowed], f"\nimport {name}.inner\n"))
    expected = [f"canvasrt/{path}:2: {name} may be imported only in: {THIRD_PARTIES[name]}" for path in sorted(places)]
    assert violations(root) == expected


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("network/text.py", "\nfrom canvasrt.ops import TorchOps", "2: network may not import canvasrt.ops; "),
        ("network/text.py", "from canvasrt import ops", "1: network may not import canvasrt.ops; "),
        ("network/text.py", "import canvasrt.ops.torch", "1: network may not import canvasrt.ops.torch; "),
        ("network/text.py", "from ..ops import torch", "1: network may not import canvasrt.ops"),
        ("network/text.py", "from .. import cli", "1: network may not import canvasrt.cli; "),
        ("network/a/b.py", "from ...cli.main import main", "1: network may not import canvasrt.cli.main; "),
        ("scheduler/plan.py", "from canvasrt.runtime import FakeRunner", "1: scheduler may not import"),
        ("gateway/app.py", "from canvasrt.bundle import Manifest", "1: gateway may not import canvasrt.bundle; "),
        ("runtime/kv.py", "def f():\n    from canvasrt.serve import x", "2: runtime may not import canvasrt.serve; "),
        ("wire.py", "import typing\nif typing.TYPE_CHECKING:\n    import canvasrt.spec", "3: wire may not import"),
        ("wire.py", "from canvasrt import (\n    __version__,\n    spec,\n)", "3: wire may not import canvasrt.spec; "),
        ("wire.py", "import importlib\nimportlib.import_module('canvasrt.cli')", "2: wire may not import canvasrt.cli"),
        ("wire.py", "__import__('torch')", "1: torch may be imported only in: "),
        ("errors.py", "from torch.nn import functional", "1: torch may be imported only in: "),
        ("runtime/fake.py", "def f():\n    import torch", "2: torch may be imported only in: "),
        ("diffusion/noise.py", "import numpy\nimport scipy.stats", "2: diffusion/ may not import scipy.stats; "),
        ("diffusion/noise.py", "import pydantic", "1: diffusion/ may not import pydantic; "),
        ("diffusion/params.py", "import yaml", "1: diffusion/params.py may not import yaml; "),
        ("spec.py", "import os\n\nos.environ['A']", "3: os.environ may be used only in: cli/"),
        ("spec.py", "import os.path\nos.getenv('A')", "2: os.getenv may be used only in: cli/"),
        ("spec.py", "import os as system\nsystem.getenv('A')", "2: os.getenv may be used only in: cli/"),
        ("spec.py", "from os import path, environ", "1: os.environ may be used only in: cli/"),
        (ANYWHERE, "", "1: no row of LAYERS places a_file_that_no_rule_names"),
        ("new_folder/deep/file.py", "", "1: no row of LAYERS places new_folder"),
        ("cli/main.py", "#\n" * (MAX_LINES + 1), "401: 401 lines, and a file has at most 400"),
        ("cli/main.py", "\ndef", "2: cannot be parsed: "),
    ],
)
def test_a_planted_violation_is_the_only_one_and_is_named_by_file_and_line(
    tmp_path: Path, path: str, source: str, expected: str
) -> None:
    (violation,) = violations(plant(tmp_path, {path: source}))
    assert violation.startswith(f"canvasrt/{path}:{expected}")


def test_what_the_rules_allow_is_no_violation(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "__init__.py": "__version__ = '1'",
            "network/text.py": "from canvasrt.ops import protocol\nfrom canvasrt.ops.protocol import Ops\n",
            "network/layer.py": "from . import text\nfrom .text import x\nfrom .. import __version__\nimport torchlike",
            "scheduler/plan.py": "from ..runtime.protocol import EngineRunner\nimport canvasrt.diffusion.state",
            "diffusion/params.py": "from __future__ import annotations\nimport math, numpy, pydantic",
            "diffusion/noise.py": "import hashlib\nfrom numpy import random\nfrom canvasrt.errors import CanvasError",
            "ops/protocol.py": "import os\nos.path.join\nfrom os import fspath\nclass A:\n    environ = 1\nA.environ",
            "cli/main.py": "import os, rich, typer\nfrom canvasrt.serve import x\nos.environ\n"
            + "#\n" * (MAX_LINES - 3),
        },
    )
    assert violations(root) == []


def test_a_new_folder_is_reported_once(tmp_path: Path) -> None:
    root = plant(tmp_path, {"utils/a.py": "import canvasrt.cli", "utils/b.py": ""})
    assert violations(root) == ["canvasrt/utils/a.py:1: no row of LAYERS places utils"]
