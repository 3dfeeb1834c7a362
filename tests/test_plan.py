"""What a quantization will need: counted by hand, against real exports, and for the published model."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import InputError
from canvasrt.inputs import input_folder
from canvasrt.quantize.job import QuantizeJob
from canvasrt.quantize.plan import Plan, Speed, measure_speed, plan
from canvasrt.quantize.recipe import Recipe, load_recipe
from canvasrt.spec import ModelSpec
from tiny import Dims, new_model, write

SPEED = Speed(flops=1e9, bytes=1e6)
GB = 10**9
# Every covered width a multiple of 64; the logits of a canvas are smaller than the largest matrix in float32.
DIMS = Dims(vocab=40, hidden=64, mlp=128, layers="sf", experts=3, top_k=2, expert_size=64, canvas=4)
EXPERTS = 2 * 3 * 3 * 64 * 64  # elements: layers, experts, matrices
EXPERT_MATRICES = 2 * 3 * 3
MLP = 2 * 3 * 128 * 64
ATTENTION = (64 * 64 + 2 * 32 * 64 + 64 * 64) + (128 * 64 + 32 * 64 + 64 * 128)  # sliding q, k and v, o; full q, k, o
LINEAR = EXPERTS + MLP + ATTENTION
LINEAR_MATRICES = EXPERT_MATRICES + 6 + 4 + 3
LARGEST = 4 * 3 * 128 * 64  # gate_up_proj of a layer in float32
TEXT: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 2,
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
VISION_BYTES = 27 * 2 * (4 * 1152 * 1152 + 3 * 1152 * 4304)  # of its layers' matrices


class Silent:
    def stage(self, name: str, total: int) -> None:
        """Shows nothing."""

    def advance(self) -> None:
        """Shows nothing."""


def half(folder: Path, dims: Dims = DIMS) -> Checkpoint:
    new_model(dims, 0).to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint.open(folder)


def tensor_bytes(folder: Path) -> int:
    """As the safetensors library reads them."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)
    return total


def exported_bytes(source: Checkpoint, recipe: Recipe, folder: Path) -> int:
    calibration = folder / "calibration.jsonl"
    calibration.write_text('{"tokens": [2, 9, 8, 7]}\n{"tokens": [2, 5]}\n', encoding="utf-8")
    if recipe.calibration is not None:
        settings = recipe.calibration.model_copy(update={"canvases": 1, "steps": 1})
        recipe = recipe.model_copy(update={"calibration": settings})
    QuantizeJob(source, recipe, folder / "out", calibration, None, "cpu").run(Silent())
    return tensor_bytes(folder / "out")


