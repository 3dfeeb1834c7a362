"""The torch lowering: every primitive computes at once, on a CPU or a CUDA device."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from canvasrt.ops.protocol import Number, Precision
from canvasrt.ops.torch_weights import TorchWeights

Tensor = torch.Tensor

# Multiplications from which oneDNN's float32 product is the faster one on a CPU: twice the speed, but 15 us to start.
ONEDNN_PRODUCTS = 3_000_000


class TorchOps:
    """Implements canvasrt.ops.protocol.Ops over torch tensors; shapes and meaning are documented there."""

    def __init__(self, weights: TorchWeights) -> None:
        self._weights = weights
        self._dtype = weights.dtype
        self._head_weights: dict[tuple[tuple[str, int], ...], Tensor] = {}
        self._averages: dict[int, Tensor] = {}
        self._epsilons: dict[float, Tensor] = {}
        # torch offers oneDNN's float32 product under a private name only, the one its compiler uses; functional.linear
        # goes to MKL, which is slow on CPUs that are not Intel's. A test compares the two.
        self._onednn = weights.dtype == torch.float32 and weights.device.type == "cpu" and torch.backends.mkldnn.enabled

    def weight(self, name: str, precision: Precision = "model") -> Tensor:
        return self._weights.small(name, self._named(precision))

    def head_weights(self, *parts: tuple[str, int]) -> Tensor:
        if parts not in self._head_weights:
            rows = [self._weights.small(name, torch.float32).expand(heads, -1) for name, heads in parts]
            self._head_weights[parts] = torch.cat(rows)
        return self._head_weights[parts]

    def linear(self, x: Tensor, *names: str) -> Tensor:
        return self._product(x, self._weights.fused(names))

    def linear_scaled(self, normed: Tensor, scale: str, *names: str, factor: float = 1.0) -> Tensor:
        if self._dtype == torch.float32:
            return self._product(normed, self._weights.scaled(names, scale, factor))
        scaled = normed * self._weights.small(scale, torch.float32)
        return self.linear((scaled if factor == 1.0 else scaled * factor).to(self._dtype), *names)

    def linear_transposed(self, x: Tensor, name: str) -> Tensor:
        return x @ self._weights.fused((name,))

    def embedding(self, tokens: Tensor, name: str) -> Tensor:
        return functional.embedding(tokens, self._weights.fused((name,)))

    def experts_merged(self, x: Tensor, name: str) -> Tensor:
        return self._product(x, self._weights.fused((name,)).flatten(0, 1))

    def experts_summed(self, x: Tensor, name: str) -> Tensor:
        return self._product(x, self._weights.summed_experts(name))

    def experts_batched(self, x: Tensor, name: str) -> Tensor:
        return torch.bmm(x, self._weights.fused((name,)).transpose(1, 2))

    def experts_routed(self, x: Tensor, experts: Tensor, route: Tensor, gate_up: str, down: str) -> Tensor:
        rows, chosen = experts.shape
        chosen_experts, order = torch.sort(experts.flatten(), stable=True)
        matrices = self._weights.fused((gate_up,))
        ends = torch.searchsorted(
            chosen_experts, torch.arange(len(matrices), device=x.device), right=True, out_int32=True
        )
        hidden = functional.grouped_mm(x.index_select(0, order // chosen), matrices.transpose(1, 2), offs=ends)
        out = functional.grouped_mm(self.gated_gelu(hidden), self._weights.fused((down,)).transpose(1, 2), offs=ends)
        back = torch.empty_like(out).index_copy_(0, order, out).view(rows, chosen, -1)
        return torch.bmm(route.unsqueeze(1), back).squeeze(1)

    def rounded(self, value: float) -> float:
        return torch.tensor(value, dtype=self._dtype).item()

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
        x = x.float()
        size = x.shape[-1]
        if size not in self._averages:
            self._averages[size] = torch.full((size, 1), 1 / size, device=x.device)
        if eps not in self._epsilons:
            self._epsilons[eps] = torch.full((1, 1), eps, device=x.device)
        # The mean as a product with 1/n that adds eps in the same kernel: half the time of mean() and a sum.
        mean = torch.addmm(self._epsilons[eps], (x * x).view(-1, size), self._averages[size])
        return x * mean.rsqrt_().view(*x.shape[:-1], 1)

    def cast(self, x: Tensor, precision: Precision) -> Tensor:
        return x.to(self._named(precision))

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
        return values.new_zeros(len(values), depth).scatter_(1, indices, values)

    def row_numbers(self, x: Tensor) -> Tensor:
        return torch.arange(len(x), device=x.device, dtype=torch.float32)

    def take_rows(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.index_select(0, indices)

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

    def pad_last(self, x: Tensor, count: int) -> Tensor:
        return functional.pad(x, (0, count))

    def rotate(self, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, scale=1.0, enable_gqa=q.shape[2] != keys.shape[1]
        )
        return mixed.transpose(1, 2).flatten(2)

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        if self._onednn and x.numel() * matrix.shape[0] >= ONEDNN_PRODUCTS:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
            return result
        return functional.linear(x, matrix)

    def _named(self, precision: Precision) -> torch.dtype:
        return torch.float32 if precision == "float32" else self._dtype

    @staticmethod
    def _like(value: Tensor | Number, other: Tensor) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=other.dtype, device=other.device)
