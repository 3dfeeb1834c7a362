"""The supervisor keeps a real tritonserver answering or ends with a clear word, and leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from solve import CHECKPOINT

import bundles
from canvasrt.errors import InputError
from canvasrt.serve.triton_files import find_triton, prepare
from triton_servers import Server, again_if_triton_aborts, free_ports, serving, session_of, supervising, wait_until

GENERATE = "/v2/models/diffusion_gemma/generate"
QUICK = {"canary": 0.2, "retry": 0.1, "answer": 1.0, "failures": 2, "drain": 10.0}

CONFIG = """
backend: "python"
max_batch_size: 1
model_transaction_policy { decoupled: true }
instance_group [ { kind: KIND_MODEL count: 1 } ]
input [
  { name: "ping" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] } ]
"""

# Streams max_tokens numbers, ten a second; can be told by a file beside it to refuse to load.
MODEL_PY = """
import sys
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.threads = []
        told = Path(__file__).parent / "refuse.txt"
        if told.exists():
            raise pb_utils.TritonModelException(told.read_text())

    def execute(self, requests):
        for request in requests:
            tensor = pb_utils.get_input_tensor_by_name(request, "max_tokens")
            count = 0 if tensor is None else int(tensor.as_numpy().item())
            arguments = request.get_response_sender(), count
            self.threads.append(threading.Thread(target=self.answer, args=arguments, daemon=True))
            self.threads[-1].start()

    def finalize(self):
        for thread in self.threads:
            thread.join()
        print('{"event": "stopped"}', file=sys.stderr, flush=True)

    def answer(self, sender, count):
        if (Path(__file__).parent / "hang.txt").exists():
            time.sleep(3600)
        for number in range(max(count, 1)):
            time.sleep(0.1 if count else 0)
            text = np.array([[f"{number};"]], dtype=object)
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "diffusion_gemma"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "1" / "model.py").write_text(MODEL_PY)
    return tmp_path / "models"


def refuse(repository: Path, sentence: str) -> None:
    (repository / "diffusion_gemma" / "1" / "refuse.txt").write_text(sentence)


def left_behind(server: Server) -> Iterator[str]:
    yield from map(str, session_of(server.facts["triton_pid"]))
    yield from map(str, Path("/dev/shm").glob(f"{server.facts['name']}*"))
    if Path(server.facts["work"]).exists():
        yield server.facts["work"]


@again_if_triton_aborts
def test_a_dead_and_a_hanging_model_are_loaded_again_until_it_is_too_much(repository: Path) -> None:
    with supervising(repository, **QUICK, repairs=3) as server:
        assert server.generate(ping=True)["text_output"] == "0;"
        # Twice: the first time Python has put a new folder beside model.py, which hides that nothing else has changed.
        for harm in (kill_model, kill_model, hang_model):
            (stub,) = server.stubs()
            harm(server, repository)
            server.wait_for("the model is back")
            server.lines.clear()
            assert server.generate(ping=True)["text_output"] == "0;"
            assert stub not in server.stubs()
        kill_model(server, repository)
        assert server.wait() == 1
        server.wait_for("failed again after 3 repairs: giving up")
        assert list(left_behind(server)) == []


def kill_model(server: Server, repository: Path) -> None:
    os.kill(server.stubs()[0], signal.SIGKILL)


def hang_model(server: Server, repository: Path) -> None:
    hang = repository / "diffusion_gemma" / "1" / "hang.txt"
    hang.touch()
    server.wait_for("canary request failed (2 of 2): no answer within 1 s")
    hang.unlink()


@again_if_triton_aborts
def test_a_model_that_can_not_be_loaded_again_ends_the_server(repository: Path) -> None:
    refusal = repository / "diffusion_gemma" / "1" / "refuse.txt"
    refusal.unlink(missing_ok=True)  # of a try that Triton aborted: the next server would not even start
    with supervising(repository, **QUICK) as server:
        refuse(repository, "the disk is gone")
        os.kill(server.stubs()[0], signal.SIGKILL)
        assert server.wait() == 1
        server.wait_for("error: the model can't be loaded again: the disk is gone")
        assert list(left_behind(server)) == []


