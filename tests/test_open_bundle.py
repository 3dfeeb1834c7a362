"""Loading a bundle: weights by name, what is refused and in which words, memory that is not there, kept kernels."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt

import canvasrt.runtime.refit
from builds import Builds
from canvasrt.bundle.reader import EngineBundle
from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import BundleError, CapacityError, CheckpointError, DeviceError, InputError
from canvasrt.runtime.cuda_device import CudaDevice, open_device
from canvasrt.runtime.open_bundle import BundleOptions, Hardware, cache_file, open_bundle
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, EngineRunner
from canvasrt.runtime.refit import WeightSource
from host_bundles import Host, host_bundle, quiet
from host_gpu import HostDriver, real
from host_tensorrt import SCRATCH_BYTES, HostTensorRT
from tiny import Dims, write

CANVAS, CONTEXT = 12, 72
SIZES = {"context": CONTEXT, "chunk": 16, "canvases": 2, "slots": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("open") / "checkpoint", Dims(layers="sf", embedding_scale=1.5), seed=5)


@pytest.fixture(scope="module")
def inside(checkpoint: Path) -> Path:
    return host_bundle(checkpoint.parent / "inside", checkpoint, **SIZES)


@pytest.fixture(scope="module")
def stripped(checkpoint: Path) -> Path:
    return host_bundle(checkpoint.parent / "stripped", checkpoint, weights="stripped", **SIZES)


def answers(runner: EngineRunner) -> list[DenoiseResult]:
    rng = np.random.default_rng(3)
    for slot, length in enumerate((30, 7)):
        runner.encode([EncodeRow(slot, rng.integers(0, 60, length).astype(np.int32), 0)])
    found = []
    for step in range(3):
        rows = [
            DenoiseRow(
                slot, rng.integers(0, 60, CANVAS).astype(np.int32), 0.7, rng.random(CANVAS, np.float32), step == 0
            )
            for slot in range(2)
        ]
        found += runner.denoise(rows)
    return found


def assert_equal(ours: list[DenoiseResult], expected: list[DenoiseResult]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(mine.entropy, theirs.entropy)
        np.testing.assert_array_equal(mine.sampled, theirs.sampled)


# Weights


@pytest.mark.parametrize(("refits", "batch"), [("together", 1), ("together", 1 << 30), ("apart", 1), ("apart", 20_000)])
def test_stripped_weights_are_filled_from_the_checkpoint_whatever_the_library_wants_at_once(
    inside: Path, stripped: Path, checkpoint: Path, refits: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canvasrt.runtime.refit, "BATCH_BYTES", batch)
    host = Host(refits=refits)
    assert_equal(answers(host.open(stripped, checkpoint=checkpoint)), answers(Host().open(inside)))
    names = [entry.name for entry in EngineBundle.open(stripped).manifest.engines["text"].weight_map]
    assert sorted(name for batch in host.library.refitted for name in batch) == sorted(names)
    assert (len(host.library.refitted) > 1) == (refits == "apart")


def test_quantized_weights_are_filled_in_their_own_formats(builds: Builds, tmp_path: Path) -> None:
    """FP8, FP4 and float32 of one checkpoint, put together from several tensors."""
    source = builds.checkpoint("tiny-nvfp4")
    sizes = {"context": 64, "chunk": 16, "canvases": 1, "slots": 1}
    folders = [
        host_bundle(tmp_path / weights, source, precision="bf16", weights=weights, **sizes)
        for weights in ("inside", "stripped")
    ]
    types = {entry.dtype for entry in EngineBundle.open(folders[1]).manifest.engines["text"].weight_map}
    assert types >= {"fp8", "fp4", "fp32", "bf16"}
    results = []
    for folder in folders:
        runner = Host().open(folder, checkpoint=source)
        canvas = runner.limits.canvas
        tokens = np.arange(2, 2 + canvas, dtype=np.int32)
        runner.encode([EncodeRow(0, tokens[:5], 0)])
        results.append(runner.denoise([DenoiseRow(0, tokens, 0.7, np.full(canvas, 0.3, np.float32), True)]))
    assert_equal(*results)


def test_a_weight_that_does_not_fill_its_place_is_refused(stripped: Path, checkpoint: Path) -> None:
    bundle = EngineBundle.open(stripped)
    entry = bundle.manifest.engines["text"].weight_map[0]
    source = WeightSource(bundle, Checkpoint.open(checkpoint))
    assert source.made(entry).nbytes == entry.nbytes
    with pytest.raises(BundleError, match=r"has room for [\d,]+ bytes, and the checkpoint's tensors make"):
        source.made(entry.model_copy(update={"nbytes": entry.nbytes + 4}))
    with pytest.raises(BundleError, match="is fp6, which this version can't make: upgrade canvasrt"):
        source.made(entry.model_copy(update={"dtype": "fp6"}))
    with pytest.raises(BundleError, match="it is filled from the checkpoint"):
        WeightSource(bundle, None).made(entry)


def test_progress_counts_every_byte_of_plan_embedding_and_weights(stripped: Path, checkpoint: Path) -> None:
    heard: dict[str, list[tuple[int, int]]] = {}
    options = BundleOptions(checkpoint=checkpoint)
    open_bundle(stripped, options, lambda part, *counts: heard.setdefault(part, []).append(counts), Host().hardware)
    assert set(heard) == {"plan", "model.decoder.embed_tokens.weight", "weights", "first steps"}
    for counts in heard.values():
        done = [each for each, _ in counts]
        assert done == sorted(done)
        assert len({whole for _, whole in counts}) == 1
        assert counts[-1][0] == counts[-1][1] > 0
    entries = EngineBundle.open(stripped).manifest.engines["text"].weight_map
    assert heard["weights"][-1][1] == sum(entry.nbytes for entry in entries)


def test_an_embedding_larger_than_a_piece_arrives_whole(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(Host().open(inside))
    monkeypatch.setattr(canvasrt.runtime.refit, "_PIECE_BYTES", 1000)
    assert_equal(answers(Host().open(inside)), expected)


def test_a_checkpoint_with_nan_is_refused_while_its_weights_are_read(stripped: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", Dims(layers="sf", embedding_scale=1.5), seed=5)
    whole = bytearray((bad / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    name = "model.decoder.layers.1.mlp.down_proj.weight"
    at = start + header[name]["data_offsets"][0]
    whole[at : at + 4] = b"\xff\xff\xff\x7f"
    (bad / "model.safetensors").write_bytes(bytes(whole))
    folder = host_bundle(tmp_path / "b", bad, weights="stripped", **SIZES)
    with pytest.raises(CheckpointError, match=f"{name} in .* NaN or infinite"):
        Host().load(folder, checkpoint=bad)


# What is refused


def host(**driver: Any) -> Host:
    return Host(HostDriver(**driver))


def other_version(made: Host) -> None:
    made.library.__version__ = "1.6.0.1"


def invalid(made: Host) -> None:
    made.library.validity = (trt.EngineValidity.INVALID, int(trt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER))


@pytest.mark.parametrize(
    ("made", "change", "error", "message"),
    [
        (host(capability=(8, 9), name="NVIDIA GeForce RTX 4090"), None, BundleError,
         r"built for sm_120 \(rtx-5090\); this GPU is sm_89 \(NVIDIA GeForce RTX 4090\).*--profile rtx-4090"),
        (host(capability=(9, 0), name="NVIDIA H100 80GB HBM3"), None, BundleError, "sm_90.*--profile h100"),
        (host(version=12040), None, InputError, "driver supports CUDA 12.4, and TensorRT here needs 13.0"),
        (host(gpus=0), None, InputError, "GPU 0 does not exist: CUDA sees 0"),
        (host(), other_version, BundleError, "compiled by tensorrt-rtx .* and tensorrt-rtx 1.6.0.1 is installed"),
        (host(), invalid, BundleError, r"GPU or driver can't run the plan \(OLD_CUDA_DRIVER\): update the driver"),
    ],
    ids=["another card", "Hopper", "old driver", "no GPU", "another library", "invalid here"],
)  # fmt: skip
def test_what_does_not_fit_the_machine_is_refused_before_memory_is_taken(
    inside: Path, made: Host, change: Callable[[Host], None] | None, error: type[Exception], message: str
) -> None:
    if change is not None:
        change(made)
    with pytest.raises(error, match=message):
        made.load(inside)
    assert made.driver.calls["cuMemAlloc"] == 0


def test_a_bundle_without_weights_a_missing_and_a_foreign_checkpoint(
    stripped: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"holds no weights.*\(checkpoint\).*--set checkpoint=FOLDER"):
        Host().load(stripped)
    other = write(tmp_path / "other", Dims(layers="sf", embedding_scale=1.5), seed=6)
    with pytest.raises(BundleError, match="another fine-tune"):
        Host().load(stripped, checkpoint=other)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    planned = host_bundle(tmp_path / "planned", tmp_path / "config", weights="stripped", recipe="fp8", **SIZES)
    with pytest.raises(BundleError, match="from a config"):
        Host().load(planned)
    assert EngineBundle.open(planned).manifest.engines["text"].weight_map  # what a benchmark makes up weights for


def test_a_damaged_plan_is_refused_by_its_hash_and_else_by_the_library(inside: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in inside.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    plan = (copy / "text.engine").read_bytes()
    (copy / "text.engine").write_bytes(plan[:-1] + b"x")
    with pytest.raises(BundleError, match="its content changed"):
        Host().load(copy)
    with pytest.raises(BundleError, match="refuses the plan: Serialization assertion failed"):
        Host().load(copy, verify="sizes")


def test_a_plan_and_a_manifest_that_disagree_about_weights(stripped: Path, checkpoint: Path) -> None:
    refused = HostTensorRT.described

    class Fewer(HostTensorRT):
        """A plan with a weight more than the manifest, or one of another size."""

        change = ""

        def described(self, plan: bytes) -> Any:
            found = refused(self, plan)
            if self.change == "more" and found is not None:
                return replace_placeholders(found, {**found.placeholders, "unheard.of": None})
            return found

    made = Host()
    made.library = Fewer(made.driver)
    made.library.change = "more"
    with pytest.raises(BundleError, match=r"the plan wants unheard\.of, of which the manifest says nothing"):
        made.load(stripped, checkpoint=checkpoint)


def replace_placeholders(described: Any, placeholders: dict[str, Any]) -> Any:
    class Changed:
        def __getattr__(self, name: str) -> Any:
            return placeholders if name == "placeholders" else getattr(described, name)

    return Changed()


# Memory


def needed(folder: Path, **options: Any) -> int:
    return Host().load(folder, **options).memory.total


def test_too_little_memory_is_told_with_its_parts_and_what_would_fit(inside: Path) -> None:
    total = needed(inside, slots=8)
    made = host(memory=total - 1000)
    with pytest.raises(CapacityError) as error:
        made.load(inside, slots=8)
    text = str(error.value)
    assert "this bundle with 8 slots of 72 tokens needs" in text
    assert all(f"{part} 0." in text for part in ("weights", "K/V of full layers", "activations", "inputs and outputs"))
    assert "serve it with slots=7 (no build needed)" in text
    assert "canvasrt plan" in text
    assert made.driver.calls["cuMemAlloc"] == 0
    assert host(memory=total + (1 << 20)).load(inside, slots=8).runner.limits.slots == 8


def test_what_is_allocated_is_what_was_planned(inside: Path) -> None:
    """Of a bundle whose plan tells of no activations; the library's own memory is not ours to count."""
    made = Host()
    loaded = made.load(inside, slots=5)
    answers(loaded.runner)
    loaded.runner.denoise(
        [DenoiseRow(0, np.zeros(CANVAS, np.int32), 1.0, np.zeros(CANVAS, np.float32), True, 0, 1, True)]
    )
    plan_weights = loaded.memory.weights - embedding_bytes(inside)
    taken = made.driver.used - 2 * SCRATCH_BYTES
    assert taken <= loaded.memory.total - plan_weights <= taken + 150_000  # 64 KiB are for alignment alone


