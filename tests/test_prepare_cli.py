"""``canvasrt prepare`` as a process: from a checkpoint to a server that answers, through kills in every stage."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from canvasrt.bundle.reader import EngineBundle
from canvasrt.checkpoint import Checkpoint
from fetching import LARGE, SECRET, SMALL, demo_files, place
from host_bundles import host_bundle
from host_process import FAULT
from pipelines import everything_below, files_of, flip, write
from planning import DEMO
from triton_servers import serving, wait_until

_NAMES = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OCI_PASSWORD")
TOKENS = dict.fromkeys(_NAMES, SECRET)
BUNDLE = {"name": "demo", "context": 512, "slots": 2}


class Prepare:
    """One process; ``log`` is what it has said so far, ``pid`` its own."""

    def __init__(self, file: Path, *options: str, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "canvasrt.cli.main", "prepare", str(file), *options]
        # Not a pipe: a child that outlives its parent would hold it open.
        handle, name = tempfile.mkstemp(".log", dir=file.parent)
        self._log = Path(name)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=handle,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or TOKENS)},
        )
        os.close(handle)
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.log, 60, lambda: f"no {text!r} in:\n{self.log}")

    def child(self) -> int:
        """The process of a stage."""
        file = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        wait_until(lambda: bool(file.read_text().split()), 30, lambda: f"no child: {self.log}")
        return int(file.read_text().split()[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> tuple[int, str]:
        """Exit code and standard output."""
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            out = stream.read()
        return self.process.wait(120), out


@contextmanager
def preparing(file: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Prepare]:
    started = Prepare(file, *options, environment=environment)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            started.process.wait(20)
        assert started.process.stdout is not None
        started.process.stdout.close()
        assert SECRET not in started.log
        assert "Traceback" not in started.log


def finished(file: Path, *options: str, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    with preparing(file, *options, environment=environment) as run:
        code, out = run.end()
        return code, out, run.log


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_checkpoint_is_quantized_through_a_kill_and_served_from_the_pipeline_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "pipeline.yaml",
        volume=str(tmp_path / "v"),
        profile="cpu",
        checkpoint={"source": str(DEMO)},
        quantize={"recipe": "int4-experts", "samples": 2},
    )
    with preparing(file) as first:
        first.wait_for("quantize: canvasrt quantize")
        child = first.child()
        wait_until(lambda: b"\0-m\0" in Path(f"/proc/{child}/cmdline").read_bytes(), 10, lambda: "not started")
        environment = Path(f"/proc/{child}/environ").read_text()
        first.kill()
    assert "PATH=" in environment
    assert SECRET not in environment
    assert not gone(child)  # it goes on, and nobody else begins the same
    with preparing(file, "--json") as second:
        second.wait_for(f"waiting for process {first.pid} on ")
        code, out = second.end()
    assert (code, second.log.count("quantize: canvasrt quantize")) == (0, 0), second.log
    told = json.loads(out)
    model = Path(told["model"])
    assert (told["checkpoint"], told["made"]) == (None, [str(model)])
    quantization = Checkpoint.open(model).quantization
    assert quantization is not None
    assert "INT4" in quantization.name
    assert SECRET not in everything_below(tmp_path)
    with serving(file, "--set", "slots=2") as server:
        answer = server.generate(60, text_input="Hello", seed=3, max_tokens=5)
        assert answer["num_output_tokens"] == 5
        server.process.terminate()
        assert server.wait() == 0
        server.wait_for("stopped")


def test_a_bundle_is_built_once_for_all_who_ask_through_signals_and_damage(tmp_path: Path) -> None:
    file = write(
        tmp_path / "pipeline.yaml",
        volume=str(tmp_path / "v"),
        profile="rtx-5090",
        checkpoint={"source": str(DEMO)},
        bundle=BUNDLE,
    )
    bundle = tmp_path / "v" / "engines" / "demo"
    partial = bundle.with_name("demo.partial")
    with preparing(file) as stopped:
        stopped.wait_for("build: canvasrt build")
        child = stopped.child()
        wait_until(partial.exists, 30, lambda: stopped.log)
        stopped.process.terminate()
        assert stopped.end()[0] == 143, stopped.log
    assert gone(child)
    assert "SIGTERM: stopped; the same command goes on from here" in stopped.log
    with preparing(file) as killed:
        killed.wait_for("build: canvasrt build")
        child = killed.child()
        wait_until(partial.exists, 30, lambda: killed.log)
        os.kill(child, signal.SIGKILL)
        assert killed.end()[0] == 1
    assert "error: build was ended by signal 9: most likely the memory" in killed.log
    assert not bundle.exists()
    with preparing(file, "--wait") as waiter, preparing(file) as first:
        first.wait_for("build: canvasrt build")
        with preparing(file) as second:
            runs = (first, second, waiter)
            assert [run.end() for run in runs] == [(0, f"{bundle}\n")] * 3, "".join(run.log for run in runs)
    assert "waiting for process" in second.log
    assert f"{bundle} is there and whole, made by another process" in second.log
    assert f"so far: {bundle} is not there" in waiter.log
    assert [run.log.count("build: canvasrt build") for run in runs] == [1, 0, 0]
    assert EngineBundle.open(bundle).manifest.target.profile == "rtx-5090"
    flip(bundle / "text.engine", 1000)
    code, out, log = finished(file, "--json")
    assert (code, json.loads(out)["made"]) == (0, [str(bundle)])
    assert "bundle" in log
    assert "is damaged: text.engine has the SHA-256" in log
    EngineBundle.open(bundle)
    names = {path.name for path in bundle.parent.iterdir()}
    assert names == {"demo", "demo.receipt.json", ".demo.prepare.lock"}


def test_a_fetch_goes_on_after_sigkill_and_after_ctrl_c(tmp_path: Path) -> None:
    with place("oci") as origin:
        file = origin.file(tmp_path)
        environment = {"OCI_USERNAME": "reader", "OCI_PASSWORD": SECRET}
        for end, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
            origin.server.holds[origin.end(LARGE)] = threading.Event()
            origin.server.reached.clear()
            with preparing(file, environment=environment) as run:
                assert origin.server.reached.wait(30), run.log
                wait_until(lambda: bool(list(tmp_path.rglob(f"{SMALL}"))), 20, lambda: "the other file")
                run.process.send_signal(end)
                assert run.end()[0] == code
            origin.server.holds.pop(origin.end(LARGE)).set()
        code, out, log = finished(file, environment=environment)
        assert code == 0, log
        assert files_of(Path(out.strip())) == demo_files()
        assert origin.count(SMALL) == 1
        ranges = [each.headers.get("Range", "") for each in origin.server.bodies(origin.end(LARGE))]
        assert (len(ranges), ranges[0]) == (3, "")
        assert all(each.startswith("bytes=") for each in ranges[1:])
        assert SECRET not in everything_below(tmp_path)
        origin.held.password = "another"
        origin.source = f"{origin.source}.1"
        code, out, log = finished(origin.file(tmp_path), environment=environment)
        assert (code, out) == (2, "")
        assert "error: oci://" in log
        assert "OCI_USERNAME and OCI_PASSWORD are set" in log


def test_a_server_serves_a_prepared_bundle_without_weights_from_the_pipeline_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host's double of a GPU, which executes engines of its own: they are put in the place of a build's."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "host_site"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(FAULT, str(tmp_path / "fault"))
    sizes = {"context": 256, "chunk": 64, "canvases": 1, "slots": 1, "weights": "stripped"}
    file = write(
        tmp_path / "pipeline.yaml",
        volume=str(tmp_path / "v"),
        profile="rtx-5090",
        checkpoint={"source": str(DEMO)},
        bundle={"name": "demo", **sizes},
        kernels=str(tmp_path / "kernels"),
    )
    host_bundle(tmp_path / "v" / "engines" / "demo", DEMO, moe=None, **sizes)
    code, out, log = finished(file, "--wait", "--json")
    assert code == 0, log
    assert json.loads(out)["checkpoint"] == str(DEMO)
    with serving(file) as server:
        assert server.generate(60, text_input="Hello", seed=3, max_tokens=5)["num_output_tokens"] == 5
    assert (tmp_path / "kernels").is_dir()


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"torch", "boto3", "botocore", "oras", "modelopt", "tensorrt_rtx"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
from canvasrt.cli.main import main
sys.argv = ["canvasrt", "prepare", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    ("changes", "options", "code", "message"),
    [
        ({}, ["--wait", "--timeout", "0"], 1, "error: not prepared after 0 s: "),
        ({}, [], 2, "this command needs oras: pip install 'canvasrt[fetch]'"),
        ({"volume": None}, [], 2, "error: pipeline file"),
        ({"checkpoint": {"source": str(DEMO)}}, ["--wait"], 0, ""),
    ],
)
def test_what_is_said_without_the_libraries_of_the_builder(
    changes: dict[str, object], options: list[str], code: int, message: str, tmp_path: Path
) -> None:
    content = {"volume": str(tmp_path / "v"), "profile": "cpu", "checkpoint": {"source": "oci://127.0.0.1:9/a/b"}}
    file = write(tmp_path / "pipeline.yaml", **{**content, **changes})
    command = [sys.executable, "-c", WITHOUT, str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.count("error: ") == (code != 0)
    assert done.stdout == ("" if code else f"{DEMO}\n")


def test_a_disk_that_fills_up_is_exit_code_3(tmp_path: Path) -> None:
    with place("s3") as origin:
        file = origin.file(tmp_path)
        environment = {"AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": SECRET}
        program = f"ulimit -f 1500; exec {sys.executable} -m canvasrt.cli.main prepare {file}"  # blocks of 1 KiB
        done = subprocess.run(
            ["/bin/bash", "-c", program], capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, **environment},
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "files may not grow larger here" in done.stderr
    assert "it goes on where it was" in done.stderr
    assert SECRET not in done.stderr
