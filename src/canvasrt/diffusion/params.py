"""Parameters of generation: a checkpoint's generation_config.json, a request's options, and what both resolve to.

Precedence, as in the reference (``DiffusionGemmaGenerationConfig``): request option, then checkpoint, then the
documented default.
"""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from canvasrt.errors import CheckpointError, InputError

FILE = "generation_config.json"

Steps = Annotated[int, Field(ge=1, le=1024)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[tuple[TokenId, ...], BeforeValidator(lambda value: (value,) if isinstance(value, int) else value)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
# JSON has lists only, and a strict model takes no list for a tuple.
FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

# Below it, the schedule reaches a temperature that float32 can't tell from 0 within the steps allowed.
LEAST_T_MAX = 1e-3
_SHOWN_CHARACTERS = 60


class _Sampler(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    cls_name: Literal["EntropyBoundSamplerConfig"] = Field("EntropyBoundSamplerConfig", alias="_cls_name")
    entropy_bound: Positive


class GenerationConfig(BaseModel):
    """What we read of generation_config.json.

    Keys of other tools are left alone; a sampler we don't know is refused.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    max_denoising_steps: Steps = 48
    t_min: Temperature = 0.4
    t_max: Temperature = 0.8
    stability_threshold: Annotated[int, Field(ge=0, le=1024)] = 1
    confidence_threshold: Positive = 0.005
    sampler_config: _Sampler = _Sampler.model_validate({"entropy_bound": 0.1})
    eos_token_id: Annotated[TokenIds, FromList] | None = None
    pad_token_id: TokenId | None = None

    @classmethod
    def load(cls, folder: Path) -> "GenerationConfig":
        """Reads ``folder``/generation_config.json; the documented defaults when there is none.

        Raises CheckpointError that names file and field.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
        # null means "not set" to transformers
        values = {key: value for key, value in values.items() if value is not None}
        sampler = values.get("sampler_config")
        name = sampler.get("_cls_name", "EntropyBoundSamplerConfig") if isinstance(sampler, dict) else sampler
        if sampler is not None and name != "EntropyBoundSamplerConfig":
            raise CheckpointError(
                f"{path}: sampler_config: found {name!r}; this version knows EntropyBoundSamplerConfig only. "
                "Use a checkpoint made for that sampler, or a newer CanvasRT."
            )
        try:
            config = cls.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {_lines(error)}") from None
        if config.t_max < config.t_min:
            raise CheckpointError(f"{path}: t_max {config.t_max} is below t_min {config.t_min}")
        return config


class RequestOptions(BaseModel):
    """What a request may ask for; None leaves the checkpoint's value. Unknown options are refused, none is dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_denoising_steps: Steps | None = None
    t_min: Temperature | None = None
    t_max: Temperature | None = None
    entropy_bound: Positive | None = None
    stability_threshold: Annotated[int, Field(ge=0, le=1024)] | None = None
    confidence_threshold: Positive | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Annotated[tuple[StopText, ...], FromList] = Field((), max_length=16)
    stop_token_ids: Annotated[tuple[TokenId, ...], FromList] = Field((), max_length=64)
    ignore_eos: bool = False

    @classmethod
    def parse(cls, **values: Any) -> "RequestOptions":
        """Raises InputError with one line for each option that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise InputError(_lines(error)) from None


@dataclass(frozen=True, slots=True)
class RequestParams:
    """A request's parameters with every value decided."""

    seed: int
    max_tokens: int  # generated tokens, the end-of-sequence token not counted
    max_denoising_steps: int
    t_min: float
    t_max: float
    entropy_bound: float  # nats
    stability_threshold: int  # earlier steps whose argmax canvas must equal this one's
    confidence_threshold: float  # nats, mean over the canvas
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]  # the checkpoint's end-of-sequence tokens and the request's own
    canvas: int  # tokens per canvas
    vocabulary: int


def resolve(
    config: GenerationConfig,
    options: RequestOptions,
    *,
    eos_token_ids: tuple[int, ...],
    canvas: int,
    vocabulary: int,
    prompt_tokens: int,
    context: int,
) -> RequestParams:
    """Decides every parameter of a request with a prompt of ``prompt_tokens`` on a runner with ``context`` tokens a
    slot.

    ``eos_token_ids`` are config.json's, for checkpoints whose generation_config.json names none.
    Raises InputError: empty prompt, contradicting temperatures, token ids outside the vocabulary, prompt or answer too
    long.
    """
    if prompt_tokens < 1:
        raise InputError("the prompt is empty: at least one token is needed")
    t_min = config.t_min if options.t_min is None else options.t_min
    t_max = config.t_max if options.t_max is None else options.t_max
    if t_max < t_min or t_max < LEAST_T_MAX:
        raise InputError(
            f"t_max must be at least t_min and at least {LEAST_T_MAX}, not t_min {t_min} with t_max {t_max}"
        )
    if outside := [token for token in options.stop_token_ids if token >= vocabulary]:
        raise InputError(f"stop_token_ids: {outside} lie outside the vocabulary of {vocabulary}")
    eos = config.eos_token_id if config.eos_token_id is not None else eos_token_ids
    return RequestParams(
        seed=secrets.randbits(64) if options.seed is None else options.seed,
        max_tokens=_max_tokens(config, options, canvas, prompt_tokens, context),
        max_denoising_steps=options.max_denoising_steps or config.max_denoising_steps,
        t_min=t_min,
        t_max=t_max,
        entropy_bound=options.entropy_bound or config.sampler_config.entropy_bound,
        stability_threshold=(
            config.stability_threshold if options.stability_threshold is None else options.stability_threshold
        ),
        confidence_threshold=options.confidence_threshold or config.confidence_threshold,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        stop_token_ids=frozenset(options.stop_token_ids) | frozenset(() if options.ignore_eos else eos),
        canvas=canvas,
        vocabulary=vocabulary,
    )


def _max_tokens(
    config: GenerationConfig, options: RequestOptions, canvas: int, prompt_tokens: int, context: int
) -> int:
    room = (context - prompt_tokens) // canvas * canvas  # a canvas takes its whole length, even one that is cut
    if room < 1:
        raise InputError(
            f"the prompt of {prompt_tokens} tokens leaves no room for a canvas of {canvas} in the context of "
            f"{context}: shorten it to {max(context - canvas, 0)} tokens or use a larger context"
        )
    if options.max_tokens is None:
        # A checkpoint's max_new_tokens is a default, not a limit, and gives way to a long prompt.
        return min(config.max_new_tokens or 256, room)
    if options.max_tokens > room:
        raise InputError(
            f"max_tokens {options.max_tokens} does not fit: {prompt_tokens} prompt tokens leave room for {room} in the "
            f"context of {context}"
        )
    return options.max_tokens


def _lines(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        value = repr(item["input"])
        value = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}..."
        found = "" if item["type"] == "missing" else f", found {value}"
        message = "unknown option" if item["type"] == "extra_forbidden" else item["msg"]
        problems.append(f"{place}: {message}{found}")
    return "; ".join(problems)
