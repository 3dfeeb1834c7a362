"""``canvasrt inspect`` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bundles

DEMO_REASON = "1 canvas, 32 GB/s per TFLOP: weight-bound"


def canvasrt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "canvasrt.cli.main", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return bundles.checkpoint(tmp_path / "dg-nvfp4")


@pytest.fixture
def bundle(tmp_path: Path, source: Path) -> Path:
    bundles.write(tmp_path / "dg", source)
    return tmp_path / "dg"


def shown(bundle: Path, *arguments: str) -> str:
    """Words with single blanks between them, so that a column's width does not matter."""
    done = canvasrt("inspect", bundle, *arguments)
    assert done.returncode == 0, done.stderr
    return "\n".join(" ".join(line.split()) for line in done.stdout.splitlines())


def test_everything_that_a_person_asks_is_shown(bundle: Path) -> None:
    text = shown(bundle, "--tensors")
    manifest = json.loads((bundle / "manifest.json").read_text())
    expected = [
        f"{bundle}: 0.10 MB in 7 files, every byte verified",
        "GPU sm_120 (profile rtx-5090)",
        "compiler tensorrt-rtx 1.7.1.116",
        f"built {manifest['created']} by canvasrt 0.1.0, build {manifest['build_id'][:16]}",
        "checkpoint dg-nvfp4, quantization NVFP4 (modelopt), layout ",
        "model layers 30, hidden_size 2816",
        "weights inside the plan",
        "precision nvfp4, K/V bf16",
        "experts dense",
        "shapes 4 slots of 32768 tokens, chunk 2048, 4 canvases of 256, sliding buffer 3327 for a window of 1023",
        f"moe dense {DEMO_REASON}",
        "engine text text.engine",
        "plan 0.10 MB, built in 85 s, 1.80 GB of memory at the peak",
        "reserved in encoder 0.50 GB of device memory in 2 regions, the largest 0.40 GB",
        "reserved in decoder 46.00 MB of device memory",
        "key_input_* (30) input bfloat16 4 x 8 x 1536 x 256",
        "value_output_* (30) output bfloat16 4 x 8 x 1536 x 256 value_input_*",
        "encoder tokens 1 x 1 1 x 2048 1 x 2048",
        "decoder tokens 1 x 1 4 x 256 4 x 256",
        "MATRIX_MULTIPLY 211",
        "nvfp4 14.00 MB",
        f"text.engine 100,000 {manifest['files']['text.engine']['sha256']}",
    ]
    assert [part for part in expected if part not in text] == [], text
    assert text.index("CONSTANT 640") < text.index("MATRIX_MULTIPLY 211")  # the most first
    assert len(text.splitlines()) < 80  # 120 tensors of K and V are four lines
    assert "key_input_7" not in text
    assert [line for line in text.splitlines() if "_input_*" in line]
    assert not [line for line in shown(bundle).splitlines() if "_input_*" in line]


def test_json_is_the_manifest(bundle: Path) -> None:
    done = canvasrt("inspect", bundle, "--json")
    value = json.loads(done.stdout)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert value["manifest"] == manifest
    assert value["verified"] == "full"
    assert value["path"] == str(bundle)
    assert value["total_bytes"] == sum(entry["nbytes"] for entry in manifest["files"].values())


def test_a_damaged_bundle_is_shown_only_without_verification(bundle: Path) -> None:
    plan = bytearray((bundle / "text.engine").read_bytes())
    plan[777] ^= 1
    (bundle / "text.engine").write_bytes(plan)
    done = canvasrt("inspect", bundle)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "is damaged: text.engine has the SHA-256" in done.stderr
    assert "Traceback" not in done.stderr
    assert "sizes checked, content not" in shown(bundle, "--no-verify")
    assert json.loads(canvasrt("inspect", bundle, "--no-verify", "--json").stdout)["verified"] == "sizes"


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        done = canvasrt("inspect", path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {path} ")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("stripped", "weights not in the plan: filled from the checkpoint when it is loaded"),
        ("none", "weights none, and nothing can fill them: for planning, can't be served"),
    ],
)
def test_missing_weights_are_told(tmp_path: Path, source: Path, weights: str, said: str) -> None:
    weight = bundles.weight_map(source)[0]
    given = {"name": "tokens", "dtype": "int32", "shape": [25_000], "nbytes": 100_000, "transform": "copy"}
    given |= {"file": "text.engine"}
    engines = {"text": bundles.engine(weight_map=[weight], given=[given, weight | {"name": "tokens"}])}
    moe = {"formulation": "capacity", "encoder_capacity": 256, "decoder_capacity": 32}
    bundles.write(tmp_path / "out", source, weights=weights, engines=engines, moe=moe)
    text = shown(tmp_path / "out")
    assert said in text
    assert "to be filled 1 weights, 0.01 MB" in text
    assert "bound as inputs 2 weights, 0.11 MB, of which 0.10 MB lie in the bundle" in text
    assert "experts capacity, 256 tokens per expert to encode, 32 to denoise" in text


LISTING = b"""header {
  version = 5
  memory_budget = 1
  region = { name=devmem_topdown_0 size=5000000 alignment=128 instance=0 type=user place=accelerator unified=false }
}
"""


@pytest.mark.parametrize(
    ("plan", "reserved", "said"),
    [
        (LISTING, None, "reserved in encoder 5.00 MB of device memory"),
        (b"\0" * 100, None, "reserved unknown: the plan holds no listing, as plans of other compilers"),
        (b"\0" * 100, [], "reserved no device memory beside inputs, outputs and weights"),
    ],
)
def test_memory_that_the_manifest_does_not_tell_is_read_from_the_plan(
    tmp_path: Path, source: Path, plan: bytes, reserved: list[Any] | None, said: str
) -> None:
    build = {"seconds": 1.0, "reserved": reserved}
    bundles.write(tmp_path / "out", source, plan=plan, engines={"text": bundles.engine(build=build)})
    assert said in shown(tmp_path / "out")


def test_a_manifest_can_not_speak_to_the_terminal(tmp_path: Path, source: Path) -> None:
    reasons = [{"what": "[red]what[/red]", "value": "\x1b]0;title\x07", "reason": "[/] \x1b[2J"}]
    bundles.write(tmp_path / "out", source, reasons=reasons)
    text = shown(tmp_path / "out")
    assert "[red]what[/red] ?]0;title? [/] ?[2J" in text
    assert "\x1b" not in text
