"""What a call of the engine reads and writes beside the memory of slots: inputs, constants, outputs, results.

Results of a call lie in one block and come back in one copy: argmax, sampled token and entropy of every canvas token.
Logits and soft embeddings stay on the GPU, but for one canvas of logits where somebody asks.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from canvasrt.bundle.manifest import Manifest
from canvasrt.runtime.cuda_device import CudaDevice, Pinned
from canvasrt.runtime.engine_call import Call, CallBuilder, Sizes
from canvasrt.runtime.engine_memory import SOFT, element_bytes, text_engine
from canvasrt.runtime.staging import Staging, aligned_bytes

_RESULTS = ("argmax", "sampled", "entropy")
_BUSIEST, _LOGITS, _SOFT_NEXT = "busiest", "logits", "soft.next"
Number = TypeVar("Number", np.int32, np.float32)
Ints = NDArray[np.int32]

_WORD = 4  # bytes of every number that is not the model's


class EngineIO:
    """``given``: addresses of inputs that are weights. Raises OutOfMemoryError where the GPU has too little."""

    def __init__(self, device: CudaDevice, manifest: Manifest, builder: CallBuilder, given: Mapping[str, int]) -> None:
        engine, shapes = text_engine(manifest), manifest.shapes
        self._device = device
        self._canvas = shapes.canvas
        tensors = {tensor.name: tensor for tensor in engine.tensors}
        self._aliases = {each.name: each.aliases for each in engine.tensors if each.aliases is not None}
        self._buffers = {
            each.aliases: tensors[each.aliases].shape[1:]
            for each in engine.tensors
            if each.mode == "output" and each.aliases is not None
        }
        self._width = element_bytes(tensors[SOFT]) * tensors[SOFT].shape[-1]  # of one token's soft embeddings
        self._vocabulary = tensors[_LOGITS].shape[-1]
        self._tells_busiest = _BUSIEST in tensors
        most = shapes.canvases * shapes.canvas
        largest = {
            "encoder": Sizes("encoder", 1, shapes.chunk, 0, 0, 0, 1, 1),
            "decoder": Sizes("decoder", shapes.canvases, shapes.canvas, most, most, shapes.canvas, 1, 1),
        }
        self._staging = Staging(device, {name: _input_bytes(builder, sizes) for name, sizes in largest.items()})
        self._builder = builder
        self._soft_next = device.allocate(most * self._width)
        self._no_soft = self._zeros(shapes.chunk * self._width)
        self._results_bytes = sum(aligned_bytes(_WORD * most) for _ in _RESULTS) + _WORD
        self._results = device.allocate(self._results_bytes)
        self._back = device.pinned(self._results_bytes)
        self._done = device.event()
        self._logits: tuple[int, Pinned] | None = None
        counts = np.arange(max(shapes.context, most, shapes.chunk))
        self._constants = dict(given)
        self._constants["keys"] = self._constant(counts[: shapes.context].astype(np.int32))
        if "seats" in tensors:
            self._constants["seats"] = self._constant(counts[: max(most, shapes.chunk)].astype(np.float32))
        self.received = 0  # bytes, ever

    @property
    def sent(self) -> int:
        return self._staging.uploaded

    def send(self, call: Call) -> dict[str, int]:
        """Queues the copy of a call's inputs; their addresses."""
        return self._staging.send(
            call.sizes.shape_range, call.key, lambda: self._builder.constants(call), self._builder.step_inputs(call)
        )

    def addresses(self, sizes: Sizes, inputs: Mapping[str, int]) -> dict[str, int]:
        """Of all tensors but the slots' memory."""
        outputs = {name: self._results + start for name, start in self._places(sizes).items()}
        if not self._tells_busiest:
            del outputs[_BUSIEST]
        outputs |= {_SOFT_NEXT: self._soft_next, _LOGITS: self._logits_memory()[0] if sizes.logits else self._results}
        # Of tokens that join the context, the network takes none, whatever stands there.
        encoder = {SOFT: self._no_soft} if sizes.shape_range == "encoder" else {}
        return {**self._constants, **inputs, **outputs, **encoder}

    def aliases(self, addresses: Mapping[str, int]) -> dict[str, int]:
        """Of tensors that are the same memory as an input."""
        return {name: addresses[source] for name, source in self._aliases.items()}

    def buffer_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Of the K/V inputs."""
        return {name: (rows, *shape) for name, shape in self._buffers.items()}

    def receive(self, sizes: Sizes) -> bool:
        """Queues the copy of what the host reads; False where there is nothing."""
        if not sizes.head and not self._tells_busiest:
            return False
        nbytes = self._places(sizes)[_BUSIEST] + (_WORD if self._tells_busiest else 0)
        self._device.download(self._back, self._results, nbytes)
        self.received += nbytes
        if sizes.logits:
            address, pinned = self._logits_memory()
            self._device.download(pinned, address, pinned.array.nbytes)
            self.received += pinned.array.nbytes
        self._device.record(self._done)
        return True

    def wait(self, sizes: Sizes) -> int:
        """Until the copy is there; tokens of the busiest expert, 0 where the engine does not count them."""
        self._device.wait(self._done)
        if not self._tells_busiest:
            return 0
        return int(self._read(self._places(sizes)[_BUSIEST], 1, np.float32)[0])

    def results(self, sizes: Sizes) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """argmax, sampled token and entropy, (head,) each, of the call that was waited for last."""
        places, head = self._places(sizes), sizes.head
        argmax, sampled = (self._read(places[name], head, np.int32) for name in ("argmax", "sampled"))
        return argmax, sampled, self._read(places["entropy"], head, np.float32)

    def logits(self, sizes: Sizes) -> NDArray[np.float32] | None:
        """(canvas, vocabulary) of the only canvas that wanted them."""
        if not sizes.logits:
            return None
        _, pinned = self._logits_memory()
        return pinned.array.view(np.float32).reshape(self._canvas, self._vocabulary).copy()

    def reserve_logits(self) -> None:
        """Memory for one canvas of logits, once somebody asks. Raises OutOfMemoryError."""
        self._logits_memory()

    def keep_soft(self, target: int, turn: int, canvases: int) -> None:
        """Queues the copy of soft embeddings from where a call wrote them, its ``turn``-th canvas first."""
        nbytes = self._canvas * self._width
        self._device.copy(target, self._soft_next + turn * nbytes, canvases * nbytes)

    def _places(self, sizes: Sizes) -> dict[str, int]:
        """Where in the block of results each lies: as close as the sizes allow, so that one copy brings all."""
        each = aligned_bytes(_WORD * sizes.head)
        return {name: index * each for index, name in enumerate([*_RESULTS, _BUSIEST])}

    def _read(self, start: int, count: int, kind: type[Number]) -> NDArray[Number]:
        return self._back.array[start : start + _WORD * count].view(kind).copy()  # the next call overwrites it

    def _logits_memory(self) -> tuple[int, Pinned]:
        if self._logits is None:
            nbytes = self._canvas * self._vocabulary * _WORD
            self._logits = self._device.allocate(nbytes), self._device.pinned(nbytes)
        return self._logits

    def _zeros(self, nbytes: int) -> int:
        address = self._device.allocate(nbytes)
        self._device.clear(address, nbytes)
        return address

    def _constant(self, values: NDArray[np.generic]) -> int:
        address, pinned = self._device.allocate(values.nbytes), self._device.pinned(values.nbytes)
        pinned.array[:] = values.view(np.uint8)
        self._device.upload(address, pinned, values.nbytes)
        self._device.synchronize()
        self._device.unpin(pinned)
        return address


def _input_bytes(builder: CallBuilder, sizes: Sizes) -> int:
    """An upper bound of what crosses to the GPU for a call of these sizes."""
    resident = (SOFT, "keys", "seats")
    shapes = {name: shape for name, shape in builder.shapes(sizes).items() if name not in resident}
    return sum(aligned_bytes(_WORD * int(np.prod(shape))) for shape in shapes.values())
