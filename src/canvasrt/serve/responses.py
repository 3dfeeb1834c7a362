"""One response as plain values, and as the arrays that `canvasrt.wire` declares."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvasrt import wire

_DTYPES: dict[str, Any] = {
    "BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "UINT32": np.uint32, "UINT64": np.uint64,
    "FP32": np.float32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Response:
    """Of one canvas, of one draft, or, without streaming, of the whole answer."""

    text: str
    input_tokens: int
    canvas: int
    steps: int
    seed: int
    finish_reason: str = ""
    cached_tokens: int = 0
    output_tokens: int = 0
    is_draft: bool = False
    pieces: Sequence[str] = field(default_factory=list)
    settled: Sequence[bool] = field(default_factory=list)


def ping_response() -> Response:
    return Response("alive", input_tokens=0, canvas=0, steps=0, seed=0)


def as_arrays(response: Response) -> dict[str, NDArray[Any]]:
    """By output name, with the batch dimension of 1 in front."""
    values: dict[str, Sequence[object]] = {
        "text_output": [response.text],
        "finish_reason": [response.finish_reason],
        "num_input_tokens": [response.input_tokens],
        "num_cached_tokens": [response.cached_tokens],
        "num_output_tokens": [response.output_tokens],
        "canvas_index": [response.canvas],
        "denoising_steps": [response.steps],
        "seed": [response.seed],
        "is_draft": [response.is_draft],
        "draft_pieces": response.pieces,
        "draft_settled": response.settled,
    }
    return {tensor.name: _array(tensor, values[tensor.name]) for tensor in wire.OUTPUTS}


def _array(tensor: wire.Tensor, values: Sequence[object]) -> NDArray[Any]:
    if tensor.dtype == "BYTES":
        values = [str(value).encode() for value in values]
    return np.array(values, dtype=_DTYPES[tensor.dtype]).reshape(1, len(values))
