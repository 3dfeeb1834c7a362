"""The text engine: inputs, K/V memory in place, the network, outputs, and the shapes that each is compiled for.

One network serves prompt, finished canvases and canvases being denoised: what a token is, what it sees and where its K
and V go are inputs. The bundle's manifest lists all tensors; docs/engine.md says what each means.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from canvasrt.compile.shapes import EngineShapes
from canvasrt.engine_weights import EngineWeight
from canvasrt.network.attention import Rotary
from canvasrt.network.moe import Formulation, Moe
from canvasrt.network.names import EMBEDDING
from canvasrt.network.sampler import Filters
from canvasrt.network.text import Canvas, TextInputs, TextOutputs, text_network
from canvasrt.ops.protocol import Ops
from canvasrt.ops.tensorrt_graph import Graph, Tensor
from canvasrt.ops.tensorrt_ops import TensorRTOps
from canvasrt.ops.tensorrt_weights import EngineWeights, Given
from canvasrt.spec import LayerKind, LayerSpec, ModelSpec

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, typical and largest shape
ROWS = ".rows"  # of the embedding's second input, for lookups; both lie at the same address
NEXT = ".next"  # of a K/V output, behind the name of the input that it lies in
TYPICAL_CONTEXT = 4096  # tokens that kernels of full layers are chosen for


@dataclass(frozen=True, slots=True)
class MoeShapes:
    """The expert layer's formulation, and with "capacity" the tokens per expert that each shape range is tuned for."""

    formulation: Formulation
    encoder_capacity: int = 0
    decoder_capacity: int = 0


