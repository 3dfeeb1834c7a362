"""What lies in compiled plans: no unpacked copy of a weight, each weight once, and the 26B in bounds."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx
import torch

from builds import WIDE, Builds, canvasrt, options
from canvasrt.compile.engine import MoeShapes, describe
from canvasrt.compile.plan_text import PlanText, read_plan_text
from canvasrt.compile.shapes import engine_shapes
from canvasrt.compile.source import ModelSource
from canvasrt.engine_weights import EngineWeight, made
from canvasrt.errors import BundleError
from canvasrt.ops.tensorrt_graph import Graph
from canvasrt.ops.tensorrt_weights import EngineWeights
from engine_bytes import stretches
from engine_host import LOGGER
from engine_tables import EMBEDDING, ROWS, Numbers, expected_ranges, expected_tensors
from layouts import export
from planning import ROOT
from tiny import Dims, write

STRIPPED = ("--weights", "stripped")
GIVEN = [EMBEDDING, ROWS]
MOST = {"plan_bytes": 100e6, "peak_ram_bytes": 4e9, "seconds": 900.0}


def text_of(builds: Builds, checkpoint: str, profile: str, *more: str) -> PlanText:
    text = read_plan_text(builds.bundle(checkpoint, profile, *STRIPPED, *more).plan)
    assert text.reason is None
    assert {region.shape_range for region in text.regions()} == {0, 1}
    return text


def unpacked_experts(text: PlanText, config: Path) -> list[str]:
    """Temporary tensors with as many numbers as the experts of a layer, whatever the order of their axes."""
    sizes = json.loads((config / "config.json").read_text())["text_config"]
    experts, hidden, width = sizes["num_experts"], sizes["hidden_size"], sizes["moe_intermediate_size"]
    whole = [sorted([experts, 2 * width, hidden]), sorted([experts, width, hidden]), sorted([experts * width, hidden])]
    running = [graph for graph in text.graphs if graph.kind == "run"]
    temporary = [tensor for graph in running for tensor in graph.temporary() if None not in tensor.dims]
    return [
        f"{tensor.name} {tensor.dims}"
        for tensor in temporary
        if sorted(size for size in tensor.dims if size is not None and size != 1) in whole
    ]


# Checkpoint, profile and options, and the bytes of a weight's numbers in the plan's words.
WIDTHS = {
    "NVFP4 experts": (f"{WIDE}2", "rtx-5090", (), "fp4_e2m1"),
    "NVFP4": (f"{WIDE}1", "dgx-spark", ("--recipe", "nvfp4"), "fp4_e2m1"),
    "FP8": (f"{WIDE}2", "l40s", (), "fp8_e4m3"),
    "BF16": (f"{WIDE}1", "rtx-pro-6000", ("--recipe", "none"), "bf16"),
    "INT4 experts": (f"{WIDE}1", "rtx-4090", (), "int4"),
    "NVFP4 experts, dense": (f"{WIDE}1", "rtx-5090", ("--moe", "dense"), "fp4_e2m1"),
}


@pytest.mark.parametrize("case", WIDTHS)
def test_no_weight_is_unpacked_or_copied_at_the_26bs_widths(builds: Builds, case: str) -> None:
    checkpoint, profile, more, dtype = WIDTHS[case]
    text = text_of(builds, checkpoint, profile, *more)
    assert text.weight_copies(inputs=GIVEN) == []
    assert unpacked_experts(text, builds.checkpoint(checkpoint)) == []
    layers = int(checkpoint.removeprefix(WIDE))
    experts = layers * 128 * 3 * 704 * 2816
    bits = {"fp4_e2m1": 4, "int4": 4, "fp8_e4m3": 8, "bf16": 16}[dtype]
    assert experts * bits // 8 <= text.weight_bytes()[dtype] < 1.2 * experts * bits // 8


def test_the_check_for_copies_finds_those_of_nvfp4_weights_met_by_bf16(builds: Builds) -> None:
    """W4A16: the compiler has no product for it, so that it unpacks all experts in every call.

    Of a single layer only when it denoises: context needs K and V of the last layer, and nothing behind them.
    """
    recipe = builds.checkpoint(f"{WIDE}1") / "w4a16.yaml"
    lines = (ROOT / "build" / "recipes" / "nvfp4.yaml").read_text().splitlines()
    changed = [line.replace(": nvfp4", ": nvfp4-weights") if line.startswith("  ") else line for line in lines]
    recipe.write_text("\n".join("name: w4a16" if line.startswith("name:") else line for line in changed))
    text = text_of(builds, f"{WIDE}1", "rtx-5090", "--recipe", str(recipe))
    copies = text.weight_copies(inputs=GIVEN)
    found = {(copy.shape_range, copy.tensor.count, copy.tensor.dtype) for copy in copies}
    assert {(1, 128 * 704 * 2816 * times, "bf16") for times in (1, 2)} <= found
    assert len(unpacked_experts(text, builds.checkpoint(f"{WIDE}1"))) == 2


# Formats whose kernels want the packed numbers in the checkpoint's order, or transposed.
ONCE = {
    "BF16": ("demo", "rtx-5090", ()),
    "FP8": ("fp8", "l40s", ()),
    "NVFP4 experts": ("nvfp4-experts", "rtx-5090", ()),
    "NVFP4": ("nvfp4", "rtx-5090", ()),
    "NVFP4 experts, dense": ("nvfp4-experts", "rtx-5090", ("--moe", "dense")),
    "FP8, dense": ("fp8", "l40s", ("--moe", "dense")),
}


def weights_of(source: ModelSource, dense: bool) -> list[EngineWeight]:
    """Of a network that is described and not built."""
    moe = MoeShapes("dense") if dense else MoeShapes("capacity", 64, 64)
    builder = tensorrt_rtx.Builder(LOGGER)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = Graph(tensorrt_rtx, network, "bf16")
    weights = EngineWeights(graph, source.spec, source.formats, source.checkpoint, fill=False)
    describe(graph, weights, source.spec, engine_shapes(source.spec, 2, 512, 64, 2), moe)
    return graph.weights


@pytest.mark.parametrize("case", ONCE)
def test_both_shape_ranges_share_every_weight(builds: Builds, case: str) -> None:
    """A stretch of a row or of a column of each matrix occurs once in the plan."""
    checkpoint, profile, more = ONCE[case]
    plan = builds.bundle(checkpoint, profile, *more).plan
    source = ModelSource.open(builds.checkpoint(checkpoint))
    matrices = 0
    for weight in weights_of(source, "dense" in more):
        if weight.nbytes >= 4096 and not weight.name.endswith((".scale", ".multiplier")):
            lines = stretches(made(source.weights(), weight).tobytes(), weight)
            assert sum(plan.count(line) for line in lines) == 1, weight.name
            matrices += 1
    assert matrices >= 30


def test_int4_weights_lie_in_the_plan_once(builds: Builds, tmp_path: Path) -> None:
    """Their kernel wants them in an order of its own, which one and the same number everywhere does not show."""
    dims = Dims(layers="f", mlp=48, hidden=128, expert_size=128)
    content = export(write(tmp_path / "source", dims), "int4-experts")
    code = 5
    stem = "model.decoder.layers.0.experts"
    filled = [f"{stem}.{expert}.{part}_proj.weight" for expert in range(4) for part in ("gate", "up", "down")]
    for name in filled:
        content.tensors[name] = torch.full_like(content.tensors[name], code * 17)
    folder = content.write(tmp_path / "int4")
    done = canvasrt("build", *options(folder, "rtx-4090", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    plan = np.fromfile(tmp_path / "out" / "text.engine", np.uint8)
    nbytes = sum(content.tensors[name].nbytes for name in filled)
    lengths = [_bytes_in_runs(plan, value, 1024) for value in (code * 17, (code + 8) * 17)]  # signed, or from 0 on
    assert sorted(lengths) == [0, nbytes]


def _bytes_in_runs(content: np.ndarray, value: int, least: int) -> int:
    """How many bytes lie in stretches of ``least`` or more that are all ``value``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], content == value, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[0::2]
    return int(lengths[lengths >= least].sum())


