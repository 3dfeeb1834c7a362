"""The canvas loop in a process of its own: same answers, and an end for everybody when it dies."""

import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from canvasrt.diffusion.request import RequestState
from canvasrt.errors import BusyError, CanvasRTError, CapacityError, CheckpointError, ServerError
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.torch_runner import TorchRunner
from canvasrt.scheduler.loop import Turn
from canvasrt.scheduler.types import ENDS, Event, Request
from canvasrt.serve import engine_process
from canvasrt.serve.engine_process import EngineProcess, _portable
from canvasrt.serve.intake import read_request
from canvasrt.serve.model import open_served
from canvasrt.serve.settings import ServeSettings
from canvasrt.serve.triton_log import LOST
from planning import DEMO
from service import tensors

SETTINGS = ["slots=2", "context=256", "threads=1", "max_waiting=1"]
ENDLESS = {"input_ids": [5, 6, 7], "ignore_eos": True, "stability_threshold": 1000, "max_denoising_steps": 48}


class Ear:
    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.turns: list[Turn] = []

    def __call__(self, events: Sequence[Event], turn: Turn | None) -> None:
        for event in events:
            self.events.put(event)
        if turn is not None:
            self.turns.append(turn)

    def end(self, timeout: float = 60) -> Event:
        """The next end of a request; what comes before it is dropped."""
        while (event := self.events.get(timeout=timeout)).kind not in ENDS:
            pass
        return event


@contextmanager
def running() -> Iterator[tuple[EngineProcess, Ear]]:
    engine, ear = EngineProcess.start(ServeSettings.parse(DEMO, SETTINGS)), Ear()
    engine.attach(ear)
    try:
        yield engine, ear
    finally:
        engine.close()
    assert engine._process.returncode is not None


@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[EngineProcess, Ear]]:
    with running() as made:
        yield made


def state_of(**values: Any) -> RequestState:
    served = open_served(ServeSettings.parse(DEMO, SETTINGS), 256)
    asked = read_request(tensors(**values), {}, served)
    return RequestState.new(asked.params, asked.prompt)


def test_answers_equal_those_of_a_runner_in_this_process(opened: tuple[EngineProcess, Ear]) -> None:
    engine, ear = opened
    assert (engine.limits.slots, engine.limits.context) == (2, 256)
    state = state_of(input_ids=list(range(20, 50)), max_tokens=100, ignore_eos=True, seed=2**63 + 5)
    engine.submit(Request(1, state))
    event = ear.end()
    runner = TorchRunner.open(DEMO, context=256)
    (expected,) = [each.state for each in run_requests(runner, {0: state}) if each.kind == "end"]
    assert (event.request, event.kind, event.state.output) == (1, "end", expected.output)
    assert event.state.passes == expected.passes
    assert sum(turn.denoised_rows for turn in ear.turns) == expected.passes  # every turn is told, if not at once
    assert engine.broken is None
    assert engine.stalled() == 0


def test_stop_texts_are_found_over_there(opened: tuple[EngineProcess, Ear]) -> None:
    engine, ear = opened
    prompt = "solve: 1"
    engine.submit(Request(2, state_of(text_input=prompt, max_tokens=96, ignore_eos=True, seed=1)))
    codec = open_served(ServeSettings.parse(DEMO, SETTINGS), 256).codec
    assert codec is not None
    whole = codec.decode(ear.end().state.output)
    stop = whole[3:5]
    values = {"text_input": prompt, "max_tokens": 96, "ignore_eos": True, "seed": 1, "stop_words": [stop]}
    engine.submit(Request(3, state_of(**values)))
    event = ear.end()
    assert event.state.finish_reason == "stop"
    assert len(event.state.output) == 48  # whole canvases: the service cuts the text


def test_a_full_queue_refuses_and_a_cancelled_request_ends(opened: tuple[EngineProcess, Ear]) -> None:
    engine, ear = opened
    for number in range(10, 13):  # two slots and one that waits
        engine.submit(Request(number, state_of(seed=number, max_tokens=200, **ENDLESS)))
    with pytest.raises(BusyError, match="wait"):
        engine.submit(Request(13, state_of(seed=13, max_tokens=200, **ENDLESS)))
    assert engine.stalled() < 30
    for number in range(10, 14):  # one of them was never taken
        engine.cancel(number)
    ended = {(event.request, event.kind) for event in (ear.end() for _ in range(3))}
    assert ended == {(number, "cancelled") for number in range(10, 13)}


