"""What Triton is told about the model is what `wire` declares, and settings survive the way through its config."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from canvasrt import wire
from canvasrt.serve.model_repository import CONFIG, SHIM, SHIM_TEXT, config_text, repository_files, write_repository
from canvasrt.serve.settings import ServeSettings

ROOT = Path(__file__).parents[1]
TYPES = {
    "TYPE_STRING": "BYTES",
    "TYPE_BOOL": "BOOL",
    "TYPE_INT32": "INT32",
    "TYPE_UINT32": "UINT32",
    "TYPE_UINT64": "UINT64",
    "TYPE_FP32": "FP32",
}


def declared(kind: str, text: str) -> dict[str, tuple[str, int, bool]]:
    """Type, size and whether it is optional of each tensor, read back without the code that wrote it."""
    (block,) = re.findall(rf"^{kind} \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    rows = re.findall(r'\{ name: "(\w+)" data_type: (\w+) dims: \[ (-?\d+) \]( optional: true)? \}', block)
    assert len(rows) == block.count("name:")
    return {name: (TYPES[kind], int(size), bool(optional)) for name, kind, size, optional in rows}


def test_every_tensor_of_the_wire_is_declared() -> None:
    text = config_text()
    assert declared("input", text) == {each.name: (each.dtype, each.size, True) for each in wire.INPUTS}
    assert declared("output", text) == {each.name: (each.dtype, each.size, False) for each in wire.OUTPUTS}


def test_the_committed_repository_is_what_would_be_written() -> None:
    for name, text in repository_files().items():
        assert (ROOT / "triton_repo" / name).read_text(encoding="utf-8") == text
    assert "parameters" not in config_text()
    assert len(SHIM_TEXT.splitlines()) <= 20


def test_the_shim_imports_a_module_that_is_there() -> None:
    (module,) = re.findall(r"^from (\S+) import TritonPythonModel$", SHIM_TEXT, flags=re.MULTILINE)
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(
    "folder", ["/plain", '/with "quotes" and \\backslash\\n', "/grüße/模型/\U0001f600", "/a\nb\tc"]
)
def test_settings_survive_the_way_through_the_config(folder: str, tmp_path: Path) -> None:
    settings = ServeSettings.parse(folder, ["slots=3", "log_level=debug", "reuse_prefixes=false"])
    write_repository(tmp_path, settings)
    text = (tmp_path / CONFIG).read_text(encoding="utf-8")
    assert text.isascii()
    (line,) = [line for line in text.splitlines() if line.startswith("parameters")]
    start, end = 'parameters { key: "settings" value { string_value: "', '" } }'
    assert line.startswith(start)
    assert line.endswith(end)
    quoted = line[len(start) : -len(end)]
    assert re.fullmatch(r'([^"\\]|\\["\\])*', quoted)  # the two escapes that protobuf and we agree on
    value = re.sub(r"\\(.)", r"\1", quoted)
    assert ServeSettings.model_validate_json(value) == settings
    assert json.loads(value)["slots"] == 3
    assert (tmp_path / SHIM).read_text(encoding="utf-8") == SHIM_TEXT
