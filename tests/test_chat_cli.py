"""`canvasrt chat` through a pipe and on a terminal, and `canvasrt generate --url`: what is shown, and what is asked."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from canvasrt.cli.live import visible
from scripted_server import Message, canvas, data, draft, error, scripted

PATIENCE = 30.0  # seconds
COMMAND = [sys.executable, "-m", "canvasrt.cli.main"]


class Parrot:
    """A script that answers a conversation with its last message, in two canvases, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.cancelled = threading.Event()

    def __call__(self, inputs: dict[str, Any], context: Any) -> Iterator[Message]:
        self.asked.append(inputs)
        text = json.loads(inputs["messages"])[-1]["content"]
        if text == "refuse":
            yield error("invalid request: the prompt is too long")
            return
        if inputs.get("stream_drafts"):
            yield data(draft("x" * len(text), 0))
            yield data(draft(text, len(text)))
        yield data(canvas(f"{text},"))
        if text == "endless":
            context.add_callback(self.cancelled.set)
            while context.is_active():
                time.sleep(0.01)
        yield data(canvas(" again\x1b[31m", 1, "stop"), final=True)

    def contents(self, number: int) -> list[str]:
        """What the conversation of that request was."""
        return [message["content"] for message in json.loads(self.asked[number]["messages"])]


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def url(parrot: Parrot) -> Iterator[str]:
    with scripted(parrot) as url:
        yield url


