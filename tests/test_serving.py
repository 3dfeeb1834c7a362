"""Acceptance of the server: a real Triton with the demo checkpoint, under load and under abuse."""

import json
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.client import HTTPConnection
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from canvasrt import wire
from canvasrt.client.connection import Client
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import BusyError, CancelledError, CanvasRTError, InputError, ServerError, TimedOutError
from canvasrt.runtime.generate import run_requests
from canvasrt.serve.intake import read_request
from canvasrt.serve.model import OpenModel, open_model
from canvasrt.serve.settings import ServeSettings
from planning import DEMO
from service import tensors
from triton_servers import Server, again_if_triton_aborts, serving, wait_until

SETTINGS = ["slots=8", "context=512", "threads=1", "max_waiting=400"]
LETTERS = "123456.|\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(DEMO, *(word for setting in SETTINGS for word in ("--set", setting))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc) as opened:
        yield opened


@cache
def model() -> OpenModel:
    return open_model(ServeSettings.parse(DEMO, SETTINGS))


def expected(requests: dict[int, dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """Text and finish reason of each, by the loop of the command line in this process, all in one batch."""
    runner, served = model().runner, model().served
    states = {}
    for number, values in requests.items():
        asked = read_request(tensors(**values), {}, served)
        states[number] = RequestState.new(asked.params, asked.prompt)
    assert served.codec is not None
    ends = {event.request: event.state for event in run_requests(runner, states) if event.kind == "end"}
    return {number: (served.codec.decode(end.output), str(end.finish_reason)) for number, end in ends.items()}


def draw_request(rng: np.random.Generator) -> dict[str, Any]:
    text = "".join(LETTERS[index] for index in rng.integers(0, len(LETTERS), rng.integers(1, 200)))
    return {
        "messages": json.dumps([{"role": "user", "content": text or "1"}]),
        "seed": int(rng.integers(0, 2**63)),
        "max_tokens": int(rng.integers(1, 150)),
        "max_denoising_steps": int(rng.integers(1, 9)),
        "ignore_eos": bool(rng.random() < 0.5),
        "top_k": int(rng.choice([0, 3])),
    }


def metric(server: Server, name: str, **labels: str) -> float:
    host = server.metrics.removeprefix("http://").removesuffix("/metrics")
    connection = HTTPConnection(host, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    found = re.search(rf"^{name}{re.escape('{' + inside + '}') if inside else ''} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def is_idle(server: Server) -> bool:
    return metric(server, "canvasrt_requests_running") == metric(server, "canvasrt_requests_waiting") == 0


def test_two_hundred_streams_at_once_end_as_they_would_alone_or_as_they_were_told_to(
    server: Server, client: Client
) -> None:
    rng = np.random.default_rng(11)
    requests = {number: draw_request(rng) for number in range(200)}
    cancelled = {number for number in requests if number % 10 == 3}
    late = {number for number in requests if number % 10 == 7}
    answers: dict[int, tuple[str, str]] = {}
    errors: dict[int, CanvasRTError] = {}

    def ask(number: int) -> None:
        more = {"timeout_ms": 1} if number in late else {}
        stream = client.generate(**requests[number], priority_level=1 + number % 5, **more)
        if number in cancelled:
            threading.Timer(0.02 * (number % 30), stream.close).start()
        text, reason = "", ""
        try:
            for response in stream:
                text, reason = text + response.text_output, response.finish_reason
        except CanvasRTError as error:
            errors[number] = error
            return
        answers[number] = (text, reason)

    with ThreadPoolExecutor(200) as threads:
        list(threads.map(ask, requests))
    whole = {number: values for number, values in requests.items() if number not in cancelled | late}
    together = expected(whole)
    assert [number for number in whole if answers.get(number) != together[number]] == []
    for number in list(whole)[::20]:
        assert expected({number: whole[number]})[number] == together[number]
    assert set(errors) <= cancelled | late
    assert {type(errors[number]) for number in late & set(errors)} <= {TimedOutError}
    wait_until(lambda: is_idle(server), 20, lambda: "requests are left over")
    assert metric(server, "canvasrt_kv_used_tokens") == 0
    assert metric(server, "canvasrt_slots") == 8


def test_memory_does_not_grow_with_the_requests(server: Server, client: Client) -> None:
    values = {"text_input": "12.", "max_denoising_steps": 1, "max_tokens": 5}

    def ask(number: int) -> int:
        return sum(response.num_output_tokens for response in client.generate(seed=number, **values))

    def held() -> int:
        """Bytes that the model's process and Triton hold of their own."""
        total = 0
        for process in [int(server.facts["triton_pid"]), *server.stubs()]:
            with open(f"/proc/{process}/status") as status:
                total += sum(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))
        return total

    with ThreadPoolExecutor(8) as threads:
        assert all(count >= 0 for count in threads.map(ask, range(1000)))  # until heaps have their size
        before = held()
        assert len(list(threads.map(ask, range(2000)))) == 2000
    assert held() - before < 16 << 20
    wait_until(lambda: is_idle(server), 20, lambda: "requests are left over")


def raw_value(draw: random.Random, dtype: str) -> bytes:
    """One value, valid for its type or not."""
    if dtype == "BYTES":
        text = draw.choice([b"", b"12.", b"\xff\xfe", b"[]", b'[{"role":"user","content":"1"}]', b"\x00" * 9])
        size = len(text) if draw.random() < 0.9 else draw.choice([0, 3, 2**31])
        return size.to_bytes(4, "little") + text
    width = {"BOOL": 1, "INT32": 4, "UINT32": 4, "FP32": 4, "UINT64": 8}[dtype]
    return draw.choice([bytes(width), b"\xff" * width, draw.randbytes(width), (1).to_bytes(width, "little")])


def test_ten_thousand_malformed_requests_are_answered_and_the_next_one_works(server: Server, client: Client) -> None:
    """Unlike the client's, these may have wrong types, shapes and sizes."""
    draw = random.Random(3)
    channel = grpc.insecure_channel(server.grpc)
    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
    outcomes: Counter[str] = Counter()

    def malformed() -> Any:
        request = service_pb2.ModelInferRequest(model_name=wire.MODEL)
        short = [tensor for tensor in wire.INPUTS if tensor.name in ("max_tokens", "max_denoising_steps")]
        for tensor in short if draw.random() < 0.9 else ():  # most that can be run should not run for long
            request.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=[1, 1])
            request.raw_input_contents.append((1).to_bytes(4, "little"))
        for tensor in draw.sample([tensor for tensor in wire.INPUTS if tensor not in short], draw.randrange(0, 5)):
            dtype = tensor.dtype if draw.random() < 0.9 else draw.choice(["BYTES", "INT32", "FP32", "BOOL"])
            count = draw.choice([0, 1, 1, 1, 1, 2, 40])
            shape = [1, count] if draw.random() < 0.9 else draw.choice([[], [count], [2, count], [1, 1, count], [-1]])
            request.inputs.add(name=draw.choice([tensor.name] * 20 + ["nonsense"]), datatype=dtype, shape=shape)
            request.raw_input_contents.append(b"".join(raw_value(draw, dtype) for _ in range(count)))
        if draw.random() < 0.1:
            request.parameters["max_token"].int64_param = 5
        return request

    requests = [[malformed() for _ in range(50)] for _ in range(200)]

    def send(batch: list[Any]) -> None:
        ended = 0
        for message in call(iter(batch), timeout=60):
            ended += 1
            text = message.error_message
            outcomes[text.partition(":")[0] if text.startswith(wire.ERROR_KINDS) else "triton" if text else "ran"] += 1
        assert ended >= len(batch)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, requests))
    channel.close()
    assert sum(outcomes.values()) >= 10_000
    assert outcomes[wire.INVALID] > 1_000
    assert outcomes[wire.FAILED] == 0, outcomes
    values = draw_request(np.random.default_rng(1))
    assert "".join(response.text_output for response in client.generate(**values)) == expected({0: values})[0][0]


