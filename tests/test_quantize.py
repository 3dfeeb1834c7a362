"""Quantization jobs: what they write, name by name, and that no interruption leaves anything under the final name."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from solve import CHECKPOINT

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CapacityError, CheckpointError, InputError
from canvasrt.ops.torch_formats import dequantized
from canvasrt.quantize.job import QuantizeJob
from canvasrt.quantize.recipe import Recipe, load_recipe
from tiny import Dims, write

DIMS = Dims(hidden=64, mlp=128, expert_size=64, layers="sf")
RECIPES = ("nvfp4-experts", "nvfp4", "fp8", "int4-experts")
EXPERTS, ATTENTION, MLP = ("experts",), ("q_proj", "k_proj", "v_proj", "o_proj"), ("mlp",)


class Stages:
    """Records the stages, and stops like Ctrl-C at ``stop``: when that stage begins, or after one step of it."""

    def __init__(self, stop: str = "", inside: bool = False) -> None:
        self.names: list[str] = []
        self._stop, self._inside = stop, inside

    def stage(self, name: str, total: int) -> None:
        self.names.append(name)
        if name == self._stop and not self._inside:
            raise KeyboardInterrupt

    def advance(self) -> None:
        if self.names[-1] == self._stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = write(tmp_path_factory.mktemp("source"), DIMS, seed=5)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        (folder / name).write_text(f"{name} of the source")
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids: a random checkpoint has no tokenizer."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rng = np.random.default_rng(0)
    lines = [json.dumps({"tokens": rng.integers(5, DIMS.vocab, 20 + index).tolist()}) for index in range(3)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def made(source: Checkpoint, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("made")
    return {name: job(source, name, folder / name, prompts).run(Stages()) for name in RECIPES}


def job(source: Checkpoint, recipe: str, out: Path, prompts: Path | None, samples: int | None = None) -> QuantizeJob:
    return QuantizeJob(source, quick(load_recipe(recipe)), out, prompts, samples, "cpu")


def quick(recipe: Recipe) -> Recipe:
    if recipe.calibration is None:
        return recipe
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"steps": 3})})


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def split(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices that a quantized tensor is stored in, as the published layouts have them."""
    if ".experts." not in name:
        return {name.removesuffix(".weight"): (shape[0], shape[1])}
    stem, part = name.rsplit(".", 1)
    halves = ["gate_proj", "up_proj"] if part == "gate_up_proj" else ["down_proj"]
    size = (shape[1] // len(halves), shape[2])
    return {f"{stem}.{expert}.{half}": size for expert in range(shape[0]) for half in halves}


def parts(recipe: str, stem: str, size: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of what one matrix is stored in: facts of ModelOpt's exports, written down independently."""
    out, width = size
    if recipe == "fp8":
        found: dict[str, tuple[str, tuple[int, ...]]] = {"weight": ("F8_E4M3", size), "weight_scale": ("F32", ())}
    elif recipe == "int4-experts":
        return {
            f"{stem}.weight": ("U8", (out // 2, width)),
            f"{stem}.weight_scale": ("F32", (out, width // 64)),
        }
    else:
        found = {
            "weight": ("U8", (out, width // 2)),
            "weight_scale": ("F8_E4M3", (out, width // 16)),
            "weight_scale_2": ("F32", ()),
        }
    found["input_scale"] = ("F32", ())
    return {f"{stem}.{suffix}": content for suffix, content in found.items()}


def is_covered(recipe: str, name: str) -> bool:
    kinds = EXPERTS if recipe.endswith("experts") else (*EXPERTS, *ATTENTION, *MLP)
    linear = ".experts." in name or name.endswith("_proj.weight")
    return linear and "self_conditioning" not in name and any(f".{kind}." in name for kind in kinds)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_layout_is_the_published_one(source: Checkpoint, made: dict[str, Checkpoint], recipe: str) -> None:
    check_layout(source, made[recipe], recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_layout_of_the_demo_checkpoint_is_the_published_one(tmp_path: Path, recipe: str) -> None:
    demo = Checkpoint.open(CHECKPOINT)
    check_layout(demo, job(demo, recipe, tmp_path / recipe, None, samples=4).run(Stages()), recipe)


def check_layout(source: Checkpoint, made: Checkpoint, recipe: str) -> None:
    """Every stored tensor of ``made``: name, dtype and shape."""
    stored = load_file(made.folder / "model.safetensors")
    dtypes = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}
    found = {name: (dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()}
    # The INT4 job copies what it does not pack; ModelOpt's export writes BF16.
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in load_file(source.folder / "model.safetensors").items():
        if is_covered(recipe, name):
            for stem, size in split(name, tuple(tensor.shape)).items():
                expected |= parts(recipe, stem, size)
        else:
            expected[name] = (dtypes[tensor.dtype] if recipe == "int4-experts" else "BF16", tuple(tensor.shape))
    assert found == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_quantized_is_unchanged(source: Checkpoint, made: dict[str, Checkpoint], recipe: str) -> None:
    kept = load_file(made[recipe].folder / "model.safetensors")
    for name, tensor in load_file(source.folder / "model.safetensors").items():
        if not is_covered(recipe, name):
            torch.testing.assert_close(kept[name].float(), tensor.to(kept[name].dtype).float(), atol=0, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_are_within_half_a_step_of_the_source(
    source: Checkpoint, made: dict[str, Checkpoint], recipe: str
) -> None:
    """Of its format: a sixth of the largest of a block for NVFP4 (4 to 6 is the widest gap), a 16th in FP8."""
    share = {"fp8": 1 / 16, "int4-experts": 1 / 14}.get(recipe, 1 / 6)
    for name in source.names():
        if is_covered(recipe, name):
            before, after = dequantized(source, name).float(), dequantized(made[recipe], name)
            assert not torch.equal(before.bfloat16().float(), after)
            block = {"fp8": 1, "int4-experts": 64}.get(recipe, 16)
            largest = before.reshape(-1, before.shape[-1] // block, block).abs().amax(-1, keepdim=True)
            error = (after - before).abs().reshape(-1, before.shape[-1] // block, block)
            # Block scales of NVFP4 are E4M3 and add up to a 16th; BF16 adds a 256th; FP8 has denormals.
            assert (error <= largest * share * 1.13 + 1e-3).all(), name


@pytest.mark.parametrize("recipe", ["nvfp4-experts", "nvfp4"])
def test_experts_are_packed_as_modelopts_own_tensor_packs_them(
    source: Checkpoint, made: dict[str, Checkpoint], recipe: str
) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    name = "model.decoder.layers.0.experts.down_proj"
    ours = dequantized(made[recipe], name)
    for expert, weight in enumerate(dequantized(source, name).bfloat16()):
        scale = weight.abs().amax().float() / (6 * 448)
        packed, blocks, scale = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale)
        theirs = packed.dequantize(dtype=torch.float32, scale=blocks, double_scale=scale, block_sizes={-1: 16})
        torch.testing.assert_close(ours[expert], theirs, atol=0, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_folder_is_deployable_as_it_is(source: Checkpoint, made: dict[str, Checkpoint], recipe: str) -> None:
    folder = made[recipe].folder
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source.folder / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    declared = config.pop("quantization_config")
    assert config == json.loads((source.folder / "config.json").read_text())
    own = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert own["quant_algo"] == declared["quant_algo"]
    assert own["kv_cache_quant_algo"] == (None if recipe == "int4-experts" else "FP8")
    assert not folder.with_name(f"{folder.name}.partial").exists()


@pytest.mark.parametrize(
    ("stage", "inside"), [("load", False), ("calibrate", True), ("export", False), ("export", True), ("check", False)]
)
def test_an_interruption_leaves_nothing_under_the_final_name_and_can_be_resumed(
    source: Checkpoint, made: dict[str, Checkpoint], prompts: Path, tmp_path: Path, stage: str, inside: bool
) -> None:
    before, out = digest(source.folder), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        job(source, "nvfp4-experts", out, prompts).run(Stages(stage, inside))
    assert not out.exists()
    again = Stages()
    job(source, "nvfp4-experts", out, prompts).run(again)
    calibrated = stage in ("export", "check")
    assert ("calibrate" in again.names) is not calibrated
    assert digest(out) == digest(made["nvfp4-experts"].folder)
    assert digest(source.folder) == before
    assert not (tmp_path / "out.partial").exists()


def test_a_kept_calibration_of_other_prompts_is_not_used(source: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        job(source, "fp8", tmp_path / "out", prompts).run(Stages("export"))
    again = Stages()
    job(source, "fp8", tmp_path / "out", prompts, samples=2).run(again)
    assert "calibrate" in again.names


def test_half_a_file_of_scales_is_not_taken_for_a_calibration(
    source: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "calibration.safetensors").write_bytes(b"cut off")
    again = Stages()
    job(source, "fp8", tmp_path / "out", prompts).run(again)
    assert "calibrate" in again.names


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "recipe"),
    [
        ("canvasrt.quantize.modelopt_model.export_hf_checkpoint", "fp8"),
        ("canvasrt.quantize.int4.save_file", "int4-experts"),
        ("shutil.copyfile", "int4-experts"),
    ],
)
def test_a_full_disk_is_a_clear_error(
    source: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, recipe: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, full_disk)
        with pytest.raises(CapacityError, match=r"disk of .* is full .* run the same command again"):
            job(source, recipe, tmp_path / "out", prompts).run(Stages())
    assert not (tmp_path / "out").exists()
    job(source, recipe, tmp_path / "out", prompts).run(Stages())


REFUSED: list[tuple[Callable[[Checkpoint, dict[str, Checkpoint], Path], object], str]] = [
    (lambda source, made, folder: job(made["fp8"], "fp8", folder / "out", None), "is quantized already, as FP8"),
    (lambda source, made, folder: job(source, "fp8", source.folder, None), "exists and is not empty"),
    (lambda source, made, folder: job(source, "fp8", source.folder / "out", None), "lies in the source checkpoint"),
    (lambda source, made, folder: job(source, "fp8", folder / "out", folder / "no.jsonl"), r"no.jsonl: can't be read"),
    (
        lambda source, made, folder: QuantizeJob(source, load_recipe("fp8"), folder / "out", None, None, "cuda"),
        "torch sees no NVIDIA GPU",
    ),
]


@pytest.mark.parametrize(("attempt", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(
    source: Checkpoint,
    made: dict[str, Checkpoint],
    tmp_path: Path,
    attempt: Callable[[Checkpoint, dict[str, Checkpoint], Path], object],
    message: str,
) -> None:
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = digest(source.folder)
    with pytest.raises(InputError, match=message):
        attempt(source, made, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert digest(source.folder) == before


def test_widths_that_are_no_multiple_of_a_block_are_refused(tmp_path: Path, prompts: Path) -> None:
    odd = Checkpoint.open(write(tmp_path / "odd", Dims(expert_size=24)))
    with pytest.raises(InputError, match=r"experts.down_proj has 24 inputs, which is no multiple of 16"):
        job(odd, "nvfp4-experts", tmp_path / "out", prompts)


def test_a_recipe_that_contradicts_its_modelopt_entry_is_found_before_the_result_gets_its_name(
    source: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    """Its tensors say attention too; ModelOpt's recipe quantizes the experts alone."""
    recipe = quick(load_recipe("nvfp4-experts")).model_copy(
        update={"tensors": {"experts": "nvfp4", "attention": "nvfp4"}}
    )
    with pytest.raises(CheckpointError, match="do not say the same"):
        QuantizeJob(source, recipe, tmp_path / "out", prompts, None, "cpu").run(Stages())
    assert not (tmp_path / "out").exists()