def weights_only(folder: Path) -> Recipe:
    content = yaml.safe_load((input_folder("recipes") / "nvfp4.yaml").read_text(encoding="utf-8"))
    content |= {"tensors": {"experts": "nvfp4-weights"}, "calibration": None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_recipe(str(folder / "mine.yaml"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return half(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize(
    ("recipe", "covered", "packed"),
    [
        # a weight scale and an input scale per matrix, float32
        ("fp8", LINEAR, LINEAR + 8 * LINEAR_MATRICES),
        # an E4M3 scale per 16 weights, two float32 scales per matrix
        ("nvfp4", LINEAR, LINEAR // 2 + LINEAR // 16 + 8 * LINEAR_MATRICES),
        ("nvfp4-experts", EXPERTS, EXPERTS // 2 + EXPERTS // 16 + 8 * EXPERT_MATRICES),
        # a float32 scale per 64 weights
        ("int4-experts", EXPERTS, EXPERTS // 2 + EXPERTS // 64 * 4),
    ],
)
def test_sizes_are_those_counted_by_hand_and_those_of_an_export(
    source: Checkpoint, tmp_path: Path, recipe: str, covered: int, packed: int
) -> None:
    chosen, all_bytes = load_recipe(recipe), tensor_bytes(source.folder)
    found = plan(source, chosen, 64, SPEED)
    assert found.disk_bytes == all_bytes - 2 * covered + packed
    assert found.disk_bytes == exported_bytes(source, chosen, tmp_path)
    assert found.memory_bytes == (0 if recipe == "int4-experts" else all_bytes) + 2 * LARGEST + (
        found.disk_bytes if recipe == "int4-experts" else packed
    )
    assert found.export_seconds == pytest.approx(2 * covered / 25e6)


def test_weights_without_activations_have_one_scale_per_matrix(source: Checkpoint, tmp_path: Path) -> None:
    recipe = weights_only(tmp_path)
    found = plan(source, recipe, 0, SPEED)
    assert (found.passes, found.calibration_seconds) == (0, 0)
    assert exported_bytes(source, recipe, tmp_path) == tensor_bytes(source.folder) - 2 * EXPERTS + (
        EXPERTS // 2 + EXPERTS // 16 + 4 * EXPERT_MATRICES
    )


def test_the_plan_for_weights_without_activations_is_that_of_the_export(source: Checkpoint, tmp_path: Path) -> None:
    recipe = weights_only(tmp_path)
    assert plan(source, recipe, 64, SPEED).disk_bytes == exported_bytes(source, recipe, tmp_path)


def test_a_float32_source_is_planned_as_it_is_exported(tmp_path: Path) -> None:
    source = Checkpoint.open(write(tmp_path / "source", DIMS))
    found = plan(source, load_recipe("fp8"), 64, SPEED)
    assert found.disk_bytes == exported_bytes(source, load_recipe("fp8"), tmp_path)


def test_int4_keeps_the_float32_of_a_float32_source(tmp_path: Path) -> None:
    source = Checkpoint.open(write(tmp_path / "source", DIMS))
    recipe = load_recipe("int4-experts")
    assert plan(source, recipe, 64, SPEED).disk_bytes == exported_bytes(source, recipe, tmp_path)


def test_logits_larger_than_a_matrix_count_in_memory(tmp_path: Path) -> None:
    dims = replace(DIMS, vocab=900, canvas=32, layers="f")
    source = half(tmp_path, dims)
    experts = EXPERTS // 2
    packed = experts // 2 + experts // 16 + 8 * EXPERT_MATRICES // 2
    logits = 4 * 4 * 32 * 900
    assert logits > 2 * LARGEST
    found = plan(source, load_recipe("nvfp4-experts"), 64, SPEED)
    assert found.memory_bytes == tensor_bytes(tmp_path) + packed + logits


def test_what_stays_as_it_is_may_be_of_any_width(tmp_path: Path) -> None:
    source = half(tmp_path / "source", Dims(hidden=32, mlp=40, layers="f", expert_size=32))
    recipe = load_recipe("nvfp4-experts")
    assert plan(source, recipe, 64, SPEED).disk_bytes == exported_bytes(source, recipe, tmp_path)


def per_pass(source: Checkpoint, speed: Speed) -> float:
    """Seconds: two of three experts, the embedding as LM head and for self-conditioning, multiply and add."""
    hidden, vocabulary = 64, 40
    others = sum(
        size[0] if len(size) == 1 else size[0] * size[1]
        for name, size in source.spec.tensors().items()
        if ".experts." not in name
    )
    flops = 2 * 4 * (others + vocabulary * hidden + EXPERTS * 2 / 3)
    return max(flops / speed.flops, sum(source.array(name).nbytes for name in source.names()) / speed.bytes)


@pytest.mark.parametrize(
    ("recipe", "samples", "passes"),
    [
        ("nvfp4", 64, 64 * 27),
        ("nvfp4-experts", 5, 5 * 27),
        ("fp8", 1, 27),
        ("int4-experts", 0, 0),
        ("int4-experts", 9, 0),
    ],
)
@pytest.mark.parametrize("speed", [Speed(1e6, 1e12), Speed(1e12, 1e5)], ids=["products", "memory"])
def test_calibration_is_bound_by_the_slower_of_products_and_memory(
    source: Checkpoint, recipe: str, samples: int, passes: int, speed: Speed
) -> None:
    found = plan(source, load_recipe(recipe), samples, speed)
    assert found.passes == passes
    assert found.calibration_seconds == pytest.approx(passes * per_pass(source, speed))
    assert (found.calibration_seconds > 0) == (passes > 0)


def test_a_source_that_is_quantized_already_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    exported_bytes(source, load_recipe("int4-experts"), tmp_path)
    with pytest.raises(InputError, match="quantized already"):
        plan(Checkpoint.open(tmp_path / "out"), load_recipe("fp8"), 64, SPEED)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Plan]]:
    """Plans for a checkpoint of the published dimensions: a header, and a hole of 52 GB for the data."""
    folder = tmp_path_factory.mktemp("published")
    config = {"model_type": "diffusion_gemma", "text_config": TEXT}
    sizes = ModelSpec.from_config(config, "TEXT").tensors()
    sizes["model.encoder.vision_tower.everything"] = (VISION_BYTES // 2,)
    header, end = {}, 0
    for name, shape in sizes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    source = Checkpoint.open(folder)
    yield lambda recipe: plan(source, load_recipe(recipe), 64, SPEED)
    file.unlink()


@pytest.mark.parametrize(
    ("recipe", "disk", "memory"),
    [
        ("nvfp4-experts", (18.6, 19.0), (60, 85)),  # NVIDIA's is 18.8 GB
        ("nvfp4", (16, 17), (60, 85)),
        ("fp8", (25, 28), (70, 90)),
        ("int4-experts", (18.6, 19.0), (5, 12)),
    ],
)
def test_the_published_model(
    published: Callable[[str], Plan], recipe: str, disk: tuple[float, float], memory: tuple[float, float]
) -> None:
    found = published(recipe)
    assert disk[0] * GB < found.disk_bytes < disk[1] * GB
    assert memory[0] * GB < found.memory_bytes < memory[1] * GB


def test_experts_of_the_published_model_take_half_an_hour_to_pack(published: Callable[[str], Plan]) -> None:
    assert 20 * 60 < published("nvfp4-experts").export_seconds < 40 * 60


def test_the_speed_of_this_machine_is_a_number_of_this_world() -> None:
    speed = measure_speed("cpu")
    assert 1e7 < speed.flops < 1e14
    assert 1e7 < speed.bytes < 1e13
