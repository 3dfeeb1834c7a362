"""The torch lowering for float32 on a CPU: what lies between two products is one kernel, not a dozen calls."""

import torch

from canvasrt.ops import cpu_kernels
from canvasrt.ops.torch_ops import TorchOps
from canvasrt.ops.torch_weights import TorchWeights

Tensor = torch.Tensor


class FusedTorchOps(TorchOps):
    """Implements canvasrt.ops.protocol.Ops over float32 tensors on a CPU."""

    def __init__(self, weights: TorchWeights) -> None:
        super().__init__(weights)
        self._places: dict[str, int] = {}

    def rms(self, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        cpu_kernels.rms(x.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
        return out

    def add_normed(self, x: Tensor, y: Tensor, scale: str, eps: float) -> tuple[Tensor, Tensor]:
        x, y = x.contiguous(), y.contiguous()
        out, normed = torch.empty_like(x), torch.empty_like(x)
        size = x.shape[-1]
        cpu_kernels.add_normed(
            x.data_ptr(),
            y.data_ptr(),
            self._at(scale),
            out.data_ptr(),
            normed.data_ptr(),
            x.numel() // size,
            size,
            eps,
        )
        return out, normed

    def add_branches(
        self, x: Tensor, branches: tuple[Tensor, Tensor], scales: tuple[str, str, str], factor: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, a, b, factor = x.contiguous(), branches[0].contiguous(), branches[1].contiguous(), factor.contiguous()
        out, normed = torch.empty_like(x), torch.empty_like(x)
        size = x.shape[-1]
        cpu_kernels.add_branches(
            x.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            self._at(scales[0]),
            self._at(scales[1]),
            self._at(scales[2]),
            factor.data_ptr(),
            out.data_ptr(),
            normed.data_ptr(),
            x.numel() // size,
            size,
            int(factor.numel() > 1),
            eps,
        )
        return out, normed

    def choose_experts(self, gated: Tensor, scores: Tensor, scale: str, experts: int, k: int) -> Tensor:
        scores = scores.contiguous()
        if gated.stride(1) != 1:
            gated = gated.contiguous()
        out = torch.empty(gated.shape)
        rows, size = gated.shape
        cpu_kernels.choose_experts(
            scores.data_ptr(),
            self._at(scale),
            gated.data_ptr(),
            out.data_ptr(),
            rows,
            experts,
            k,
            size // experts,
            gated.stride(0),
        )
        return out

    def draw(
        self,
        raw: Tensor,
        softcap: float,
        temperature: Tensor,
        uniforms: Tensor,
        limits: tuple[Tensor, Tensor] | None,
        halvings: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        raw = raw.contiguous()
        capped = torch.tanh(raw / softcap).mul_(softcap)
        temperature, uniforms = temperature.contiguous(), uniforms.contiguous()
        rows, size = raw.shape
        argmax, sampled = torch.empty(2, rows, dtype=torch.int32)
        entropy, shares = torch.empty(rows), torch.empty(rows, size)
        top_k, top_p = (uniforms[:0],) * 2 if limits is None else (limit.contiguous() for limit in limits)
        cpu_kernels.draw(
            raw.data_ptr(),
            capped.data_ptr(),
            temperature.data_ptr(),
            uniforms.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            argmax.data_ptr(),
            sampled.data_ptr(),
            entropy.data_ptr(),
            shares.data_ptr(),
            rows,
            len(top_k),
            size,
            halvings,
        )
        return argmax, sampled, entropy, shares

    def heads(
        self,
        projected: Tensor,
        dim: int,
        queries: tuple[str, int],
        keys: tuple[str, int],
        value_is_key: bool,
        eps: float,
        cos: Tensor,
        signed_sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        projected, cos, signed_sin = projected.contiguous(), cos.contiguous(), signed_sin.contiguous()
        rows, tokens, _ = projected.shape
        # Head by head, as the products of attention read them.
        q = torch.empty(queries[1], rows, tokens, dim)
        k, v = torch.empty(rows, tokens, keys[1], dim), torch.empty(rows, tokens, keys[1], dim)
        cpu_kernels.heads(
            projected.data_ptr(),
            self._head_norms((queries, keys)).data_ptr(),
            cos.data_ptr(),
            signed_sin.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            rows * tokens,
            queries[1],
            keys[1],
            dim,
            value_is_key,
            eps,
        )
        return q.permute(1, 2, 0, 3), k, v

    def _at(self, name: str) -> int:
        """The address of a vector, which the weights keep."""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = self._weights.small(name, torch.float32).data_ptr()
        return place
