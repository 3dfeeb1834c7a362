"""The canvas loop in a process of its own, as the service sees it and as it runs.

Python runs one thread at a time, and denoising is hundreds of short calls: where other threads take and send requests
in the same process, each of them makes a step wait. A runner that brings its process down takes no server with it.

Both sides pickle tuples into one socket. Calls are (number, verb, arguments) and answers (number, result); what the
loop tells has the number 0.
"""

import contextlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from canvasrt.diffusion.request import RequestState
from canvasrt.errors import DEVICE_EXIT, BusyError, CanvasRTError, DeviceError, ServerError
from canvasrt.scheduler.loop import CanvasLoop, Listener, Turn
from canvasrt.scheduler.types import ENDS, Event, Request
from canvasrt.serve.answer import StopText
from canvasrt.serve.log import write_line
from canvasrt.serve.model import OpenModel, open_model
from canvasrt.serve.settings import ServeSettings

_NEWS = 0  # number of what nobody asked for
_TURNS = 32  # that are told together at most where nothing else is to be told: each message wakes the other process
_ANSWER_SECONDS = 10.0  # a call is answered between two operations of a step
_END_SECONDS = 10.0
_TELL_SECONDS = 5.0  # between two lines about loading
_SILENT = "the engine process does not answer"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the other process has opened."""

    slots: int
    context: int


class EngineProcess:
    """Implements canvasrt.serve.service.Loop; made by `start`, told to whom by `attach`."""

    def __init__(self, process: "subprocess.Popen[bytes]", connection: Connection, limits: EngineLimits) -> None:
        self.limits = limits
        self._process = process
        self._connection = connection
        self._sending = threading.Lock()
        self._numbers = itertools.count(_NEWS + 1)
        self._waiting: dict[int, queue.SimpleQueue[Any]] = {}
        self._states: dict[int, RequestState] = {}  # of requests that have not ended, as last heard
        self._gone: ServerError | None = None
        self._closing = False
        self._lock = threading.Lock()  # of the three above
        self._listener: Listener
        self._reader = threading.Thread(target=self._read, name="engine", daemon=True)

    @classmethod
    def start(cls, settings: ServeSettings) -> "EngineProcess":
        """Opens the model there. Raises the CanvasRTError that it raises, ServerError where the process ends."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "canvasrt.serve.engine_process", str(theirs.fileno())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        connection = Connection(ours.detach())
        try:
            connection.send(settings.model_dump_json())
            opened = connection.recv()
        except (EOFError, OSError):
            raise ServerError(
                f"the engine process ended while it opened the model ({_how(process)}). Its last words stand above; "
                "after SIGKILL there are none: memory ran out, so ask for fewer slots or a smaller context"
            ) from None
        if isinstance(opened, Exception):
            process.wait(_END_SECONDS)
            raise opened
        return cls(process, connection, opened)

    def attach(self, listener: Listener) -> "EngineProcess":
        self._listener = listener
        self._reader.start()
        return self

    @property
    def broken(self) -> Exception | None:
        if self._gone is not None:
            return self._gone
        try:
            text = self._call("broken")
        except queue.Empty:
            text = _SILENT
        return None if text is None else ServerError(text)

    def stalled(self) -> float:
        """Seconds since the loop last turned while it had something to do."""
        try:
            seconds: float = self._call("stalled")
        except queue.Empty:
            return _ANSWER_SECONDS
        return seconds

    def submit(self, request: Request) -> None:
        """Raises BusyError as `CanvasLoop.submit` does; then no event follows."""
        with self._lock:
            self._states[request.id] = request.state
        try:
            refused = self._call("submit", replace(request, stop_check=None))
        except queue.Empty:
            refused = BusyError(_SILENT)
            self.cancel(request.id)  # it may be taken yet
        except BusyError as error:
            refused = error
        if refused is not None:
            with self._lock:
                told = self._states.pop(request.id, None) is None
            if not told:  # that it failed with the process
                raise refused

    def cancel(self, request: int) -> None:
        with contextlib.suppress(BusyError):  # it ended with its process
            self._send(next(self._numbers), "cancel", request)

    def drain(self, seconds: float) -> bool:
        try:
            return bool(self._call("drain", seconds, timeout=seconds + _ANSWER_SECONDS))
        except (BusyError, queue.Empty):
            return False

    def close(self) -> None:
        """Cancels what still runs, tells it, and ends the process."""
        self._closing = True
        with contextlib.suppress(BusyError, queue.Empty):
            self._call("close", timeout=_END_SECONDS)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _call(self, verb: str, *arguments: object, timeout: float | None = None) -> Any:
        """Raises BusyError where the process has ended, queue.Empty where it does not answer in time."""
        number, answer = next(self._numbers), queue.SimpleQueue[Any]()
        with self._lock:
            self._waiting[number] = answer
        try:
            self._send(number, verb, *arguments)
            result = answer.get(timeout=_ANSWER_SECONDS if timeout is None else timeout)
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if isinstance(result, ServerError):
            raise BusyError(f"the server is broken and must be restarted: {result}")
        return result

    def _send(self, number: int, verb: str, *arguments: object) -> None:
        if self._gone is not None:
            raise BusyError(f"the server is broken and must be restarted: {self._gone}")
        try:
            with self._sending:
                self._connection.send((number, verb, arguments))
        except OSError:
            raise BusyError("the server is broken and must be restarted: its engine process has ended") from None

    def _read(self) -> None:
        while True:
            try:
                number, *message = self._connection.recv()
            except (EOFError, OSError):
                self._lost()
                return
            if number == _NEWS:
                self._heard(*message)
            else:
                with self._lock:
                    answer = self._waiting.get(number)
                if answer is not None:
                    answer.put(message[0])

    def _heard(self, events: Sequence[Event], turns: Sequence[Turn]) -> None:
        with self._lock:
            events = [event for event in events if event.request in self._states]  # not of those that were given up
            for event in events:
                if event.kind in ENDS:
                    del self._states[event.request]
                else:
                    self._states[event.request] = event.state
        for turn in turns:
            self._listener((), turn)
        if events:
            self._listener(events, None)

    def _lost(self) -> None:
        """The process has ended, asked or not: everybody who waits for it is told."""
        gone = ServerError(f"the engine process has ended ({_how(self._process)})")
        if not self._closing:
            write_line("error", "engine lost", {"message": str(gone)})  # the supervisor reads it, and acts
        with self._lock:
            self._gone = gone
            states, self._states = self._states, {}
            answers = list(self._waiting.values())
        for answer in answers:
            answer.put(gone)
        now = time.monotonic()
        events = [Event(request, "failed", state, now, error=gone) for request, state in states.items()]
        if events:
            self._listener(events, None)


