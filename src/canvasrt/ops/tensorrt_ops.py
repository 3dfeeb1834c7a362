"""The TensorRT lowering: every primitive adds layers to a network that a compiler will see.

Tensors are strongly typed: what is computed in float32 is cast there, as in the network. Knows nothing of the model's
structure, of shape ranges or of K/V memory.
"""

from collections.abc import Sequence

import numpy as np

from canvasrt.engine_weights import to_bf16
from canvasrt.errors import InputError
from canvasrt.formats import E4M3_MAX, NVFP4_BLOCK, Format
from canvasrt.ops.composed import Composed
from canvasrt.ops.protocol import Number, Precision
from canvasrt.ops.tensorrt_graph import Graph, Tensor
from canvasrt.ops.tensorrt_weights import EngineWeights, Operand

FUSED_HEAD = 256  # largest head_dim that TensorRT has a fused attention kernel for
LEAST_TOKEN = 1e-30  # largest activation of a token, where that is 0
_MATRIX, _FLOAT32_BITS = 2, 16


class TensorRTOps(Composed[Tensor]):
    """Implements canvasrt.ops.protocol.Ops over tensors of a network; shapes and meaning are documented there."""

    def __init__(self, graph: Graph, weights: EngineWeights) -> None:
        self.graph = graph
        self._weights = weights

    # Weights

    def weight(self, name: str, precision: Precision = "model") -> Tensor:
        single = precision == "float32" or self.graph.precision == "fp32"
        return self._weights.small(name, "fp32" if single else "bf16")

    def linear(self, x: Tensor, *names: str) -> Tensor:
        if self._weights.fuses(names):
            return self._multiplied(x, self._weights.operand(*names))
        return self.concat([self._multiplied(x, self._weights.operand(name)) for name in names], -1)

    def linear_scaled(self, normed: Tensor, scale: str, *names: str, factor: float = 1.0) -> Tensor:
        return self.linear(self.scaled(normed, scale, factor), *names)

    def gated_linear(self, normed: Tensor, scale: str, gate: str, up: str) -> Tensor:
        return self.gated_gelu(self.linear_scaled(normed, scale, gate, up))

    def linear_transposed(self, x: Tensor, name: str) -> Tensor:
        return self.graph.product(x, self._weights.given(name).matrix, transposed=False)

    def embedding(self, tokens: Tensor, name: str) -> Tensor:
        return self.graph.network.add_gather(self._weights.given(name).rows, tokens, 0).get_output(0)

    def gated_both(self, normed: Tensor, mlp: tuple[str, str, str], experts: tuple[str, str]) -> tuple[Tensor, Tensor]:
        return self.gated_linear(normed, *mlp), self._experts_gated(normed, *experts)

    def _experts_gated(self, normed: Tensor, scale: str, name: str) -> Tensor:
        experts, both, _ = self._weights.shape(name)
        product = self._multiplied(self.scaled(normed, scale), self._weights.flat_experts(name))
        halves = self.graph.reshape(product, (-1, experts, both))
        return self.graph.reshape(self.gated_gelu(halves), (-1, experts * both // 2))

    def experts_summed(self, x: Tensor, name: str) -> Tensor:
        operand, shares = self._weights.summed_experts(name)
        if shares is not None:
            experts, _, size = self._weights.shape(name)
            apart = self.graph.reshape(self.cast(x, "float32"), (-1, experts, size))
            weighted = self.multiply(apart, self.graph.literal(np.array(shares).reshape(1, -1, 1)))
            x = self.graph.reshape(self.cast(weighted, "model"), (-1, experts * size))
        return self._multiplied(x, operand)

    def experts_batched(self, x: Tensor, name: str) -> Tensor:
        return self._multiplied(x, self._weights.operand(name))

    def experts_routed(self, x: Tensor, experts: Tensor, route: Tensor, gate_up: str, down: str) -> Tensor:
        raise InputError("an engine has no sparse expert formulation: use dense or capacity")

    # Arithmetic

    def rounded(self, value: float) -> float:
        if self.graph.precision == "fp32":
            return float(np.float32(value))
        bits = to_bf16(np.array([value], np.float32)).astype(np.uint32) << _FLOAT32_BITS
        return float(bits.view(np.float32)[0])

    def add(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return self.graph.elementwise("SUM", a, b)

    def subtract(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return self.graph.elementwise("SUB", a, b)

    def multiply(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return self.graph.elementwise("PROD", a, b)

    def divide(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return self.graph.elementwise("DIV", a, b)

    def maximum(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return self.graph.elementwise("MAX", a, b)

    def minimum(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return self.graph.elementwise("MIN", a, b)

    def less_equal(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return self.graph.unary("NOT", self.graph.elementwise("GREATER", a, b))  # there is no layer for it

    def where(self, condition: Tensor, a: Tensor, b: Tensor | Number) -> Tensor:
        other = self.graph.literal(b, a.dtype) if isinstance(b, (int, float)) else b
        return self.graph.network.add_select(*self.graph.aligned(condition, a, other)).get_output(0)

    def exp(self, x: Tensor) -> Tensor:
        return self.graph.unary("EXP", x)

    def log(self, x: Tensor) -> Tensor:
        return self.graph.unary("LOG", x)

    def tanh(self, x: Tensor) -> Tensor:
        return self.graph.activation("TANH", x)

    def gated_gelu(self, x: Tensor) -> Tensor:
        half = int(x.shape[-1]) // 2
        gate, up = self.split(x, [half, half], -1)
        return self.multiply(self.graph.activation("GELU_TANH", gate), up)

    def add_scaled(self, x: Tensor, normed: Tensor, scale: str) -> Tensor:
        return self.add(x, self.scaled(normed, scale))  # rounded before the sum, as in the reference

    def rms(self, x: Tensor, eps: float) -> Tensor:
        x = self.cast(x, "float32")
        mean = self.graph.reduce("AVG", self.multiply(x, x), -1)
        return self.divide(x, self.graph.unary("SQRT", self.add(mean, eps)))

    def cast(self, x: Tensor, precision: Precision) -> Tensor:
        return self.graph.cast(x, self.graph.float32 if precision == "float32" else self.graph.model)

    def to_float(self, x: Tensor) -> Tensor:
        return self.graph.cast(x, self.graph.float32)

    def to_int(self, x: Tensor) -> Tensor:
        return self.graph.cast(x, self.graph.int32)

    # Reductions and selection

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return self.graph.reduce("SUM", x, axis)

    def max(self, x: Tensor, axis: int) -> Tensor:
        return self.graph.reduce("MAX", x, axis)

    def softmax(self, x: Tensor) -> Tensor:
        layer = self.graph.network.add_softmax(x)
        layer.axes = 1 << (len(x.shape) - 1)
        return layer.get_output(0)

    def argmax(self, x: Tensor) -> Tensor:
        return self.graph.reshape(self.top_k(x, 1)[1], (-1,))

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        layer = self.graph.network.add_topk(x, self.graph.trt.TopKOperation.MAX, k, 1 << (len(x.shape) - 1))
        return layer.get_output(0), layer.get_output(1)

    def cumulative_sum(self, x: Tensor, axis: int) -> Tensor:
        trt, which = self.graph.trt, self.graph.literal(axis % len(x.shape))
        return self.graph.network.add_cumulative(x, which, trt.CumulativeOperation.SUM, False, False).get_output(0)

    def one_hot(self, indices: Tensor, depth: int) -> Tensor:
        rank = len(indices.shape)
        column = self.graph.reshape_to(indices, *[(indices, axis) for axis in range(rank)], 1)
        numbers = self.graph.literal(np.arange(depth).reshape([1] * rank + [depth]))
        return self.to_float(self.graph.elementwise("EQUAL", column, numbers))

    def spread(self, values: Tensor, indices: Tensor, depth: int) -> Tensor:
        chosen = self.multiply(self.one_hot(indices, depth), self.graph.reshape(values, (0, int(values.shape[1]), 1)))
        return self.graph.reshape(self.sum(chosen, 1), (-1, depth))

    def row_numbers(self, x: Tensor) -> Tensor:
        layer = self.graph.network.add_fill((1,), self.graph.trt.FillOperation.LINSPACE, self.graph.float32)
        layer.set_input(0, self.graph.sizes((x, 0)))
        layer.set_input(1, self.graph.literal(0.0))
        layer.set_input(2, self.graph.literal([1.0]))
        return layer.get_output(0)

    def zeros(self, count: int) -> Tensor:
        return self.graph.literal(np.zeros(count, np.float32))

    def scatter(self, base: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        layer = self.graph.network.add_scatter(base, indices, values, self.graph.trt.ScatterMode.ELEMENT)
        layer.axis = 0
        return layer.get_output(0)

    def take_rows(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.graph.network.add_gather(x, indices, 0).get_output(0)

    def take_along_last(self, x: Tensor, indices: Tensor) -> Tensor:
        layer = self.graph.network.add_gather_v2(x, indices, self.graph.trt.GatherMode.ELEMENT)
        layer.axis = len(x.shape) - 1
        return layer.get_output(0)

    # Layout

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return self.graph.reshape(x, shape)

    def reshape_like(self, x: Tensor, like: Tensor) -> Tensor:
        return self.graph.reshape_to(x, *[(like, axis) for axis in range(len(like.shape))])

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return tuple(self.graph.slice(x, axis, start, size) for start, size in zip(starts, sizes, strict=True))

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return self.graph.concat(parts, axis)

    def split_rows(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        count = self.graph.sizes((last, 0))
        first = self.graph.elementwise("SUB", self.graph.sizes((x, 0)), count)
        return self.graph.slice(x, 0, 0, first), self.graph.slice(x, 0, first, (last, 0))

    # Attention

    def rotate(self, x: Tensor, cos: Tensor, signed_sin: Tensor, *norms: tuple[str, int]) -> Tensor:
        half = int(x.shape[-1]) // 2
        prefix = norms[0][0].rsplit(".", 2)[0]
        x = self.multiply(x, self._weights.small(f"{prefix}.qk_norm", "fp32", repeated=norms))
        first, second = self.split(x, [half, half], -1)
        rolled = self.concat([second, first], -1)
        return self.add(self.multiply(x, cos), self.multiply(rolled, signed_sin))

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, first: int = 0) -> Tensor:
        """``mask`` is boolean here: (rows, 1, tokens, keys), true where a key is visible."""
        graph, trt = self.graph, self.graph.trt
        heads, dim, groups = int(q.shape[2]), int(q.shape[3]), int(keys.shape[1])
        share = heads // groups if dim > FUSED_HEAD else 1
        queries = graph.transpose(q, (0, 2, 1, 3))
        if share > 1:
            # No fused kernel has heads this wide. Folded into the tokens, the query heads of a group share its K and V,
            # which TensorRT would otherwise copy for each of them.
            apart = graph.reshape_to(q, (q, 0), (q, 1), groups, share, dim)
            queries = graph.reshape_to(graph.transpose(apart, (0, 2, 1, 3, 4)), (q, 0), groups, -1, dim)
        layer = graph.network.add_attention_v2(
            queries, keys, values, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
        )
        layer.decomposable = dim > FUSED_HEAD
        if mask is not None:
            layer.mask = self._repeated(mask, share) if share > 1 else mask
        mixed = layer.get_output(0)
        if share > 1:
            apart = graph.reshape_to(mixed, (q, 0), groups, (q, 1), share, dim)
            return graph.reshape_to(graph.transpose(apart, (0, 2, 1, 3, 4)), (q, 0), (q, 1), heads * dim)
        return graph.reshape(graph.transpose(mixed, (0, 2, 1, 3)), (0, 0, heads * dim))

    def _repeated(self, mask: Tensor, times: int) -> Tensor:
        """(rows, 1, tokens, keys) with each token's line ``times`` times: (rows, 1, tokens * times, keys)."""
        graph = self.graph
        column = graph.reshape_to(mask, (mask, 0), 1, (mask, 2), 1, (mask, 3))
        ones = graph.literal([[[[[True]] * times]]])
        wide = graph.elementwise("AND", column, ones)
        return graph.reshape_to(wide, (mask, 0), 1, -1, (mask, 3))

    def _multiplied(self, x: Tensor, operand: Operand) -> Tensor:
        """x (..., in) through a matrix, in the model's precision; (experts, C, in) through one matrix per expert."""
        graph = self.graph
        experts = len(operand.tensor.shape) > _MATRIX
        rows = x if experts or len(x.shape) == _MATRIX else graph.reshape(x, (-1, int(x.shape[-1])))
        met, of_token = self._met(rows, operand.format, operand.input_scale)
        result = graph.product(met, operand.tensor, transposed=True)
        if of_token is not None or operand.multiplier is not None:
            result = self.cast(result, "float32")
            for factor in (of_token, operand.multiplier):
                result = result if factor is None else self.multiply(result, factor)
            result = self.cast(result, "model")
        if rows is x:
            return result
        return graph.reshape_to(result, *[(x, axis) for axis in range(len(x.shape) - 1)], int(result.shape[-1]))

    def _met(self, x: Tensor, form: Format, scale: float) -> tuple[Tensor, Tensor | None]:
        """x (..., in) rounded as the matrix that it meets wants it, and the factors of the tokens' results."""
        graph = self.graph
        network, types = graph.network, graph.trt.DataType
        if form.activations == "none":
            return x, None
        if form.activations == "block":
            layer = network.add_dynamic_quantize(x, len(x.shape) - 1, NVFP4_BLOCK, types.FP4, types.FP8)
            layer.set_input(1, graph.literal(scale))  # a constant of the build: the compiler takes no other
            blocks = network.add_dequantize(layer.get_output(1), graph.literal(scale), graph.model).get_output(0)
            return network.add_dequantize(layer.get_output(0), blocks, graph.model).get_output(0), None
        of_token = None
        if form.activations == "token":
            x = self.cast(x, "float32")
            largest = self.max(graph.unary("ABS", x), -1)
            # A token of zeros would be divided by 0, or by a number that a GPU flushes to 0.
            of_token = self.divide(self.maximum(largest, LEAST_TOKEN), E4M3_MAX)
            x, scale = self.cast(self.divide(x, of_token), "model"), 1.0
        step = graph.literal(scale)
        packed = network.add_quantize(x, step, types.FP8).get_output(0)
        return network.add_dequantize(packed, step, graph.model).get_output(0), of_token