def test_a_killed_engine_fails_its_requests_and_takes_no_more(capfd: pytest.CaptureFixture[str]) -> None:
    with running() as (engine, ear):
        engine.submit(Request(1, state_of(seed=1, max_tokens=200, **ENDLESS)))
        engine.submit(Request(2, state_of(seed=2, max_tokens=200, **ENDLESS)))
        waiting: list[Exception] = []

        def drain() -> None:
            waiting.append(Exception(str(engine.drain(30))))

        thread = threading.Thread(target=drain)
        thread.start()
        time.sleep(0.2)
        os.kill(engine._process.pid, signal.SIGKILL)
        ends = [ear.end(timeout=10) for _ in range(2)]
        assert {(event.request, event.kind) for event in ends} == {(1, "failed"), (2, "failed")}
        assert {str(event.error) for event in ends} == {"the engine process has ended (signal SIGKILL)"}
        thread.join(10)  # nobody waits for the dead
        assert [str(each) for each in waiting] == ["False"]
        assert isinstance(engine.broken, ServerError)
        with pytest.raises(BusyError, match="must be restarted: the engine process has ended"):
            engine.submit(Request(3, state_of(input_ids=[5], seed=3)))
        engine.cancel(1)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if LOST in line]  # for the supervisor
    assert json.loads(line)["message"] == "the engine process has ended (signal SIGKILL)"


def test_a_silent_engine_refuses_and_what_it_took_meanwhile_is_told_to_nobody(
    opened: tuple[EngineProcess, Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ear = opened
    monkeypatch.setattr(engine_process, "_ANSWER_SECONDS", 0.2)
    os.kill(engine._process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BusyError, match="does not answer"):
            engine.submit(Request(20, state_of(seed=20, max_tokens=200, **ENDLESS)))
        assert str(engine.broken) == "the engine process does not answer"
        assert engine.stalled() >= 0.2
    finally:
        os.kill(engine._process.pid, signal.SIGCONT)
    monkeypatch.undo()
    engine.submit(Request(21, state_of(input_ids=[5], seed=21, max_tokens=48)))
    event = ear.end()
    assert (event.request, event.kind) == (21, "end")
    assert engine.broken is None


def test_a_request_that_was_told_to_have_failed_is_not_refused_as_well(
    opened: tuple[EngineProcess, Ear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the process ends while a request is on its way: one end, whichever comes first."""
    engine, _ = opened

    def lost(*_: object) -> None:
        engine._states.clear()  # `_lost` tells all that are in it
        raise BusyError("the engine process has ended")

    monkeypatch.setattr(engine, "_call", lost)
    engine.submit(Request(30, state_of(input_ids=[5], seed=30)))
    monkeypatch.setattr(engine, "_call", lambda *_: BusyError("no room"))
    with pytest.raises(BusyError, match="no room"):
        engine.submit(Request(31, state_of(input_ids=[5], seed=31)))
    assert engine._states == {}


def test_closing_lets_requests_end_for_a_while_and_cancels_the_rest(capfd: pytest.CaptureFixture[str]) -> None:
    with running() as (engine, ear):
        engine.submit(Request(1, state_of(input_ids=[5], seed=1, max_tokens=48)))
        assert engine.drain(60)
        assert ear.end().kind == "end"
        with pytest.raises(BusyError, match="stopping"):
            engine.submit(Request(2, state_of(input_ids=[5], seed=2)))
    with running() as (engine, ear):
        engine.submit(Request(1, state_of(seed=1, max_tokens=200, **ENDLESS)))
        assert not engine.drain(0.05)
        engine.close()
        assert (ear.end().kind, ear.events.empty()) == ("cancelled", True)
    assert LOST not in capfd.readouterr().err  # nobody has to act


def test_an_engine_without_a_server_ends() -> None:
    with running() as (engine, ear):
        engine.submit(Request(1, state_of(seed=1, max_tokens=200, **ENDLESS)))
        assert ear.events.get(timeout=60).kind == "admitted"
        with socket.socket(fileno=os.dup(engine._connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)  # as when the server is killed
        assert engine._process.wait(10) == 0
        assert ear.end(timeout=10).kind == "failed"


def test_what_can_not_be_opened_is_refused_in_the_words_of_the_one_who_opens(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        EngineProcess.start(ServeSettings.parse(tmp_path, SETTINGS))
    with pytest.raises(CapacityError, match="exceeds the 1024 positions"):
        EngineProcess.start(ServeSettings.parse(DEMO, ["context=5000"]))


def test_an_engine_that_dies_while_it_opens_the_model_says_what_to_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(subprocess.Popen[bytes]):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            self.kill()

    monkeypatch.setattr(engine_process.subprocess, "Popen", Killed)
    with pytest.raises(ServerError, match=r"\(signal SIGKILL\)\. .* fewer slots or a smaller context"):
        EngineProcess.start(ServeSettings.parse(DEMO, SETTINGS))


def test_errors_of_libraries_that_the_server_has_not_loaded_are_told_as_text() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert repr(_portable(OutOfMemoryError("2 GiB"))) == "RuntimeError('OutOfMemoryError: 2 GiB')"
    for error in (ValueError("x"), CanvasRTError("y")):
        assert _portable(error) is error