class _Engine:
    """The other side."""

    def __init__(self, connection: Connection, model: OpenModel) -> None:
        self._connection = connection
        self._served = model.served
        self._close = model.close
        self._sending = threading.Lock()
        self._turns: list[Turn] = []
        self._loop = CanvasLoop(model.runner, model.policy, self._tell, on_broken=_end_with_the_gpu)

    def serve(self) -> None:
        while True:
            try:
                number, verb, arguments = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the server is gone, whatever the loop is doing
            if verb == "drain":  # takes its time, in which others cancel
                threading.Thread(target=self._answer, args=(number, verb, arguments), daemon=True).start()
            else:
                self._answer(number, verb, arguments)
            if verb == "close":
                self._close()
                return

    def _answer(self, number: int, verb: str, arguments: tuple[Any, ...]) -> None:
        result: object = None
        if verb == "submit":
            result = self._submit(*arguments)
        elif verb == "cancel":
            self._loop.cancel(*arguments)
        elif verb == "drain":
            result = self._loop.drain(*arguments)
        elif verb == "stalled":
            result = self._loop.stalled()
        elif verb == "broken":
            result = None if self._loop.broken is None else str(_portable(self._loop.broken))
        else:
            self._loop.close()
        self._send((number, result))

    def _submit(self, request: Request) -> CanvasRTError | None:
        stops = request.state.params.stop
        codec = self._served.codec
        if stops and codec is not None:
            request = replace(request, stop_check=StopText(codec.decode, stops))
        try:
            self._loop.submit(request)
        except CanvasRTError as error:
            return error
        return None

    def _tell(self, events: Sequence[Event], turn: Turn | None) -> None:
        if turn is not None:
            self._turns.append(turn)
        if not events and len(self._turns) < _TURNS:
            return
        # Nobody there reads what is to be encoded, and a prompt can be long.
        light = [
            replace(
                event,
                state=replace(event.state, to_encode=event.state.to_encode[:0]),
                error=None if event.error is None else _portable(event.error),
            )
            for event in events
        ]
        turns, self._turns = self._turns, []
        self._send((_NEWS, light, turns))

    def _send(self, message: tuple[object, ...]) -> None:
        with contextlib.suppress(OSError), self._sending:  # a server that is gone ends us in `serve`
            self._connection.send(message)


def _end_with_the_gpu(error: Exception) -> None:
    """After a CUDA error nothing runs in this process any more, and its memory is given back only when it ends."""
    if isinstance(error, DeviceError):
        write_line("error", "broken", {"message": str(error), "exit_code": DEVICE_EXIT})
        os._exit(DEVICE_EXIT)


class _Loading:
    """Tells the server's log how far the model is loaded: at the start of each part, then every few seconds."""

    def __init__(self) -> None:
        self._part = ""
        self._told = 0.0

    def __call__(self, part: str, done: int, whole: int) -> None:
        now = time.monotonic()
        if part != self._part or now - self._told >= _TELL_SECONDS or done == whole:
            self._part, self._told = part, now
            write_line("info", "loading", {"part": part, "done": done, "of": whole})


def _portable(error: Exception) -> Exception:
    """One that the other process can make of what it gets: a device's error belongs to a library it has not loaded."""
    known = isinstance(error, CanvasRTError | DeviceError) or type(error).__module__ == "builtins"
    return error if known else RuntimeError(f"{type(error).__name__}: {error}")


def _how(process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return "it closed its connection but runs"
    if code == DEVICE_EXIT:
        return f"exit code {code}: the GPU failed, as its log says"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main(descriptor: int) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; the server says when to end
        signal.signal(each, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        model = open_model(ServeSettings.model_validate_json(connection.recv()), _Loading())
    except (CanvasRTError, DeviceError) as error:
        connection.send(error if isinstance(error, CanvasRTError) else ServerError(str(error)))
        sys.exit(0 if isinstance(error, CanvasRTError) else DEVICE_EXIT)
    connection.send(EngineLimits(model.runner.limits.slots, model.runner.limits.context))
    _Engine(connection, model).serve()


if __name__ == "__main__":
    from canvasrt.serve.engine_process import main as importable  # classes of __main__ could not be pickled

    importable(int(sys.argv[1]))
