"""Matrices of a checkpoint as TensorRT tensors, in the form that the compiler multiplies without unpacking them first.

Every quantized matrix is dequantized in the graph with the literal scale 1, and its real scales multiply the product's
result, row by row in float32. So no scale that belongs to a checkpoint is baked into a kernel, one kernel serves all
experts, and TensorRT-RTX reads the packed numbers directly: with a scale per expert inside the dequantization it would
first write a BF16 copy of all experts (docs/decisions/0007-engine-definition.md has the sizes).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from canvasrt.checkpoint import Checkpoint
from canvasrt.engine_weights import Bytes, EngineType, EngineWeight, Part, aligned, made
from canvasrt.errors import CheckpointError, InputError
from canvasrt.formats import NVFP4_BLOCK, PLAIN, Format
from canvasrt.layout import Matrix, Stored
from canvasrt.ops.tensorrt_graph import Graph, Tensor
from canvasrt.spec import ModelSpec

_MATRIX_AXES = 2
_PACKED: dict[str, EngineType] = {"fp8": "fp8", "nvfp4": "fp4", "int4": "int4"}  # by a checkpoint's format


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix ready for a product, and what the product needs around it."""

    tensor: Tensor  # (out, in) or (experts, out, in), in the model's precision
    multiplier: Tensor | None  # (1, out) or (experts, 1, out) float32, for the result
    format: Format
    input_scale: float  # of the activations, for "static" and "block"


@dataclass(frozen=True, slots=True)
class Given:
    """A matrix (out, in) that comes as two inputs, both at the same address."""

    matrix: Tensor  # for products
    rows: Tensor  # for lookups: with one input for both, the compiler copies all of it in every step


