"""``canvasrt build`` refuses what can't be built: it names cause and way out, and writes nothing."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builds import Builds, canvasrt, listing, option_of, options, run_here
from canvasrt.compile import target
from canvasrt.errors import InputError
from canvasrt.ops.tensorrt_api import CompilerName
from planning import CAPACITY, profile_file, profile_text

PROFILE = "rtx-5090"


def refusal(*arguments: object, code: int = 2) -> str:
    """What ``canvasrt build`` says on standard error, without the choices that it may print before."""
    found, printed, said = run_here("build", *arguments)
    assert (found, printed) == (code, ""), said
    assert "Traceback" not in said
    return said[said.index("error: ") :]


def refused(folder: Path, *arguments: object, code: int = 2) -> str:
    """The same, and ``folder`` stays as it is."""
    before = listing(folder)
    said = refusal(*arguments, code=code)
    assert listing(folder) == before
    assert [entry for entry in folder.rglob("*") if entry.name.endswith((".partial", ".lock", ".replaced"))] == []
    return said


@pytest.fixture
def tiny(builds: Builds, tmp_path: Path) -> Path:
    return Path(shutil.copytree(builds.checkpoint("tiny"), tmp_path / "checkpoint"))


def test_nvfp4_on_a_gpu_without_it_names_the_recipes_that_run_there(builds: Builds, tmp_path: Path) -> None:
    for profile, recipes in (("l40s", "fp8 or int4-experts"), ("rtx-4090", "int4-experts or fp8")):
        said = refused(tmp_path, *options(builds.checkpoint("nvfp4-experts"), profile, tmp_path / "out"))
        assert f"{profile} (compute capability 8.9) can't compute with the NVFP4 weights" in said
        assert f"Use --recipe {recipes}, from the BF16 checkpoint." in said
        arguments = options(builds.checkpoint("published"), profile, tmp_path / "out")
        said = refused(tmp_path, *arguments, "--weights", "stripped", "--recipe", "nvfp4")
        assert f"Use --recipe {recipes}.\n" in said


def test_the_cpu_profile_has_nothing_to_compile(tiny: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, *options(tiny, "cpu", tmp_path / "out"))
    assert (
        f"profile cpu has nothing to compile: the torch runtime runs a checkpoint as it is (canvasrt generate {tiny}"
        in said
    )


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that does not have it."""

    def load(name: CompilerName) -> Any:
        raise InputError(f"the compiler {name} can't be loaded (No module named 'tensorrt')")

    monkeypatch.setattr(target, "load_compiler", load)


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize("profile", ["h100", "h200", "b200", "dgx-station"])
def test_a_datacenter_gpu_elsewhere_prints_the_command_to_run_there(tiny: Path, tmp_path: Path, profile: str) -> None:
    spaced = Path(shutil.copytree(tiny, tmp_path / "a model's folder"))
    more = ("--context", "200", "--slots", "3", "--canvases", "2", "--chunk", "64", "--moe", "capacity:3:4")
    arguments = options(spaced, profile, tmp_path / "out", *more, "--weights", "stripped")
    said = refused(tmp_path, *arguments)
    assert "TensorRT compiles on the GPU itself" in said
    container, plain = said.splitlines()[2:]
    assert plain.startswith("or without a container: pip install '.[tensorrt]' && ")
    command = shlex.split(plain.partition(" && ")[2])
    words = shlex.split(container)
    assert words[:6] == ["docker", "run", "--rm", "--gpus", "all", "-v"]
    assert shlex.split(words[-1].partition(" && ")[2]) == command
    # The same build, word for word, in another order.
    assert command[:2] == ["canvasrt", "build"]
    assert {name: option_of(command, name) for name in command[2::2]} == {
        name: option_of(arguments, name) for name in arguments[::2]
    }
    assert refusal(*command[2:]) == said