PUZZLE = [{"role": "user", "content": "12.|..5\n...|...\n...|6.1\n4..|..2\n.4.|2.3\n53.|4.6"}]
REFUSED_OVER_HTTP = [
    ({"messages": "[]"}, "invalid request: messages"),
    ({"text_input": "1", "max_token": 5}, "invalid request: max_token is no input of this model"),
    ({"text_input": "1" * 1_000_000}, "invalid request: text_input: 1,000,000 characters"),
    ({"text_input": "1", "max_tokens": 2**31 - 1}, "invalid request: max_tokens 2147483647 does not fit"),
    ({"text_input": "1", "max_tokens": "many"}, ""),
    ({"text_input": {"a": 1}}, ""),
    ({"stream": False}, "invalid request: send one of text_input"),
    ({"text_input": "1", "frequency_penalty": 1.0}, "invalid request: frequency_penalty 1: 0 only"),
]


@pytest.mark.parametrize(("body", "said"), REFUSED_OVER_HTTP, ids=range(len(REFUSED_OVER_HTTP)))
def test_what_is_wrong_is_said_over_http_too(server: Server, body: dict[str, Any], said: str) -> None:
    status, answer = server.post(f"/v2/models/{wire.MODEL}/generate", body)
    assert 400 <= status < 600
    assert said in answer["error"]


