"""The torch lowering: every primitive computes at once, on a CPU or a CUDA device."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from canvasrt.ops.protocol import Number, Precision
from canvasrt.ops.torch_weights import TorchWeights

Tensor = torch.Tensor

# Rows per expert from which a loop over the experts with oneDNN's product beats one grouped product on a CPU.
LOOP_ROWS = 32


class TorchOps:
    """Implements canvasrt.ops.protocol.Ops over torch tensors; shapes and meaning are documented there."""

    def __init__(self, weights: TorchWeights) -> None:
        self._weights = weights
        self._dtype = weights.dtype
        # oneDNN's float32 product is up to twice as fast as the MKL one behind functional.linear on CPUs that are not
        # Intel's, and torch offers it under this name only (the compiler's back end uses it). Same sums, checked by a
        # test.
        self._onednn = weights.dtype == torch.float32 and weights.device.type == "cpu" and torch.backends.mkldnn.enabled

    def weight(self, name: str, precision: Precision = "model") -> Tensor:
        return self._weights.small(name, self._named(precision))

    def linear(self, x: Tensor, *names: str) -> Tensor:
        return self._product(x, self._weights.fused(names))

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
        flat = experts.flatten()
        order = torch.argsort(flat, stable=True)
        matrices = self._weights.fused((gate_up,))
        ends = torch.searchsorted(flat[order], torch.arange(len(matrices), device=x.device), right=True, out_int32=True)
        grouped = x[order // chosen]
        hidden = self._grouped_product(grouped, matrices, ends)
        out = self._grouped_product(self.gated_gelu(hidden), self._weights.fused((down,)), ends)
        back = torch.empty_like(out)
        back[order] = out
        return (back.view(rows, chosen, -1) * route.unsqueeze(-1)).sum(1)

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
        return functional.gelu(gate, approximate="tanh") * up

    def rms(self, x: Tensor, eps: float) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

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

    def row_numbers(self, x: Tensor) -> Tensor:
        return torch.arange(len(x), device=x.device, dtype=torch.float32)

    def take_rows(self, x: Tensor, indices: Tensor) -> Tensor:
        return x[indices]

    def take_along_last(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.gather(-1, indices)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])

    def reshape_like(self, x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(like.shape)

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        return torch.split(x, list(sizes), axis)

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
        if self._onednn:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
            return result
        return functional.linear(x, matrix)

    def _grouped_product(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        """x (rows, in), sorted by expert; expert e has the rows up to ends[e] and the matrix matrices[e] (out, in)."""
        if self._onednn and len(x) >= LOOP_ROWS * len(matrices):
            bounds = [0, *ends.tolist()]
            parts = [self._product(x[a:b], matrix) for a, b, matrix in zip(bounds, bounds[1:], matrices, strict=False)]
            return torch.cat(parts)
        return functional.grouped_mm(x, matrices.transpose(1, 2), offs=ends)

    def _named(self, precision: Precision) -> torch.dtype:
        return torch.float32 if precision == "float32" else self._dtype

    @staticmethod
    def _like(value: Tensor | Number, other: Tensor) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=other.dtype, device=other.device)
