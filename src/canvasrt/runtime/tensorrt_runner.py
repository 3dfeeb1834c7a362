"""EngineRunner over an engine bundle, on TensorRT and TensorRT-RTX, without torch.

A call runs rows of neighbouring places of the K/V memory: `Placement` brings the slots of a call together. Prompts go
through the encoder's shape range piece by piece; finished canvases wait for the next call of the decoder's range and
join it as rows of their own, where their slot does not denoise in it. All work is queued in one stream; only denoising
waits for results: three numbers per canvas token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from canvasrt.bundle.manifest import Manifest
from canvasrt.errors import CapacityError, DeviceError, InputError
from canvasrt.runtime.cuda_device import CudaDevice, OutOfMemoryError
from canvasrt.runtime.engine_call import KEY_STEP, TOKEN_STEP, Call, CallBuilder, CallRow, Sizes
from canvasrt.runtime.engine_contexts import EngineContexts
from canvasrt.runtime.engine_io import EngineIO
from canvasrt.runtime.engine_memory import SOFT, slot_buffers
from canvasrt.runtime.kv_memory import Held, KvMemory
from canvasrt.runtime.placement import Placement
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, RunnerLimits
from canvasrt.runtime.rows import check_denoise, check_encode, check_slot
from canvasrt.runtime.slots import Slots
from canvasrt.runtime.tensorrt_engine import TensorRTEngine
from canvasrt.spec import ModelSpec

Ints = NDArray[np.int32]
Shapes = dict[str, tuple[int, ...]]
Addresses = dict[str, int]

_NOTHING = np.zeros(0, np.int32)
_SEAT_STEP = 32  # seats of a repeated call are a multiple of it: each number is a shape


class TensorRTRunner:
    """Made by `canvasrt.runtime.open_bundle.open_bundle`, which checks and loads.

    ``given``: addresses of inputs that are weights. Every verb raises DeviceError once the GPU has failed.
    Raises OutOfMemoryError where the GPU has too little memory for so many slots.
    """

    def __init__(
        self,
        engine: TensorRTEngine,
        manifest: Manifest,
        spec: ModelSpec,
        slots: int,
        given: dict[str, int],
        key_step: int = KEY_STEP,
        token_step: int = TOKEN_STEP,
    ) -> None:
        shapes = self._shapes = manifest.shapes
        if slots < shapes.canvases:
            raise InputError(f"a bundle of {shapes.canvases} canvases in a call needs as many slots, not {slots}")
        self.device: CudaDevice = engine.device
        self._manifest, self._spec = manifest, spec
        self._limits = RunnerLimits(
            slots, shapes.context, shapes.chunk, shapes.canvas, spec.vocab_size, shapes.canvases, True, True
        )
        self._slots = Slots(slots, shapes.window, shapes.sliding)
        self._placement = Placement(slots)
        self._pending: dict[int, Ints] = {}  # slot -> a canvas's length of tokens that join the next decoder call
        self._memory = KvMemory(self.device, slot_buffers(manifest, spec), slots)
        self._builder = CallBuilder(spec, shapes, key_step, token_step)
        self._io = EngineIO(self.device, manifest, self._builder, given)
        engine.reserve()
        self._contexts = EngineContexts(engine, self.device, list(manifest.engines["text"].shape_ranges))
        self._failed: DeviceError | None = None
        self.calls = self.repeated = 0  # runs of the engine; those of them that only had too few seats before

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    @property
    def captures(self) -> bool:
        """Whether steps are captured in CUDA graphs; turns itself off where the engine can't be captured."""
        return self._contexts.captures

    @captures.setter
    def captures(self, value: bool) -> None:
        self._contexts.captures = value

    @property
    def launches(self) -> int:
        """Calls that were launches of a graph."""
        return self._contexts.launched

    def length(self, slot: int) -> int:
        check_slot(self._limits, slot)
        return self._lengths()[slot]

    def can_rewind(self, slot: int, length: int) -> bool:
        return 0 <= length <= self.length(slot) and self._slots.can_rewind(slot, length)

    def release(self, slot: int) -> None:
        with self._usable():
            check_slot(self._limits, slot)
            self._pending.pop(slot, None)
            self._slots.release(slot)
            self._memory.clear_soft(self._placement.place(slot))

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Queues the rows' tokens; those as long as a canvas are only noted down and join the next decoder call."""
        with self._usable():
            check_encode(self._limits, self._lengths(), rows)
            for row in rows:
                self._slots.check_rewind(row.slot, row.position)
            for row in rows:
                held = self._slots.length(row.slot)
                kept = self._pending.pop(row.slot, _NOTHING)[: max(row.position - held, 0)]
                if row.position < held:
                    self._slots.rewind(row.slot, row.position)
                tokens = np.concatenate([kept, row.tokens])
                if len(tokens) == self._shapes.canvas:
                    self._pending[row.slot] = tokens
                else:
                    self._prefill(row.slot, tokens)

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Callable[[], None] | None = None) -> list[DenoiseResult]:
        """One step for each row. ``meanwhile`` is called once while the GPU works."""
        with self._usable():
            check_denoise(self._limits, self._lengths(), rows)
            if any(row.want_logits for row in rows):
                self._io.reserve_logits()  # before anything has changed
            results: dict[int, DenoiseResult] = {}
            slots = {row.slot for row in rows}
            while first := [slot for slot in self._pending if slot in slots][: self._shapes.canvases]:
                self._decode([], first + self._riders(slots, self._shapes.canvases - len(first)))
            for group in self._groups(rows):
                riders = self._riders(slots, self._shapes.canvases - len(group))
                results |= self._decode(group, riders, meanwhile)
                meanwhile = None
            return [results[row.slot] for row in rows]

    def stored(self, layer: int, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Bytes of K and V that a layer keeps of a slot's context, (kv_heads, tokens, bytes) each: for verification."""
        with self._usable():
            while slot in self._pending:
                self._decode([], [slot])
            first = self._slots.start(slot) if self._spec.layers[layer].kind == "sliding" else 0
            count, place = self._slots.length(slot) - first, self._placement.place(slot)
            keys, values = (self._memory.read(f"{name}.{layer}", place, count) for name in ("k", "v"))
            return keys, values

    def bytes_sent(self) -> int:
        """That crossed to the GPU so far."""
        return self._io.sent

    def bytes_received(self) -> int:
        return self._io.received

    def synchronize(self) -> None:
        """Waits for all that is queued: prompts are encoded while `encode` has returned."""
        with self._usable():
            self.device.synchronize()

    def _lengths(self) -> list[int]:
        return [length + len(self._pending.get(slot, _NOTHING)) for slot, length in enumerate(self._slots.lengths())]

    def _riders(self, others: set[int], room: int) -> list[int]:
        """Slots whose finished canvas can join a call in which they do not denoise."""
        return [slot for slot in self._pending if slot not in others][: max(room, 0)]

    def _groups(self, rows: Sequence[DenoiseRow]) -> list[list[DenoiseRow]]:
        """Rows of one call each: a call has so many, and gives the logits of one canvas."""
        apart = {row.slot for row in [row for row in rows if row.want_logits][1:]}
        others = [row for row in rows if row.slot not in apart]
        others.sort(key=lambda row: self._placement.place(row.slot))
        most = self._shapes.canvases
        together = [others[start : start + most] for start in range(0, len(others), most)]
        return together + [[row] for row in rows if row.slot in apart]

    def _prefill(self, slot: int, tokens: Ints) -> None:
        chunk = self._shapes.chunk
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            held = self._slots.length(slot)
            padded = self._builder.padded(held, len(piece))
            self._make_room(slot, padded)
            # Padded with its own tokens: equal ones would crowd the same experts.
            row = CallRow(slot, held, self._slots.start(slot), np.resize(piece, padded), None)
            seats = self._seats("encoder", padded)
            self._run(partial(self._builder.prompt, row), seats, self._placement.place(slot))
            self._slots.commit(slot, len(piece))

    def _decode(
        self, rows: Sequence[DenoiseRow], joining: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> dict[int, DenoiseResult]:
        """One call of the decoder's range: canvases that denoise, and slots whose finished canvas joins the context."""
        canvas = self._shapes.canvas
        by_slot: dict[int, DenoiseRow | None] = {row.slot: row for row in rows} | dict.fromkeys(joining)
        first = self._gather(list(by_slot))
        for slot, row in by_slot.items():
            self._make_room(slot, canvas)
            if row is not None and row.first:
                self._memory.clear_soft(self._placement.place(slot))
        ordered = sorted(by_slot, key=self._placement.place)
        call_rows = [self._call_row(slot, by_slot[slot]) for slot in ordered]
        seats = self._seats("decoder", len(ordered) * canvas)
        call = self._run(partial(self._builder.canvases, call_rows), seats, first, meanwhile)
        for slot in joining:
            self._slots.commit(slot, len(self._pending.pop(slot)))
        return self._results(call, first)

    def _call_row(self, slot: int, canvas: DenoiseRow | None) -> CallRow:
        tokens = self._pending[slot] if canvas is None else canvas.canvas
        return CallRow(slot, self._slots.length(slot), self._slots.start(slot), tokens, canvas)

    def _gather(self, slots: list[int]) -> int:
        """Brings slots to neighbouring places; the first of them."""
        first, pairs = self._placement.gather(slots, self._slots.length)
        for one, other in pairs:  # by now each is where the other was
            there, here = self._placement.place(other), self._placement.place(one)
            self._memory.exchange(there, here, self._held(one), self._held(other))
            for slot in (one, other):
                if not self._slots.length(slot):  # what stands at its new place is another's
                    self._memory.clear_soft(self._placement.place(slot))
        return first

    def _held(self, slot: int) -> Held:
        length = self._slots.length(slot)
        return Held(length, length - self._slots.start(slot), self._shapes.canvas if length else 0)

    def _make_room(self, slot: int, count: int) -> None:
        moved = self._slots.make_room(slot, count)
        if moved is not None:
            self._memory.move_to_front(self._placement.place(slot), *moved)

    def _seats(self, shape_range: str, tokens: int) -> int:
        """Places per expert to begin with; 0 where every expert takes every token."""
        moe = self._manifest.moe
        if moe.formulation != "capacity":
            return 0
        chosen = moe.encoder_capacity if shape_range == "encoder" else moe.decoder_capacity
        return min(chosen or tokens, tokens)

    def _run(
        self, build: Callable[[int], Call], seats: int, place: int, meanwhile: Callable[[], None] | None = None
    ) -> Call:
        """Queues a call, and repeats it with more seats until they suffice; waits only where there is an answer."""
        while True:
            call = build(seats)
            sizes, sent = call.sizes, self._io.send(call)

            def bindings(sizes: Sizes = sizes, sent: dict[str, int] = sent) -> tuple[Shapes, Addresses]:
                addresses = self._memory.addresses(place) | self._io.addresses(sizes, sent)
                shapes = self._builder.shapes(sizes) | self._io.buffer_shapes(sizes.rows)
                return shapes, addresses | self._io.aliases(addresses)

            # A prompt's sizes seldom come again, and a canvas of logits is for debugging.
            key = (sizes, place) if sizes.shape_range == "decoder" and not sizes.logits else None
            self._contexts.run(sizes.shape_range, key, bindings)
            self.calls += 1
            waits = self._io.receive(sizes)
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            if not waits:
                return call
            busiest = self._io.wait(sizes)
            if busiest <= seats or not seats:
                return call
            # Without seats for all, later layers ran on wrong numbers, and may want more seats still with right ones.
            self.repeated += 1
            seats = min(-(-busiest // _SEAT_STEP) * _SEAT_STEP, sizes.rows * sizes.tokens)

    def _results(self, call: Call, first: int) -> dict[int, DenoiseResult]:
        """What the host reads, and the soft embeddings brought back to their slots."""
        canvas, rows = self._shapes.canvas, call.rows
        if call.order == tuple(range(len(rows))) and rows:
            self._io.keep_soft(self._memory.address(SOFT, first), 0, len(rows))
        else:
            for turn, index in enumerate(call.order):
                self._io.keep_soft(self._memory.address(SOFT, first + index), turn, 1)
        argmax, sampled, entropy = self._io.results(call.sizes)
        logits = self._io.logits(call.sizes)
        results = {}
        for turn, index in enumerate(call.order):
            row = rows[index].canvas
            part = slice(turn * canvas, (turn + 1) * canvas)
            kept = logits if row is not None and row.want_logits else None
            results[rows[index].slot] = DenoiseResult(argmax[part], sampled[part], entropy[part], kept)
        return results

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Every verb: after the GPU has failed, none does anything any more."""
        if self._failed is not None:
            raise self._failed
        self.device.use()
        try:
            yield
        except DeviceError as error:
            self._failed = error
            raise
        except OutOfMemoryError as error:
            raise CapacityError(
                f"the GPU has no {error} left for a canvas of logits: serve the bundle with fewer slots"
            ) from None

    def warm_up(self, told: Callable[[int, int], None]) -> None:
        """Runs every number of canvases until its step is captured, so that no request waits for that."""
        most, canvas = self._shapes.canvases, self._shapes.canvas
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self._spec.vocab_size, max(most, 2) * canvas).astype(np.int32)
        for count in range(1, most + 1):
            for slot in range(count):
                self.encode([EncodeRow(slot, tokens[: min(canvas // 2 + 1, self._shapes.chunk)], 0)])
            uniforms = np.zeros(canvas, np.float32)
            rows = [
                DenoiseRow(slot, tokens[slot * canvas : (slot + 1) * canvas], 1.0, uniforms, True)
                for slot in range(count)
            ]
            for _ in range(3):
                results = self.denoise(rows)
            if not all(np.isfinite(result.entropy).all() for result in results):
                raise InputError("the engine computes NaN: its weights are damaged; build the bundle again")
            told(count, most)
        for slot in range(most):
            self.release(slot)
