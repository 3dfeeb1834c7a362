"""``canvasrt verify`` and ``canvasrt generate`` on an engine bundle, whose engine the network interpreter executes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from builds import Builds, run_here
from canvasrt.runtime import engine_call
from canvasrt.runtime.open_bundle import Hardware
from host_bundles import Host, host_bundle
from host_gpu import real
from planning import DEMO
from tiny import Dims, write


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("other"), Dims(layers="sf"), seed=5)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "demo"
    return host_bundle(folder, DEMO, precision="bf16", context=256, chunk=64, canvases=1, slots=1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()

    class HostHardware(Hardware):
        def __init__(self) -> None:
            super().__init__(made.hardware.device, made.hardware.library)

    monkeypatch.setattr("canvasrt.runtime.open_bundle.Hardware", HostHardware)
    return made


def test_verify_compares_an_engine_with_torch(demo: Path, gpu: Host) -> None:
    arguments = ("verify", demo, "--checkpoint", DEMO, "--samples", 4)
    code, printed, said = run_here(*arguments, "--json")
    found = json.loads(printed)
    assert (code, found["agrees"], found["prompts"], found["torch"]) == (0, True, 4, "float32 on cpu"), said
    assert 0 < found["kl_median"] < 1e-3  # a BF16 engine
    assert found["top1_agreement"] > 0.99
    assert gpu.library.calls > 20
    code, printed, _ = run_here(*arguments, "--max-kl", 0)
    assert code == 1
    assert "DIFFERS from the torch lowering" in printed


def test_verify_notices_an_engine_that_turns_its_keys_too_far(
    demo: Path, gpu: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine_call._inverse_frequencies
    monkeypatch.setattr(engine_call, "_inverse_frequencies", lambda layer: original(layer) * np.float32(1.02))
    code, printed, _ = run_here("verify", demo, "--checkpoint", DEMO, "--samples", 4, "--json")
    assert code == 1
    assert json.loads(printed)["kl_median"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the checkpoint to compare it with: --checkpoint FOLDER"),
        (["--checkpoint", "OTHER"], "is not the one that bundle"),
        (["--source", str(DEMO)], "--source is for checkpoints"),
    ],
)
def test_verify_explains_what_a_bundle_is_compared_with(
    demo: Path, gpu: Host, checkpoint: Path, arguments: list[str], message: str
) -> None:
    given = [str(checkpoint) if each == "OTHER" else each for each in arguments]
    code, _, said = run_here("verify", demo, *given)
    assert code == 2
    assert message in said


def test_a_gpu_that_fails_gives_the_command_its_own_exit_code(demo: Path, gpu: Host) -> None:
    gpu.driver.faults["cuEventSynchronize"] = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    code, _, said = run_here("verify", demo, "--checkpoint", DEMO)
    assert (code, said) == (70, "error: CUDA error CUDA_ERROR_ILLEGAL_ADDRESS in cuEventSynchronize: a planted fault\n")


def test_generate_answers_with_a_bundle(demo: Path, gpu: Host) -> None:
    puzzle = "..6|35.\n.53|.1.\n31.|62.\n.24|.35\n432|..1\n5..|..3"
    code, printed, said = run_here("generate", demo, "--prompt", puzzle, "--prompt", puzzle, "--seed", 4, "--json")
    answers = [json.loads(line)["text"].strip() for line in printed.splitlines()]
    assert (code, answers) == (0, ["146|352\n253|416\n315|624\n624|135\n432|561\n561|243"] * 2), said
    assert gpu.library.calls > 0
    code, _, said = run_here("generate", demo, "--prompt", puzzle, "--context", 128)
    assert (code, "built for a context of 256 tokens" in said) == (2, True)


REAL = """
import sys
import tensorrt_rtx
from canvasrt.bundle.reader import EngineBundle
from canvasrt.runtime.cuda_device import CudaDevice
from canvasrt.runtime.tensorrt_engine import TensorRTEngine
from host_gpu import HostDriver
plan = EngineBundle.open(sys.argv[1]).engine("text")
try:
    TensorRTEngine(tensorrt_rtx, CudaDevice(HostDriver()), plan, ["encoder", "decoder"], "text.engine")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_nvidias_own_library_refuses_a_real_plan_here_and_we_repeat_its_words(builds: Builds) -> None:
    """What of the real library works without a GPU: its runtime starts, reads the plan, and says what it lacks.

    In a process of its own, since the library writes to the first logger that a process gave it.
    """
    bundle = builds.bundle("tiny", "rtx-5090").path
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", REAL, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    assert done.stdout.startswith("BundleError: text.engine: TensorRT-RTX says that this machine's GPU or driver can't")
    assert "cudaError 35" in done.stdout