@dataclass(slots=True)
class GraphCache:
    """Implements canvasrt.ops.protocol.Cache: K and V are written into the buffers that came as inputs."""

    graph: Graph
    spec: ModelSpec
    inputs: Mapping[str, Tensor]
    writes: dict[LayerKind, Tensor]  # (rows,) int32: where each row's first token goes
    visible: dict[LayerKind, Tensor]  # (rows, 1, tokens, keys) boolean
    active: Tensor  # (keys,): as long as the part of the full layers' buffers that is in use
    updated: dict[str, Tensor] = field(default_factory=dict)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._append(f"k.{layer}", layer, k)
        self._append(f"v.{layer}", layer, v)

    def attend(self, ops: Ops[Tensor], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._append(f"k.{layer}", layer, k), self._append(f"v.{layer}", layer, v)
        return ops.attention(q, keys, values, self.visible[self.spec.layers[layer].kind])

    def _append(self, name: str, layer: int, new: Tensor) -> Tensor:
        graph, kind = self.graph, self.spec.layers[layer].kind
        new = graph.transpose(new, (0, 2, 1, 3))
        mode = graph.trt.KVCacheMode.LINEAR
        whole = graph.network.add_kv_cache_update(self.inputs[name], new, self.writes[kind], mode).get_output(0)
        self.updated[name + NEXT] = whole
        # A sliding buffer is bounded and attended whole, behind a mask; of a full one, only what is in use.
        return graph.slice(whole, 2, 0, (self.active, 0)) if kind == "full" else whole


def describe(
    graph: Graph, weights: EngineWeights, spec: ModelSpec, shapes: EngineShapes, moe: MoeShapes
) -> list[EngineWeight]:
    """Adds inputs, network and outputs to an empty graph. Returns the weights that are inputs, under their names."""
    inputs = _inputs(graph, spec, shapes, moe)
    ops = TensorRTOps(graph, weights)
    given = weights.give(EMBEDDING, Given(inputs[EMBEDDING], inputs[EMBEDDING + ROWS]))
    kinds = _kinds(spec)
    writes = {kind: inputs[f"write.{kind}"] for kind in kinds}
    visible = {kind: _visible(graph, inputs, kind, shapes) for kind in kinds}
    cache = GraphCache(graph, spec, inputs, writes, visible, inputs["keys"])
    canvas = Canvas(
        soft_embeddings=inputs["soft"],
        temperature=inputs["temperature"],
        uniforms=inputs["uniforms"],
        filters=Filters(inputs["top_k"], inputs["top_p"]),
        head_rows=inputs["head_rows"],
        logit_rows=inputs["logit_rows"],
    )
    call = TextInputs(
        tokens=inputs["tokens"],
        rotary={kind: _rotary(graph, inputs, kind) for kind in kinds},
        cache=cache,
        canvas=canvas,
        is_canvas=inputs["is_canvas"],
    )
    outputs = text_network(ops, spec, call, "mixed", Moe(moe.formulation, inputs.get("seats")))
    _outputs(graph, ops, outputs, cache)
    return [given]


def ranges(spec: ModelSpec, shapes: EngineShapes, moe: MoeShapes) -> dict[str, dict[str, Range]]:
    """For both shape ranges, the shapes of every input whose shape varies."""
    c = shapes.canvas
    most = shapes.canvases * c
    return {
        "encoder": _range(
            spec, shapes, moe, (1, 1, 1), (1, shapes.chunk, shapes.chunk), (0, 0, 0), moe.encoder_capacity
        ),
        "decoder": _range(spec, shapes, moe, (1, 1, shapes.canvases), (c, c, c), (0, c, most), moe.decoder_capacity),
    }


def _range(
    spec: ModelSpec,
    shapes: EngineShapes,
    moe: MoeShapes,
    rows: tuple[int, int, int],
    tokens: tuple[int, int, int],
    head: tuple[int, int, int],
    capacity: int,
) -> dict[str, Range]:
    """Each triple is (smallest, typical, largest)."""

    def each(*sizes: tuple[int, int, int] | int) -> Range:
        low, typical, high = zip(*[(size,) * 3 if isinstance(size, int) else size for size in sizes], strict=True)
        return low, typical, high

    keys = (tokens[0], max(tokens[1], min(TYPICAL_CONTEXT, shapes.context)), shapes.context)
    limited, logits = (0, 0, head[2]), (0, 0, min(head[2], shapes.canvas))
    found = {
        "tokens": each(rows, tokens),
        "is_canvas": each(rows, tokens, 1),
        "soft": each(rows, tokens, spec.hidden_size),
        "keys": each(keys),
        "head_rows": each(head),
        "temperature": each(head, 1),
        "uniforms": each(head, 1),
        "top_k": each(limited, 1),
        "top_p": each(limited, 1),
        "logit_rows": each(logits),
        **dict.fromkeys((EMBEDDING, EMBEDDING + ROWS), each(spec.vocab_size, spec.hidden_size)),
    }
    for kind, layer in _kinds(spec).items():
        found |= {f"{name}.{kind}": each(rows, tokens, layer.head_dim // 2) for name in ("cos", "sin")}
        found |= {f"{name}.{kind}": each(rows, tokens) for name in ("first", "end")}
        found[f"write.{kind}"] = each(rows)
    if moe.formulation == "capacity":
        largest = rows[2] * tokens[2]
        found["seats"] = each((1, min(capacity, largest), largest))
    for layer in spec.layers:
        length = shapes.context if layer.kind == "full" else shapes.sliding
        buffer = each(rows, layer.kv_heads, length, layer.head_dim)
        found |= {f"k.{layer.index}": buffer, f"v.{layer.index}": buffer}
    return found


def _inputs(graph: Graph, spec: ModelSpec, shapes: EngineShapes, moe: MoeShapes) -> dict[str, Tensor]:
    types = graph.trt.DataType
    found: dict[str, Tensor] = {}

    def add(name: str, dtype: object, shape: tuple[int, ...], dimensions: tuple[str, ...]) -> None:
        found[name] = graph.input(name, dtype, shape, dimensions)

    by_token = ("rows", "tokens")
    add("tokens", types.INT32, (-1, -1), by_token)
    add("is_canvas", types.BOOL, (-1, -1, 1), by_token)
    add("soft", graph.model, (-1, -1, spec.hidden_size), by_token)
    add("keys", types.INT32, (-1,), ("keys",))
    for kind, layer in _kinds(spec).items():
        for name in ("cos", "sin"):
            add(f"{name}.{kind}", types.FLOAT, (-1, -1, layer.head_dim // 2), by_token)
        for name in ("first", "end"):
            add(f"{name}.{kind}", types.INT32, (-1, -1), by_token)
        add(f"write.{kind}", types.INT32, (-1,), ("rows",))
    add("head_rows", types.INT32, (-1,), ("head",))
    add("temperature", types.FLOAT, (-1, 1), ("head",))
    add("uniforms", types.FLOAT, (-1, 1), ("head",))
    add("top_k", types.FLOAT, (-1, 1), ("limited",))
    add("top_p", types.FLOAT, (-1, 1), ("limited",))
    add("logit_rows", types.INT32, (-1,), ("logits",))
    for name in (EMBEDDING, EMBEDDING + ROWS):
        add(name, graph.model, (spec.vocab_size, spec.hidden_size), ())
    if moe.formulation == "capacity":
        add("seats", types.FLOAT, (-1,), ("seats",))
    for layer in spec.layers:
        length = shapes.context if layer.kind == "full" else shapes.sliding
        for name in ("k", "v"):
            add(f"{name}.{layer.index}", graph.model, (-1, layer.kv_heads, length, layer.head_dim), ("rows",))
    return found


def _outputs(graph: Graph, ops: TensorRTOps, outputs: TextOutputs[Tensor], cache: GraphCache) -> None:
    prediction = outputs.prediction
    assert prediction is not None  # only the encoder phase predicts nothing
    graph.output(ops.to_int(prediction.argmax), "argmax")
    graph.output(ops.to_int(prediction.sampled), "sampled")
    graph.output(prediction.entropy, "entropy")
    graph.output(prediction.soft_embeddings, "soft.next")
    assert prediction.logits is not None  # those of the logit rows
    graph.output(prediction.logits, "logits")
    if outputs.busiest is not None:
        graph.output(outputs.busiest, "busiest")
    for name, tensor in cache.updated.items():
        graph.output(tensor, name)


def _rotary(graph: Graph, inputs: Mapping[str, Tensor], kind: LayerKind) -> Rotary[Tensor]:
    """Both halves of a head turn by the same angles: (rows, tokens, half) to (rows, tokens, 1, head_dim)."""
    cos, sin = inputs[f"cos.{kind}"], inputs[f"sin.{kind}"]

    def whole(first: Tensor, second: Tensor) -> Tensor:
        both = graph.concat([first, second], -1)
        return graph.reshape_to(both, (both, 0), (both, 1), 1, int(both.shape[-1]))

    return Rotary(whole(cos, cos), whole(graph.unary("NEG", sin), sin))


def _visible(graph: Graph, inputs: Mapping[str, Tensor], kind: LayerKind, shapes: EngineShapes) -> Tensor:
    """(rows, 1, tokens, keys) boolean: a token sees the buffer rows from its ``first`` on that come before its ``end``.

    Made from two numbers per token: the mask itself would be most of what crosses to the GPU in a step.
    """
    rows = inputs["keys"] if kind == "full" else graph.literal(np.arange(shapes.sliding))
    keys = graph.reshape(rows, (1, 1, 1, -1))

    def column(name: str) -> Tensor:
        bound = inputs[f"{name}.{kind}"]
        return graph.reshape_to(bound, (bound, 0), 1, (bound, 1), 1)

    from_first = graph.unary("NOT", graph.elementwise("LESS", keys, column("first")))
    return graph.elementwise("AND", from_first, graph.elementwise("LESS", keys, column("end")))


def _kinds(spec: ModelSpec) -> dict[LayerKind, LayerSpec]:
    """The kinds of layers that the model has, each with one of its layers: all of a kind have the same heads."""
    return {layer.kind: layer for layer in spec.layers}
