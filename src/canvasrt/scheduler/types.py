"""What goes into the scheduler and comes out of it: requests, ticks, outcomes, events. Values only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from canvasrt.diffusion.request import RequestState
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow

# Called with a request's state after each finished canvas; True ends the request there (stop strings).
StopCheck = Callable[[RequestState], bool]


@dataclass(frozen=True, slots=True)
class Policy:
    """How requests share a runner."""

    canvases: int  # rows of one denoising call
    prefill_tokens: int  # prompt tokens that one tick encodes at most, of all requests together
    max_waiting: int  # requests beyond the free slots that may wait
    patience: int = 16  # later requests that may be admitted before a waiting one
    reuse_prefixes: bool = True  # slots keep the tokens of requests that have ended


@dataclass(frozen=True, slots=True)
class Request:
    """``state`` is new: its prompt is all still to encode."""

    id: int
    state: RequestState
    priority: int = 3  # 1 goes first
    deadline: float | None = None  # seconds, on the clock whose time plan() is given
    draft_every: int = 0  # steps; 0: no drafts
    stop_check: StopCheck | None = None


# draft: a step that was asked for; canvas: one is finished and another follows; end: the last one is finished.
# The other three end a request too.
EventKind = Literal["admitted", "draft", "canvas", "end", "failed", "cancelled", "timed out"]
ENDS = frozenset({"end", "failed", "cancelled", "timed out"})


@dataclass(frozen=True, slots=True)
class Event:
    request: int
    kind: EventKind
    state: RequestState
    time: float  # when it was planned or applied, seconds on the clock
    cached_tokens: int = 0  # of the prompt, found in the slot
    error: Exception | None = None  # why it failed


@dataclass(frozen=True, slots=True)
class Tick:
    """One turn: release, then encode, then denoise. A slot that encodes its last tokens may denoise in it too."""

    number: int
    release: tuple[int, ...] = ()
    encode: tuple[EncodeRow, ...] = ()
    denoise: tuple[DenoiseRow, ...] = ()
    events: tuple[Event, ...] = ()  # what happened while planning


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the runner made of a tick, by slot. A slot that failed to encode was not denoised."""

    denoised: Mapping[int, DenoiseResult] = field(default_factory=dict)
    failed: Mapping[int, Exception] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a scheduler is."""

    waiting: int
    running: int
    kept: int  # slots that hold the tokens of requests that have ended
    context_tokens: int  # of running requests
    kept_tokens: int
