"""Checkpoint tensors as torch tensors on one device, loaded when first asked for and kept in the form that the
lowering uses.

Knows nothing of the network: a fused matrix is whatever group of names the network asks for.
"""

from collections.abc import Hashable

import torch

from canvasrt.checkpoint import Checkpoint
from canvasrt.formats import Format
from canvasrt.ops.torch_formats import dequantized, input_scale


class TorchWeights:
    """Matrices in the forms that are asked for: fused, scaled or permuted; one form each, but for small experts.

    Quantized ones are dequantized once, when first asked for. Raises CheckpointError when a tensor holds NaN or
    infinity, naming it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._kept: dict[Hashable, torch.Tensor] = {}  # asked 70 times a step: keys must be cheap
        self._gates: dict[Hashable, tuple[torch.Tensor, int]] = {}
        self._experts: dict[str, tuple[torch.Tensor, ...]] = {}
        self._scales: dict[str, torch.Tensor | None] = {}

    def small(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A vector or scalar, in either precision."""
        key = (name, dtype)
        if key not in self._kept:
            self._kept[key] = self._load(name, dtype)
        return self._kept[key]

    def fused(self, names: tuple[str, ...]) -> torch.Tensor:
        """The matrices (out_i, in) of ``names`` below each other: (sum of out_i, in)."""
        if names not in self._kept:
            parts = [self._load(name, self.dtype) for name in names]
            self._kept[names] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._kept[names]

    def scaled(self, names: tuple[str, ...], scale: str, factor: float = 1.0) -> torch.Tensor:
        """``fused`` with every input column times ``scale`` (in,) and ``factor``."""
        key = (names, scale, factor)
        if key not in self._kept:
            column = self._load(scale, torch.float32) * factor
            self._kept[key] = torch.cat([self._load(name, torch.float32) * column for name in names]).to(self.dtype)
        return self._kept[key]

    def planar_experts(self, name: str) -> torch.Tensor:
        """(experts, 2 out, in) as one matrix (2 * experts * out, in): all gates, then all ups."""
        key = (name, "planar")
        if key not in self._kept:
            self._kept[key] = self._planes(name).flatten(0, 1)
        return self._kept[key]

    def gates(self, mlp: tuple[str, str, str], experts: tuple[str, str]) -> tuple[torch.Tensor, int]:
        """(scale, gate, up) of an MLP and (scale, matrices) of its experts as one matrix, and the MLP's size.

        Its rows are the MLP's gate, the experts' gates, then the MLP's up, the experts' ups; scaled as ``scaled``.
        """
        key = (mlp, experts)
        if key not in self._gates:
            scale, gate, up = mlp
            column, columns = (self._load(each, torch.float32) for each in (scale, experts[0]))
            gates, ups = self._planes(experts[1])
            parts = [
                self._load(gate, torch.float32) * column,
                gates * columns,
                self._load(up, torch.float32) * column,
                ups * columns,
            ]
            self._gates[key] = torch.cat(parts).to(self.dtype), len(parts[0])
        return self._gates[key]

    def _planes(self, name: str) -> torch.Tensor:
        """(experts, 2 out, in) as (2, experts * out, in)."""
        experts = self._load(name, self.dtype)
        count, both, size = experts.shape
        return experts.view(count, 2, both // 2, size).transpose(0, 1).reshape(2, -1, size)

    def transposed(self, name: str) -> torch.Tensor:
        """The matrix (out, in) as a view (in, out), always the same one."""
        key = (name, "transposed")
        if key not in self._kept:
            self._kept[key] = self.fused((name,)).t()
        return self._kept[key]

    def each_expert(self, name: str) -> tuple[torch.Tensor, ...]:
        """The matrices (experts, out, in) as views (out, in), always the same ones."""
        if name not in self._experts:
            self._experts[name] = self.fused((name,)).unbind()
        return self._experts[name]

    def activations(self, name: str) -> tuple[Format, torch.Tensor | None]:
        """The format of a matrix, and what scales the activations that meet it, () or (experts,) or None."""
        if name not in self._scales:
            scale = input_scale(self._checkpoint, name)
            self._scales[name] = None if scale is None else scale.to(self.device)
        return self._checkpoint.stored(name).format, self._scales[name]

    def summed_experts(self, name: str) -> torch.Tensor:
        """(experts, out, in) as one matrix (out, experts * in), whose product sums over the experts."""
        key = (name, "summed")
        if key not in self._kept:
            experts = self._load(name, self.dtype)
            self._kept[key] = experts.permute(1, 0, 2).reshape(experts.shape[1], -1).contiguous()
        return self._kept[key]

    def _load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return dequantized(self._checkpoint, name).to(self.device, dtype)
