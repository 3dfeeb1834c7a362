"""Runs one tritonserver: starts it, watches the model in it with a canary request, repairs it, stops it.

Triton keeps saying that a model is ready when the process of its Python model is dead, so only a request tells.
Knows nothing of the model but its name and that it answers a ping; reads no environment.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import BinaryIO, NoReturn

from canvasrt.errors import InputError
from canvasrt.serve.triton_files import Launch
from canvasrt.serve.triton_log import TritonLog, model_error
from canvasrt.wire import MODEL

INTERRUPTED, FAILED = 130, 1
_RESTRICTED = "model-repository,shared-memory,trace,logging"
_KEY = "canvasrt-key"
_SHARED_MEMORY = 8 << 20  # bytes of the region between server and model; it grows by itself
_GPU = Path("/dev/nvidiactl")

# Runs beside the server and outlives its supervisor, even one that is killed: when the pipe to it closes, it ends the
# server's whole process group, since models go on for ever without their server, and removes what they leave behind.
_GUARD = """
read -r group && { read -r _; kill -s KILL -- "-$group"; }
rm -rf -- "$1"
rm -f -- "/dev/shm/$2"*
"""


@dataclass(frozen=True, slots=True)
class Addresses:
    host: str
    http: int
    grpc: int
    metrics: int

    @property
    def reachable(self) -> str:
        """A host to connect to from this machine."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    def url(self, port: int) -> str:
        return f"[{self.reachable}]:{port}" if ":" in self.reachable else f"{self.reachable}:{port}"

    def check(self) -> None:
        """Raises InputError for equal ports and for one that can't be listened on."""
        named = {"--http-port": self.http, "--grpc-port": self.grpc, "--metrics-port": self.metrics}
        for name, port in named.items():
            others = [other for other, number in named.items() if number == port and other != name]
            if others:
                raise InputError(f"{name} and {others[0]} are both {port}: each needs a port of its own")
            try:
                family = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM)[0][0]
                with socket.socket(family) as listener:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
                    listener.bind((self.host, port))
            except OSError as error:
                fault = (error.strerror or str(error)).lower()
                raise InputError(f"{name} {port} can't be used on {self.host}: {fault}. Choose another") from None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, and how often."""

    load: float = 1800.0  # the longest that a model may take to load
    still_loading: float = 10.0  # between two signs of life
    canary: float = 5.0  # between two canary requests
    retry: float = 1.0  # after one that failed
    answer: float = 20.0  # the longest that one may take
    failures: int = 3  # in a row, then the model is repaired
    repairs: int = 3  # that many within `window`, then the server is given up
    window: float = 600.0
    drain: float = 30.0  # for requests in flight when the server is told to stop
    finish: float = 5.0  # then for the model to let go of what it holds


class ServerError(Exception):
    """The server can't go on, for no fault of the user."""