def run(*arguments: str, text: str | bytes | None = None) -> subprocess.CompletedProcess[str]:
    given = text.encode() if isinstance(text, str) else text
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, input=given, check=False, timeout=PATIENCE)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_pipe_is_answered_line_by_line_with_the_conversation_so_far(url: str, parrot: Parrot) -> None:
    done = run(
        "chat", "--url", url, "--system", "Be kind.", "--seed", "7", "--max-tokens", "9", text="one\n\ntwo\\\nmore\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "one, again\x1b[31m\ntwo\nmore, again\x1b[31m\n"  # for a program: as the model wrote it
    assert parrot.contents(0) == ["Be kind.", "one"]
    assert parrot.contents(1) == ["Be kind.", "one", "one, again\x1b[31m", "two\nmore"]
    assert [inputs["seed"] for inputs in parrot.asked] == [7, 8]
    assert all(inputs["max_tokens"] == 9 and inputs["stream"] for inputs in parrot.asked)


def test_a_new_conversation_and_the_end_by_command(url: str, parrot: Parrot) -> None:
    done = run("chat", "--url", url, text="one\n/new\ntwo\n/exit\nthree\n")
    assert done.returncode == 0, done.stderr
    assert [parrot.contents(number) for number in range(len(parrot.asked))] == [["one"], ["two"]]


def test_an_error_ends_a_pipe(url: str, parrot: Parrot) -> None:
    done = run("chat", "--url", url, text="refuse\nnext\n")
    assert done.returncode == 2
    assert done.stderr == "error: the prompt is too long\n"
    assert len(parrot.asked) == 1
    bad = run("chat", "--url", url, text=b"\xff\xfe\n")
    assert bad.returncode == 2
    assert "standard input is no UTF-8 text" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_without_a_server_chat_says_so() -> None:
    done = run("chat", "--url", "127.0.0.1:1", text="one\n")
    assert done.returncode != 0
    assert "no server answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_drafts_without_a_terminal_are_lines(url: str) -> None:
    done = run("chat", "--url", url, "--live", text="one\n")
    assert done.stdout.splitlines()[:3] == ["   0/3 settled  xxx", "   3/3 settled  one", "one, again\x1b[31m"]


class Terminal:
    """What a person sees and types."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._unread = ""

    def see(self, text: str, again: str = "") -> str:
        """Waits for it, and types ``again`` every second; returns everything up to and with it."""
        typed = time.monotonic()
        patience = typed + PATIENCE
        while text not in self._unread:
            assert time.monotonic() < patience, f"{text!r} was not shown, but {self._unread!r}"
            if again and time.monotonic() > typed + 1:
                self.type(again)
                typed = time.monotonic()
            if select.select([self._file], [], [], 0.1)[0]:
                try:
                    read = os.read(self._file, 65536)
                except OSError:  # what Linux says at the end of a terminal
                    read = b""
                assert read, f"ended before {text!r}, after {self._unread!r}"
                self._unread += read.decode()
        seen, _, self._unread = self._unread.partition(text)
        return seen + text

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())


@contextmanager
def terminal(*arguments: str) -> Iterator[tuple[Terminal, Callable[[], int]]]:
    """A command on a terminal of its own, and what waits for its exit code."""
    ours, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    # Of the first terminal that the leader of a session opens it becomes the master: else Ctrl-C is nobody's.
    command = ["sh", "-c", ': <> "$(tty)"; exec "$@"', "sh", *COMMAND, *arguments]
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True)
    os.close(its)
    try:
        yield Terminal(ours), lambda: process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_stops_an_answer_here_and_at_the_server(url: str, parrot: Parrot) -> None:
    with terminal("chat", "--url", url) as (screen, ended):
        screen.see("> ")
        screen.type("endless\n")
        screen.see("endless,")
        screen.type("\x03")
        screen.see("stopped")
        assert parrot.cancelled.wait(PATIENCE)
        screen.see("> ")
        screen.type("\x03")  # at the prompt: a hint
        screen.see("Ctrl-D ends", again="\x03")  # readline overlooks a signal right after it has shown the prompt
        screen.see("> ")
        screen.type("refuse\n")
        screen.see("error: the prompt is too long")
        screen.see("> ")
        screen.type("one\n")
        assert "\x1b[31m" not in screen.see("one, again\u241b[31m")
        screen.see("> ")
        screen.type("\x04")
        assert ended() == 0
    assert parrot.contents(2) == ["one"]  # neither the stopped question nor the refused one


def test_a_canvas_emerges_in_place_on_a_terminal(url: str) -> None:
    with terminal("chat", "--url", url, "--live") as (screen, ended):
        screen.see("> ")
        screen.type("abc\n")
        seen = screen.see("abc, again\u241b[31m\r\n")
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
        assert plain.index("xxx") < plain.index("abc,")
        assert "\x1b[2mx" in seen  # dim: not settled
        assert "\x1b[1;32ma" in seen  # bright: settled
        screen.see("> ")
        screen.type("/exit\n")
        assert ended() == 0


def test_generate_at_a_server_shows_what_it_shows_here(url: str, parrot: Parrot) -> None:
    options = (
        "--steps",
        "5",
        "--t-min",
        "0.25",
        "--t-max",
        "0.5",
        "--entropy-bound",
        "0.5",
        "--stop",
        "a",
        "--stop",
        "b",
    )
    more = ("--stability-threshold", "2", "--confidence-threshold", "0.5", "--top-k", "3", "--top-p", "0.5")
    last = ("--stop-token-id", "4", "--seed", "3", "--max-tokens", "9", "--timeout", "2.5", "--system", "S")
    done = run("generate", "--url", url, "-p", "one", "-p", "two", "--json", *options, *more, *last)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["text"], second["text"]) == ("one, again\x1b[31m", "two, again\x1b[31m")
    assert first["output_tokens"] == len(first["text"])
    assert (first["canvases"], first["denoising_steps"], first["prompt_tokens"], first["cached_tokens"]) == (2, 8, 5, 2)
    assert (first["finish_reason"], first["seed"], first["tokens_per_forward"]) == ("stop", 7, round(15 / 8, 2))
    assert {name: value for name, value in parrot.asked[0].items() if name != "messages"} == {
        "stream": True, "seed": 3, "max_tokens": 9, "max_denoising_steps": 5, "t_min": 0.25, "t_max": 0.5,
        "entropy_bound": 0.5, "stability_threshold": 2, "confidence_threshold": 0.5, "top_k": 3, "top_p": 0.5,
        "stop_words": ["a", "b"], "stop_token_ids": [4], "timeout_ms": 2500,
    }  # fmt: skip
    assert sorted(parrot.contents(number)[-1] for number in (0, 1)) == ["one", "two"]
    assert parrot.contents(0)[0] == "S"


def test_generate_at_a_server_shows_drafts(url: str) -> None:
    done = run("generate", "--url", url, "-p", "one", "--live", "--delay", "0")
    assert done.stdout.splitlines()[:2] == ["1.1    0/3 settled  xxx", "1.1    3/3 settled  one"]
    assert "one, again\u241b[31m" in done.stdout


def test_ctrl_c_in_generate_cancels_all_its_requests(url: str, parrot: Parrot) -> None:
    command = [*COMMAND, "generate", "--url", url, "-p", "endless", "-p", "endless"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        patience = time.monotonic() + PATIENCE
        while len(parrot.asked) < 2:
            assert time.monotonic() < patience
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert said == b"interrupted\n"
    assert parrot.cancelled.wait(PATIENCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "or a server with --url"),
        (("--url", "127.0.0.1:1", "--top-p", "1.5"), "top_p"),
        (("--url", "127.0.0.1:1", "--timeout", "nan"), "0.001 to 4,000,000 seconds"),
        (("--url", "127.0.0.1:1", "-p", " "), "the prompt is empty"),
        (("--url", "127.0.0.1:1", "--dtype", "bfloat16"), "leave --dtype out"),
        (("examples/sudoku/checkpoint", "--timeout", "1"), "--timeout is for a server"),
        (("examples/sudoku/checkpoint", "--url", "127.0.0.1:1"), "leave MODEL out"),
        (("--url", "127.0.0.1:1"), "no server answers"),
    ],
)
def test_a_users_mistake_gets_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run("generate", "-p", "x", *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b[2J\x07\r\x7f\x9b") == "\u241b[2J\u2407\u240d\u2421\ufffd"
