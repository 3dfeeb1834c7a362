"""Which GPU, compiler and checkpoint a bundle is for, and the command that makes the one that is missing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import bundles
from canvasrt.bundle import reader
from canvasrt.bundle.manifest import MANIFEST, Manifest, build_command, build_id
from canvasrt.bundle.reader import EngineBundle, already_built, read_manifest
from canvasrt.errors import BundleError, CheckpointError
from canvasrt.profiles.profile import GpuProfile


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return bundles.checkpoint(tmp_path / "dg-nvfp4")


@pytest.fixture
def bundle(tmp_path: Path, source: Path) -> Path:
    target = tmp_path / "engines" / "dg-rtx-5090"
    bundles.write(target, source)
    return target


def profile(name: str, capability: str, products: list[str]) -> GpuProfile:
    def fact(value: object) -> dict[str, object]:
        return {"value": value, "source": "a test, page 1"}

    def choice(value: object) -> dict[str, object]:
        return {"value": value, "reason": "a test wants it"}

    facts = {
        "architecture": fact("Blackwell"), "compute_capability": fact(capability), "memory_gb": fact(32.0),
        "memory_is_shared": False, "bandwidth_gb_s": None, "tflops": None, "cpu_architectures": fact(["amd64"]),
        "product_names": fact(products),
    }  # fmt: skip
    choices = {
        "compiler": choice("tensorrt-rtx"), "recipe": choice("none"), "moe": choice({"formulation": "dense"}),
        "kv_type": choice("bf16"), "slots": choice(1), "context": choice(512), "chunk": choice(16),
        "canvases": choice(1),
    }  # fmt: skip
    return GpuProfile.model_validate({"name": name, "title": name, "facts": facts, "choices": choices})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "dgx-spark": profile("dgx-spark", "12.1", ["NVIDIA-GB10"]),
        "h100": profile("h100", "9.0", ["NVIDIA-H100-80GB-HBM3"]),
        "h200": profile("h200", "9.0", ["NVIDIA-H200"]),
    }
    monkeypatch.setattr(reader, "profile_names", lambda: sorted(known))
    monkeypatch.setattr(reader, "load_profile", known.__getitem__)


@pytest.mark.parametrize(
    ("capability", "product", "said"),
    [
        ("12.1", "NVIDIA GB10", "this GPU is sm_121 (NVIDIA GB10). Build it: canvasrt build --checkpoint dg-nvfp4 "
         "--profile dgx-spark --out {parent}/dg-dgx-spark"),
        ("9.0", "NVIDIA H200", "--profile h200 --out {parent}/dg-h200"),
        ("9.0", None, "--profile h100 --out {parent}/dg-h100, or --profile h200"),
        ("9.0", "NVIDIA H20", "--profile h100 --out {parent}/dg-h100, or --profile h200"),
        ("8.6", "RTX A6000", "No GPU profile of this version is for it: write one, a YAML file like those in "
         "canvasrt/profiles, and build it: canvasrt build --checkpoint dg-nvfp4 --profile PROFILE.yaml --out"),
    ],
)  # fmt: skip
def test_another_gpu_is_refused_with_the_command_that_builds_for_it(
    bundle: Path, gpus: None, capability: str, product: str | None, said: str
) -> None:
    opened = EngineBundle.open(bundle)
    opened.check_gpu("12.0", "NVIDIA GeForce RTX 5090")
    opened.check_gpu("12.0")
    with pytest.raises(BundleError) as caught:
        opened.check_gpu(capability, product)
    message = str(caught.value)
    assert message.startswith(f"bundle {bundle} was built for sm_120 (rtx-5090); this GPU is sm_")
    assert said.format(parent=bundle.parent) in message


def test_another_compiler_version_is_refused(bundle: Path) -> None:
    opened = EngineBundle.open(bundle)
    opened.check_compiler("tensorrt-rtx", "1.7.1.116")
    for name, version in (("tensorrt-rtx", "1.8.0.1"), ("tensorrt", "1.7.1.116")):
        with pytest.raises(BundleError, match=f"compiled by tensorrt-rtx 1.7.1.116, and {name} {version} is installed"):
            opened.check_compiler(name, version)


def test_a_bundle_of_a_configuration_alone_can_not_be_served(tmp_path: Path, source: Path, bundle: Path) -> None:
    EngineBundle.open(bundle).check_servable()
    bundles.write(tmp_path / "none", source, weights="none", options={"recipe": "nvfp4"})
    with pytest.raises(BundleError, match=r"it can't be served.*--weights stripped --recipe nvfp4 --force"):
        EngineBundle.open(tmp_path / "none").check_servable()


def test_only_the_checkpoint_of_the_build_may_fill_it(tmp_path: Path, source: Path) -> None:
    engines = {"text": bundles.engine(weight_map=bundles.weight_map(source))}
    bundles.write(tmp_path / "out", source, weights="stripped", engines=engines)
    opened = EngineBundle.open(tmp_path / "out")
    opened.check_checkpoint(source)
    opened.check_checkpoint(bundles.checkpoint(tmp_path / "the same elsewhere"))
    with pytest.raises(BundleError) as caught:
        opened.check_checkpoint(bundles.checkpoint(tmp_path / "my tune", seed=1))
    assert "built from (dg-nvfp4). It is another fine-tune: the tensors are the same" in str(caught.value)
    assert f"--checkpoint '{tmp_path}/my tune' --profile rtx-5090 --out '{tmp_path}/out-my tune'" in str(caught.value)
    with pytest.raises(BundleError, match="It is another model, quantization or sharding"):
        opened.check_checkpoint(bundles.checkpoint(tmp_path / "larger", rows=128))
    with pytest.raises(CheckpointError):
        opened.check_checkpoint(tmp_path / "nothing")


def test_the_command_is_quoted_for_a_shell_and_names_what_is_not_the_default() -> None:
    made = bundles.manifest(options={"context": 8192, "recipe": "my recipe.yaml"}, weights="stripped")
    assert build_command(made, out="engines/x y") == (
        "canvasrt build --checkpoint dg-nvfp4 --profile rtx-5090 --out 'engines/x y' --weights stripped --context 8192 "
        "--recipe 'my recipe.yaml'"
    )
    plain = build_command(bundles.manifest(), out="$HOME/x", checkpoint="a;b", profile="h100")
    assert plain == "canvasrt build --checkpoint 'a;b' --profile h100 --out '$HOME/x'"


def test_the_build_id_follows_all_that_decides_the_result_and_nothing_else() -> None:
    def of(made: Manifest, **changes: Any) -> str:
        inputs = ("canvasrt", "compiler", "target", "checkpoint", "profile", "plan", "weights", "options")
        return build_id(**({name: getattr(made, name) for name in inputs} | changes))

    made = bundles.manifest(profile={"a": 1, "b": 2})
    checkpoint = made.checkpoint
    assert made.build_id == of(made) == of(made, profile={"b": 2, "a": 1})
    assert of(made, checkpoint=checkpoint.model_copy(update={"folder": "moved"})) == of(made)
    different: list[dict[str, Any]] = [
        {"canvasrt": "0.2.0"},
        {"compiler": made.compiler.model_copy(update={"version": "1.8"})},
        {"target": made.target.model_copy(update={"compute_capability": "12.1"})},
        {"checkpoint": checkpoint.model_copy(update={"layout": "3" * 64})},
        {"checkpoint": checkpoint.model_copy(update={"content": None})},
        {"profile": {"a": 1}},
        {"plan": {"slots": 8}},
        {"weights": "stripped"},
        {"options": {"context": 1024}},
    ]
    assert len({of(made), *(of(made, **change) for change in different)}) == len(different) + 1


def test_a_second_build_of_the_same_finds_the_first_unless_it_is_damaged(bundle: Path) -> None:
    ident = read_manifest(bundle).build_id
    found = already_built(bundle, ident)
    assert found is not None
    assert found.manifest.build_id == ident
    assert already_built(bundle, "c" * 64) is None
    assert already_built(bundle.with_name("none"), ident) is None
    (bundle / "text.engine").write_bytes(bytes(len(bundles.PLAN)))
    assert already_built(bundle, ident) is None


def test_the_manifest_carries_its_own_hash_as_the_description_says(bundle: Path) -> None:
    content = (bundle / MANIFEST).read_text()
    carried = json.loads(content)["self_sha256"]
    assert hashlib.sha256(content.replace(carried, "0" * 64, 1).encode()).hexdigest() == carried