class Supervisor:
    """``work`` is a folder that is removed with the server; ``say`` takes one line for the log."""

    def __init__(
        self,
        launch: Launch,
        repository: Path,
        work: Path,
        addresses: Addresses,
        timing: Timing,
        ready: Callable[[int], None],
        say: Callable[[str], None],
        verbose: bool = False,
    ) -> None:
        self._launch = launch
        self._repository = repository
        self._work = work
        self._addresses = addresses
        self._timing = timing
        self._ready = ready
        self._say = say
        self._log = TritonLog(say, verbose)
        self.name = f"canvasrt-{secrets.token_hex(4)}"
        self._secret = secrets.token_hex(16)
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._serving = False
        self._repaired: list[float] = []

    def run(self) -> int:
        """Until the server ends: 0 after SIGTERM, 130 after SIGINT, 1 when it failed.

        Raises InputError when the model refuses to load with a sentence of its own. Main thread only.
        """
        return asyncio.run(self._run())

    async def _run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signals.put_nowait, number)
        guard = await _start(["/bin/sh", "-c", _GUARD, "canvasrt-guard", str(self._work), self.name], stdin=PIPE)
        assert guard.stdin is not None
        try:
            output, inlet = os.pipe()  # not asyncio's own: its wait() returns only when the last writer has closed it
            with open(output, "rb", 0) as stream:
                try:
                    process = await _start(self._command(), stdout=inlet, environment=self._launch.environment)
                finally:
                    os.close(inlet)
                guard.stdin.write(f"{process.pid}\n".encode())
                return await self._serve(process, stream)
        finally:
            guard.stdin.close()
            await guard.wait()

    async def _serve(self, process: Process, output: BinaryIO) -> int:
        reading = asyncio.create_task(self._log.read(output))
        ended = asyncio.create_task(process.wait())
        told = asyncio.create_task(self._signals.get())
        watching = asyncio.create_task(self._watch(process))
        try:
            await asyncio.wait({ended, told, watching}, return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                watching.cancel()  # a server that stops accepts no canary: it would be taken for dead, and repaired
                return await self._stop(process, ended, told.result())
            if not ended.done():
                watching.result()  # raises
            # Its last words; a model that lives on holds the pipe open.
            await asyncio.wait({reading}, timeout=1.0)
            self._died(ended.result())
        except ServerError as error:
            self._say(f"error: {error}")
            return FAILED
        finally:
            watching.cancel()
            told.cancel()
            reading.cancel()

    def _command(self) -> Sequence[str]:
        at, settings = self._addresses, self._timing
        restricted = f"{_RESTRICTED}:{_KEY}={self._secret}"
        return [
            str(self._launch.server),
            f"--id={self.name}",
            f"--model-repository={self._repository}",
            f"--backend-directory={self._launch.backends}",
            # Without explicit control a model can't be loaded again.
            "--model-control-mode=explicit",
            f"--load-model={MODEL}",
            *(f"--{kind}-address={at.host}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={at.http}",
            f"--grpc-port={at.grpc}",
            f"--metrics-port={at.metrics}",
            # Who may load models may run any code: nobody but the supervisor.
            f"--http-restricted-api={restricted}",
            f"--grpc-restricted-protocol={restricted}",
            f"--backend-config=python,shm-default-byte-size={_SHARED_MEMORY}",
            f"--backend-config=python,shm-region-prefix-name={self.name}-",
            f"--allow-gpu-metrics={str(_GPU.exists()).lower()}",
            f"--exit-timeout-secs={int(settings.drain + settings.finish) + 1}",
            "--log-format=ISO8601",
        ]

    async def _watch(self, process: Process) -> None:
        """Never returns; raises ServerError."""
        await self._until_ready()
        self._serving = True
        self._ready(process.pid)
        failures = 0
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._log.lost.wait(), self._timing.retry if failures else self._timing.canary)
            fault = await self._ping()
            if fault is None:
                self._log.lost.clear()  # of a model that was replaced since
                if failures:
                    self._say("the canary request is answered again")
                failures = 0
                continue
            failures += 1
            self._say(f"canary request failed ({failures} of {self._timing.failures}): {fault}")
            gone = self._log.lost.is_set() or not _others_in_session(process.pid)
            if gone or failures >= self._timing.failures:  # it is dead, or hung
                await self._repair(process)
                failures = 0

    async def _until_ready(self) -> None:
        began = told = time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            code, text = await self._call("GET", "/v2", "", self._timing.answer)
            # By name: the port may have become another server's since it was checked.
            if code == 200 and f'"{self.name}"' in text:
                code, text = await self._call("GET", "/v2/health/ready", "", self._timing.answer)
                if code == 200:
                    break
            now = time.monotonic()
            if now - began > self._timing.load:
                raise ServerError(f"the model was not loaded within {self._timing.load:.0f} s")
            if now - told >= self._timing.still_loading:
                told = now
                self._say(f"loading the model, {now - began:.0f} s so far")
        fault = await self._ping()
        if fault is not None:
            raise ServerError(f"the model was loaded and does not answer: {fault}")

    async def _ping(self) -> str | None:
        """None, or what is wrong."""
        code, text = await self._call("POST", f"/v2/models/{MODEL}/generate", '{"ping": true}', self._timing.answer)
        return None if code == 200 else _error(text)

    async def _repair(self, process: Process) -> None:
        now = time.monotonic()
        self._repaired = [each for each in self._repaired if now - each < self._timing.window]
        if len(self._repaired) >= self._timing.repairs:
            raise ServerError(f"the model failed again after {len(self._repaired)} repairs: giving up")
        self._repaired.append(now)
        self._say("loading the model again")
        self._log.lost.clear()
        for stub in _others_in_session(process.pid):  # a model that hangs would keep its memory
            with suppress(ProcessLookupError):
                os.kill(stub, signal.SIGKILL)
        # Triton loads a model again only if a file beside model.py has changed; a changed config.pbtxt is not enough.
        os.utime(self._repository / MODEL / "1" / "model.py")
        code, text = await self._call("POST", f"/v2/repository/models/{MODEL}/load", "", self._timing.load)
        fault = _error(text) if code != 200 else await self._ping()
        if fault is not None:
            raise ServerError(f"the model can't be loaded again: {model_error(fault) or fault}")
        self._say(f"the model is back after {time.monotonic() - now:.1f} s")

    async def _stop(self, process: Process, ended: "asyncio.Task[int]", first: signal.Signals) -> int:
        """Streams in flight end, up to the limit or to a second signal; the guard does the rest."""
        if not self._serving:
            self._say(f"{first.name}: stopped before the model was loaded")
            return INTERRUPTED if first == signal.SIGINT else 0
        drain = self._timing.drain
        self._say(f"{first.name}: stopping; requests in flight have {drain:.0f} s, a second signal stops at once")
        if not ended.done():
            process.send_signal(signal.SIGTERM)
        again = asyncio.create_task(self._signals.get())
        stopped = asyncio.create_task(self._log.stopped.wait())
        # The model itself cancels what still runs after the time for it; a hanging one is killed a little later.
        limit = drain + self._timing.finish
        await asyncio.wait({ended, again, stopped}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done() and not again.done():
            # A model that was loaded again can't be unloaded: Triton would wait for the dead one.
            await asyncio.wait({ended, again}, timeout=self._timing.finish, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() or stopped.done():
            self._say("stopped")
        else:
            self._say(again.result().name + ": stopped at once" if again.done() else f"stopped after {limit:.0f} s")
        again.cancel()
        stopped.cancel()
        return INTERRUPTED if first == signal.SIGINT else 0

    def _died(self, code: int) -> NoReturn:
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if self._log.refusal is not None:
            raise InputError(self._log.refusal)
        self._log.show_last()
        raise ServerError(f"tritonserver {end}")

    async def _call(self, method: str, path: str, body: str, seconds: float) -> tuple[int, str]:
        """Status and text; status 0 and what is wrong where there is no answer."""
        return await asyncio.to_thread(self._blocking_call, method, path, body, seconds)

    def _blocking_call(self, method: str, path: str, body: str, seconds: float) -> tuple[int, str]:
        connection = HTTPConnection(self._addresses.reachable, self._addresses.http, timeout=seconds)
        try:
            connection.request(method, path, body, {_KEY: self._secret, "Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except TimeoutError:
            return 0, f"no answer within {seconds:.0f} s"
        except (OSError, HTTPException) as error:
            return 0, str(error) or type(error).__name__
        finally:
            connection.close()


async def _start(
    command: Sequence[str],
    stdin: int = DEVNULL,
    stdout: int = DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """In a session of its own: Ctrl-C in a terminal must reach the supervisor only, which then drains."""
    try:
        return await asyncio.create_subprocess_exec(
            *command, stdin=stdin, stdout=stdout, stderr=STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        raise InputError(f"{command[0]} can't be started: {error.strerror}") from None


def _error(text: str) -> str:
    """What Triton's JSON says, or the text as it is."""
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text


def _others_in_session(leader: int) -> list[int]:
    """Living processes of the session that ``leader`` leads, itself not among them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != leader:
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]  # behind its name
            except OSError:  # it has ended
                continue
            if int(session) == leader and state not in "ZX":
                found.append(int(entry.name))
    return found
