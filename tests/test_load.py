"""The load generator: what its figures mean, on a clock that the test turns, and `canvasrt bench --url` as a whole."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from canvasrt.client.load import Load, Outcome, figures, observe, percentile, run_load
from canvasrt.client.tensors import Response
from canvasrt.errors import BusyError, ServerError
from scripted_server import Message, canvas, data, draft, error, scripted

REQUESTS = 20


class Clock:
    """Turned by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([7.0], 1, 7.0),
        ([7.0], 99, 7.0),
        ([3.0, 1.0, 2.0, 4.0], 50, 2.0),
        ([3.0, 1.0, 2.0, 4.0], 51, 3.0),
        ([3.0, 1.0, 2.0, 4.0], 100, 4.0),
        ([float(value) for value in range(1, 101)], 90, 90.0),
        ([float(value) for value in range(1, 101)], 99, 99.0),
    ],
)
def test_a_percentile_is_the_nearest_rank(values: list[float], percent: float, expected: float | None) -> None:
    assert percentile(values, percent) == expected


def test_one_request_is_observed_canvas_by_canvas() -> None:
    clock = Clock()

    def send(number: int) -> Iterator[Response]:
        assert number == 3
        for seconds, response in (
            (0.5, draft("ab", 1)), (0.5, canvas("abc", 0)), (2.0, canvas("de", 1)), (3.0, canvas("f", 2, "stop")),
        ):  # fmt: skip
            clock.now += seconds
            yield response
        clock.now += 0.25

    assert observe(send, 3, clock) == Outcome(
        seconds=6.25, first_canvas_seconds=1.0, gaps_seconds=[2.0, 3.0], input_tokens=5, cached_tokens=2,
        output_tokens=6, canvases=3, steps=12,
    )  # fmt: skip


def test_an_error_ends_a_request_and_is_noted_by_its_kind() -> None:
    def send(number: int) -> Iterator[Response]:
        yield canvas("abc")
        raise BusyError("no room")

    assert observe(send, 0, Clock()).error == "busy"

    def broken(number: int) -> Iterator[Response]:
        raise ZeroDivisionError
        yield canvas("abc")

    with pytest.raises(ZeroDivisionError):  # no failure of the server, so it is not counted as one
        run_load(broken, 4, 2)


def test_the_figures_of_a_load() -> None:
    answered = [
        Outcome(1.0, 0.1, [0.2], input_tokens=10, cached_tokens=5, output_tokens=30, canvases=2, steps=10),
        Outcome(3.0, 0.3, [], input_tokens=30, cached_tokens=5, output_tokens=10, canvases=1, steps=10),
    ]
    failed = [Outcome(9.0, 9.0, [9.0], output_tokens=99, canvases=9, steps=9, error=kind) for kind in ("busy", "busy")]
    found = figures(Load(4, 4.0, [*answered, *failed]))
    times = {key: found.pop(key) for key in ("time_to_first_canvas_ms", "inter_canvas_ms", "request_latency_ms")}
    assert found == {
        "concurrency": 4, "requests": 4, "answered": 2, "errors": {"busy": 2}, "seconds": 4.0, "output_tokens": 40,
        "output_tokens_per_second": 10.0, "requests_per_second": 0.5, "steps_per_canvas": 20 / 3,
        "tokens_per_forward": 2.0, "cached_prompt_share": 0.25,
    }  # fmt: skip
    assert times["time_to_first_canvas_ms"] == pytest.approx({"mean": 200, "p50": 100, "p90": 300, "p99": 300})
    assert times["inter_canvas_ms"] == pytest.approx({"mean": 200, "p50": 200, "p90": 200, "p99": 200})
    assert times["request_latency_ms"] == pytest.approx({"mean": 2000, "p50": 1000, "p90": 3000, "p99": 3000})
    nothing = figures(Load(1, 1.0, failed))
    assert nothing["request_latency_ms"] is None
    assert nothing["steps_per_canvas"] is None


def test_as_many_requests_run_at_once_as_there_are_workers_and_each_runs_once() -> None:
    lock, running, most, sent = threading.Lock(), 0, 0, []

    def send(number: int) -> Iterator[Response]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            sent.append(number)
        time.sleep(0.01)
        yield canvas("abc", 0, "stop")
        with lock:
            running -= 1

    ended: list[None] = []
    load = run_load(send, REQUESTS, 4, lambda: ended.append(None))
    assert most == 4
    assert sorted(sent) == list(range(REQUESTS))
    assert len(load.outcomes) == len(ended) == REQUESTS
    assert all(outcome.error is None and outcome.output_tokens == 3 for outcome in load.outcomes)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "canvasrt.cli.main", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_bench_prints_and_saves_the_figures_of_a_server(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def script(inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        asked.append(inputs)
        if len(asked) == 3:
            yield error("busy: full")
        yield data(canvas("abcd", 0))
        yield data(canvas("ef", 1, "stop"), final=True)

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "made" / "here"
    prompts.write_text('{"prompt": "one"}\n{"tokens": [1, 2]}\n', encoding="utf-8")
    with scripted(script) as url:
        options = ("--url", url, "--prompts", str(prompts), "--requests", "6", "--max-tokens", "9", "--seed", "5")
        done = bench(*options, "--concurrency", "1,3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    for shown in ("output tokens/s", "request latency p99, ms", "5/6", "6/6", "busy: 1", "none"):
        assert shown in done.stdout
    report = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert [run["concurrency"] for run in report["runs"]] == [1, 3]
    assert report["runs"][1]["tokens_per_forward"] == 6 / 8
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert len(asked) == 1 + 6 + 3 + 6  # each level first sends a round that is not counted
    counted = asked[1:7]
    assert [inputs["seed"] for inputs in counted] == [5, 6, 7, 8, 9, 10]
    assert [inputs.get("input_ids") for inputs in counted] == [None, [1, 2]] * 3
    assert json.loads(counted[0]["messages"]) == [{"role": "user", "content": "one"}]
    assert all(inputs["max_tokens"] == 9 and inputs["stream"] for inputs in asked)


def test_bench_gives_up_when_nothing_is_answered() -> None:
    with scripted(lambda inputs, context: iter([error("busy: full")])) as url:
        done = bench("--url", url, "--requests", "2")
    assert done.returncode != 0
    assert "no request was answered with 1 at once: busy: 2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "or a server with --url"),
        (("--url", "127.0.0.1:1"), "no server answers at 127.0.0.1:1"),
        (("--url", "here"), "HOST:PORT"),
        (("--url", "127.0.0.1:1", "--device", "cuda", "--exact"), "leave --device, --exact out"),
        (("examples/sudoku/checkpoint", "--out", "x"), "--out is for the figures of a server"),
    ],
)
def test_a_users_mistake_gets_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_error_is_no_answer() -> None:
    def send(number: int) -> Iterator[Response]:
        raise ServerError("gone")

    load = run_load(send, 3, 3)
    assert figures(load)["errors"] == {"server error": 3}
