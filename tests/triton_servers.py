"""Real servers for tests: `serving` runs `canvasrt serve`, `supervising` a supervisor with a model of the test's own.

Both run in a process of their own, on free ports, and leave no process behind. Run as a program, this file is the
second one's other half.
"""

import functools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from canvasrt.serve.supervisor import Addresses, Supervisor, Timing
from canvasrt.serve.triton_files import find_triton, prepare
from canvasrt.wire import MODEL

START_SECONDS = 90.0
Test = Callable[..., None]
ATTEMPTS = 3  # another process may take a port between our looking and the server's listening
_HOST = "127.0.0.1"
_ABORTED = "boost::interprocess::lock_exception"
_started_here: "list[Server]" = []


def again_if_triton_aborts(test: Test) -> Test:
    """For tests that kill a stub: where that hits it while it holds a lock in shared memory, tritonserver aborts.

    Seldom, and none of our doing: the supervisor then ends, as for any death of the server.
    """

    @functools.wraps(test)
    def repeated(*given: Any, **named: Any) -> None:
        for _ in range(ATTEMPTS - 1):
            before = len(_started_here)
            try:
                return test(*given, **named)
            except Exception:  # whatever the test meets when the server is gone
                if not any(_ABORTED in server.log for server in _started_here[before:]):
                    raise
        return test(*given, **named)

    return repeated


@dataclass
class Server:
    process: "subprocess.Popen[bytes]"
    lines: list[str] = field(default_factory=list)  # of its standard error, so far
    facts: dict[str, Any] = field(default_factory=dict)  # what it printed when it was ready

    @property
    def http(self) -> str:
        return str(self.facts["http"])

    @property
    def grpc(self) -> str:
        """HOST:PORT."""
        return str(self.facts["grpc"])

    @property
    def metrics(self) -> str:
        return str(self.facts["metrics"])

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def __post_init__(self) -> None:
        _started_here.append(self)

    def stubs(self) -> list[int]:
        """Processes of the Python model."""
        leader = int(self.facts["triton_pid"])
        return [pid for pid in session_of(leader) if pid != leader]

    def stub(self) -> int:
        """The process that Triton talks to."""
        return self._one(b"triton_python_backend_stub")

    def engine(self) -> int:
        """The process with the canvas loop."""
        return self._one(b"engine_process")

    def _one(self, what: bytes) -> int:
        (pid,) = (each for each in self.stubs() if what in Path(f"/proc/{each}/cmdline").read_bytes())
        return pid

    def post(self, path: str, body: object = None, timeout: float = 20.0) -> tuple[int, Any]:
        with self.open(path, body, timeout) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith("{") else text

    def generate(self, timeout: float = 20.0, **inputs: object) -> dict[str, Any]:
        status, answer = self.post(f"/v2/models/{MODEL}/generate", inputs, timeout)
        assert status == 200, answer
        return dict(answer)

    @contextmanager
    def open(self, path: str, body: object, timeout: float = 20.0) -> Iterator[HTTPResponse]:
        connection = HTTPConnection(self.http.removeprefix("http://"), timeout=timeout)
        try:
            connection.request("POST", path, "" if body is None else json.dumps(body))
            yield connection.getresponse()
        finally:
            connection.close()

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def wait_for(self, text: str, timeout: float = 30.0) -> None:
        """Until its log has ``text``."""
        wait_until(lambda: text in self.log, timeout, lambda: f"no {text!r} in:\n{self.log}")


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    """`canvasrt serve MODEL`, ready; ended with SIGTERM if the test has not ended it."""
    command = [sys.executable, "-m", "canvasrt.cli.main", "serve", str(model), "--json", *options]

    def with_ports() -> list[str]:
        http, grpc, metrics = map(str, free_ports(3))
        return [*command, "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]

    with _running(with_ports) as server:
        yield server


@contextmanager
def supervising(repository: Path, **timing: float) -> Iterator[Server]:
    """A supervisor with the model in ``repository``; may end before it is ready, which ``facts`` tells."""

    def command() -> list[str]:
        return [sys.executable, str(Path(__file__)), str(repository), json.dumps([free_ports(3), timing])]

    with _running(command) as server:
        yield server


@contextmanager
def _running(command: Callable[[], list[str]]) -> Iterator[Server]:
    for attempt in range(ATTEMPTS):
        with ExitStack() as stack:
            server = stack.enter_context(_started(command()))
            taken = "can't be used on" in server.log or "already in use" in server.log
            if server.facts or not taken or attempt == ATTEMPTS - 1:
                yield server
                return


@contextmanager
def _started(command: list[str]) -> Iterator[Server]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    server = Server(process)
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if readable else b""
        if line:
            server.facts = json.loads(line)
        else:
            process.wait(10)
            reader.join(5)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5)
        process.stdout.close()
        process.stderr.close()
        if server.facts:
            _no_orphans(int(server.facts["triton_pid"]))


def _no_orphans(leader: int) -> None:
    try:
        wait_until(lambda: not session_of(leader), 10, lambda: f"left over: {session_of(leader)}")
    finally:
        for pid in session_of(leader):
            os.kill(pid, signal.SIGKILL)


def _read(server: Server) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.lines.append(line.decode(errors="replace").rstrip("\n"))


def free_ports(count: int) -> list[int]:
    """Below the range from which the system takes ports for connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(18_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind((_HOST, port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def session_of(leader: int) -> list[int]:
    """Living processes of the session that ``leader`` leads or led."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state not in "ZX":
                found.append(int(entry.name))
    return found


def wait_until(true: Callable[[], bool], timeout: float, why: Callable[[], str]) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, why()
        time.sleep(0.05)


def _supervise(repository: Path, numbers: list[Any]) -> int:
    (http, grpc, metrics), timing = numbers

    def ready(pid: int) -> None:
        urls = {"http": f"http://{_HOST}:{http}", "grpc": f"{_HOST}:{grpc}", "metrics": f"http://{_HOST}:{metrics}"}
        print(json.dumps({**urls, "triton_pid": pid, "work": str(work), "name": supervisor.name}), flush=True)  # noqa: T201

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        launch = prepare(find_triton(os.environ["PATH"]), work, os.environ)
        addresses = Addresses(_HOST, http, grpc, metrics)
        supervisor = Supervisor(launch, repository, work, addresses, Timing(**timing), ready, say)
        return supervisor.run()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    sys.exit(_supervise(Path(sys.argv[1]), json.loads(sys.argv[2])))
