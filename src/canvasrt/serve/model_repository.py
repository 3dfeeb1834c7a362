"""Writes Triton's model repository: one model, declared by `canvasrt.wire`, whose model.py only imports ours.

`triton_repo/` is written from here too (scripts/generate_docs.py), without settings.
"""

import json
from pathlib import Path

from canvasrt.serve.settings import PARAMETER, ServeSettings
from canvasrt.wire import INPUTS, MODEL, OUTPUTS, Tensor

CONFIG = f"{MODEL}/config.pbtxt"
SHIM = f"{MODEL}/1/model.py"

SHIM_TEXT = '''\
"""What Triton's Python backend loads: the model itself is in the installed package. Written by generate_docs.py."""

from canvasrt.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def config_text(settings: ServeSettings | None = None) -> str:
    """config.pbtxt; the model's settings are a parameter in it."""
    blocks = [
        "# Written by scripts/generate_docs.py from src/canvasrt/wire.py; do not edit.",
        f'name: "{MODEL}"',
        'backend: "python"',
        "# A batch is what the scheduler makes of all running requests, so each request is a batch of one.",
        "max_batch_size: 1",
        "model_transaction_policy { decoupled: true }",
        "instance_group [ { kind: KIND_MODEL count: 1 } ]",
        _tensors("input", INPUTS, " optional: true"),
        _tensors("output", OUTPUTS, ""),
    ]
    if settings is not None:
        value = _quoted(json.dumps(settings.model_dump(mode="json")))
        blocks.append(f'parameters {{ key: "{PARAMETER}" value {{ string_value: {value} }} }}')
    return "\n".join(blocks) + "\n"


def repository_files(settings: ServeSettings | None = None) -> dict[str, str]:
    """Texts by their place in the repository."""
    return {CONFIG: config_text(settings), SHIM: SHIM_TEXT}


def write_repository(folder: Path, settings: ServeSettings | None = None) -> None:
    for name, text in repository_files(settings).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _tensors(kind: str, tensors: tuple[Tensor, ...], more: str) -> str:
    rows = [f'  {{ name: "{each.name}" data_type: {_type(each)} dims: [ {each.size} ]{more} }}' for each in tensors]
    return f"{kind} [\n" + ",\n".join(rows) + "\n]"


def _type(tensor: Tensor) -> str:
    return "TYPE_STRING" if tensor.dtype == "BYTES" else f"TYPE_{tensor.dtype}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format. ``text`` is JSON in ASCII, which has no control characters."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