def embedding_bytes(folder: Path) -> int:
    return sum(entry.nbytes for entry in EngineBundle.open(folder).manifest.engines["text"].given)


@pytest.mark.parametrize("failing", range(0, 14, 3))
def test_memory_that_runs_out_while_loading_is_told_the_same_way(inside: Path, failing: int) -> None:
    """Others may take it between the check and the allocation, and the library takes more than the manifest knows."""
    made = Host()
    made.driver.faults_at["cuMemAlloc"] = (failing + 1, real.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(CapacityError, match=r"had no [\d,]+ bytes left while .* was loaded.*this bundle with 2"):
        made.load(inside)


def test_a_library_that_runs_out_of_memory_is_understood(inside: Path) -> None:
    class Short(HostTensorRT):
        def described(self, plan: bytes) -> Any:
            return None

    made = Host()
    made.library = Short(made.driver)
    logged = "Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)"
    original = made.library.Runtime

    def runtime(logger: Any) -> Any:
        found = original(logger)
        found.deserialize_cuda_engine = lambda plan: logger.log(trt.ILogger.ERROR, logged)
        return found

    made.library.Runtime = runtime
    with pytest.raises(CapacityError, match="while the bundle was loaded"):
        made.load(inside)


def test_a_library_that_sees_too_little_memory_beforehand(inside: Path) -> None:
    made = Host()
    made.library.validity = (trt.EngineValidity.INVALID, int(trt.EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY))
    with pytest.raises(CapacityError, match="while the bundle was loaded"):
        made.load(inside)


def test_a_gpu_that_fails_while_loading_is_no_lack_of_memory(inside: Path) -> None:
    made = Host()
    made.driver.faults["cuMemsetD8Async"] = real.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED in cuMemsetD8Async"):
        made.load(inside)


# Kernels that were compiled


def test_kernels_are_kept_beside_the_bundle_and_used_again(inside: Path, tmp_path: Path) -> None:
    file = cache_file(inside)
    file.unlink(missing_ok=True)
    assert file.parent == inside.parent
    assert Host().load(inside).warnings == ()
    assert file.read_bytes() == b"kernels of this GPU"
    assert Host().load(inside).warnings == ()
    file.write_bytes(b"kernels of another GPU")
    (warning,) = Host().load(inside).warnings
    assert "kernels are compiled again" in warning
    assert file.read_bytes() == b"kernels of this GPU"
    assert [each.name for each in inside.parent.iterdir() if each.name.startswith("inside.kernels.")] == []
    own = tmp_path / "own"
    Host().load(inside, cache=own)
    assert own.read_bytes() == b"kernels of this GPU"


def test_kernels_that_can_not_be_kept_are_a_warning(inside: Path, tmp_path: Path) -> None:
    (warning,) = Host().load(inside, cache=tmp_path / "missing" / "file").warnings
    assert "the next start compiles them again" in warning


# Datacenter TensorRT


def test_a_bundle_of_datacenter_tensorrt_needs_nothing_that_only_rtx_has(inside: Path, tmp_path: Path) -> None:
    """No runtime cache: its kernels are chosen when the plan is built."""
    folder = tmp_path / "h100"
    shutil.copytree(inside, folder)
    manifest = EngineBundle.open(inside).manifest
    compiler, target = manifest.compiler.model_copy(update={"name": "tensorrt"}), manifest.target
    target = target.model_copy(update={"compute_capability": "9.0", "profile": "h100"})
    changed = manifest.model_copy(update={"compiler": compiler, "target": target})
    (folder / "manifest.json").write_bytes(changed.to_bytes())
    made = Host(HostDriver(capability=(9, 0), name="NVIDIA H100 80GB HBM3"))
    with pytest.raises(BundleError, match=r"compiled by tensorrt .* and tensorrt-rtx .* is installed"):
        made.load(folder)
    made.library = HostTensorRT(made.driver, name="tensorrt")
    assert_equal(answers(made.open(folder)), answers(Host().open(inside)))
    assert not cache_file(folder).exists()


# Threads, and this machine


def test_a_runner_that_was_opened_by_one_thread_runs_in_another(inside: Path) -> None:
    runner = Host().open(inside)
    expected = answers(Host().open(inside))
    found: list[list[DenoiseResult]] = []
    thread = threading.Thread(target=lambda: found.append(answers(runner)))
    thread.start()
    thread.join(30)
    assert_equal(found[0], expected)


def test_without_a_driver_this_machine_says_so(inside: Path) -> None:
    with pytest.raises(InputError, match=r"no usable NVIDIA driver on this machine.*nvidia-smi"):
        open_bundle(inside, BundleOptions(), quiet, Hardware(open_device, lambda manifest: HostTensorRT(HostDriver())))


def test_closing_gives_all_memory_back(inside: Path) -> None:
    made = Host()
    device = CudaDevice(made.driver)
    loaded = open_bundle(inside, BundleOptions(warms_up=False), quiet, replace(made.hardware, device=lambda: device))
    answers(loaded.runner)
    assert made.driver.used > 0
    device.close()
    assert made.driver.used == 0
