"""The engine of the published 26B model, described from its config.json: weights, inputs, outputs, shape ranges."""

import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt

from canvasrt.checkpoint import Checkpoint
from canvasrt.compile.engine import NEXT, ROWS, MoeShapes, describe, ranges
from canvasrt.compile.shapes import EngineShapes, engine_shapes
from canvasrt.compile.source import ModelSource
from canvasrt.engine_weights import EngineWeight
from canvasrt.network.moe import Formulation
from canvasrt.ops.tensorrt_graph import EnginePrecision, Graph
from canvasrt.ops.tensorrt_weights import EngineWeights
from engine_host import LOGGER
from layouts import LAYOUTS, Layout, export
from tiny import Dims, write

REAL = Path(__file__).parent / "fixtures" / "diffusiongemma-26b-a4b"
EMBEDDING = "model.decoder.embed_tokens.weight"
RECIPES = ("none", "nvfp4-experts", "nvfp4", "fp8", "int4-experts")
LAYERS = 30


@dataclass
class Described:
    network: Any
    weights: list[EngineWeight]
    given: list[EngineWeight]
    shapes: EngineShapes
    ranges: dict[str, Any]
    seconds: float
    alive: tuple[Any, ...]

    def inputs(self) -> list[Any]:
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]


def described(
    source: ModelSource, moe: MoeShapes, shapes: EngineShapes, precision: EnginePrecision, fill: bool = False
) -> Described:
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = Graph(trt, network, precision)
    started = time.perf_counter()
    weights = EngineWeights(graph, source.spec, source.formats, source.checkpoint, fill=fill)
    given = describe(graph, weights, source.spec, shapes, moe)
    seconds = time.perf_counter() - started
    return Described(
        network, graph.weights, given, shapes, ranges(source.spec, shapes, moe), seconds, (builder, graph, weights)
    )


@cache
def real(recipe: str, formulation: Formulation) -> Described:
    source = ModelSource.open(REAL, recipe)
    shapes = engine_shapes(source.spec, slots=8, context=16384, chunk=1024, canvases=4)
    return described(source, MoeShapes(formulation, 96, 64), shapes, "bf16")


# Bytes of a weight: packed number and its share of a block's scale.
FP4, FP8, INT4, BF16 = 0.5 + 1 / 16, 1.0, 0.5 + 2 / 64, 2.0
# Attention, dense MLP, experts.
BYTES = {
    "none": (BF16, BF16, BF16),
    "nvfp4-experts": (BF16, BF16, FP4),
    "nvfp4": (FP4, FP4, FP4),
    "fp8": (FP8, FP8, FP8),
    "int4-experts": (BF16, BF16, INT4),
}
# Per layer: 7 norms, norms of query and key, layer scalars of encoder and decoder, router's 2 vectors and matrix, fused
# query, key and value, output, gate and up, down, and 2 of the experts. Beside the layers: the final norm, the norm and
# the 2 matrices of self-conditioning. A quantized matrix brings a tensor of block scales or a multiplier, or both; in
# the dense formulation the experts' second one needs no multiplier.
PLAIN_WEIGHTS = LAYERS * 19 + 4
MORE = {"none": (0, 0), "nvfp4-experts": (3, 4), "nvfp4": (11, 12), "fp8": (5, 6), "int4-experts": (2, 2)}