@pytest.mark.usefixtures("no_tensorrt")
def test_a_build_plan_for_a_datacenter_gpu_prints_the_same_command(tiny: Path, tmp_path: Path) -> None:
    plan = {"checkpoint": str(tiny), "profile": "h100", "out": str(tmp_path / "out"), "slots": 3, "moe": CAPACITY}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    said = refused(tmp_path, tmp_path / "plan.yaml", "--context", "200")
    command = shlex.split(said.splitlines()[-1].partition(" && ")[2])
    assert option_of(command, "--moe") == "capacity:128:64"
    assert (option_of(command, "--slots"), option_of(command, "--context")) == ("3", "200")


def test_a_missing_rtx_compiler_says_how_to_install_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from canvasrt.ops import tensorrt_api

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(tensorrt_api, "import_module", absent)
    said = refused(tmp_path, *options(tiny, PROFILE, tmp_path / "out"))
    assert (
        "the compiler tensorrt-rtx can't be loaded (No module named 'tensorrt_rtx'): pip install 'canvasrt[rtx]'"
        in said
    )


def test_a_profile_that_wants_fp8_keys_and_values_is_refused(tiny: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, *options(tiny, profile_file(tmp_path, kv_type="fp8"), tmp_path / "out"))
    assert "kv_type" in said
    assert "bf16" in said


def test_a_context_that_the_model_does_not_have_names_the_largest(tiny: Path, tmp_path: Path) -> None:
    arguments = options(tiny, PROFILE, tmp_path / "out")
    said = refused(tmp_path, *arguments, "--context", "257", code=3)
    assert "context 257 exceeds the 256 positions of this model" in said
    assert "ask for at most 256" in said
    said = refused(tmp_path, *arguments, "--context", "23")
    assert "context 23 leaves no room for a prompt beside the canvas of 12 tokens: ask for at least 24" in said


def test_what_does_not_fit_the_gpu_comes_with_what_does(builds: Builds, tmp_path: Path) -> None:
    arguments = options(builds.checkpoint("published"), "rtx-4090", tmp_path / "out", "--weights", "stripped")
    said = refused(tmp_path, *arguments, "--context", "262144", code=3)
    assert re.search(r"rtx-4090 has 25\.76 GB and this needs \d\d\.\d\d GB: weights 16\.96, K/V of full layers", said)
    proposed = re.search(r"It fits with (--context \d+) \(", said)
    assert proposed is not None
    assert "with --profile l40s (48.31 GB)" in said
    from canvasrt.compile.buildplan import BuildPlan
    from canvasrt.compile.job import prepare

    context = int(proposed[1].split()[1])
    plan = BuildPlan(checkpoint=arguments[1], profile="rtx-4090", out="x", weights="stripped", context=context)
    assert prepare(plan).shapes.context == context
    said = refused(tmp_path, *arguments, "--recipe", "none", code=3)
    assert "It fits as asked with --recipe int4-experts" in said


def test_a_configuration_without_weights_can_not_be_built_with_them_inside(builds: Builds, tmp_path: Path) -> None:
    folder = builds.checkpoint("wide-1")
    said = refused(tmp_path, *options(folder, PROFILE, tmp_path / "out"))
    assert f"{folder}: holds config.json and no weights" in said
    assert "--weights stripped" in said


@pytest.mark.parametrize("weights", ["inside", "stripped"])
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4-experts"])
def test_a_recipe_does_not_quantize_a_checkpoint_on_the_way(
    builds: Builds, tmp_path: Path, recipe: str, weights: str
) -> None:
    """Else a checkpoint with weights would become a bundle that can't be served."""
    arguments = options(builds.checkpoint("tiny"), PROFILE, tmp_path / "out", "--weights", weights)
    said = refused(tmp_path, *arguments, "--recipe", recipe)
    assert "has weights" in said
    assert f"canvasrt quantize {arguments[1]} --recipe {recipe}" in said


def test_a_recipe_for_a_checkpoint_that_is_quantized_already_is_refused(builds: Builds, tmp_path: Path) -> None:
    said = refused(tmp_path, *options(builds.checkpoint("fp8"), "l40s", tmp_path / "out"), "--recipe", "fp8")
    assert "is quantized already (FP8 (modelopt)): leave --recipe out" in said


