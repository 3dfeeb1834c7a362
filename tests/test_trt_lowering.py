"""What the lowering and the compiler's driver ask of TensorRT-RTX exists, with the same arguments, in TensorRT 11.4."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tensorrt_rtx

import canvasrt.compile.compiler
from canvasrt.compile.compiler import BuildLog, Request, compile_text
from canvasrt.compile.engine import MoeShapes, describe
from canvasrt.compile.scratch import Scratch
from canvasrt.compile.shapes import engine_shapes
from canvasrt.compile.source import ModelSource
from canvasrt.ops.tensorrt_graph import Graph
from canvasrt.ops.tensorrt_weights import EngineWeights
from layouts import LAYOUTS, export
from rtx_only import ALLOWED_RTX_ONLY
from tiny import Dims, write
from trt_surface import RECORDED_ENUMS, Surface, record, recorded_faults, static_faults

DIMS = Dims(layers="sf", hidden=64, mlp=96, expert_size=64, vocab=625, full_head_dim=288)


def describe_network(trt: ModuleType, source: ModelSource, moe: MoeShapes) -> int:
    class Quiet(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            pass

    logger = Quiet()
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = Graph(trt, network, "bf16")
    weights = EngineWeights(graph, source.spec, source.formats, source.checkpoint, fill=True)
    describe(graph, weights, source.spec, engine_shapes(source.spec, 2, 128, 16, 2), moe)
    return int(network.num_layers)


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_every_format_and_formulation_is_described_with_what_both_compilers_have(tmp_path: Path, layout: Any) -> None:
    folder = write(tmp_path / "source", DIMS)
    if layout != "plain":
        export(folder, layout).write(tmp_path / "made")
        folder = tmp_path / "made"
    source = ModelSource.open(folder)
    trt, seen = record(tensorrt_rtx)
    layers = describe_network(trt, source, MoeShapes("capacity", 4, 4))
    if layout != "fp8-dynamic":  # a scale per row does not go with dense experts
        layers += describe_network(trt, source, MoeShapes("dense"))
    assert layers > 500
    used = {str(use) for use in seen}
    assert len(used) > 40
    assert recorded_faults(seen, Surface.load(), {}) == []  # nothing here is RTX's own


@pytest.mark.parametrize("filled", [True, False])
def test_a_build_uses_of_tensorrt_rtx_only_what_the_list_allows(
    tmp_path: Path, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource.open(write(tmp_path / "source", Dims(layers="f")))
    trt, seen = record(tensorrt_rtx)
    monkeypatch.setattr(canvasrt.compile.compiler, "load_compiler", lambda name: trt)
    request = Request(source, engine_shapes(source.spec, 1, 64, 16, 1), MoeShapes("dense"), "tensorrt-rtx", 89, filled)
    plan = bytearray()

    def sink(data: Any) -> int:
        piece = bytes(data)
        plan.extend(piece)
        return len(piece)

    with Scratch(tmp_path) as scratch:
        compiled = compile_text(request, sink, scratch, lambda phase, done, total: None, BuildLog())
    assert len(plan) > 100_000
    assert compiled.seconds > 0
    assert recorded_faults(seen, Surface.load(), ALLOWED_RTX_ONLY) == []


@pytest.mark.parametrize("filled", [True, False])
def test_a_build_for_a_datacenter_gpu_uses_nothing_of_tensorrt_rtx(
    tmp_path: Path, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the compiling itself, which needs that GPU."""
    source = ModelSource.open(write(tmp_path / "source", Dims(layers="f")))
    trt, seen = record(tensorrt_rtx)
    monkeypatch.setattr(canvasrt.compile.compiler, "load_compiler", lambda name: trt)
    monkeypatch.setattr(canvasrt.compile.compiler, "_run", lambda *arguments: 0)
    request = Request(source, engine_shapes(source.spec, 1, 64, 16, 1), MoeShapes("dense"), "tensorrt", 90, filled)
    with Scratch(tmp_path) as scratch:
        compiled = compile_text(request, lambda data: 0, scratch, lambda phase, done, total: None, BuildLog())
    assert {"encoder", "decoder"} == compiled.ranges.keys()
    assert recorded_faults(seen, Surface.load(), {}) == []
    assert ("BuilderFlag", "STRIP_PLAN") in {(use.owner, use.name) for use in seen} or filled


def test_members_that_the_sources_compute_are_the_same_in_both_compilers(tmp_path: Path) -> None:
    """So that a member which no test uses is no surprise on a datacenter GPU either."""
    surface = Surface.load()
    for (name,) in RECORDED_ENUMS:
        if name not in ALLOWED_RTX_ONLY:
            assert set(getattr(tensorrt_rtx, name).__members__) <= set(surface.classes[name]["members"]), name
    file = tmp_path / "lowering.py"
    file.write_text("kinds = self.trt.UnaryOperation\ngetattr(kinds, name)\ngetattr(trt.DataType, name)\n")
    (fault,) = static_faults([file], surface, {})
    assert fault == "lowering.py:3: a name of TensorRT that is computed is not checked: spell it out"
