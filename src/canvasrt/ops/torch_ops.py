"""The torch lowering: every primitive computes at once, on a CPU or a CUDA device."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.nn import functional

from canvasrt.ops.composed import Composed
from canvasrt.ops.protocol import Number, Precision
from canvasrt.ops.torch_attention import causal_attention
from canvasrt.ops.torch_products import ROWS, Products
from canvasrt.ops.torch_weights import TorchWeights

Tensor = torch.Tensor

SMALL_SCORES = 1 << 16  # attention scores up to which two products beat the fused attention kernel


class TorchOps(Composed[torch.Tensor]):
    """Implements canvasrt.ops.protocol.Ops over torch tensors; shapes and meaning are documented there.

    In float32 on a CPU a row's result has the same bits whatever other rows a call has.
    """

    def __init__(self, weights: TorchWeights) -> None:
        self._weights = weights
        self._dtype = weights.dtype
        self._head_weights: dict[tuple[tuple[str, int], ...], Tensor] = {}
        self._rounded: dict[float, float] = {}
        self._epsilons: dict[float, Tensor] = {}
        self._folds = weights.dtype == torch.float32
        onednn = self._folds and weights.device.type == "cpu" and torch.backends.mkldnn.enabled
        self._products = Products() if onednn else None
        self.row_multiple = ROWS if onednn else 1  # of the tokens in a call, for speed

    def weight(self, name: str, precision: Precision = "model") -> Tensor:
        return self._weights.small(name, self._named(precision))

    def linear(self, x: Tensor, *names: str) -> Tensor:
        return self._product(x, self._weights.fused(names))

    def linear_scaled(self, normed: Tensor, scale: str, *names: str, factor: float = 1.0) -> Tensor:
        if self._folds:
            return self._product(normed, self._weights.scaled(names, scale, factor))
        return self.linear(self.scaled(normed, scale, factor), *names)

    def gated_linear(self, normed: Tensor, scale: str, gate: str, up: str) -> Tensor:
        if self._folds:
            return self._gated(normed, self._weights.scaled((gate, up), scale))
        return self._gated(self.scaled(normed, scale), self._weights.fused((gate, up)))

    def linear_transposed(self, x: Tensor, name: str) -> Tensor:
        return self._product(x, self._weights.transposed(name))

    def embedding(self, tokens: Tensor, name: str) -> Tensor:
        return functional.embedding(tokens, self._weights.fused((name,)))

    def gated_both(self, normed: Tensor, mlp: tuple[str, str, str], experts: tuple[str, str]) -> tuple[Tensor, Tensor]:
        if not self._folds:
            return self.gated_linear(normed, *mlp), self._experts_gated(normed, *experts)
        matrix, size = self._weights.gates(mlp, experts)
        both = self._gated(normed, matrix)
        return both.narrow(-1, 0, size), both.narrow(-1, size, both.shape[-1] - size)

    def _experts_gated(self, normed: Tensor, scale: str, name: str) -> Tensor:
        return self._gated(self.scaled(normed, scale), self._weights.planar_experts(name))

    def experts_summed(self, x: Tensor, name: str) -> Tensor:
        return self._product(x, self._weights.summed_experts(name))

    def experts_batched(self, x: Tensor, name: str) -> Tensor:
        if self._products is None:
            return torch.bmm(x, self._weights.fused((name,)).transpose(1, 2))
        matrices = self._weights.each_expert(name)
        return torch.stack([self._products.linear(rows, matrix) for rows, matrix in zip(x, matrices, strict=True)])

    def experts_routed(self, x: Tensor, experts: Tensor, route: Tensor, gate_up: str, down: str) -> Tensor:
        rows, chosen = experts.shape
        chosen_experts, order = torch.sort(experts.flatten(), stable=True)
        numbers = torch.arange(len(self._weights.fused((gate_up,))), device=x.device)
        ends = torch.searchsorted(chosen_experts, numbers, right=True, out_int32=True)
        met = self._met(x.index_select(0, order // chosen), gate_up, chosen_experts)
        if self._products is None:
            hidden = self.gated_gelu(self._grouped(met, gate_up, ends))
            out = self._grouped(self._met(hidden, down, chosen_experts), down, ends)
        else:
            pieces = [0, *ends.tolist()]
            hidden = self._expert_by_expert(self._gated, met, gate_up, pieces)
            out = self._expert_by_expert(self._products.linear, self._met(hidden, down, chosen_experts), down, pieces)
        back = torch.empty_like(out).index_copy_(0, order, out).view(rows, chosen, -1)
        return back.mul_(route.unsqueeze(-1)).sum(1)

    def _grouped(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        return functional.grouped_mm(x, self._weights.fused((name,)).transpose(1, 2), offs=ends)

    def _expert_by_expert(
        self, multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, name: str, ends: list[int]
    ) -> Tensor:
        parts = zip(self._weights.each_expert(name), pairwise(ends), strict=True)
        return torch.cat([multiply(x[first:last], matrix) for matrix, (first, last) in parts if last > first])

    def rounded(self, value: float) -> float:
        if value not in self._rounded:
            self._rounded[value] = torch.tensor(value, dtype=self._dtype).item()
        return self._rounded[value]

    def add(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return a + b

    def subtract(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return a - b

    def multiply(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return a * b

    def divide(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return a / b

    def maximum(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return torch.maximum(a, self._like(b, a))

    def minimum(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return torch.minimum(a, self._like(b, a))

    def less_equal(self, a: Tensor, b: Tensor | Number) -> Tensor:
        return a <= b

    def where(self, condition: Tensor, a: Tensor, b: Tensor | Number) -> Tensor:
        return torch.where(condition, a, self._like(b, a))

    def exp(self, x: Tensor) -> Tensor:
        return x.exp()

    def log(self, x: Tensor) -> Tensor:
        return x.log()

    def tanh(self, x: Tensor) -> Tensor:
        return x.tanh()

    def gated_gelu(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh").mul_(up)

    def add_scaled(self, x: Tensor, normed: Tensor, scale: str) -> Tensor:
        weight = self._weights.small(scale, torch.float32)
        if self._dtype == torch.float32:
            return torch.addcmul(x, normed, weight)
        return x + (normed * weight).to(self._dtype)  # rounded before the sum, as in the reference

    def rms(self, x: Tensor, eps: float) -> Tensor:
        if x.dtype is not torch.float32:
            x = x.float()
        epsilon = self._epsilons.get(eps)
        if epsilon is None:
            epsilon = self._epsilons[eps] = torch.full((1,), eps, device=x.device)
        # The length of the vector, squared again: two thirds of the time of a mean of squares.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()

    def cast(self, x: Tensor, precision: Precision) -> Tensor:
        wanted = torch.float32 if precision == "float32" else self._dtype
        return x if x.dtype is wanted else x.to(wanted)  # asked 100 times a step: to() that does nothing takes 0.7 us

    def to_float(self, x: Tensor) -> Tensor:
        return x.float()

    def to_int(self, x: Tensor) -> Tensor:
        return x.long()

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis, keepdim=True)

    def max(self, x: Tensor, axis: int) -> Tensor:
        return x.amax(axis, keepdim=True)

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def argmax(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = x.topk(k, dim=-1)
        return values, indices

    def cumulative_sum(self, x: Tensor, axis: int) -> Tensor:
        return x.cumsum(axis)

    def one_hot(self, indices: Tensor, depth: int) -> Tensor:
        return (indices.unsqueeze(-1) == torch.arange(depth, device=indices.device)).float()

    def spread(self, values: Tensor, indices: Tensor, depth: int) -> Tensor:
        return values.new_zeros(values.shape[0], depth).scatter_(1, indices, values)

    def row_numbers(self, x: Tensor) -> Tensor:
        return torch.arange(len(x), device=x.device, dtype=torch.float32)

    def zeros(self, count: int) -> Tensor:
        return torch.zeros(count, device=self._weights.device)

    def scatter(self, base: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        return base.scatter(0, indices, values)

    def take_rows(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.take(indices) if x.dim() == 1 else x.index_select(0, indices)

    def take_along_last(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.gather(-1, indices)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        if 0 in shape:
            shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
        return x.reshape(shape)

    def reshape_like(self, x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(like.shape)

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        parts, start = [], 0
        for size in sizes:  # narrow is one call into C++, split is Python around one
            parts.append(x.narrow(axis, start, size))
            start += size
        return tuple(parts)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(parts), axis)

    def split_rows(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        first = len(x) - len(last)
        return x[:first], x[first:]

    def rotate(self, x: Tensor, cos: Tensor, signed_sin: Tensor, *norms: tuple[str, int]) -> Tensor:
        half = x.shape[-1] // 2
        x = x * self._head_norms(norms)
        return torch.addcmul(x * cos, x.roll(half, -1), signed_sin)

    def _head_norms(self, norms: tuple[tuple[str, int], ...]) -> Tensor:
        """(heads, dim): each vector for so many heads."""
        weights = self._head_weights.get(norms)
        if weights is None:
            rows = [self._weights.small(name, torch.float32).expand(heads, -1) for name, heads in norms]
            weights = self._head_weights[norms] = torch.cat(rows)
        return weights

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, first: int = 0) -> Tensor:
        if mask is not None and self._products is not None:
            return causal_attention(q, keys, values, mask, first, self._products)
        # In bfloat16 the product would round the scores, which the fused kernel keeps in float32.
        small = self._folds and mask is None and q.shape[1] * q.shape[2] * keys.shape[2] <= SMALL_SCORES
        if small:
            return self._small_attention(q, keys[0], values[0])
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, scale=1.0, enable_gqa=q.shape[2] != keys.shape[1]
        )
        return mixed.transpose(1, 2).flatten(2)

    @staticmethod
    def _small_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One row, keys and values (kv_heads, keys, dim): the fused kernel is made for more work."""
        _, tokens, heads, dim = q.shape
        groups = keys.shape[0]
        grouped = q.view(tokens, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)
        scores = torch.bmm(grouped, keys.transpose(1, 2))
        mixed = torch.bmm(scores.softmax(-1), values)
        return mixed.view(groups, -1, tokens, dim).permute(2, 0, 1, 3).reshape(1, tokens, heads * dim)

    def _met(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor:
        """x (..., in) as it meets the matrix: here as it is. ``experts`` (...) names the expert that each row meets."""
        return x

    def _gated(self, x: Tensor, both: Tensor) -> Tensor:
        """The rows of ``both`` are those of the gate, then those of the up matrix."""
        if self._products is None:
            return self.gated_gelu(functional.linear(x, both))
        return self._products.gated(x, both)

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return functional.linear(x, matrix) if self._products is None else self._products.linear(x, matrix)

    def _named(self, precision: Precision) -> torch.dtype:
        return torch.float32 if precision == "float32" else self._dtype

    @staticmethod
    def _like(value: Tensor | Number, other: Tensor) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=other.dtype, device=other.device)
