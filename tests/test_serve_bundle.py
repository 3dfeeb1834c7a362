"""Engine bundles behind the service, the engine process and a real Triton: the same texts as the torch runner's.

The engine process has a GPU that is this machine's memory, and the network interpreter for TensorRT (host_process.py).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builds import Builds, canvasrt
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import BundleError, InputError
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from canvasrt.runtime.torch_runner import TorchRunner
from canvasrt.scheduler.types import Request
from canvasrt.serve.engine_process import EngineProcess
from canvasrt.serve.intake import read_request
from canvasrt.serve.model import check_model, open_model, open_served
from canvasrt.serve.settings import ServeSettings
from canvasrt.wire import MODEL
from host_bundles import Host, host_bundle
from host_process import FAULT
from planning import DEMO
from service import tensors
from test_engine_process import Ear
from triton_servers import again_if_triton_aborts, free_ports, serving

CONTEXT = 256
# A puzzle that is solved in a few steps: random text is chaotic, and a last bit decides of it after twenty.
ASKED = {"text_input": "..6|35.\n.53|.1.\n31.|62.\n.24|.35\n432|..1\n5..|..3", "max_tokens": 96, "seed": 4}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return host_bundle(folder / "demo", DEMO, context=CONTEXT, chunk=64, canvases=2, slots=2)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """For processes that are started from here."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "host_site"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(FAULT, str(tmp_path / "fault"))
    return


def state_of(settings: ServeSettings, **values: Any) -> RequestState:
    asked = read_request(tensors(**values), {}, open_served(settings, CONTEXT))
    return RequestState.new(asked.params, asked.prompt)


def expected(state: RequestState) -> tuple[int, ...]:
    runner = TorchRunner.open(DEMO, context=CONTEXT)
    return next(event.state.output for event in run_requests(runner, {0: state}) if event.kind == "end")


def test_a_bundle_opens_with_its_own_sizes(bundle: Path) -> None:
    host = Host()
    model = open_model(ServeSettings.parse(bundle, ["slots=3"]), hardware=host.hardware)
    assert isinstance(model.runner, TensorRTRunner)
    assert (model.runner.limits.slots, model.context, model.policy.canvases) == (3, CONTEXT, 2)
    assert model.policy.prefill_tokens == 64
    assert model.served.codec is not None
    assert host.library.calls > 0  # the first steps are taken before anybody asks
    assert host.driver.calls["cuGraphInstantiate"] == 2  # of one canvas and of two
    assert model.runner.length(0) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("context=128", f"was built for a context of {CONTEXT} tokens.*--context 128"),
        ("canvases=3", "at most 2 canvases in a call.*--canvases 3"),
        ("slots=1", "as many slots, not 1"),
    ],
)
def test_settings_that_a_bundle_can_not_have(bundle: Path, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_model(ServeSettings.parse(bundle, [setting]), hardware=Host().hardware)


def test_a_bundle_without_weights_asks_for_its_checkpoint_before_a_server_is_started(tmp_path: Path) -> None:
    folder = host_bundle(tmp_path / "b", DEMO, context=CONTEXT, chunk=64, canvases=1, slots=1, weights="stripped")
    with pytest.raises(BundleError, match="--set checkpoint=FOLDER"):
        check_model(ServeSettings.parse(folder, []))
    check_model(ServeSettings.parse(folder, [f"checkpoint={DEMO}"]))


@pytest.mark.usefixtures("_gpu")
def test_the_engine_process_answers_and_ends_with_its_own_exit_code_when_the_gpu_fails(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings, ear = ServeSettings.parse(bundle, []), Ear()
    engine = EngineProcess.start(settings)
    engine.attach(ear)
    state = state_of(settings, **ASKED)
    engine.submit(Request(1, state))
    event = ear.end()
    assert (event.kind, event.state.output) == ("end", expected(state))
    (tmp_path / "fault").touch()
    engine.submit(Request(2, state))
    event = ear.end()
    assert event.kind == "failed"
    assert "CUDA_ERROR_ILLEGAL_ADDRESS in cuEventSynchronize" in str(event.error)
    assert engine._process.wait(20) == 70
    engine._reader.join(20)
    assert str(engine.broken) == "the engine process has ended (exit code 70: the GPU failed, as its log says)"
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert {line["part"] for line in lines if line["event"] == "loading"} >= {"plan", "first steps"}
    assert [line["exit_code"] for line in lines if line["event"] == "broken"] == [70]


@again_if_triton_aborts
def serve_and_fail(bundle: Path, fault: Path) -> None:
    with serving(bundle, "--canary-seconds", "0.5") as server:
        settings = ServeSettings.parse(bundle, [])
        state = state_of(settings, **ASKED)
        codec = open_served(settings, CONTEXT).codec
        assert codec is not None
        assert server.generate(60, **ASKED)["text_output"] == codec.decode(expected(state))
        fault.touch()
        status, answer = server.post(f"/v2/models/{MODEL}/generate", ASKED, 60)
        assert status != 200
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(answer)
        fault.unlink()
        server.wait_for("the model is back", 90)
        assert "(2 of 3)" not in server.log  # failed canary requests: it is known what has happened
        assert server.generate(60, **ASKED)["text_output"] == codec.decode(expected(state))


@pytest.mark.usefixtures("_gpu")
def test_triton_serves_a_bundle_and_loads_it_again_after_the_gpu_has_failed(bundle: Path, tmp_path: Path) -> None:
    serve_and_fail(bundle, tmp_path / "fault")


def test_without_a_gpu_serve_says_so_in_one_sentence(builds: Builds) -> None:
    built = builds.bundle("tiny", "rtx-5090")
    http, grpc, metrics = free_ports(3)
    done = canvasrt("serve", built.path, "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
    assert done.returncode == 2, done.stderr
    assert "no usable NVIDIA driver on this machine" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_fault_of_these_tests_is_off_by_default() -> None:
    assert FAULT not in os.environ
