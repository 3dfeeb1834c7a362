"""Execution contexts of an engine, and the denoising steps that are captured in CUDA graphs.

A step is a thousand small kernels; launched one by one they take longer than many of them run. A graph launches them
all at once, but keeps shapes and addresses: one for each that comes again, with a context of its own, since a context
that gets other shapes spoils the graphs captured from it (TensorRT's developer guide, "CUDA Graphs").
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from canvasrt.errors import DeviceError
from canvasrt.runtime.cuda_device import CudaDevice
from canvasrt.runtime.tensorrt_engine import Context, Shape, TensorRTEngine

Bindings = Callable[[], tuple[Mapping[str, Shape], Mapping[str, int]]]

# Launches after which a graph is captured anew, where the library compiles better kernels meanwhile.
RECAPTURES = (50, 1000)
GRAPHS = 24  # kept at once; the one that was used longest ago goes first
_REMEMBERED = 512  # keys that ran once


@dataclass(slots=True)
class _Own:
    context: Context
    graph: Any = None
    launches: int = 0


class EngineContexts:
    """``captures``: whether steps are captured; turns off where the engine can't be."""

    def __init__(self, engine: TensorRTEngine, device: CudaDevice, ranges: list[str]) -> None:
        self._engine = engine
        self._device = device
        self._shared = {name: engine.context(name) for name in ranges}
        self._own: OrderedDict[Hashable, _Own] = OrderedDict()
        self._once: OrderedDict[Hashable, None] = OrderedDict()
        self._recaptures = RECAPTURES if engine.compiles_late else ()
        self.captures = True
        self.launched = 0  # calls that were launches of a graph

    def run(self, shape_range: str, key: Hashable, bindings: Bindings) -> None:
        """Queues one call; ``bindings`` gives the shapes and addresses of its tensors where they are wanted.

        Calls with the same ``key`` have the same; None: it won't come again.

        The first of a key runs in the range's shared context, the second in one of its own, since an engine has to run
        once with new shapes before it can be captured; the third is captured.
        """
        own = self._own_of(shape_range, key) if self.captures and key is not None else None
        if own is None:
            self._enqueue(self._shared[shape_range], bindings)
        elif own.graph is not None and own.launches not in self._recaptures:
            self._launch(own)
        else:
            self._enqueue_or_capture(own, bindings)

    @property
    def graphs(self) -> int:
        return sum(own.graph is not None for own in self._own.values())

    def _own_of(self, shape_range: str, key: Hashable) -> _Own | None:
        own = self._own.get(key)
        if own is not None:
            self._own.move_to_end(key)
            return own
        if key not in self._once:
            self._once[key] = None
            if len(self._once) > _REMEMBERED:
                self._once.popitem(last=False)
            return None
        del self._once[key]
        if len(self._own) >= GRAPHS:
            self._device.synchronize()  # it may be running
            _, oldest = self._own.popitem(last=False)
            if oldest.graph is not None:
                self._device.drop(oldest.graph)
        self._own[key] = own = _Own(self._engine.context(shape_range))
        return own

    def _enqueue_or_capture(self, own: _Own, bindings: Bindings) -> None:
        if not own.context.ran:
            self._enqueue(own.context, bindings)
            return
        try:
            with self._device.captured() as found:
                own.context.enqueue()
        except DeviceError as error:  # nothing has run: the call can still be made as the others were
            self.captures = False
            self._engine.warnings.append(f"steps are not captured in graphs: {error}")
            own.context.enqueue()
            return
        if own.graph is not None:
            self._device.synchronize()
            self._device.drop(own.graph)
        own.graph = found[0]
        self._launch(own)

    def _launch(self, own: _Own) -> None:
        self._device.launch(own.graph)
        own.launches += 1
        self.launched += 1

    def _enqueue(self, context: Context, bindings: Bindings) -> None:
        context.bind(*bindings())
        context.enqueue()
