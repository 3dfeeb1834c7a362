"""Writes an INT4 checkpoint, tensor by tensor: chosen matrices scaled and packed by ModelOpt, all others copied.

ModelOpt 0.47's own exporter knows no INT4 experts of this model. The layout is the one it has for INT4: weight U8
(out / 2, in), the even row in the low half, weight_scale (out, in / block). Weights need no prompts, so no model is
loaded: memory holds one shard.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from canvasrt import __version__
from canvasrt.checkpoint import Checkpoint
from canvasrt.ops.torch_formats import load
from canvasrt.quantize.recipe import Recipe
from canvasrt.tensorfile import read_folder

Tensor = torch.Tensor

SHARD_BYTES = 5_000_000_000


def export_int4(source: Checkpoint, recipe: Recipe, folder: Path, advance: Callable[[], None]) -> None:
    """``advance`` is called once per tensor of the source's files."""
    folder.mkdir(parents=True)
    _write_shards(folder, _tensors(source, recipe, advance))
    kept = [name for name in source.names() if name.endswith("_proj.weight") and not recipe.covers(name)]
    algorithm = {"quant_algo": "W4A16", "group_size": recipe.block}
    quantization = {
        **algorithm,
        "kv_cache_quant_algo": "FP8" if recipe.kv_cache == "fp8" else None,
        "exclude_modules": ["lm_head", *(name.removesuffix(".weight") for name in kept)],
    }
    report = {"producer": {"name": "canvasrt", "version": __version__}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    declared = {"quant_method": "modelopt", **algorithm}
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}), encoding="utf-8")


def _tensors(source: Checkpoint, recipe: Recipe, advance: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    for info in read_folder(source.folder).values():
        if info.name in source.names() and recipe.covers(info.name):
            yield from _packed(info.name, load(source, source.info(info.name)), recipe)
        else:
            with safe_open(info.file, "pt") as file:
                yield info.name, file.get_tensor(info.name)
        advance()


def _packed(name: str, weight: Tensor, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    if weight.dim() == 2:
        yield from _matrix(name.removesuffix(".weight"), weight, recipe)
        return
    stem, fused = name.rsplit(".", 1)
    halves = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    for expert, both in enumerate(weight):
        for half, matrix in zip(halves, both.chunk(len(halves)), strict=True):
            yield from _matrix(f"{stem}.{expert}.{half}", matrix, recipe)


def _matrix(stem: str, weight: Tensor, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    from canvasrt.quantize.modelopt_model import pack_int4

    assert recipe.block is not None  # Recipe saw it
    packed, scale = pack_int4(weight.float(), recipe.block)
    yield f"{stem}.weight", packed
    yield f"{stem}.weight_scale", scale


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """model.safetensors, or shards and their index where that would be larger than a shard."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    files = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for index, file in enumerate(files):
        (folder / f"shard-{index}").rename(folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index_content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_content, indent=2) + "\n", encoding="utf-8")
