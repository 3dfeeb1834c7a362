"""From the tensors of a request to what the scheduler runs: everything that can be wrong with a request is said here.

Knows nothing of Triton.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvasrt import wire
from canvasrt.diffusion.params import GenerationConfig, RequestOptions, RequestParams, resolve
from canvasrt.errors import InputError
from canvasrt.serve.prompts import check_messages
from canvasrt.serve.tokenizer import TextCodec
from canvasrt.spec import ModelSpec

Tensors = Mapping[str, NDArray[Any]]

_INPUTS = {tensor.name: tensor for tensor in wire.INPUTS}
_OPTIONS = (
    "seed", "max_tokens", "max_denoising_steps", "t_min", "t_max", "entropy_bound", "stability_threshold",
    "confidence_threshold", "top_k", "top_p", "ignore_eos",
)  # fmt: skip
_NEUTRAL = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "beam_width": 1}
_BYTES_PER_TOKEN = 256  # no token of a vocabulary is longer, so a text that is cannot fit
# What Triton itself puts among a request's parameters; a client's own unknown keys arrive there over HTTP.
_PARAMETERS = frozenset({"timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"})
_PARAMETER_PREFIX = "triton_"


@dataclass(frozen=True, slots=True)
class Served:
    """What requests are checked against."""

    spec: ModelSpec
    config: GenerationConfig
    context: int  # tokens per slot
    codec: TextCodec | None  # None: the model has no tokenizer, so token ids only


@dataclass(frozen=True, slots=True)
class Intake:
    """A request that can be run."""

    prompt: NDArray[np.int32]
    params: RequestParams
    stream: bool
    draft_every: int
    priority: int
    timeout: float | None  # seconds
    echo: str  # what the answer begins with


def is_ping(tensors: Tensors) -> bool:
    return "ping" in tensors and bool(_value(tensors, "ping"))


def read_request(tensors: Tensors, parameters: Mapping[str, object], served: Served) -> Intake:
    """Raises InputError with one sentence for each thing that is wrong."""
    for name in parameters:
        if name not in _PARAMETERS and not name.startswith(_PARAMETER_PREFIX):
            raise InputError(f"{name} is no input of this model. It knows {', '.join(_INPUTS)}")
    for name, neutral in _NEUTRAL.items():
        value = _value(tensors, name)
        if value is not None and value != neutral:
            raise InputError(f"{name} {value:g}: {_INPUTS[name].meaning}")
    options = _options(tensors, served.config)
    prompt, text = _prompt(tensors, served)
    stream, drafts = bool(_value(tensors, "stream")), _whole(tensors, "stream_drafts", 0, 1024)
    if drafts and not stream:
        raise InputError("stream_drafts needs stream: without it there is one response, the finished answer")
    priority = _whole(tensors, "priority_level", 0, wire.LOWEST_PRIORITY) or wire.DEFAULT_PRIORITY
    timeout = _value(tensors, "timeout_ms") or 0
    echo = text if text is not None and _value(tensors, "exclude_input_in_output") is False else ""
    params = resolve(
        served.config,
        options,
        eos_token_ids=served.spec.eos_token_ids,
        canvas=served.spec.canvas_length,
        vocabulary=served.spec.vocab_size,
        prompt_tokens=len(prompt),
        context=served.context,
    )
    return Intake(prompt, params, stream, drafts, priority, timeout / 1e3 if timeout else None, echo)


def _options(tensors: Tensors, config: GenerationConfig) -> RequestOptions:
    values = {name: value for name in _OPTIONS if (value := _value(tensors, name)) is not None}
    temperature = _value(tensors, "temperature")
    if temperature is not None:
        if "t_min" in values or "t_max" in values:
            raise InputError("temperature and t_min or t_max are two ways to say the same: send one of them")
        if temperature == 0:  # the schedule's temperatures decide what a step accepts, so none of them can be 0
            values.setdefault("seed", 0)
        else:
            values["t_max"] = temperature
            values["t_min"] = temperature * config.t_min / config.t_max
    stops = [text for text in _texts(tensors, "stop_words") if text]  # TensorRT-LLM's clients send "" for none
    return RequestOptions.parse(stop=tuple(stops), stop_token_ids=_ids(tensors, "stop_token_ids"), **values)


def _prompt(tensors: Tensors, served: Served) -> tuple[NDArray[np.int32], str | None]:
    """Token ids, and the text where it was one."""
    forms = [name for name in ("text_input", "messages", "input_ids") if name in tensors]
    if len(forms) != 1:
        found = "none of them" if not forms else " and ".join(forms)
        raise InputError(f"send one of text_input, messages and input_ids, not {found}")
    if forms == ["input_ids"]:
        ids = _ids(tensors, "input_ids")
        if any(token >= served.spec.vocab_size for token in ids):
            raise InputError(f"input_ids: {max(ids)} is outside the vocabulary of {served.spec.vocab_size}")
        return _without_images(np.array(ids, dtype=np.int32), served), None
    if served.codec is None:
        raise InputError("this model has no tokenizer.json: send input_ids")
    text = str(_value(tensors, forms[0]))
    if len(text) > _BYTES_PER_TOKEN * served.context:
        raise InputError(f"{forms[0]}: {len(text):,} characters can't fit the context of {served.context} tokens")
    if forms == ["text_input"]:
        return _without_images(served.codec.encode(text), served), text
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"messages: not JSON ({error})") from None
    return _without_images(served.codec.encode_chat(check_messages("messages", messages)), served), None


def _without_images(tokens: NDArray[np.int32], served: Served) -> NDArray[np.int32]:
    if (tokens == served.spec.image_token_id).any():
        raise InputError("the prompt holds image tokens, and this version reads text only: remove them")
    return tokens


def _whole(tensors: Tensors, name: str, least: int, most: int) -> int:
    value = _value(tensors, name) or 0
    if not least <= value <= most:
        raise InputError(f"{name} {value}: {least} to {most} expected")
    return int(value)


def _ids(tensors: Tensors, name: str) -> tuple[int, ...]:
    ids = tuple(int(value) for value in _values(tensors, name))
    if ids and min(ids) < 0:
        raise InputError(f"{name}: {min(ids)} is no token id")
    return ids


def _texts(tensors: Tensors, name: str) -> list[str]:
    return [str(value) for value in _values(tensors, name)]


def _value(tensors: Tensors, name: str) -> Any:
    """A Python value; None where the request does not have that input."""
    if name not in tensors:
        return None
    values = _values(tensors, name)
    if len(values) != 1:
        raise InputError(f"{name}: one value expected, found {len(values)}")
    return values[0]


def _values(tensors: Tensors, name: str) -> list[Any]:
    if name not in tensors:
        return []
    array = tensors[name].reshape(-1)
    dtype = _INPUTS[name].dtype
    if dtype == "BYTES":
        return [_text(name, value) for value in array.tolist()]
    if dtype == "FP32":  # 0.3 as FP32 is another number than 0.3, and the same seed must give the same text
        return [float(str(value)) for value in array]
    return list(array.tolist())


def _text(name: str, value: object) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
