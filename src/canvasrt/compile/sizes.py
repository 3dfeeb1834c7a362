"""Bytes that the model's tensors take in an engine, by format and by the part of the network that reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from canvasrt.compile.source import ModelSource
from canvasrt.formats import NVFP4_BLOCK, PLAIN, Format, Weights
from canvasrt.quantize.recipe import Recipe

Part = Literal["experts", "attention", "mlp", "embedding", "conditioning", "other"]

BF16, FLOAT32 = 2, 4
_EMBEDDING = "model.decoder.embed_tokens.weight"
_CONDITIONING = "model.decoder.self_conditioning."


@dataclass(frozen=True, slots=True)
class Size:
    """Of all tensors of one part in one format."""

    elements: int
    nbytes: int


def part_of(name: str) -> Part:
    """``name`` is one of `ModelSpec.tensors`. Router, norms and scalars are "other"."""
    if ".experts." in name:
        return "experts"
    if name == _EMBEDDING:
        return "embedding"
    if name.startswith(_CONDITIONING):
        return "conditioning"
    if name.endswith("_proj.weight"):
        return "attention" if ".self_attn." in name else "mlp"
    return "other"


def stored_bytes(shape: tuple[int, ...], form: Format) -> int:
    """Weights and their scales. An engine holds everything that is not quantized in BF16."""
    elements = prod(shape)
    if form.weights == "plain":
        return elements * BF16
    scales = FLOAT32 * prod(shape[:-1])  # the engine has one per output channel, also where they are all the same
    if form.weights == "fp8":
        return elements + scales
    if form.weights == "nvfp4":
        return elements // 2 + elements // NVFP4_BLOCK + scales
    return elements // 2 + elements // form.block * BF16


def sizes(source: ModelSource) -> dict[tuple[Part, Format], Size]:
    """Of every part and format that occurs."""
    found: dict[tuple[Part, Format], Size] = {}
    for name, shape in source.spec.tensors().items():
        form = source.formats[name]
        before = found.get((part_of(name), form), Size(0, 0))
        found[part_of(name), form] = Size(before.elements + prod(shape), before.nbytes + stored_bytes(shape, form))
    return found


def bytes_by_format(source: ModelSource) -> Mapping[Weights, int]:
    """The embedding counts once: LM head and self-conditioning read the same matrix."""
    found: dict[Weights, int] = {}
    for (_, form), size in sizes(source).items():
        found[form.weights] = found.get(form.weights, 0) + size.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def unpacked_bytes(source: ModelSource) -> int:
    """BF16 copy of the largest NVFP4 matrix whose activations are not quantized: TensorRT-RTX makes one in every run.

    INT4 is unpacked inside the product's kernel.
    """
    copies = [
        prod(shape) * BF16
        for name, shape in source.spec.tensors().items()
        if source.formats[name].weights == "nvfp4" and source.formats[name].activations == "none"
    ]
    return max(copies, default=0)


def with_recipe(source: ModelSource, recipe: Recipe | None) -> ModelSource:
    """The same model as ``recipe`` would quantize it; None: in BF16.

    Raises InputError for a recipe that the model's dimensions don't divide into.
    """
    names = source.spec.tensors()
    if recipe is None:
        return ModelSource(source.folder, source.spec, dict.fromkeys(names, PLAIN), "bf16", "none", None)
    recipe.check(source.spec)
    formats = {name: recipe.format if recipe.covers(name) else PLAIN for name in names}
    return ModelSource(source.folder, source.spec, formats, recipe.kv_cache, f"recipe {recipe.name}", None)
