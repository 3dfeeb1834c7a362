"""Inputs of a request as bytes, and the bytes of a response as values, both by the tables in `canvasrt.wire`.

Knows nothing of gRPC: a tensor is its declaration and its raw bytes, numbers little-endian, texts behind their length.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from canvasrt import wire
from canvasrt.errors import InputError, ServerError

_INPUTS = {tensor.name: tensor for tensor in wire.INPUTS}
_DTYPES: dict[str, Any] = {"BOOL": "?", "INT32": "<i4", "UINT32": "<u4", "UINT64": "<u8", "FP32": "<f4"}
_LENGTH_BYTES = 4  # before every text


@dataclass(frozen=True, slots=True)
class Response:
    """What one response says: a finished canvas, a draft of one, or, without stream, the whole answer.

    A field for each of `canvasrt.wire.OUTPUTS`, which tell what it means.
    """

    text_output: str
    finish_reason: str
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    canvas_index: int
    denoising_steps: int
    seed: int
    is_draft: bool
    draft_pieces: tuple[str, ...]
    draft_settled: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor of a request."""

    tensor: wire.Tensor
    count: int
    raw: bytes


def encode(inputs: Mapping[str, object]) -> list[Input]:
    """The tensors of a request. None stands for an input that is left out; ``messages`` may be the list itself.

    Raises InputError for an input that `canvasrt.wire` does not declare, or a value that does not fit it.
    """
    encoded = []
    for name, given in inputs.items():
        if name not in _INPUTS:
            raise InputError(f"{name} is no input of the server. It knows {', '.join(_INPUTS)}")
        if given is None:
            continue
        tensor = _INPUTS[name]
        values = _values(tensor, _json(given) if name == "messages" and not isinstance(given, str) else given)
        encode_all = _texts if tensor.dtype == "BYTES" else _numbers
        encoded.append(Input(tensor, len(values), encode_all(tensor, values)))
    return encoded


def decode(tensors: Mapping[str, tuple[str, bytes]]) -> Response:
    """A response from the datatype and raw bytes of its outputs by name.

    Raises ServerError for outputs that are not those of `canvasrt.wire`: the server is of another version.
    """
    values: dict[str, Any] = {}
    for tensor in wire.OUTPUTS:
        dtype, raw = tensors.get(tensor.name, ("nothing", b""))
        if dtype != tensor.dtype:
            raise ServerError(
                f"the server sent {dtype} as {tensor.name} and {tensor.dtype} was expected: is it of another version?"
            )
        found = _decoded(tensor, raw)
        if tensor.size == wire.ONE and len(found) != 1:
            raise ServerError(f"the server sent {len(found)} values as {tensor.name} and one was expected")
        values[tensor.name] = found[0] if tensor.size == wire.ONE else found
    return Response(**values)


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"messages: {error}") from None


def _values(tensor: wire.Tensor, value: object) -> list[object]:
    if tensor.size == wire.ONE:
        return [value]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InputError(f"{tensor.name}: a list is expected, not {value!r}")
    return list(value)


def _texts(tensor: wire.Tensor, values: list[object]) -> bytes:
    parts = []
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"{tensor.name}: a text is expected, not {value!r}")
        try:
            text = value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{tensor.name}: half a character at position {error.start}: send valid Unicode") from None
        parts += [len(text).to_bytes(_LENGTH_BYTES, "little"), text]
    return b"".join(parts)


def _numbers(tensor: wire.Tensor, values: list[object]) -> bytes:
    kinds = {"BOOL": (bool, np.bool_), "FP32": (float, int, np.floating, np.integer)}.get(tensor.dtype)
    for value in values:
        if not isinstance(value, kinds or (int, np.integer)) or (isinstance(value, bool) and tensor.dtype != "BOOL"):
            raise InputError(f"{tensor.name}: {tensor.dtype} is expected, not {value!r}")
    try:
        return np.array(values, dtype=_DTYPES[tensor.dtype]).tobytes()
    except OverflowError:
        raise InputError(f"{tensor.name}: {values} does not fit {tensor.dtype}") from None


def _decoded(tensor: wire.Tensor, raw: bytes) -> tuple[Any, ...]:
    if tensor.dtype == "BYTES":
        return tuple(_split(raw))
    try:
        return tuple(np.frombuffer(raw, dtype=_DTYPES[tensor.dtype]).tolist())
    except ValueError:
        raise ServerError(f"the server sent {len(raw)} bytes as {tensor.name}, which is no {tensor.dtype}") from None


def _split(raw: bytes) -> Iterator[str]:
    start = 0
    while start < len(raw):
        end = start + _LENGTH_BYTES + int.from_bytes(raw[start : start + _LENGTH_BYTES], "little")
        if end > len(raw):
            raise ServerError("the server sent a text that is shorter than it says")
        yield raw[start + _LENGTH_BYTES : end].decode(errors="replace")
        start = end
