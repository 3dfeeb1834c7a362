"""scripts/gpu_check.py without a GPU: its parts on small dimensions, and on the host seam for what needs CUDA.

Figures are looked at for being there and adding up, never for how fast this machine is.
"""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from canvasrt.bundle.manifest import WeightEntry
from canvasrt.errors import InputError
from canvasrt.runtime.cuda_device import CudaDevice
from contract import CHECKS
from host_bundles import Host, host_bundle
from host_tensorrt import PLANS, Described
from planning import ROOT
from tiny import Dims, write

NO_GPU = "no usable NVIDIA driver on this machine"


@pytest.fixture(scope="module")
def gpu_check() -> Iterator[ModuleType]:
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        import gpu_check

        yield gpu_check
    finally:
        sys.path.remove(folder)


@pytest.fixture
def options(gpu_check: ModuleType, tmp_path: Path) -> Any:
    given = gpu_check.parser().parse_args(["--tiny", "--device", "cpu", "--profile", "rtx-5090"])
    return gpu_check.options_of(given, tmp_path)


def ran(gpu_check: ModuleType, options: Any, name: str, file: Path | None = None) -> Any:
    record = gpu_check.Record(name, file)
    gpu_check.run_part(record, options)
    return record


def test_torch_part(gpu_check: ModuleType, options: Any, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    record = ran(gpu_check, options, "torch-26b", file)
    assert (record.status, record.failures) == ("passed", [])
    steps = record.tables["steps"]
    once = [row for row in steps if row["passes_per_step"] == 1]
    assert [(row["moe"], row["canvases"]) for row in once] == [
        (moe, canvases) for moe in ("dense", "capacity", "sparse") for canvases in (1, 2)
    ]
    for row in steps:
        assert row["ms_least"] <= row["ms"] <= row["ms_most"]
        assert row["gpu_ms"] is None
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["routed_floor_ms"] <= row["floor_ms"]
        assert 1 <= row["passes_per_step"] <= 2
    assert {row["seats"] for row in steps if row["moe"] == "capacity"} == {12, 24}
    assert {row["tokens"] for row in record.tables["prompts"]} == {32}
    assert {row["rows"] for row in record.tables["head"]} == {12, 24, 48, 96}
    assert "torch has no FP8 path" in record.figures["fp8"]
    assert json.loads(file.read_text()) == json.loads(json.dumps(record.content()))


def test_seats_are_doubled_until_no_pass_is_repeated(gpu_check: ModuleType, options: Any) -> None:
    asked = replace(options, seats_factor=1, formulations=("capacity",), canvases=(2,))
    record = ran(gpu_check, asked, "torch-26b")
    assert record.status == "passed"
    rows = [(row["seats"], row["passes_per_step"] > 1) for row in record.tables["steps"]]
    assert rows == [(12, True), (24, False)]


def test_a_formulation_that_fails_leaves_the_others(
    gpu_check: ModuleType, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import torch_model

    opened = torch_model._opened

    def fails(options: Any, spec: Any, name: str) -> Any:
        if name == "dense":
            raise torch_model.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 45.00 GiB")
        return opened(options, spec, name)

    monkeypatch.setattr(torch_model, "_opened", fails)
    record = ran(gpu_check, options, "torch-26b")
    assert record.status == "failed"
    assert record.reason == "dense: OutOfMemoryError: CUDA out of memory. Tried to allocate 45.00 GiB"
    assert {row["moe"] for row in record.tables["steps"]} == {"capacity", "sparse"}


def test_transformers_part(gpu_check: ModuleType, options: Any) -> None:
    record = ran(gpu_check, options, "transformers-26b")
    assert (record.status, record.failures) == ("passed", [])
    assert [(row["canvases"], row["steps"]) for row in record.tables["steps"]] == [(1, 2), (2, 2)]


def test_transformers_part_shares_the_weights_of_encoder_and_decoder(gpu_check: ModuleType, options: Any) -> None:
    import torch
    import transformers
    from gpu_parts.transformers_model import random_model

    config = transformers.DiffusionGemmaConfig.from_pretrained(options.config)
    model = random_model(torch, transformers, config, "cpu")
    encoder, decoder = model.model.encoder.language_model, model.model.decoder
    assert encoder.embed_tokens.weight is decoder.embed_tokens.weight
    assert encoder.layers[0].experts.down_proj is decoder.layers[0].experts.down_proj
    assert decoder.layers[0].layer_scalar.dtype == torch.bfloat16
    assert all(bool(torch.isfinite(each).all()) for each in (*decoder.parameters(), *decoder.buffers()))


def test_products_part(gpu_check: ModuleType, options: Any) -> None:
    record = ran(gpu_check, options, "gemm")
    assert (record.status, record.failures) == ("passed", [])
    rows = record.tables["products"]
    assert [(row["numbers"], row["product"], row["tokens"]) for row in rows] == [
        (numbers, product, tokens)
        for numbers in ("float32", "bfloat16")
        for product in ("gate_up", "down")
        for tokens in (8, 16)
    ]
    assert record.figures["weights"] == {"gate_up": [512, 64], "down": [64, 256]}
    for row in rows:  # 2 operations for each of tokens * 512 * 64, or tokens * 64 * 256
        count = 2 * row["tokens"] * (512 * 64 if row["product"] == "gate_up" else 64 * 256)
        assert row["tflops"] * row["ms"] == pytest.approx(count / 1e9)


# The bundle


@pytest.mark.parametrize(
    ("recipe", "moe"),
    [("none", "dense"), ("fp8", "capacity"), ("nvfp4-experts", "capacity"), ("int4-experts", "dense")],
)
def test_bundle_part_with_random_weights(
    gpu_check: ModuleType, options: Any, tmp_path: Path, recipe: str, moe: str
) -> None:
    from gpu_parts import bundle

    from canvasrt.profiles.profile import Moe

    sizes = {"encoder_capacity": 16, "decoder_capacity": 24} if moe == "capacity" else {}
    settings = {"context": 48, "chunk": 16, "canvases": 2, "slots": 2, "weights": "stripped", "recipe": recipe}
    settings["moe"] = Moe(formulation=moe, **sizes)
    folder = host_bundle(tmp_path / "bundle", options.config, precision="bf16", **settings)
    record = gpu_check.Record("bundle-26b")
    host = Host()
    bundle.run(replace(options, bundle=folder), record, host.hardware)
    record.end()
    assert (record.status, record.failures) == ("passed", [])
    figures = record.figures
    assert figures["weights"] == "random"
    assert figures["floor"].startswith("canvasrt.compile.roofline, facts of the profile rtx-5090")
    phases = ("deserialize_s", "inputs_s", "refit_s", "ready_s", "random_weights_s")
    assert all(0 <= figures[phase] <= figures["load_s"] for phase in phases)
    assert sum(figures[phase] for phase in phases[:4]) == pytest.approx(figures["load_s"])
    assert figures["refit_s"] > 0
    assert host.library.refitted
    assert figures["first_step_ms"] > 0
    steps = record.tables["steps"]
    assert [(row["context"], row["canvases"], row["graphs"]) for row in steps] == [
        (context, canvases, graphs) for context in (15, 36) for canvases in (1, 2) for graphs in (True, False)
    ]
    for row in steps:
        assert row["graph_launches_per_step"] == (row["calls_per_step"] if row["graphs"] else 0)
        assert min(row["bytes_sent"], row["bytes_received"]) >= 4 * 12 * row["canvases"]
        assert row["bytes_received"] < 4 * 67 * 12  # no logits
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert host.driver.reason == ""


def test_bundle_part_with_a_users_bundle(gpu_check: ModuleType, options: Any, tmp_path: Path) -> None:
    from gpu_parts import bundle

    checkpoint = write(tmp_path / "checkpoint", Dims(layers="sf"), seed=1)
    settings = {"context": 48, "chunk": 16, "canvases": 1, "slots": 1, "weights": "stripped"}
    folder = host_bundle(tmp_path / "bundle", checkpoint, precision="bf16", **settings)
    record = gpu_check.Record("bundle-26b")
    bundle.run(replace(options, bundle=folder, checkpoint=checkpoint), record, Host().hardware)
    record.end()
    assert record.status == "passed"
    assert record.figures["weights"] == "the bundle's"
    assert {row["canvases"] for row in record.tables["steps"]} == {1}


def test_random_weights_hold_no_nan_and_the_size_that_their_scales_undo(gpu_check: ModuleType) -> None:
    from gpu_parts.random_weights import RandomSource

    from canvasrt.engine_weights import _e4m3

    packed = WeightEntry(name="w", dtype="fp8", shape=(8, 64, 400), nbytes=8 * 64 * 400, transform="copy")
    scale = WeightEntry(name="w.multiplier", dtype="fp32", shape=(8, 1, 64), nbytes=4 * 8 * 64, transform="fp32")
    source = RandomSource((packed, scale))
    codes = source.made(packed)
    assert not ((codes & 0x7F) == 0x7F).any()
    numbers = _e4m3(codes) * source.made(scale).view(np.float32)[0]
    assert math.sqrt(float((numbers**2).mean()) * 400) == pytest.approx(1, rel=0.1)


# Contract, verification and targets


def test_verify_part_keeps_what_the_command_said(
    gpu_check: ModuleType, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import verify

    said: dict[str, tuple[int, str, str]] = {"bundle": (1, '{"passed": false}', "DIFFERS"), "torch": (0, "{}", "")}
    asked = []

    def canvasrt(*words: str) -> tuple[int, str, str]:
        asked.append(words)
        return said["bundle" if "--checkpoint" in words else "torch"]

    monkeypatch.setattr(verify, "canvasrt", canvasrt)
    record = gpu_check.Record("verify")
    verify.compare(record, "torch", ["C", "--device", "cuda"])
    verify.compare(record, "bundle", ["B", "--checkpoint", "C"])
    record.end()
    assert asked == [("verify", "C", "--device", "cuda", "--json"), ("verify", "B", "--checkpoint", "C", "--json")]
    assert record.figures["torch"] == {"exit_code": 0, "output": {}}
    assert record.figures["bundle"] == {"exit_code": 1, "output": {"passed": False}}
    assert record.reason == "canvasrt verify of bundle: exit code 1: DIFFERS"


def test_contract_part_with_a_host_opener(gpu_check: ModuleType, options: Any, tmp_path: Path) -> None:
    from gpu_parts import contract, small

    checkpoint = write(tmp_path / "checkpoint", Dims(layers="sf", embedding_scale=1.5), seed=5)

    def build(plan: Any) -> Path:
        given = plan.model_dump(exclude={"checkpoint", "profile", "out"})
        return host_bundle(Path(plan.out), checkpoint, precision="fp32", **given)

    bundles = small.Bundles(checkpoint, tmp_path / "bundles", "rtx-5090", build)
    record = gpu_check.Record("contract")
    contract.check(record, {"bundle": bundles.opener(Host().hardware)}, only="released")
    record.end()
    assert (record.status, record.failures) == ("passed", [])
    assert [row["result"] for row in record.tables["checks"]] == ["ok"] * sum(
        "released" in each.__name__ for each in CHECKS
    )


def test_contract_part_tells_every_failure(gpu_check: ModuleType) -> None:
    from gpu_parts import contract

    def open_runner(**asked: int) -> Any:
        raise InputError("no runner today")

    record = gpu_check.Record("contract")
    contract.check(record, {"torch": open_runner})
    record.end()
    assert record.status == "failed"
    assert [failure["message"] for failure in record.failures] == ["no runner today"] * len(CHECKS)
    assert "traceback" not in record.failures[0]


def test_targets_part_on_the_host(gpu_check: ModuleType, options: Any) -> None:
    from gpu_parts import rtx_targets

    alive: list[object] = []

    def build(trt: Any, target: str) -> bytes:
        if target == "SM80":
            raise rtx_targets.PartError("the compiler refused: no such target")
        builder, network, config, kept = rtx_targets.prepared(trt, "SM120")
        alive.extend((builder, network, config, kept))
        plan = f"target {target}".encode()
        limits = ((1, rtx_targets.WIDTH), (24, rtx_targets.WIDTH), (48, rtx_targets.WIDTH))
        PLANS[plan] = Described(builder, kept, network, {"decoder": {"x": limits}})
        return plan

    host = Host()
    patched = pytest.MonkeyPatch()
    patched.setattr(rtx_targets, "library", lambda name: host.library)
    with patched.context():
        record = gpu_check.Record("rtx-targets")
        rtx_targets.run(options, record, build, CudaDevice(host.driver))
    patched.undo()
    record.end()
    assert (record.status, record.figures["runs"]) == ("passed", ["SM89", "SM120", "CURRENT"])
    assert record.tables["targets"][0] == {"target": "SM80", "build": "the compiler refused: no such target"}
    assert record.tables["targets"][1]["result"] == "ok"


def test_targets_part_sees_wrong_numbers(gpu_check: ModuleType) -> None:
    from gpu_parts.rtx_targets import difference, expected

    x = np.ones((24, 64), np.float32)
    product, _ = expected(x)
    assert difference(product, product) == 0
    assert difference(product * np.nan, product) == math.inf


# The command


def test_parts_are_processes_and_say_why_they_can_t_run_here(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    chosen = "environment,rtx-targets,gemm"
    assert gpu_check.main(["--tiny", "--parts", chosen, "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert found["command"] == ["gpu_check.py", "--tiny", "--parts", chosen, "--out", str(out)]
    assert (found["gpus"], found["cuda"], found["versions"]["tensorrt"]) == ([], None, None)
    assert found["versions"]["torch"] is not None
    parts = found["parts"]
    assert {part["status"] for part in parts.values()} == {"failed"}
    assert parts["environment"]["reason"].startswith("no NVIDIA GPU to be seen: nvidia-smi")
    assert parts["gemm"]["reason"] == "torch sees no NVIDIA GPU: check the driver, or use --device cpu"
    assert parts["rtx-targets"]["reason"].startswith(NO_GPU)
    assert [row["build"] for row in parts["rtx-targets"]["targets"]][:3] == ["ok"] * 3
    assert "traceback" not in out.read_text()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "| gemm | failed |" in printed.out
    assert "rtx-targets, targets" in printed.out


def test_the_parts_that_need_a_gpu_say_so_in_one_line(gpu_check: ModuleType, options: Any) -> None:
    for name in ("torch-26b", "transformers-26b", "bundle-26b"):
        record = ran(gpu_check, replace(options, device="cuda"), name)
        assert record.status == "failed"
        assert "GPU" in record.reason
        assert not any("traceback" in failure for failure in record.failures), record.failures


def test_a_missing_library_is_no_failure_of_the_rest(
    gpu_check: ModuleType, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "gpu_parts.torch_model", raising=False)
    for name in ("gemm", "torch-26b"):
        record = ran(gpu_check, options, name)
        assert record.status == "not installed"
        assert record.reason.startswith("torch is not installed")


def test_one_part_s_end_is_not_that_of_the_others(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_process(name: str, words: list[str], folder: Path, timeout: float) -> dict[str, Any]:
        return {"status": "passed"} if name == "gemm" else {"status": "failed", "reason": "CUDA | error\n700"}

    monkeypatch.setattr(gpu_check, "in_process", in_process)
    assert gpu_check.main(["--parts", "verify,gemm", "--out", str(tmp_path / "gpu.json")]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| verify | failed |")
    assert "CUDA \\| error 700" in rows[2]
    assert rows[3].startswith("| gemm | passed |")
    assert gpu_check.main(["--parts", "gemm"]) == 0


@pytest.mark.parametrize(("script", "reason"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
    ("import sys; sys.exit(7)", "the process ended with exit code 7"),
    ("import time; time.sleep(60)", "the part was ended after 1 seconds"),
])  # fmt: skip
def test_a_crash_keeps_what_was_found(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, pathlib\n"
        "file = pathlib.Path(sys.argv[sys.argv.index('--record') + 1])\n"
        'file.write_text(\'{"status": "failed", "reason": "the part did not end", "steps": [{"ms": 1.5}]}\')\n'
        "print('the last words', file=sys.stderr, flush=True)\n" + script
    )
    monkeypatch.setattr(gpu_check, "__file__", str(child))
    found = gpu_check.in_process("gemm", ["--tiny", "--", "--canvases", "1"], tmp_path / "part", 1)
    assert (found["status"], found["reason"], found["steps"]) == ("failed", reason, [{"ms": 1.5}])
    assert found["said"] == ["the last words"]


def test_options(gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--parts", "gemm,verify", "--canvases", "1,3", "--layers", "6", "--", "--context", "4096"]
    given: Namespace = gpu_check.parser().parse_args(words)
    options = gpu_check.options_of(given, tmp_path)
    assert (given.parts, options.canvases, options.build) == (["gemm", "verify"], (1, 3), ("--context", "4096"))
    assert json.loads((options.config / "config.json").read_text())["text_config"]["num_hidden_layers"] == 6
    with pytest.raises(SystemExit):
        gpu_check.parser().parse_args(["--parts", "gem"])
    assert "gem is no part: there are environment, rtx-targets" in capsys.readouterr().err
