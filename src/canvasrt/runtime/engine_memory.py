"""What a bundle takes of a GPU, from its manifest, and what to change where that is more than there is.

The parts are those of ``canvasrt plan``; the numbers are those of this bundle. All sizes in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from canvasrt.bundle.manifest import Engine, EngineTensor, Manifest
from canvasrt.errors import BundleError, CapacityError
from canvasrt.runtime.kv_memory import EXCHANGE_BYTES, Buffer, Kind
from canvasrt.spec import ModelSpec

ELEMENT_BYTES = {"bf16": 2, "float": 4, "int32": 4, "bool": 1}
SOFT = "soft"  # the buffer of the soft embeddings that a canvas keeps
_GB = 10**9
_FLOAT_BYTES = 4
_SCALARS = 64  # bytes per token of a call: ids, what it sees, limits, uniforms, and what the sampler returns
_ALIGNMENT_BYTES = 1 << 16  # of all the small tensors


@dataclass(frozen=True, slots=True)
class EngineMemory:
    weights: int
    full_kv: int
    sliding_kv: int
    activations: int
    inputs_and_outputs: int
    per_slot: int  # of the above, what each slot has of its own
    slots: int
    least_slots: int  # that a plan of so many canvases wants
    context: int

    @property
    def total(self) -> int:
        return self.weights + self.full_kv + self.sliding_kv + self.activations + self.inputs_and_outputs

    def items(self) -> Mapping[str, int]:
        return {
            "weights": self.weights,
            "K/V of full layers": self.full_kv,
            "K/V of sliding layers": self.sliding_kv,
            "activations": self.activations,
            "inputs and outputs": self.inputs_and_outputs,
        }


def text_engine(manifest: Manifest) -> Engine:
    """Raises BundleError for a bundle without one."""
    engine = manifest.engines.get("text")
    if engine is None:
        raise BundleError("the bundle has no text engine: build it again")
    return engine


def slot_buffers(manifest: Manifest, spec: ModelSpec) -> list[Buffer]:
    """K and V of every layer as the engine wants them, and the soft embeddings: what every slot has of its own."""
    engine = text_engine(manifest)
    by_name = {tensor.name: tensor for tensor in engine.tensors}
    found = []
    for output in engine.tensors:
        if output.mode == "output" and output.aliases is not None:
            _, heads, rows, width = by_name[output.aliases].shape
            kind: Kind = spec.layers[int(output.aliases.rpartition(".")[2])].kind
            found.append(Buffer(output.aliases, kind, heads, rows, width * element_bytes(output)))
    soft = by_name[SOFT]
    found.append(Buffer(SOFT, "soft", 1, manifest.shapes.canvas, soft.shape[-1] * element_bytes(soft)))
    return found


def element_bytes(tensor: EngineTensor) -> int:
    size = ELEMENT_BYTES.get(tensor.dtype)
    if size is None:
        raise BundleError(f"the engine's {tensor.name} is {tensor.dtype}, which this version can't make: upgrade it")
    return size


def engine_memory(manifest: Manifest, spec: ModelSpec, slots: int) -> EngineMemory:
    """Of a bundle with so many slots: how many there are is no property of the plan."""
    engine, shapes = text_engine(manifest), manifest.shapes
    buffers = slot_buffers(manifest, spec)
    each = {kind: sum(buffer.place_bytes for buffer in buffers if buffer.kind == kind) for kind in _KINDS}
    reserved: dict[str, int] = {}
    for region in engine.build.reserved or ():
        reserved[region.shape_range] = reserved.get(region.shape_range, 0) + region.nbytes
    return EngineMemory(
        weights=sum(engine.build.weight_bytes.values()),
        full_kv=slots * each["full"],
        sliding_kv=slots * each["sliding"],
        activations=max(reserved.values(), default=0),
        inputs_and_outputs=slots * each["soft"] + _call_bytes(manifest, spec, buffers[-1].row_bytes),
        per_slot=sum(each.values()),
        slots=slots,
        least_slots=shapes.canvases,
        context=shapes.context,
    )


def _call_bytes(manifest: Manifest, spec: ModelSpec, soft_bytes: int) -> int:
    """What calls read and write beside slots and weights; ``soft_bytes``: of one token's soft embeddings."""
    shapes = manifest.shapes
    canvases = shapes.canvases * shapes.canvas
    soft = (canvases + shapes.chunk) * soft_bytes  # written by a call; read for a prompt
    logits = shapes.canvas * spec.vocab_size * _FLOAT_BYTES
    rotary = sum({layer.kind: layer.head_dim for layer in spec.layers}.values()) * _FLOAT_BYTES  # cosines and sines
    inputs = 2 * (shapes.chunk + canvases) * (rotary + _SCALARS)  # of both shape ranges: constants, and every step's
    counts = (shapes.context + max(shapes.chunk, canvases)) * _FLOAT_BYTES
    return soft + logits + inputs + counts + EXCHANGE_BYTES + _ALIGNMENT_BYTES


_KINDS: tuple[Kind, ...] = ("full", "sliding", "soft")


def check_memory(needed: EngineMemory, free: int, total: int, gpu: str) -> None:
    """Raises CapacityError with the parts and what would fit, before anything is loaded."""
    if needed.total > free:
        raise CapacityError(shortage(needed, free, total, gpu))


def shortage(needed: EngineMemory, free: int, total: int, gpu: str) -> str:
    """What is too large, and every number that can be made smaller, with how."""
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in needed.items().items())
    advice = []
    fitting = needed.slots - -(-(needed.total - free) // needed.per_slot)
    if fitting >= needed.least_slots:
        advice.append(f"serve it with slots={fitting} (no build needed)")
    per_token = needed.full_kv // needed.context + _FLOAT_BYTES
    context = needed.context - -(-(needed.total - free) // per_token)
    if context >= needed.context // 8:
        advice.append(f"build it again with --context {context} or less")
    advice.append("build it again with fewer --canvases, a smaller --chunk or a smaller recipe (canvasrt plan)")
    if total - free > _GB:
        advice.append(f"end what else uses the GPU: {_gigabytes(total - free)} GB are taken (nvidia-smi)")
    return (
        f"{gpu} has {_gigabytes(free)} of {_gigabytes(total)} GB free, and this bundle with {needed.slots} slots of "
        f"{needed.context} tokens needs {_gigabytes(needed.total)} GB: {parts}. Either " + ", or ".join(advice)
    )


def _gigabytes(size: int) -> str:
    return f"{size / _GB:.2f}"
