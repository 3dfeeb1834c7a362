"""The client and its commands against a real server with the demo's model: the answers are those of this process."""

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from solve import CHECKPOINT, as_prompt, count_solved, held_out
from typer.testing import CliRunner

from canvasrt.cli.main import app
from canvasrt.client.connection import Client
from canvasrt.client.tensors import Response
from canvasrt.errors import BusyError, InputError, ServerError, TimedOutError
from triton_servers import Server, again_if_triton_aborts, serving

PUZZLES = held_out(4, 2)
TWO = as_prompt(PUZZLES[0])  # an answer of two canvases
ONE = as_prompt(held_out(1)[0])
DOCS = Path(__file__).parents[1] / "docs" / "clients.md"
# Eighteen canvases: long enough to be interrupted.
LONG: dict[str, Any] = {"input_ids": [5] * 56, "ignore_eos": True, "max_tokens": 900, "seed": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CHECKPOINT) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc) as client:
        yield client


def run(*arguments: str, text: str | None = None) -> str:
    """What a command prints. In this process: torch is imported once."""
    done = CliRunner().invoke(app, arguments, input=text)
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def answer(client: Client, **inputs: object) -> str:
    return "".join(response.text_output for response in client.generate(**inputs))


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "3"),
        ("--seed", "4", "--t-min", "0.3", "--entropy-bound", "0.05", "--steps", "6", "--top-k", "9", "--stop", "1\n"),
        ("--seed", "5", "--max-tokens", "50", "--steps", "4", "--raw"),
    ],
)
def test_the_answer_is_that_of_this_process(server: Server, options: tuple[str, ...]) -> None:
    asked = ("-p", ONE, "-p", TWO, "-p", "what can you do?", *options, "--json")
    here, there = (
        [json.loads(line) for line in run("generate", *where, *asked).splitlines()]
        for where in ((str(CHECKPOINT),), ("--url", server.grpc))
    )
    same = ("text", "finish_reason", "seed", "prompt_tokens", "output_tokens", "canvases", "denoising_steps")
    assert [[one[key] for key in same] for one in there] == [[one[key] for key in same] for one in here]
    assert len(there) == 3


