"""Weights of a bundle that are not in its plan: placeholders filled from the checkpoint, and inputs that are weights.

The manifest says of which stored tensors each is made (canvasrt.engine_weights). Bytes go from the mapped files to the
GPU; what has to be put together first takes memory of this machine, a batch at a time where the library lets us.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from canvasrt.bundle.manifest import WeightEntry
from canvasrt.bundle.reader import EngineBundle
from canvasrt.checkpoint import Checkpoint
from canvasrt.engine_weights import EngineType, EngineWeight, Part, aligned, made
from canvasrt.errors import BundleError
from canvasrt.runtime.cuda_device import CudaDevice
from canvasrt.runtime.tensorrt_engine import TensorRTEngine

Progress = Callable[[str, int, int], None]  # what is loaded, bytes done, bytes in all
Bytes = NDArray[np.uint8]

BATCH_BYTES = 1 << 30  # of weights that are put together before the library takes them
_PIECE_BYTES = 32 << 20  # of a weight on its way to the GPU


class Weights(Protocol):
    """Where a bundle's weights come from."""

    def made(self, entry: WeightEntry) -> Bytes:
        """The bytes that the engine wants, (entry.nbytes,)."""
        ...


class WeightSource:
    """Implements Weights: the bundle's own files, or the checkpoint that it was built from."""

    def __init__(self, bundle: EngineBundle, checkpoint: Checkpoint | None) -> None:
        self._bundle = bundle
        self._checkpoint = checkpoint

    def made(self, entry: WeightEntry) -> Bytes:
        """The bytes that the engine wants. Raises CheckpointError for NaN, BundleError for a checkpoint that is not
        there or does not make what the plan has room for.
        """
        if entry.file is not None:
            return np.frombuffer(self._bundle.map(entry.file), np.uint8)
        if self._checkpoint is None:
            raise BundleError(f"bundle {self._bundle.path} holds no {entry.name}: it is filled from the checkpoint")
        dtype = next((each for each in get_args(EngineType) if each == entry.dtype), None)
        if dtype is None:
            raise BundleError(
                f"bundle {self._bundle.path}: {entry.name} is {entry.dtype}, which this version can't make: upgrade "
                "canvasrt"
            )
        weight = EngineWeight(
            name=entry.name,
            dtype=dtype,
            shape=entry.shape,
            parts=tuple(Part(part.tensor, part.count) for part in entry.parts),
            columns=entry.columns,
        )
        found = made(self._checkpoint, weight)
        if found.nbytes != entry.nbytes:
            raise BundleError(
                f"bundle {self._bundle.path}: {entry.name} has room for {entry.nbytes:,} bytes, and the checkpoint's "
                f"tensors make {found.nbytes:,}: build the bundle again"
            )
        return found


def refit(engine: TensorRTEngine, entries: Sequence[WeightEntry], source: Weights, progress: Progress) -> None:
    """Fills every placeholder; ``progress`` hears of the last byte when the library has taken it.

    Raises BundleError for a weight that the plan and the manifest do not agree on.
    """
    trt = engine.trt
    refitter = trt.Refitter(engine.engine, engine.logger)
    types = _types(trt)
    unknown = set(refitter.get_all_weights()) - {entry.name for entry in entries}
    if unknown:
        raise BundleError(f"the plan wants {min(unknown)}, of which the manifest says nothing: build the bundle again")
    done, whole = 0, sum(entry.nbytes for entry in entries)
    waiting: dict[str, Bytes] = {}  # the library reads them when it refits, not when it is told of them
    for entry in entries:
        content = aligned(source.made(entry))
        weights = trt.Weights(types[entry.dtype], content.ctypes.data, int(np.prod(entry.shape, dtype=np.int64)))
        if not refitter.set_named_weights(entry.name, weights):
            raise BundleError(f"the plan refuses {entry.name}: {engine.said.last()}. Build the bundle again")
        waiting[entry.name] = content
        done += entry.nbytes
        if sum(each.nbytes for each in waiting.values()) >= BATCH_BYTES and not refitter.get_missing_weights():
            _apply(engine, refitter, waiting)
        progress("weights", min(done, whole - 1), whole)
    if missing := refitter.get_missing_weights():
        raise BundleError(f"the plan still wants {missing[0]} after all of the manifest's weights: build it again")
    _apply(engine, refitter, waiting)
    progress("weights", whole, whole)


def _apply(engine: TensorRTEngine, refitter: Any, waiting: dict[str, Bytes]) -> None:
    if waiting and not refitter.refit_cuda_engine():
        engine.raise_if_out_of_memory(sum(each.nbytes for each in waiting.values()))
        raise BundleError(f"the weights could not be put into the plan: {engine.said.last()}")
    for name in waiting:
        refitter.unset_named_weights(name)
    waiting.clear()


def _types(trt: ModuleType) -> dict[str, Any]:
    kinds = trt.DataType
    return {"bf16": kinds.BF16, "fp32": kinds.FLOAT, "fp8": kinds.FP8, "fp4": kinds.FP4, "int4": kinds.INT4}


def to_device(device: CudaDevice, content: Bytes, told: Callable[[int, int], None]) -> int:
    """The address of a copy on the GPU; ``told`` hears the bytes that are under way, and all."""
    address = device.allocate(content.nbytes)
    staging = [(device.pinned(min(_PIECE_BYTES, content.nbytes)), device.event()) for _ in range(2)]
    for index, start in enumerate(range(0, content.nbytes, _PIECE_BYTES)):
        pinned, copied = staging[index % 2]
        piece = content[start : start + _PIECE_BYTES]
        device.wait(copied)
        pinned.array[: piece.nbytes] = piece
        device.upload(address + start, pinned, piece.nbytes)
        device.record(copied)
        told(start + piece.nbytes, content.nbytes)
    device.synchronize()
    for pinned, _ in staging:
        device.unpin(pinned)
    return address
