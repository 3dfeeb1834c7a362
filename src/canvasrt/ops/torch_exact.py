"""The torch lowering with the arithmetic of a quantized checkpoint: activations rounded as a GPU engine rounds them.

Products themselves are float32, as tensor cores accumulate. Slower than `TorchOps` on dequantized weights, and made for
judging what an engine will compute, without one.
"""

import torch

from canvasrt.errors import InputError
from canvasrt.ops.torch_formats import rounded
from canvasrt.ops.torch_ops import TorchOps
from canvasrt.ops.torch_weights import TorchWeights

Tensor = torch.Tensor


class ExactTorchOps(TorchOps):
    """Float32 only. The ``dense`` expert formulation rounds activations after the routing weights, the others before:
    the results differ within the rounding. It raises InputError for experts whose input scales differ.
    """

    def __init__(self, weights: TorchWeights) -> None:
        super().__init__(weights)
        self._folds = False  # a norm's weight belongs to the activations, which are rounded

    def linear(self, x: Tensor, *names: str) -> Tensor:
        parts = [self._product(self._met(x, name), self._weights.fused((name,))) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def gated_linear(self, normed: Tensor, scale: str, gate: str, up: str) -> Tensor:
        return self.gated_gelu(self.linear(self.scaled(normed, scale), gate, up))

    def _experts_gated(self, normed: Tensor, scale: str, name: str) -> Tensor:
        _, input_scale = self._weights.activations(name)
        if input_scale is not None and input_scale.dim():
            raise InputError(
                f"the experts of {name} have input scales of their own, and the dense formulation rounds once for all "
                "of them: use sparse or capacity"
            )
        met = self._met(self.scaled(normed, scale), name)
        return self.gated_gelu(self._product(met, self._weights.planar_experts(name)))

    def experts_summed(self, x: Tensor, name: str) -> Tensor:
        experts = len(self._weights.fused((name,)))
        met = self._met(x.view(len(x), experts, -1), name, torch.arange(experts, device=x.device))
        return self._product(met.flatten(1), self._weights.summed_experts(name))

    def experts_batched(self, x: Tensor, name: str) -> Tensor:
        return super().experts_batched(self._met(x, name, torch.arange(len(x), device=x.device).view(-1, 1)), name)

    def _gated(self, x: Tensor, both: Tensor) -> Tensor:
        """As ``experts_batched`` and ``gated_gelu`` do it: one last bit can flip a rounding behind it."""
        return self.gated_gelu(self._product(x, both))

    def _met(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor:
        """Rounded as the matrix's format says."""
        form, scale = self._weights.activations(name)
        if form.activations == "none":
            return x
        if scale is not None and scale.dim():
            assert experts is not None  # only experts have one scale each
            scale = scale[experts].unsqueeze(-1)
        return rounded(x, form, scale)