def test_requests_share_a_client_and_disturb_each_other_in_nothing(client: Client) -> None:
    asked = [{"messages": chat(as_prompt(grids)), "seed": seed} for grids in PUZZLES for seed in (1, 2)]
    alone = [answer(client, **inputs) for inputs in asked]
    together: dict[int, str] = {}

    def ask(number: int) -> None:
        together[number] = answer(client, **asked[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(asked))] == alone
    assert sum(count_solved(text, PUZZLES[index // 2]) for index, text in enumerate(alone)) > len(asked)


def test_drafts_come_in_order_and_lead_to_the_canvas(client: Client) -> None:
    canvases: list[list[Response]] = [[]]
    for response in client.generate(messages=chat(TWO), seed=1, stream_drafts=1):
        canvases[-1].append(response)
        if not response.is_draft and not response.finish_reason:
            canvases.append([])
    assert len(canvases) == 2
    before = ""
    for index, (*drafts, done) in enumerate(canvases):
        assert drafts
        assert all(draft.is_draft and draft.canvas_index == index for draft in drafts)
        assert {len(draft.draft_pieces) for draft in drafts} == {len(draft.draft_settled) for draft in drafts} == {48}
        steps = [draft.denoising_steps for draft in drafts]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert done.denoising_steps == steps[-1] + 1  # the last step's draft is the canvas
        assert not done.draft_pieces
        for draft in drafts:
            plain = "".join(re.sub(r"^<.+>$", "", piece) for piece in draft.draft_pieces)
            assert draft.text_output == before + plain
        before += done.text_output
    assert canvases[-1][-1].finish_reason == "stop"


def test_a_request_that_is_closed_ends_at_the_server_and_the_next_one_works(server: Server, client: Client) -> None:
    running = client.generate(request_id="to be closed", **LONG)
    assert next(running).canvas_index == 0
    running.close()
    server.wait_for('"request": "to be closed", "outcome": "cancelled"')
    assert count_solved(answer(client, messages=chat(ONE), seed=1), held_out(1)[0]) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": "x", "max_tokens": 5000}, "^max_tokens 5000 does not fit"),
        ({"text_input": "x", "input_ids": [1]}, "^send one of text_input, messages and input_ids"),
        ({}, "^send one of"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "role"),
        ({"messages": "{"}, "not JSON"),
        ({"input_ids": [10**6]}, "outside the vocabulary"),
        ({"text_input": "x", "stream": False, "stream_drafts": 1}, "needs stream"),
        ({"text_input": "x", "frequency_penalty": 0.5}, "frequency_penalty"),
    ],
)
def test_what_the_server_refuses_is_said_in_its_words(client: Client, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(client.generate(**inputs))


def test_a_timeout_is_the_servers_to_tell(client: Client) -> None:
    with pytest.raises(TimedOutError, match="not finished within"):
        list(client.generate(timeout_ms=20, **LONG))


def test_without_streaming_there_is_one_response(client: Client) -> None:
    (whole,) = client.generate(messages=chat(TWO), seed=1, stream=False)
    parts = list(client.generate(messages=chat(TWO), seed=1))
    assert whole.text_output == "".join(part.text_output for part in parts)
    assert whole.num_output_tokens == sum(part.num_output_tokens for part in parts)
    assert len(parts) == 2


def test_chat_remembers_the_conversation(server: Server, client: Client) -> None:
    said = run("chat", "--url", server.grpc, "--seed", "1", text="what can you do?\nhello\n")
    first = answer(client, messages=chat("what can you do?"), seed=1)
    conversation = [*chat("what can you do?"), {"role": "assistant", "content": first}, *chat("hello")]
    assert said == f"{first}\n{answer(client, messages=conversation, seed=2)}\n"


def test_the_page_about_clients_shows_what_works(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert '"localhost:8001"' in snippet
    exec(snippet.replace("localhost:8001", server.grpc), {})
    assert re.search(r"Send six rows.*\n\[stop\] \d+ steps, seed 1\n$", capsys.readouterr().out)


def test_bench_measures_the_server(server: Server, tmp_path: Path) -> None:
    options = ("--url", server.grpc, "--concurrency", "1,4", "--requests", "8", "--json", "--out", str(tmp_path))
    report = json.loads(run("bench", str(CHECKPOINT), *options))
    for level in report["runs"]:
        assert level["answered"] == 8
        assert level["errors"] == {}
        assert level["tokens_per_forward"] > 4
        assert 0 < level["time_to_first_canvas_ms"]["p50"] <= level["request_latency_ms"]["p50"]
    # The same requests at every level: what they generate does not depend on how many run at once.
    assert len({level["output_tokens"] for level in report["runs"]}) == 1
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8")) == report


@again_if_triton_aborts
def test_a_model_that_dies_leaves_nobody_waiting() -> None:
    with serving(CHECKPOINT) as server, Client(server.grpc, quiet_seconds=0.5) as client:
        running = client.generate(**LONG)
        next(running)
        os.kill(server.stub(), signal.SIGKILL)
        with pytest.raises(ServerError, match="not healthy"):
            list(running)


def test_a_server_that_is_stopped_leaves_nobody_waiting() -> None:
    with serving(CHECKPOINT) as server, Client(server.grpc, quiet_seconds=0.5) as client:
        running = client.generate(**LONG)
        next(running)
        server.process.terminate()
        with pytest.raises(BusyError, match="stopping"):
            _ask_on(client)
        assert next(running).canvas_index == 1  # what has begun goes on
        server.process.terminate()  # the second time: at once
        with pytest.raises(ServerError, match="broke after"):
            list(running)
        assert server.wait() == 0
        with pytest.raises(ServerError, match="no server answers"):
            list(client.generate(text_input="x"))


def _ask_on(client: Client) -> None:
    """Until something is wrong."""
    while True:
        answer(client, messages=chat("hello"), max_tokens=1)