def test_a_scale_for_each_row_does_not_go_with_dense_experts(builds: Builds, tmp_path: Path) -> None:
    arguments = options(builds.checkpoint("tiny-fp8-dynamic"), "l40s", tmp_path / "out", "--moe", "dense")
    said = refused(tmp_path, *arguments)
    assert "has a scale for each row, which the dense formulation can't apply: build with the capacity" in said


Change = Callable[[Path], None]


def not_a_number(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + size])["model.decoder.layers.0.self_attn.q_proj.weight"]
    begin = 8 + size + entry["data_offsets"][0]
    content[begin + 8 : begin + 12] = b"\x00\x00\xc0\x7f"
    file.write_bytes(content)


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damaged_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtyp*"', 1))


def no_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.decoder.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


DAMAGE: list[tuple[Change, list[str]]] = [
    (not_a_number, ["self_attn.q_proj.weight in ", "model.safetensors holds values that are NaN or infinite"]),
    (cut_off, ["model.safetensors: the file is 100 bytes short"]),
    (damaged_header, ["model.safetensors: not a valid safetensors file", "Download or copy the file again"]),
    (no_shard, ["model-00001-of-00002.safetensors: the shard is missing"]),
    (pickled, ["holds pytorch_model.bin, which is pickle"]),
    (no_config, ["config.json is missing"]),
    (damaged_config, ["config.json: not readable as JSON"]),
]


@pytest.mark.parametrize(("damage", "parts"), DAMAGE, ids=lambda each: getattr(each, "__name__", ""))
def test_a_damaged_checkpoint_is_named_and_nothing_is_left(
    tiny: Path, tmp_path: Path, damage: Change, parts: list[str]
) -> None:
    damage(tiny)
    said = refused(tmp_path, *options(tiny, PROFILE, tmp_path / "engines" / "out"))
    assert [part for part in parts if part not in said] == [], said


OPTIONS: list[tuple[tuple[str, ...], list[str]]] = [
    (("--moe", "sparse"), ["--moe sparse is unknown: dense, or capacity:ENCODER:DECODER such as capacity:128:64"]),
    (("--moe", "dense:3:4"), ["--moe dense:3:4 is unknown"]),
    (("--moe", "capacity"), ["--moe capacity is unknown"]),
    (("--moe", "capacity:0:4"), ["--moe capacity:0:4 is unknown"]),
    (("--moe", "capacity:-3:4"), ["is unknown"]),
    (("--weights", "none"), ["--weights none is unknown: inside or stripped"]),
    (("--weights", ""), ["--weights  is unknown"]),
    (("--recipe", "nvfp5"), ["no recipe is called 'nvfp5'", "nvfp4-experts"]),
    (("--canvases", "3", "--slots", "2"), ["canvases 3 exceeds slots 2"]),
    (("--slots", "257"), ["slots", "256"]),
    (("--canvases", "65"), ["canvases", "64"]),
    (("--context", "262145"), ["context", "262144"]),
    (("--chunk", "262145"), ["chunk", "262144"]),
    (("--profile", ""), ["profile"]),
    (("--profile", "rtx-9090"), ["no GPU profile is called 'rtx-9090'", "rtx-pro-6000", ".yaml"]),
    (("--profile", "nowhere.yaml"), ["profile nowhere.yaml can't be read"]),
    (("--checkpoint", "nowhere"), ["nowhere: no such folder"]),
    (("--checkpoint", "google/diffusiongemma"), ["hf download google/diffusiongemma --local-dir DIR"]),
    (("--out", ""), ["out"]),
    (("--out", "."), ["."]),
    (("--out", "/"), ["/"]),
    (("--out", "x.partial"), ["names that end in .partial or .replaced are those of unfinished builds"]),
]


