"""What Triton over gRPC costs: the same requests through a real server and through the canvas loop in this process.

    .venv/bin/python scripts/bench_serving.py [--concurrency 1,2,4,8,16] [--requests 960] [--canvases 5]

Both take a conversation as JSON and give the answer as text. Closed loop: so many workers, each of which sends its next
request when the one before has ended. Both sides have the same prompts, seeds, settings, threads of the runner and
scheduler, and take turns in one run, so that a noisy machine is noisy for both. The client is a process of its own, as
elsewhere; client, server and runner share this machine's cores. Prints a Markdown table, a row per concurrency; exit
code 1 when more than one answer in a hundred differs (ties that rounding breaks in another batch).
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from canvasrt.client.connection import Client
from canvasrt.client.load import Load, figures, run_load
from canvasrt.client.tensors import Response
from canvasrt.diffusion.params import RequestOptions, resolve
from canvasrt.diffusion.request import RequestState
from canvasrt.scheduler.loop import CanvasLoop, Turn
from canvasrt.scheduler.types import ENDS, Event, Request
from canvasrt.serve.model import OpenModel, open_model
from canvasrt.serve.prompts import check_messages, read_prompts
from canvasrt.serve.settings import ServeSettings

CHECKPOINT = Path(__file__).parents[1] / "examples" / "sudoku" / "checkpoint"
TURNS = 8


class InProcess:
    """Requests through a `CanvasLoop` without a server; `send` may be called from many threads."""

    def __init__(self, model: OpenModel, prompts: Sequence[str], options: dict[str, Any]) -> None:
        self._model, self._prompts, self._options = model, prompts, options
        self._ends: dict[int, SimpleQueue[Event]] = {}
        self._loop = CanvasLoop(model.runner, model.policy, self._listen)

    def _listen(self, events: Sequence[Event], turn: Turn | None) -> None:
        for event in events:
            if event.kind in ENDS:
                self._ends[event.request].put(event)

    def send(self, number: int, texts: dict[int, str]) -> Iterator[Response]:
        served = self._model.served
        assert served.codec is not None
        messages = json.loads(self._prompts[number % len(self._prompts)])
        prompt = served.codec.encode_chat(check_messages("messages", messages))
        params = resolve(
            served.config,
            RequestOptions.parse(seed=number, **self._options),
            eos_token_ids=served.spec.eos_token_ids,
            canvas=served.spec.canvas_length,
            vocabulary=served.spec.vocab_size,
            prompt_tokens=len(prompt),
            context=served.context,
        )
        ended: SimpleQueue[Event] = SimpleQueue()
        self._ends[number] = ended
        self._loop.submit(Request(number, RequestState.new(params, prompt)))
        event = ended.get(timeout=120)
        assert event.kind == "end", event
        texts[number] = served.codec.decode(event.state.output)
        yield Response(
            text_output="",
            finish_reason=event.state.finish_reason or "",
            num_input_tokens=len(prompt),
            num_cached_tokens=event.cached_tokens,
            num_output_tokens=len(event.state.output),
            canvas_index=event.state.canvas.index,
            denoising_steps=event.state.passes,
            seed=number,
            is_draft=False,
            draft_pieces=(),
            draft_settled=(),
        )

    def close(self) -> None:
        self._loop.close()


class Remote:
    """Requests over gRPC from a process of their own: what this one has loaded must not slow the client down."""

    def __init__(self, url: str, prompts: Sequence[str], options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve_loads, args=(theirs, url, prompts, options), daemon=True)
        self._process.start()

    def load(self, start: int, share: int, level: int) -> tuple[Load, dict[int, str]]:
        self._connection.send((start, share, level))
        answer: tuple[Load, dict[int, str]] = self._connection.recv()
        return answer

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(10)


def serve_loads(orders: Connection, url: str, prompts: Sequence[str], options: dict[str, Any]) -> None:
    with Client(url) as client:
        while (order := orders.recv()) is not None:
            start, share, level = order
            texts: dict[int, str] = {}

            def send(offset: int, start: int = start, texts: dict[int, str] = texts) -> Iterator[Response]:
                number = start + offset
                texts[number] = ""
                for response in client.generate(messages=prompts[number % len(prompts)], seed=number, **options):
                    texts[number] += response.text_output
                    yield response

            orders.send((run_load(send, share, level), texts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="1,2,4,8,16")
    parser.add_argument("--requests", type=int, default=960, help="per concurrency and side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the runner, on both sides")
    parser.add_argument("--canvases", type=int, help="per request, wherever the model would end; by default as it ends")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    arguments = parser.parse_args()
    levels = [int(level) for level in arguments.concurrency.split(",")]
    settings = [f"slots={max(levels)}", "context=512", f"threads={arguments.threads}", "reuse_prefixes=false"]
    model = open_model(ServeSettings.parse(CHECKPOINT, settings))
    lines = read_prompts(CHECKPOINT / "prompts.jsonl")
    prompts = [json.dumps(list(line.messages)) for line in lines]
    canvas = model.served.spec.canvas_length
    more = {} if arguments.canvases is None else {"max_tokens": arguments.canvases * canvas, "ignore_eos": True}
    inside = InProcess(model, prompts, more)
    command = [sys.executable, "-m", "canvasrt.cli.main", "serve", str(CHECKPOINT), "--json"]
    ports = ["--http-port", "18400", "--grpc-port", "18401", "--metrics-port", "18402"]
    options = [text for setting in settings for text in ("--set", setting)]
    server = subprocess.Popen(
        [*command, *ports, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        remote = Remote(ready["grpc"], prompts, more)
        rows = [compared(inside, remote, level, arguments.requests) for level in levels]
        remote.close()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        inside.close()
    print(table(rows))
    cores = len(os.sched_getaffinity(0))
    print(
        f"\nTokens/s and ms. {cores} cores, {arguments.threads} of them for the runner; {arguments.requests} requests."
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2) + "\n")
    return 0 if all(row["same_answers"] >= 0.99 for row in rows) else 1


def compared(inside: InProcess, remote: Remote, level: int, requests: int) -> dict[str, Any]:
    """Both sides at one concurrency, in turns."""
    mine: dict[int, str] = {}
    theirs: dict[int, str] = {}

    def in_process(start: int, share: int, level: int) -> tuple[Load, dict[int, str]]:
        texts: dict[int, str] = {}
        return run_load(lambda offset: inside.send(start + offset, texts), share, level), texts

    sides: dict[str, tuple[Callable[[int, int, int], tuple[Load, dict[int, str]]], dict[int, str]]]
    sides = {"in process": (in_process, mine), "over gRPC": (remote.load, theirs)}
    loads: dict[str, list[Load]] = {name: [] for name in sides}
    share = -(-requests // TURNS)
    for turn in range(-1, TURNS):  # the first is for warming up
        for name, (run, texts) in sides.items():
            load, answers = run(max(turn, 0) * share, share, level)
            texts.update(answers)
            if turn >= 0:
                loads[name].append(load)
    found = {name: figures(together(each)) for name, each in loads.items()}
    assert not [each["errors"] for each in found.values() if each["errors"]], found
    return {
        "concurrency": level,
        **found,
        "ratio": found["over gRPC"]["output_tokens_per_second"] / found["in process"]["output_tokens_per_second"],
        "steps_per_request": sum(outcome.steps for load in loads["over gRPC"] for outcome in load.outcomes) / len(mine),
        "same_answers": sum(text == theirs[number] for number, text in mine.items()) / len(mine),
    }


def together(loads: Sequence[Load]) -> Load:
    outcomes = [outcome for load in loads for outcome in load.outcomes]
    return Load(loads[0].concurrency, sum(load.seconds for load in loads), outcomes)


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "at once",
        "in process",
        "over gRPC",
        "ratio",
        "steps per request",
        "first canvas p50, p99",
        "latency p50, p99",
    )
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        first, latency = row["over gRPC"]["time_to_first_canvas_ms"], row["over gRPC"]["request_latency_ms"]
        speeds = [f"{row[name]['output_tokens_per_second']:,.0f}" for name in ("in process", "over gRPC")]
        times = [f"{each['p50']:.0f}, {each['p99']:.0f}" for each in (first, latency)]
        cells = [str(row["concurrency"]), *speeds, f"{row['ratio']:.3f}", f"{row['steps_per_request']:.1f}", *times]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


if __name__ == "__main__":
    sys.exit(main())
