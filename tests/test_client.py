"""The client against a server that misbehaves on demand. `tests/test_client_server.py` has a real one."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from canvasrt import wire
from canvasrt.client.connection import Client
from canvasrt.client.failures import failure, kind_of
from canvasrt.client.tensors import Response, decode, encode
from canvasrt.errors import (
    BusyError,
    CancelledError,
    CanvasRTError,
    CapacityError,
    InputError,
    ServerError,
    TimedOutError,
)
from scripted_server import Message, canvas, data, draft, end, error, pack, scripted

MANY = 16


def two_canvases(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
    yield data(canvas(inputs["text_input"]))
    yield data(canvas(" end", 1, "stop"))
    yield end()


def endless(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
    yield data(canvas("one"))
    while context.is_active():
        time.sleep(0.01)


def texts(responses: Iterator[Response]) -> str:
    return "".join(response.text_output for response in responses)


def test_a_response_has_a_field_for_every_output() -> None:
    assert [field.name for field in dataclasses.fields(Response)] == [tensor.name for tensor in wire.OUTPUTS]


def test_inputs_are_written_as_the_wire_declares_them() -> None:
    given: dict[str, Any] = {
        "text_input": "grün", "input_ids": [1, -2], "stream": True, "seed": 2**64 - 1, "stop_words": ["a", "bb"],
        "temperature": 0.5, "timeout_ms": 2**32 - 1, "top_k": None,
    }  # fmt: skip
    encoded = {each.tensor.name: (each.count, each.raw) for each in encode(given)}
    dtypes = {tensor.name: tensor.dtype for tensor in wire.INPUTS}
    given.pop("top_k")
    assert encoded == {
        name: (len(values), pack(dtypes[name], values))
        for name, values in ((name, value if isinstance(value, list) else [value]) for name, value in given.items())
    }


def test_messages_may_be_the_list_itself() -> None:
    messages = [{"role": "user", "content": "ü"}]
    (tensor,) = encode({"messages": messages})
    assert json.loads(tensor.raw[4:]) == messages
    assert encode({"messages": json.dumps(messages, ensure_ascii=False)}) == [tensor]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"max_token": 1}, "max_token is no input"),
        ({"max_tokens": 2**31}, "does not fit INT32"),
        ({"seed": -1}, "does not fit UINT64"),
        ({"max_tokens": 1.5}, "INT32 is expected, not 1.5"),
        ({"max_tokens": True}, "INT32 is expected, not True"),
        ({"stream": 1}, "BOOL is expected, not 1"),
        ({"temperature": "hot"}, "FP32 is expected"),
        ({"stop_words": "abc"}, "a list is expected"),
        ({"text_input": b"abc"}, "a text is expected"),
        ({"text_input": "\ud800"}, "half a character"),
        ({"messages": [{"role": "user", "content": {1, 2}}]}, "messages: "),
    ],
)
def test_an_input_that_does_not_fit_is_refused_before_it_is_sent(inputs: dict[str, Any], message: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InputError, match=message):
        client.generate(**inputs)


def outputs(response: Response) -> dict[str, tuple[str, bytes]]:
    answer = data(response).infer_response
    return {
        output.name: (output.datatype, raw)
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


@pytest.mark.parametrize("response", [canvas("grün\n", 3, "stop", seed=2**64 - 1), draft("ab", 1), canvas("")])
def test_a_response_is_read_as_it_was_written(response: Response) -> None:
    assert decode(outputs(response)) == response


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": ("INT32", b"\0\0\0\0")}, "INT32 as seed and UINT64 was expected"),
        ({"text_output": ("BYTES", b"\x09\0\0\0abc")}, "shorter than it says"),
        ({"text_output": ("BYTES", b"")}, "0 values as text_output"),
        ({"canvas_index": ("INT32", b"\0")}, "1 bytes as canvas_index"),
    ],
)
def test_outputs_of_another_version_are_an_error_of_the_server(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        decode({**outputs(canvas("x")), **changed})
    with pytest.raises(ServerError, match="nothing as text_output"):
        decode({})


def test_kinds_become_classes_and_classes_kinds() -> None:
    classes = dict(
        zip(wire.ERROR_KINDS, [InputError, BusyError, TimedOutError, CancelledError, ServerError], strict=True)
    )
    for kind, expected in classes.items():
        found = failure(f"{kind}: what happened: a thing")
        assert type(found) is expected
        assert str(found) == "what happened: a thing"
        assert kind_of(found) == kind
    assert isinstance(failure("busy: x"), CapacityError)
    assert isinstance(failure("Stub process 'diffusion_gemma_0_0' is not healthy."), ServerError)
    assert isinstance(failure("Request for unknown model: 'diffusion_gemma' has no available versions"), BusyError)
    assert kind_of(CanvasRTError("of another kind")) == wire.FAILED


@pytest.mark.parametrize("address", ["", "localhost", "http://localhost:8001", "a b:1", "host:99999", "host:", ":80"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        Client(address)


def test_what_is_asked_reaches_the_server_and_the_answer_the_client() -> None:
    seen: list[dict[str, Any]] = []

    def script(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        seen.append(inputs)
        yield data(draft("ab", 1))
        yield data(canvas("ab", 0, "stop"), final=True)

    with scripted(script) as url, Client(url) as client:
        client.ping()
        got = list(client.generate(text_input="x", stop_words=["a", "b"], seed=3, top_k=None, stream_drafts=1))
        once = list(client.generate(text_input="x", stream=False))
    assert got == once == [draft("ab", 1), canvas("ab", 0, "stop")]
    assert seen[0] == {"text_input": "x", "stop_words": ["a", "b"], "seed": 3, "stream_drafts": 1, "stream": True}
    assert seen[1] == {"text_input": "x", "stream": False}


def test_one_client_serves_many_threads() -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = texts(client.generate(text_input=f"no. {number}"))

    with scripted(two_canvases) as url, Client(url) as client:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(MANY)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {number: f"no. {number} end" for number in range(MANY)}


def test_closing_the_iterator_cancels_at_the_server_and_harms_nobody() -> None:
    ended = threading.Event()

    def script(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        if inputs["text_input"] == "endless":
            context.add_callback(ended.set)
            yield from endless(inputs, context)
        yield from two_canvases(inputs, context)

    with scripted(script) as url, Client(url) as client:
        running = client.generate(text_input="endless")
        assert next(running).text_output == "one"
        running.close()
        assert list(running) == []
        assert ended.wait(5)
        assert texts(client.generate(text_input="next")) == "next end"
        running.close()  # once more: nothing


def test_a_loop_that_is_left_cancels_too() -> None:
    ended = threading.Event()

    def script(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        context.add_callback(ended.set)
        yield from endless(inputs, context)

    with scripted(script) as url, Client(url) as client:
        for _ in client.generate(text_input="x"):
            break
        assert ended.wait(5)


def test_closing_the_client_ends_the_requests_of_other_threads() -> None:
    found: list[BaseException] = []
    with scripted(endless) as url:
        client = Client(url)
        running = client.generate(text_input="x")
        next(running)

        def read() -> None:
            try:
                next(running)
            except CanvasRTError as error:
                found.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        client.close()
        thread.join(5)
        assert [type(each) for each in found] == [CancelledError]
        with pytest.raises(CancelledError, match="closed"):
            client.generate(text_input="x")


@pytest.mark.parametrize(
    ("sent", "kind", "message"),
    [
        ([error("invalid request: max_tokens 5000 does not fit")], InputError, "^max_tokens 5000"),
        ([data(canvas("x")), error("busy: the server is stopping")], BusyError, "^the server is stopping"),
        ([data(canvas("x")), end()], ServerError, "without a finish_reason"),
        ([data(canvas("x", 0, "stop"))], ServerError, "before it was complete"),
        ([], ServerError, "before it was complete"),
    ],
)
def test_an_answer_that_ends_wrongly_is_an_error(sent: list[Message], kind: type[Exception], message: str) -> None:
    with (
        scripted(lambda inputs, context: iter(sent)) as url,
        Client(url) as client,
        pytest.raises(kind, match=message),
    ):
        list(client.generate(text_input="x"))


def test_a_connection_that_breaks_is_an_error_that_says_where() -> None:
    with scripted(endless) as url:
        client = Client(url)
        running = client.generate(text_input="x")
        next(running)
    with client:
        with pytest.raises(ServerError, match="broke after 1 responses"):
            next(running)
        with pytest.raises(ServerError, match=r"no server answers at .*canvasrt serve"):
            list(client.generate(text_input="x"))
        with pytest.raises(ServerError, match="no server answers"):
            client.ping()


def test_a_server_whose_model_is_dead_is_noticed_by_a_ping() -> None:
    """The connection stands and nothing comes: what Triton does when its Python process was killed."""
    dead = error("Stub process 'diffusion_gemma_0_0' is not healthy.")
    with scripted(endless, pings=lambda: dead) as url, Client(url, quiet_seconds=0.2) as client:
        running = client.generate(text_input="x")
        started = time.monotonic()
        with pytest.raises(ServerError, match="not healthy"):
            list(running)
        assert time.monotonic() - started < 5


def test_a_server_that_is_stopping_may_finish_what_it_has_begun() -> None:
    def slow(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        time.sleep(0.6)
        yield from two_canvases(inputs, context)

    stopping = error("Request for unknown model: 'diffusion_gemma' has no available versions")
    with scripted(slow, pings=lambda: stopping) as url, Client(url, quiet_seconds=0.1) as client:
        assert texts(client.generate(text_input="x")) == "x end"
        with pytest.raises(BusyError, match="stopping"):
            client.ping()


def test_a_slow_server_that_answers_pings_is_left_alone_until_the_silence_is_too_long() -> None:
    def slow(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        time.sleep(0.6)
        yield from two_canvases(inputs, context)

    with scripted(slow) as url, Client(url, quiet_seconds=0.1) as client:
        assert texts(client.generate(text_input="x")) == "x end"
    with (
        scripted(endless) as url,
        Client(url, quiet_seconds=0.1, silence_seconds=0.4) as client,
        pytest.raises(TimedOutError, match=r"nothing for 0\.4 seconds"),
    ):
        list(client.generate(text_input="x"))


def test_a_timeout_ends_a_request_although_the_server_does_not() -> None:
    with scripted(endless) as url, Client(url) as client:
        started = time.monotonic()
        with pytest.raises(TimedOutError, match="did not finish the request in time"):
            list(client.generate(text_input="x", timeout_ms=100))
        assert 0.1 < time.monotonic() - started < 6


def test_a_server_that_comes_back_is_found_again() -> None:
    with scripted(two_canvases) as url:
        client = Client(url)
        assert texts(client.generate(text_input="x")) == "x end"
    with client:
        with pytest.raises(ServerError):
            client.ping()
        with scripted(two_canvases, port=url.split(":")[1]):
            patience = time.monotonic() + 10
            while True:
                try:
                    assert texts(client.generate(text_input="y")) == "y end"
                    break
                except ServerError:
                    assert time.monotonic() < patience
                    time.sleep(0.05)


# Ctrl-C at any moment of an answer, again and again; a hang ends it with a traceback of all threads.
_INTERRUPTED = """
import faulthandler, os, random, signal, sys, threading, time
from canvasrt.client.connection import Client

client, end, interrupted = Client(sys.argv[1]), time.monotonic() + 3, 0
while time.monotonic() < end:
    faulthandler.dump_traceback_later(20, exit=True)
    timer = threading.Timer(random.random() / 100, os.kill, (os.getpid(), signal.SIGINT))
    try:
        responses = client.generate(text_input="endless")
        timer.start()
        for _ in responses:
            pass
    except KeyboardInterrupt:
        interrupted += 1
    timer.join()
    assert "".join(response.text_output for response in client.generate(text_input="x")) == "x end"
client.close()
print(interrupted)
"""


def test_an_interrupt_at_any_moment_leaves_the_client_in_order() -> None:
    def script(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        return (endless if inputs["text_input"] == "endless" else two_canvases)(inputs, context)

    with scripted(script) as url:
        done = subprocess.run([sys.executable, "-c", _INTERRUPTED, url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