def test_the_death_of_the_server_ends_the_supervisor_with_its_last_words(repository: Path) -> None:
    with supervising(repository, **QUICK) as server:
        (stub,) = server.stubs()
        os.kill(server.facts["triton_pid"], signal.SIGKILL)
        assert server.wait() == 1
        server.wait_for("error: tritonserver was killed by signal 9")
        assert "Started HTTPService" in server.log
        assert stub not in session_of(server.facts["triton_pid"])
        assert list(left_behind(server)) == []


def test_a_killed_supervisor_leaves_nothing_behind(repository: Path) -> None:
    with supervising(repository, **QUICK) as server:
        assert len(list(left_behind(server))) >= 4  # server, stub, shared memory, folder
        server.process.kill()
        wait_until(lambda: not list(left_behind(server)), 10, lambda: str(list(left_behind(server))))


def test_a_second_signal_stops_at_once_and_so_does_the_limit(repository: Path) -> None:
    with supervising(repository, **QUICK) as server:
        with server.open(f"{GENERATE}_stream", {"max_tokens": 600}) as stream:
            assert b"data:" in stream.readline()
            server.process.send_signal(signal.SIGINT)
            server.wait_for("requests in flight have 10 s")
            began = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.wait() == 130
            assert time.monotonic() - began < 5
        assert list(left_behind(server)) == []
    with supervising(repository, **{**QUICK, "drain": 0.5, "finish": 0.5}) as server:
        with server.open(f"{GENERATE}_stream", {"max_tokens": 600}) as stream:
            assert b"data:" in stream.readline()
            server.process.terminate()
            assert server.wait() == 0
        assert "stopped after 1 s" in server.log
        assert list(left_behind(server)) == []


def test_a_stream_in_flight_ends_before_the_server_does(repository: Path) -> None:
    with supervising(repository, **QUICK) as server:
        only_the_supervisor_may_load_models_and_change_the_log(server)
        with server.open(f"{GENERATE}_stream", {"max_tokens": 15}) as stream:
            assert b"data:" in stream.readline()
            server.process.terminate()
            rest = stream.read().decode()
        assert '"14;"' in rest
        assert server.wait() == 0
        server.wait_for("\nstopped")


def only_the_supervisor_may_load_models_and_change_the_log(server: Server) -> None:
    for path in ("/v2/repository/models/diffusion_gemma/load", "/v2/repository/index", "/v2/logging"):
        status, answer = server.post(path)
        assert (status, "restricted" in str(answer)) == (403, True)
    from tritonclient.grpc import InferenceServerClient  # here: it takes a second to import
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(server.grpc) as client:
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="restricted"):
            client.load_model("diffusion_gemma")


def test_a_model_that_refuses_to_load_says_why_in_its_own_words(repository: Path) -> None:
    refuse(repository, 'the folder "x" is broken: copy it again')
    with supervising(repository, **QUICK) as server:
        assert server.facts == {}
        assert 'InputError: the folder "x" is broken: copy it again' in server.lines[-1]