def test_bytes_that_are_no_text_are_refused(server: Server) -> None:
    host = server.http.removeprefix("http://")
    connection = HTTPConnection(host, timeout=10)
    connection.request("POST", f"/v2/models/{wire.MODEL}/generate", b'{"text_input": "\xff\xfe"}')
    answer = connection.getresponse()
    assert answer.status == 400
    assert "error" in json.loads(answer.read())
    connection.close()


def test_generate_over_http_gives_one_json_and_a_stream_one_for_each_canvas(server: Server) -> None:
    values = {"messages": json.dumps(PUZZLE), "seed": 3, "max_tokens": 120, "ignore_eos": True}
    text, reason = expected({0: values})[0]
    one = server.generate(**values)
    assert (one["text_output"], one["finish_reason"], one["num_output_tokens"]) == (text, reason, 120)
    with server.open(f"/v2/models/{wire.MODEL}/generate_stream", {**values, "stream": True}) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(part["text_output"] for part in parts) == text
    assert [part["canvas_index"] for part in parts] == [0, 1, 2]


def test_the_request_of_tritons_openai_frontend_works_as_it_is(server: Server) -> None:
    """Its TensorRT-LLM form: tensors of shape [1, 1], one response with one text."""
    served = model().served
    assert served.codec is not None
    prompt = served.codec.decode(served.codec.encode_chat(PUZZLE).tolist())
    inputs: list[tuple[str, str, Any]] = [
        ("text_input", "BYTES", prompt), ("stream", "BOOL", False), ("max_tokens", "INT32", 48),
        ("top_p", "FP32", 1.0), ("frequency_penalty", "FP32", 0.0), ("presence_penalty", "FP32", 0.0),
        ("temperature", "FP32", 0.8), ("seed", "UINT64", 7), ("stop_words", "BYTES", ["zzz"]),
        ("return_num_input_tokens", "BOOL", True), ("return_num_output_tokens", "BOOL", True),
    ]  # fmt: skip
    body = {
        "inputs": [
            {"name": n, "datatype": d, "shape": [1, 1], "data": [value] if d != "BYTES" or n == "text_input" else value}
            for n, d, value in inputs
        ]
    }
    with Client(server.grpc) as opened:
        values = {name: value for name, _, value in inputs if name not in ("stream",)}
        (response,) = opened.generate(stream=False, **values)
    assert response.num_input_tokens == len(served.codec.encode(prompt))
    assert response.finish_reason in ("stop", "length")
    # The KServe endpoint takes no decoupled models, which is Triton's own word and not ours.
    status, answer = server.post(f"/v2/models/{wire.MODEL}/infer", body)
    assert status >= 400
    assert "decoupled" in answer["error"]