@pytest.mark.parametrize(
    ("recipe", "formulation"),
    [*((recipe, "capacity") for recipe in RECIPES), ("nvfp4-experts", "dense"), ("fp8", "dense")],
)
def test_every_recipe_is_described_in_seconds_with_the_weights_that_arithmetic_expects(
    recipe: str, formulation: Formulation
) -> None:
    made = real(recipe, formulation)
    assert made.seconds < 15
    hidden, mlp, width = 2816, 2112, 704
    sliding = (16 + 8 + 8) * 256 * hidden + 16 * 256 * hidden
    full = (16 + 2) * 512 * hidden + 16 * 512 * hidden
    attention, dense, experts = BYTES[recipe]
    expected = attention * (25 * sliding + 5 * full) + dense * LAYERS * 3 * mlp * hidden
    expected += experts * LAYERS * 128 * 3 * width * hidden
    expected += BF16 * (LAYERS * 128 * hidden + 3 * mlp * hidden)  # routers and self-conditioning are never quantized
    total = sum(weight.nbytes for weight in made.weights)
    assert abs(total / expected - 1) < 0.01
    assert len(made.weights) == PLAIN_WEIGHTS + LAYERS * MORE[recipe][formulation == "capacity"]
    (embedding,) = made.given
    assert (embedding.name, embedding.shape, embedding.nbytes) == (EMBEDDING, (262144, 2816), 262144 * 2816 * 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_placeholder_has_a_name_of_its_own_and_can_be_filled_later(recipe: str) -> None:
    made = real(recipe, "capacity")
    names = [weight.name for weight in made.weights]
    assert len(set(names)) == len(names)
    assert all(made.network.are_weights_marked_refittable(name) for name in names)
    layers = {made.network.get_layer(index).name for index in range(made.network.num_layers)}
    assert layers.issuperset(names)


@pytest.mark.parametrize("formulation", ["dense", "capacity"])
def test_every_buffer_goes_in_and_comes_out_of_one_update(formulation: Formulation) -> None:
    network = real("nvfp4-experts", formulation).network
    inputs = {tensor.name: tensor for tensor in real("nvfp4-experts", formulation).inputs()}
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    buffers = {f"{name}.{layer}" for name in "kv" for layer in range(LAYERS)}
    assert {name for name in inputs if name[:2] in ("k.", "v.")} == buffers
    more = {"busiest"} if formulation == "capacity" else set()
    assert outputs == {f"{name}.next" for name in buffers} | more | {
        "argmax", "sampled", "entropy", "soft.next", "logits",
    }  # fmt: skip
    pairs = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if trt.ILayer.type.fget(layer) == trt.LayerType.KV_CACHE_UPDATE:
            before, after, kind = layer.get_input(0), layer.get_output(0), layer.get_input(2).name
            pairs.append((before.name, after.name))
            assert (before.dtype, tuple(before.shape)) == (after.dtype, tuple(after.shape))
            number = int(before.name[2:])
            full = number % 6 == 5
            assert kind == ("write.full" if full else "write.sliding")
            shape = (-1, 2, 16384, 512) if full else (-1, 8, 1023 + 1024 + 256, 256)
            assert (tuple(before.shape), before.dtype) == (shape, trt.DataType.BF16)
    assert sorted(pairs) == sorted((name, name + NEXT) for name in buffers)


def test_full_layers_alone_have_their_heads_folded_into_the_tokens() -> None:
    """Heads of 256 have a fused kernel, heads of 512 have none."""
    network, found = real("nvfp4-experts", "capacity").network, []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if trt.ILayer.type.fget(layer) == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            queries, keys = layer.get_input(0).shape, layer.get_input(1).shape
            found.append((queries[1], keys[1], queries[3], layer.attention.decomposable))
    assert found == [(2, 2, 512, True) if layer % 6 == 5 else (16, 8, 256, False) for layer in range(LAYERS)]


# Layers that may see BF16: products, what only moves numbers, GELU and its product, residuals, and two of the experts'.
ROUNDED = {
    "ACTIVATION GELU_TANH", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "CAST", "ELEMENTWISE PROD", "ELEMENTWISE SUM",
    "GATHER", "KV_CACHE_UPDATE", "MATRIX_MULTIPLY", "SELECT", "SHAPE", "SHUFFLE", "SLICE", "TOPK",
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "formulation", "more"),
    [
        ("none", "capacity", {"REDUCE SUM"}),  # over a token's experts
        ("nvfp4-experts", "dense", {"DYNAMIC_QUANTIZE", "DEQUANTIZE"}),
        ("fp8", "capacity", {"REDUCE SUM", "QUANTIZE"}),
    ],
)
def test_only_products_and_residuals_are_rounded_to_bf16(recipe: str, formulation: Formulation, more: set[str]) -> None:
    """Norms, rotation, router, everything behind the logits and the multipliers of quantized matrices are float32."""
    network, found = real(recipe, formulation).network, set()
    classes = {
        trt.LayerType.ACTIVATION: trt.IActivationLayer,
        trt.LayerType.ELEMENTWISE: trt.IElementWiseLayer,
        trt.LayerType.REDUCE: trt.IReduceLayer,
    }
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = trt.ILayer.type.fget(layer)
        inputs = [layer.get_input(each) for each in range(layer.num_inputs)]
        if all(tensor is None or tensor.dtype != trt.DataType.BF16 for tensor in inputs):
            continue
        name = kind.name
        if kind in classes:
            layer.__class__ = classes[kind]
            name += " " + (layer.type if kind == trt.LayerType.ACTIVATION else layer.op).name
        found.add(name)
    assert found == ROUNDED | more