@pytest.mark.parametrize(
    ("changes", "parts"), OPTIONS, ids=lambda each: " ".join(each) if isinstance(each, tuple) else ""
)
def test_a_wrong_option_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...], parts: list[str]
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    arguments = options(tiny, PROFILE, tmp_path / "out")
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
        else:
            arguments += [name, value]
    said = refused(tmp_path, *arguments)
    assert [part for part in parts if part not in said] == [], said
    assert said.count("\n") == 1


def test_what_is_missing_of_the_options_is_named(tmp_path: Path) -> None:
    said = refused(tmp_path)
    assert said.startswith("error: --checkpoint, --profile, --out missing: give them, or a build plan")
    assert "--profile, --out missing" in refused(tmp_path, "--checkpoint", tmp_path)


PLANS: dict[str, tuple[str, list[str]]] = {
    "an unknown key": ("colour: red", ["unknown key colour: the keys are checkpoint, profile, out, weights"]),
    "an unknown key further in": ("moe: {formulation: dense, size: 3}", ["unknown key moe.size"]),
    "a number too large": ("slots: 1000", ["slots: Input should be less than or equal to 256"]),
    "a number as text": ("slots: '3'", ["slots: Input should be a valid integer"]),
    "another word for weights": ("weights: outside", ["weights: Input should be 'inside' or 'stripped'"]),
    "experts as in the profile": ("moe: {formulation: capacity}", ["encoder_capacity and decoder_capacity belong to"]),
    "sparse experts": ("moe: {formulation: sparse}", ["sparse"]),
    "a key twice": ("slots: 3\nslots: 4", ["the key slots is written twice"]),
    "no YAML": ("{", ["is not YAML"]),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_fault_in_a_build_plan_is_named_with_file_and_key(tiny: Path, tmp_path: Path, case: str) -> None:
    text, parts = PLANS[case]
    plan = {"checkpoint": str(tiny), "profile": PROFILE, "out": str(tmp_path / "out")}
    file = tmp_path / "plan.yaml"
    file.write_text(f"{yaml.safe_dump(plan)}{text}\n")
    said = refused(tmp_path, file)
    assert [part for part in parts if part not in said] == [], said
    assert case == "sparse experts" or str(file) in said


def test_a_build_plan_without_a_key_or_without_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("profile: rtx-5090\n")
    said = refused(tmp_path, tmp_path / "plan.yaml")
    assert "plan.yaml: checkpoint: Field required; out: Field required" in said
    (tmp_path / "empty.yaml").write_text("")
    assert "must be a mapping with the keys checkpoint, profile, out" in refused(tmp_path, tmp_path / "empty.yaml")
    assert "nowhere.yaml can't be read" in refused(tmp_path, tmp_path / "nowhere.yaml")


def test_sparse_experts_are_refused_in_a_profile_too(tiny: Path, tmp_path: Path) -> None:
    content = profile_text(moe={"formulation": "sparse"})
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(content))
    said = refused(tmp_path, *options(tiny, str(tmp_path / "gpu.yaml"), tmp_path / "out"))
    assert "sparse" in said


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_is_there_and_is_no_bundle_stays(tiny: Path, tmp_path: Path, force: tuple[str, ...]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    said = refused(tmp_path, *options(tiny, PROFILE, tmp_path / "notes"), *force)
    assert "holds other files and is not a bundle, so it is left alone: name another folder, or empty it" in said
    said = refused(tmp_path, *options(tiny, PROFILE, tmp_path / "notes" / "mine.txt"), *force)
    assert "exists and is not a folder: name another place for the bundle" in said
    said = refused(tmp_path, *options(tiny, PROFILE, tmp_path / "notes" / "mine.txt" / "below"), *force)
    assert f"can't write {tmp_path}/notes/mine.txt/below" in said


def test_a_place_where_nobody_may_write_is_named(tiny: Path) -> None:
    said = refusal(*options(tiny, PROFILE, Path("/proc/engines/out")))
    assert "can't write /proc/engines/out: " in said


def test_the_exit_code_of_a_process_is_the_same(tiny: Path, tmp_path: Path) -> None:
    done = canvasrt("build", *options(tiny, "cpu", tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