def test_a_deadline_of_the_server_is_kept_too(server: Server) -> None:
    """Triton's own request timeout, in microseconds, which over HTTP comes as a parameter."""
    request = service_pb2.ModelInferRequest(model_name=wire.MODEL)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append((1).to_bytes(4, "little") + b"1")
    request.parameters["timeout"].int64_param = 1
    channel = grpc.insecure_channel(server.grpc)
    (message,) = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=20)
    channel.close()
    assert message.error_message.startswith(wire.TIMED_OUT)


@again_if_triton_aborts
def test_a_full_queue_a_kill_under_load_and_the_end() -> None:
    """One server of its own, since it does not survive this."""
    options = ("--set", "slots=1", "--set", "max_waiting=2", "--set", "threads=1")
    with serving(DEMO, *options) as server, Client(server.grpc, quiet_seconds=1.0) as client:
        values = {"text_input": "1", "max_tokens": 900, "ignore_eos": True, "seed": 1}
        values |= {"stability_threshold": 1000, "max_denoising_steps": 48}
        found: Counter[str] = Counter()

        def ask(_: int) -> None:
            try:
                for _response in client.generate(**values):
                    pass
                found["answered"] += 1
            except (BusyError, ServerError, CancelledError, TimedOutError) as error:
                found[type(error).__name__] += 1

        with ThreadPoolExecutor(8) as threads:
            asked = [threads.submit(ask, number) for number in range(8)]
            wait_until(lambda: found["BusyError"] >= 4, 20, lambda: f"found {found}")
            os.kill(server.stub(), signal.SIGKILL)
            for each in asked:
                each.result(timeout=60)
        assert found["BusyError"] == 5
        assert found["ServerError"] == 3
        wait_until(lambda: answers(client), 30, lambda: server.log)
        with ThreadPoolExecutor(1) as threads:
            lost = threads.submit(lambda: list(client.generate(**values)))
            wait_until(lambda: metric(server, "canvasrt_requests_running") == 1, 20, lambda: "nothing runs")
            os.kill(server.engine(), signal.SIGKILL)
            with pytest.raises(ServerError, match=r"the engine process has ended \(signal SIGKILL\)"):
                lost.result(timeout=20)
        wait_until(lambda: answers(client), 40, lambda: server.log)
        # The first canary request after it was enough.
        assert "(2 of 3)" not in server.log.partition("engine lost")[2]
        with ThreadPoolExecutor(3) as threads:
            running = [threads.submit(ask, number) for number in range(3)]
            wait_until(lambda: metric(server, "canvasrt_requests_waiting") == 2, 20, lambda: "nothing waits")
            server.process.terminate()
            for each in running:
                each.result(timeout=60)
        assert server.wait(60) == 0
        assert found["answered"] == 3, found  # one was running and two waited: all have 30 seconds


def test_requests_that_shared_a_connection_leave_a_model_that_ends_in_order() -> None:
    """A call that its client cancels behind the last response makes Triton keep the model for ever."""
    settings = ("--set", "slots=4", "--set", "context=256", "--set", "threads=1")
    values = {"text_input": "12.", "max_denoising_steps": 1, "max_tokens": 5}
    with serving(DEMO, *settings) as server:
        with Client(server.grpc) as client, ThreadPoolExecutor(4) as threads:
            answered = list(threads.map(lambda seed: len(list(client.generate(seed=seed, **values))), range(24)))
            client.ping()
        server.process.terminate()
        assert server.wait(60) == 0
        assert len(answered) == 24
        assert '"event": "stopped"' in server.log


def answers(client: Client) -> bool:
    try:
        return [response.finish_reason for response in client.generate(text_input="1", max_tokens=1)] != []
    except (CanvasRTError, InputError):
        return False