def test_the_26b_is_built_from_its_configuration_and_can_not_be_served(builds: Builds) -> None:
    """The first 12 of its 30 layers, two of them full: all of them take two minutes of a core. scripts/bench_builds.py
    builds those.
    """
    built = builds.bundle("first-12", "rtx-5090", *STRIPPED)
    for name, most in MOST.items():
        assert 0 < built.printed[name] < most, name
    opened = built.open()
    manifest = opened.manifest
    assert (manifest.weights, manifest.checkpoint.content) == ("none", None)
    assert manifest.checkpoint.quantization == "recipe nvfp4-experts"
    assert {"what": "weights", "value": "recipe nvfp4-experts"}.items() <= manifest.reasons[0].model_dump().items()
    shapes = manifest.shapes
    capacity = (manifest.moe.encoder_capacity or 0, manifest.moe.decoder_capacity or 0)
    numbers = Numbers(shapes.slots, shapes.context, shapes.chunk, shapes.canvases, capacity)
    config = json.loads((built.checkpoint / "config.json").read_text())
    engine = manifest.engines["text"]
    tensors = {each.name: (each.mode, each.dtype, each.shape, each.aliases) for each in engine.tensors}
    assert tensors == expected_tensors(config, numbers)
    assert sum(1 for name in tensors if name.startswith(("k.", "v."))) == 2 * 2 * 12
    ranges = {
        name: {tensor: (each.min, each.opt, each.max) for tensor, each in inputs.items()}
        for name, inputs in engine.shape_ranges.items()
    }
    assert ranges == expected_ranges(config, numbers)
    text = read_plan_text(built.plan)
    assert text.weight_copies(inputs=GIVEN) == []
    assert unpacked_experts(text, built.checkpoint) == []
    assert set(manifest.files) == {"config.json", "text.engine", "build.log"}
    assert not manifest.needs_checkpoint
    with pytest.raises(BundleError, match=r"was built from a config.json alone, for planning: it can't be served"):
        opened.check_servable()
