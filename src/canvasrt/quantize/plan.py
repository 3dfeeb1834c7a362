"""What a quantization will need, from the checkpoint's headers: memory, disk and time. Bytes and seconds.

Sizes are exact arithmetic. Times are an estimate from the machine's speed, measured for half a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from canvasrt.checkpoint import Checkpoint
from canvasrt.formats import NVFP4_BLOCK
from canvasrt.quantize.int4 import SHARD_BYTES
from canvasrt.quantize.job import check_source
from canvasrt.quantize.recipe import Recipe
from canvasrt.tensorfile import read_folder

_EMBEDDING = "model.decoder.embed_tokens.weight"
# Tensors over the vocabulary that a step of transformers' loop holds at once: logits, scaled, probabilities, a copy.
_LOGITS = 4
_FLOAT32, _BF16 = 4, 2
# Bytes of BF16 weights that ModelOpt packs in a second on a CPU: 46 GB of experts took about half an hour.
_PACK_BYTES_PER_SECOND = 25e6
_SECONDS = 0.25  # that each speed is measured


@dataclass(frozen=True, slots=True)
class Speed:
    flops: float  # per second, BF16 products
    bytes: float  # per second, read from memory


@dataclass(frozen=True, slots=True)
class Sizes:
    memory_bytes: int  # of the device that the model is loaded on, at the peak
    disk_bytes: int
    packed_from_bytes: int  # weights that are packed, in the precision they are loaded in


@dataclass(frozen=True, slots=True)
class Plan:
    memory_bytes: int
    disk_bytes: int
    passes: int  # of the model, in calibration
    calibration_seconds: float
    export_seconds: float


def sizes(source: Checkpoint, recipe: Recipe) -> Sizes:
    """Raises InputError for a source that the recipe can't start from."""
    check_source(source, recipe)
    covered = {name: shape for name, shape in source.spec.tensors().items() if recipe.covers(name)}
    # ModelOpt loads and writes BF16, whatever the source is stored in; INT4 copies what it does not pack.
    width = None if recipe.weights == "int4" else _BF16
    infos = read_folder(source.folder).values()
    loaded = {info.name: prod(info.shape) * width if width else info.nbytes for info in infos}
    source_bytes = sum(loaded.values())
    packed = sum(_packed_bytes(recipe, name, shape) for name, shape in covered.items())
    covered_bytes = sum(loaded[name] for name in covered)
    largest = max(prod(shape) for shape in covered.values()) * _FLOAT32
    disk = source_bytes - covered_bytes + packed
    if recipe.weights == "int4":
        memory = min(SHARD_BYTES, disk) + 2 * largest
    else:
        logits = _LOGITS * source.spec.canvas_length * source.spec.vocab_size * _FLOAT32
        # The exporter keeps the packed copies until it writes, beside the model.
        memory = source_bytes + packed + max(2 * largest, logits)
    return Sizes(memory, disk, covered_bytes)


def plan(source: Checkpoint, recipe: Recipe, samples: int, speed: Speed) -> Plan:
    """``samples``: prompts that calibrate. Raises InputError for a source that the recipe can't start from."""
    needs = sizes(source, recipe)
    settings = recipe.calibration
    # Per prompt: the steps, the prompt and each finished canvas encoded, and the whole text once more.
    per_prompt = 0 if settings is None else settings.canvases * (settings.steps + 1) + 1
    passes = samples * per_prompt
    per_pass = max(_flops(source) / speed.flops, source.nbytes() / speed.bytes)
    export_seconds = needs.packed_from_bytes / _PACK_BYTES_PER_SECOND
    return Plan(needs.memory_bytes, needs.disk_bytes, passes, passes * per_pass, export_seconds)


def measure_speed(device: str) -> Speed:
    """Half a second of products and copies on ``device``."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    block = torch.zeros(2**26 if device == "cpu" else 2**30, device=device, dtype=torch.uint8)
    flops = 2 * size**3 * _rate(lambda: a @ b, device)
    return Speed(flops, block.numel() * _rate(block.max, device))


def _rate(run: Callable[[], object], device: str) -> float:
    """Runs per second."""
    run()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count / (time.perf_counter() - started)


def _packed_bytes(recipe: Recipe, name: str, shape: tuple[int, ...]) -> int:
    elements = prod(shape)
    matrices = (shape[0] * (2 if name.endswith("gate_up_proj") else 1)) if len(shape) > 2 else 1
    if recipe.weights == "fp8":
        return elements + 2 * _FLOAT32 * matrices
    if recipe.weights == "int4":
        return elements // 2 + elements // (recipe.block or 1) * _FLOAT32
    scalars = 2 if recipe.weights == "nvfp4" else 1  # weight_scale_2, and input_scale where activations are rounded
    return elements // 2 + elements // NVFP4_BLOCK + scalars * _FLOAT32 * matrices


def _flops(source: Checkpoint) -> float:
    """Of one pass over a canvas: chosen experts only, the embedding as LM head and for self-conditioning."""
    spec = source.spec
    active = 0.0
    for name, shape in spec.tensors().items():
        share = spec.experts_per_token / spec.experts if ".experts." in name else 2.0 if name == _EMBEDDING else 1.0
        active += prod(shape) * share
    return 2 * active * spec.canvas_length