class EngineWeights:
    """Adds the weights of one model to a graph, each at most once.

    ``formats`` names the format of every tensor; ``checkpoint`` holds them. Without ``fill`` all become placeholders,
    to be filled when the plan is loaded; without ``checkpoint`` nothing can ever fill them, and the scales of
    activations are 1. ``kept`` says where the bytes of a weight stay while the network lives.
    """

    def __init__(
        self,
        graph: Graph,
        spec: ModelSpec,
        formats: Mapping[str, Format],
        checkpoint: Checkpoint | None,
        fill: bool,
        kept: Callable[[Bytes], Bytes] = aligned,
    ) -> None:
        if fill and checkpoint is None:
            raise ValueError("there is no checkpoint to fill the weights from")
        self._graph = graph
        self._shapes = spec.tensors()
        self._formats = formats
        self._checkpoint = checkpoint
        self._fill = fill
        self._place = kept
        self._kept: dict[str, Tensor] = {}
        self._given: dict[str, Given] = {}
        self._model: EngineType = "bf16" if graph.precision == "bf16" else "fp32"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def small(self, name: str, dtype: EngineType, repeated: Sequence[tuple[str, int]] = ()) -> Tensor:
        """A vector or scalar in its shape; with ``repeated``, (name, times) vectors below each other."""
        names = repeated or [(name, 1)]
        width = self._shapes[names[0][0]]
        shape = (sum(times for _, times in repeated), *width) if repeated else width
        parts = tuple(Part(self._tensor(each), times) for each, times in names)
        return self._constant(EngineWeight(f"{name}.{dtype}", dtype, shape, parts))

    def given(self, name: str) -> Given:
        """A matrix that comes as an input."""
        return self._given[name]

    def give(self, name: str, given: Given) -> EngineWeight:
        """Makes inputs of the network the place of a matrix that is never quantized, and tells what belongs there.

        For the embedding: as a constant it would lie in memory twice, since the LM head wants it transposed and the
        soft embedding does not, and once more for each shape range.
        """
        self._given[name] = given
        return EngineWeight(name, self._model, self._shapes[name], (Part(self._tensor(name)),))

    def fuses(self, names: Sequence[str]) -> bool:
        """Whether one product may serve several matrices: their formats and their activations' scales are the same."""
        return len({(self._formats[name], self._input_scale(name)) for name in names}) == 1

    def operand(self, *names: str) -> Operand:
        """The matrices (out_i, in) below each other, or the experts (experts, out, in) of one name."""
        if names[0] in self._given:
            return Operand(self._given[names[0]].matrix, None, PLAIN, 1.0)
        shape = self._shapes[names[0]]
        if len(names) > 1:
            shape = (sum(self._shapes[name][0] for name in names), shape[1])
        return self._operand("+".join([names[0], *(name.rsplit(".", 2)[1] for name in names[1:])]), names, shape)

    def flat_experts(self, name: str) -> Operand:
        """(experts, out, in) as one matrix (experts * out, in)."""
        experts, out, size = self._shapes[name]
        return self._operand(name, (name,), (experts * out, size))

    def summed_experts(self, name: str) -> tuple[Operand, list[float] | None]:
        """(experts, out, in) as one matrix (out, experts * in), and what each expert's input is to be multiplied by.

        Raises InputError for a scale per row: experts lie along the inner axis, where a result can't tell them apart.
        """
        experts, out, size = self._shapes[name]
        operand = self._operand(name, (name,), (out, experts * size), columns=experts)
        if self._formats[name].weights not in ("fp8", "nvfp4"):
            return operand, None
        scales = self._expert_scales(name, experts)
        largest = max(scales)
        multiplier = self._graph.literal([[largest]], self._graph.float32)
        return Operand(operand.tensor, multiplier, operand.format, operand.input_scale), [s / largest for s in scales]

    def _operand(self, key: str, names: Sequence[str], shape: tuple[int, ...], columns: int = 0) -> Operand:
        form = self._formats[names[0]]
        matrices = [matrix for name in names for matrix in self._matrices(name)]
        weights = tuple(Part(matrix.weight.name) for matrix in matrices)
        graph = self._graph
        scale = self._input_scale(names[0])
        if form.weights == "plain":
            tensor = self._constant(EngineWeight(key, self._model, shape, weights, columns))
            return Operand(tensor, None, form, scale)
        packed = _PACKED[form.weights]
        tensor = self._constant(EngineWeight(key, packed, shape, weights, columns))
        one = graph.literal(1.0)
        if form.weights == "fp8":
            numbers = graph.network.add_dequantize(tensor, one, graph.model).get_output(0)
        else:
            blocks = (*shape[:-1], shape[-1] // (NVFP4_BLOCK if form.weights == "nvfp4" else form.block))
            parts = tuple(Part(matrix.scale.name) for matrix in matrices if matrix.scale is not None)
            if form.weights == "nvfp4":
                stored = self._constant(EngineWeight(f"{key}.scale", "fp8", blocks, parts, columns))
                scales = graph.network.add_dequantize(stored, one, graph.model).get_output(0)
            else:
                scales = self._constant(EngineWeight(f"{key}.scale", self._model, blocks, parts, columns))
            numbers = graph.network.add_dequantize(tensor, scales, graph.model).get_output(0)
        multiplier = None if columns or form.weights == "int4" else self._multiplier(key, names, shape)
        return Operand(numbers, multiplier, form, scale)

    def _multiplier(self, key: str, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        """Scale of each row of the result: of its matrix, or its own."""
        parts = []
        for name in names:
            matrices = self._matrices(name)
            rows = int(np.prod(self._shapes[name][:-1])) // max(len(matrices), 1)
            for matrix in matrices:
                info = matrix.scale if self._formats[name].weights == "fp8" else matrix.global_scale
                assert info is not None  # layout.py saw it
                parts.append(Part(info.name, rows if np.prod(info.shape) == 1 else 1))
        wide = (shape[0], 1, shape[1]) if len(shape) > _MATRIX_AXES else (1, shape[0])
        return self._constant(EngineWeight(f"{key}.multiplier", "fp32", wide, tuple(parts)))

    def _expert_scales(self, name: str, experts: int) -> list[float]:
        if self._checkpoint is None:
            return [1.0] * experts
        scales = []
        for matrix in self._matrices(name):
            info = matrix.scale if self._formats[name].weights == "fp8" else matrix.global_scale
            assert info is not None  # layout.py saw it
            if np.prod(info.shape) != 1:
                raise InputError(
                    f"{info.name} has a scale for each row, which the dense formulation can't apply: build with the "
                    "capacity formulation (moe in the GPU profile or the build plan)"
                )
            scales.append(self._number(info.name))
        return scales

    def _input_scale(self, name: str) -> float:
        """Of the activations that meet a tensor; 1 where they have none or nothing is known.

        The experts of a layer read the same tokens: one scale for all of them, else CheckpointError.
        """
        infos = [matrix.input_scale for matrix in self._matrices(name)]
        numbers = {self._number(info.name) for info in infos if info is not None}
        if not numbers:
            return 1.0
        if len(infos) > 1 and len(numbers) > 1:
            halves = np.array([self._number(info.name) for info in infos if info is not None])
            per_expert = halves.reshape(self._shapes[name][0], -1).max(1)  # gate and up read the same input
            if len(set(per_expert.tolist())) > 1:
                raise CheckpointError(
                    f"the experts of {name} have input scales of their own ({per_expert.min():g} to "
                    f"{per_expert.max():g}), and an engine rounds the tokens once for all experts. Quantize with "
                    "canvasrt quantize, which calibrates one scale per layer."
                )
            return float(per_expert[0])
        return numbers.pop()

    def _number(self, tensor: str) -> float:
        assert self._checkpoint is not None  # its caller has a stored tensor
        data = made(self._checkpoint, EngineWeight(tensor, "fp32", (1,), (Part(tensor),)))
        number = float(data.view(np.float32)[0])
        if not number > 0:
            raise CheckpointError(
                f"{tensor} is {number:g}, and a scale must be above 0. The calibration saw no data there: quantize "
                "again with canvasrt quantize."
            )
        return number

    def _matrices(self, name: str) -> tuple[Matrix, ...]:
        return self._stored(name).matrices if self._checkpoint is not None else ()

    def _stored(self, name: str) -> Stored:
        assert self._checkpoint is not None
        return self._checkpoint.stored(name)

    def _tensor(self, name: str) -> str:
        """The stored tensor of a name that is one tensor; its own name where there is no checkpoint."""
        assert self._formats.get(name, PLAIN).weights == "plain"
        return self._stored(name).matrices[0].weight.name if self._checkpoint is not None else name

    def _constant(self, weight: EngineWeight) -> Tensor:
        if weight.name not in self._kept:
            data: Any = None
            if self._fill:
                assert self._checkpoint is not None  # checked when this was made
                data = self._place(made(self._checkpoint, weight))
            self._kept[weight.name] = self._graph.constant(weight, data)
        return self._kept[weight.name]