def canvasrt(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "canvasrt.cli.main", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["BROKEN"], "model.safetensors"),
        (["BUNDLE", "--set", "context=4096"], "was built for a context of 32768 tokens, which no setting changes"),
        (["CHECKPOINT", "--set", "slots=0"], "--set slots=0: "),
        (["CHECKPOINT", "--set", "slot=1"], "--set slot=1: expected KEY=VALUE"),
        (["CHECKPOINT", "--http-port", "8001"], "--http-port and --grpc-port are both 8001"),
        (
            ["CHECKPOINT", "--metrics-port", "TAKEN"],
            "--metrics-port TAKEN can't be used on 127.0.0.1: address already in",
        ),
        (["CHECKPOINT", "--host", "203.0.113.7"], "can't be used on 203.0.113.7"),
    ],
)
def test_a_users_mistake_is_told_before_a_server_is_started(
    arguments: list[str], message: str, broken: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        places = {"CHECKPOINT": str(CHECKPOINT), "BROKEN": str(broken), "BUNDLE": str(tmp_path / "b"), "TAKEN": port}
        if "BUNDLE" in arguments:
            bundles.write(tmp_path / "b", CHECKPOINT)
        done = canvasrt(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message.replace("TAKEN", port) in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_model_that_can_not_hold_its_requests_says_so_without_a_traceback() -> None:
    http, grpc, metrics = map(str, free_ports(3))
    ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    done = canvasrt(str(CHECKPOINT), "--set", "context=4096", *ports)
    assert done.returncode == 2, done.stderr
    assert "exceeds the 1024 positions" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_demo_checkpoint_is_served_and_a_request_ends_before_the_server() -> None:
    with serving(CHECKPOINT, "--set", "slots=2", "--canary-seconds", "0.5") as server:
        server.wait_for("READY: http://")
        assert json.loads(next(line for line in server.lines if line.startswith("{")))["event"] == "ready"
        assert server.generate(text_input="Hello", seed=3, max_tokens=5)["num_output_tokens"] == 5
        inputs = {"text_input": "Hello", "stream": True, "max_tokens": 300, "ignore_eos": True}
        with server.open(f"{GENERATE}_stream", inputs) as stream:
            assert b"data:" in stream.readline()
            server.process.terminate()
            rest = stream.read().decode()
        assert server.wait() == 0
        assert '"finish_reason":"length"' in rest


def test_a_signal_while_the_model_is_loaded_ends_at_once(tmp_path: Path) -> None:
    ports = [f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), free_ports(3), strict=True)]
    command = [sys.executable, "-m", "canvasrt.cli.main", "serve", str(CHECKPOINT), *ports]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "loading" in process.stderr.readline()
        time.sleep(0.5)
        process.terminate()
        assert "SIGTERM: stopped before the model was loaded" in process.stderr.read()
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_no_triton_is_told_with_a_way_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no Triton .* pip install --no-deps --target .*/triton nvidia-pytriton"):
        find_triton("", prefix=tmp_path, container=tmp_path / "opt")


def test_a_container_is_found_on_path_or_in_its_place(tmp_path: Path) -> None:
    stub = container(tmp_path, f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0")
    for path in ("", str(tmp_path / "opt" / "bin")):
        found = find_triton(path, prefix=tmp_path, container=tmp_path / "opt")
        assert (found.server, found.stub, found.bundled) == (tmp_path / "opt" / "bin" / "tritonserver", stub, False)
        launch = prepare(found, tmp_path / "work", {"PATH": "/bin"}, prefix=tmp_path / "own")
        assert launch.backends == tmp_path / "opt" / "backends"
        assert launch.environment == {"PATH": f"{tmp_path}/own/bin:/bin"}


def test_a_triton_for_another_python_is_refused(tmp_path: Path) -> None:
    container(tmp_path, "libpython3.99.so.1.0")
    with pytest.raises(InputError, match=r"runs models with Python 3\.99, .*: install canvasrt for Python 3\.99"):
        find_triton("", prefix=tmp_path, container=tmp_path / "opt")


def container(folder: Path, library: str) -> Path:
    backend = folder / "opt" / "backends" / "python"
    backend.mkdir(parents=True)
    (backend / "libtriton_python.so").touch()
    (backend / "triton_python_backend_stub").write_bytes(b"\x7fELF\x00" + library.encode() + b"\x00")
    server = folder / "opt" / "bin" / "tritonserver"
    server.parent.mkdir()
    server.touch(mode=0o755)
    return backend / "triton_python_backend_stub"


def test_a_test_is_repeated_for_an_abort_of_triton_alone() -> None:
    tried: list[str] = []

    @again_if_triton_aborts
    def ends_with(*logs: str) -> None:
        log = logs[len(tried)]
        tried.append(log)
        Server(process=None, lines=[log])  # none is needed for its log
        assert not log

    ends_with("boost::interprocess::lock_exception", "")
    assert len(tried) == 2
    with pytest.raises(AssertionError):
        ends_with("", "", "another fault")
    assert len(tried) == 3
    tried.clear()
    with pytest.raises(AssertionError):
        ends_with(*["boost::interprocess::lock_exception"] * 3)
    assert len(tried) == 3
