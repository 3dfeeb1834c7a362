"""The torch lowering with the arithmetic of a quantized checkpoint: activations rounded as a GPU engine rounds them.

Products themselves are float32, as tensor cores accumulate. Slower than `TorchOps` on dequantized weights, and made for
judging what an engine will compute, without one.
"""

import torch
from torch.nn import functional

from canvasrt.errors import InputError
from canvasrt.ops.torch_formats import rounded
from canvasrt.ops.torch_ops import TorchOps
from canvasrt.ops.torch_weights import TorchWeights

Tensor = torch.Tensor


class ExactTorchOps(TorchOps):
    """Float32 only. The ``dense`` expert formulation weights activations before the second product, where rounding
    must come first: it raises InputError for quantized experts.
    """

    def __init__(self, weights: TorchWeights) -> None:
        super().__init__(weights)
        self._folds = False  # a norm's weight belongs to the activations, which are rounded

    def linear(self, x: Tensor, *names: str) -> Tensor:
        parts = [self._product(self._met(x, name), self._weights.fused((name,))) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def gated_linear(self, normed: Tensor, scale: str, gate: str, up: str) -> Tensor:
        return self.gated_gelu(self.linear(self._scaled(normed, scale), gate, up))

    def experts_gated(self, normed: Tensor, scale: str, name: str) -> Tensor:
        if self._weights.activations(name)[0].activations != "none":
            raise InputError(
                "the dense formulation can't round the activations of quantized experts: use sparse or capacity"
            )
        return super().experts_gated(normed, scale, name)

    def experts_batched(self, x: Tensor, name: str) -> Tensor:
        return super().experts_batched(self._met(x, name, torch.arange(len(x), device=x.device).view(-1, 1)), name)

    def experts_routed(self, x: Tensor, experts: Tensor, route: Tensor, gate_up: str, down: str) -> Tensor:
        tokens, chosen = experts.shape
        expert_of_row, order = torch.sort(experts.flatten(), stable=True)
        matrices = self._weights.fused((gate_up,))
        ends = torch.searchsorted(
            expert_of_row, torch.arange(len(matrices), device=x.device), right=True, out_int32=True
        )
        met = self._met(x.index_select(0, order // chosen), gate_up, expert_of_row)
        hidden = self.gated_gelu(functional.grouped_mm(met, matrices.transpose(1, 2), offs=ends))
        met = self._met(hidden, down, expert_of_row)
        out = functional.grouped_mm(met, self._weights.fused((down,)).transpose(1, 2), offs=ends)
        back = torch.empty_like(out).index_copy_(0, order, out).view(tokens, chosen, -1)
        return torch.bmm(route.unsqueeze(1), back).squeeze(1)

    def _met(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor:
        """x (..., in) as it meets the matrix; ``experts`` (...) names the expert that each row meets."""
        form, scale = self._weights.activations(name)
        if form.activations == "none":
            return x
        if scale is not None and scale.dim():
            assert experts is not None  # only experts have one scale each
            scale = scale[experts].unsqueeze(-1)
        return rounded(x, form, scale)