@pytest.mark.parametrize("formulation", ["dense", "capacity"])
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4-experts"])
def test_both_shape_ranges_cover_every_input_and_the_builder_takes_them(recipe: str, formulation: Formulation) -> None:
    made = real(recipe, formulation)
    builder, *_ = made.alive
    config = builder.create_builder_config()
    assert list(made.ranges) == ["encoder", "decoder"]
    for number, spans in enumerate(made.ranges.values()):
        profile = builder.create_optimization_profile()
        assert set(spans) == {tensor.name for tensor in made.inputs()}
        named: dict[tuple[str, int], int] = {}
        for tensor in made.inputs():
            low, typical, high = spans[tensor.name]
            profile.set_shape(tensor.name, low, typical, high)
            assert all(a <= b <= c for a, b, c in zip(low, typical, high, strict=True))
            for which, shape in enumerate((low, typical, high)):
                assert len(shape) == len(tensor.shape)
                for axis, (length, declared) in enumerate(zip(shape, tensor.shape, strict=True)):
                    assert declared in (-1, length)
                    dimension = tensor.get_dimension_name(axis)
                    assert bool(dimension) == (declared == -1), f"{tensor.name}: axis {axis} varies and has no name"
                    if dimension:  # equal names have equal lengths in every call
                        assert named.setdefault((dimension, which), length) == length
        assert profile
        assert config.add_optimization_profile(profile) == number
    lengths = {name: made.ranges["decoder"][name] for name in ("tokens", "head_rows", "keys", "top_k", "logit_rows")}
    assert lengths == {
        "tokens": ((1, 256), (1, 256), (4, 256)),
        "head_rows": ((0,), (256,), (1024,)),
        "keys": ((256,), (4096,), (16384,)),
        "top_k": ((0, 1), (0, 1), (1024, 1)),
        "logit_rows": ((0,), (0,), (256,)),
    }
    assert made.ranges["encoder"]["tokens"] == ((1, 1), (1, 1024), (1, 1024))
    if formulation == "capacity":
        assert made.ranges["encoder"]["seats"] == ((1,), (96,), (1024,))
        assert made.ranges["decoder"]["seats"] == ((1,), (64,), (1024,))


def test_the_embedding_is_two_inputs_and_no_constant() -> None:
    made = real("none", "capacity")
    shapes = {tensor.name: (tuple(tensor.shape), tensor.dtype) for tensor in made.inputs()}
    assert shapes[EMBEDDING] == shapes[EMBEDDING + ROWS] == ((262144, 2816), trt.DataType.BF16)
    assert all("embed_tokens" not in weight.name for weight in made.weights)


TINY = Dims(layers="ssf", hidden=64, mlp=96, expert_size=64, head_dim=16, full_head_dim=32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain"), TINY)


def literals(checkpoint: Checkpoint, formulation: Formulation) -> set[str]:
    """Scales that are constants of the build: of activations, and in dense those that tell experts' products apart."""
    found = set()
    for name in checkpoint.names():
        for matrix in checkpoint.stored(name).matrices:
            infos = [matrix.input_scale]
            if formulation == "dense" and name.endswith("experts.down_proj"):
                infos.append(matrix.global_scale or matrix.scale)
            if checkpoint.stored(name).format.weights != "int4":
                found.update(info.name for info in infos if info is not None)
    return found


@pytest.mark.parametrize("formulation", ["dense", "capacity"])
@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_every_stored_tensor_is_used_exactly_once(
    plain: Path, tmp_path: Path, layout: Layout, formulation: Formulation
) -> None:
    if (layout, formulation) == ("fp8-dynamic", "dense"):
        return  # refused: tests/test_engine_formats.py
    folder = plain if layout == "plain" else export(plain, layout).write(tmp_path / "made")
    source = ModelSource.open(folder)
    shapes = engine_shapes(source.spec, slots=2, context=64, chunk=16, canvases=2)
    made = described(source, MoeShapes(formulation, 8, 8), shapes, "bf16")
    checkpoint = source.weights()
    uses = Counter(part.tensor for weight in (*made.weights, *made.given) for part in weight.parts)
    stored = {info.name for name in checkpoint.names() for info in checkpoint.stored(name).infos()}
    constant = literals(checkpoint, formulation)
    assert set(uses) == stored - constant
    assert set(uses.values()) == {1}
    for weight in (*made.weights, *made.given):
        elements = 0
        for part in weight.parts:
            info = checkpoint.info(part.tensor)
            packed = 2 if info.dtype == "U8" else 1
            elements += part.count * int(np.prod(info.shape)) * packed
        assert elements == weight.count, weight.name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_weights_are_described_with_and_without_data(plain: Path, tmp_path: Path, layout: Layout) -> None:
    """A stripped plan is filled by what the manifest says of the one with weights."""
    source = ModelSource.open(export(plain, layout).write(tmp_path / "made"))
    shapes = engine_shapes(source.spec, slots=2, context=64, chunk=16, canvases=2)
    filled, stripped = (described(source, MoeShapes("capacity", 8, 8), shapes, "bf16", fill) for fill in (True, False))
    assert filled.weights == stripped.weights
    assert filled.given == stripped.given
    assert filled.network.num_layers == stripped.network.num_layers
    assert not any(filled.network.are_weights_marked_refittable(weight.name) for weight in filled.weights)
