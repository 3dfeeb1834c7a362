"""Errors by kind: the words of a server's message as our exceptions, and our exceptions as those words."""

from canvasrt import wire
from canvasrt.errors import BusyError, CancelledError, CanvasRTError, InputError, ServerError, TimedOutError

_CLASSES: dict[wire.ErrorKind, type[CanvasRTError]] = {
    wire.INVALID: InputError,
    wire.BUSY: BusyError,
    wire.TIMED_OUT: TimedOutError,
    wire.CANCELLED: CancelledError,
    wire.FAILED: ServerError,
}
_STOPPING = "has no available versions"  # Triton's words while it stops, or before the model is loaded


def failure(message: str) -> CanvasRTError:
    """The exception for a server's error message, without the kind's words where it begins with one.

    Messages of other origin are Triton's own: it found no model, or the process that runs it has ended.
    """
    for kind, error in _CLASSES.items():
        if message.startswith(f"{kind}: "):
            return error(message.removeprefix(f"{kind}: "))
    if _STOPPING in message:
        return BusyError(f"the server is stopping or not ready yet: {message}")
    return ServerError(message)


def kind_of(error: CanvasRTError) -> wire.ErrorKind:
    """The opposite of `failure`, for counting."""
    return next((kind for kind, each in _CLASSES.items() if isinstance(error, each)), wire.FAILED)
