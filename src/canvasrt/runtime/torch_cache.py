"""K/V slots of the torch runner: where tokens are written, what each call may see, and the bounded sliding buffers.

Full-attention layers keep the whole context. Sliding layers keep a buffer that tokens are appended to linearly; when
it is full, the window that the next token still sees moves to the front. Keys are stored after RoPE, so a buffer index
and a position are independent. A canvas is written behind the context as scratch and overwritten by whatever comes
next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from canvasrt.errors import CapacityError
from canvasrt.ops.torch_formats import round_kv
from canvasrt.runtime.memory import sliding_rows
from canvasrt.runtime.protocol import RunnerLimits
from canvasrt.spec import LayerKind, ModelSpec

Tensor = torch.Tensor
Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Slot:
    length: int = 0  # context tokens
    start: int = 0  # position of the first token in the sliding buffers


class TorchCache:
    """The memory of all slots.

    Buffers are (slots, rows, kv_heads, dim): a token's K of all heads is one contiguous write.
    """

    def __init__(
        self,
        spec: ModelSpec,
        limits: RunnerLimits,
        device: torch.device,
        dtype: torch.dtype,
        rounds_to_fp8: bool = False,
    ) -> None:
        """``rounds_to_fp8``: K and V are kept as numbers that an FP8 cache could hold."""
        self._rounds_to_fp8 = rounds_to_fp8
        self._window = spec.sliding_window - 1  # committed tokens that a token sees before itself
        self._layers = spec.layers
        self._device = device
        self._dtype = dtype
        self._last_key: object = None
        self._last_call: CacheCall
        self.rows: dict[LayerKind, int] = {"full": limits.context, "sliding": sliding_rows(spec, limits)}
        self._slots = [_Slot() for _ in range(limits.slots)]
        # One more row than the slots have: padding of ragged calls is written there.
        self._flat = [
            [
                torch.zeros(
                    limits.slots * self.rows[layer.kind] + 1, layer.kv_heads, layer.head_dim, device=device, dtype=dtype
                )
                for _ in range(2)
            ]
            for layer in spec.layers
        ]
        self._views = [
            [flat[:-1].view(limits.slots, self.rows[layer.kind], *flat.shape[1:]) for flat in pair]
            for layer, pair in zip(spec.layers, self._flat, strict=True)
        ]

    def length(self, slot: int) -> int:
        return self._slots[slot].length

    def lengths(self) -> list[int]:
        return [slot.length for slot in self._slots]

    def release(self, slot: int) -> None:
        self._slots[slot] = _Slot()

    def rewind(self, slot: int, length: int) -> None:
        """Forgets the tokens from ``length`` on. Raises CapacityError when the window before them has been dropped."""
        self.check_rewind(slot, length)
        self._slots[slot].length = length
        if length == 0:
            self._slots[slot].start = 0

    def can_rewind(self, slot: int, length: int) -> bool:
        held, start = self._slots[slot].length, self._slots[slot].start
        return length == 0 or length >= held or max(0, length - self._window) >= start

    def check_rewind(self, slot: int, length: int) -> None:
        if not self.can_rewind(slot, length):
            start = self._slots[slot].start
            raise CapacityError(
                f"slot {slot} can't be rewound to {length} tokens: its sliding layers keep positions from {start} "
                f"on only. Rewind to {start + self._window} or more, or release the slot and encode again."
            )

    def commit(self, slot: int, count: int) -> None:
        """The ``count`` tokens last written belong to the context now."""
        self._slots[slot].length += count

    def open(self, slots: Sequence[int], counts: Sequence[int], width: int, canvas: int) -> "CacheCall":
        """Prepares a call that writes counts[i] <= width tokens behind the context of slots[i].

        The last ``canvas`` tokens of each row are a canvas, the ones before join the context.
        """
        for slot, count in zip(slots, counts, strict=True):
            self._make_room(slot, count)
        states = [self._slots[slot] for slot in slots]
        key = (tuple(slots), tuple((s.length, s.start) for s in states), tuple(counts), width, canvas)
        if key == self._last_key:
            return self._last_call  # the steps of a canvas share everything but the tokens
        held = np.array([[s.length] for s in states])
        start = np.array([[s.start] for s in states])
        call = CacheCall(
            self,
            {
                "full": self._plan("full", slots, held, counts, width, None, canvas),
                "sliding": self._plan("sliding", slots, held - start, counts, width, self._window, canvas),
            },
            positions=held + np.arange(width),
        )
        self._last_key, self._last_call = key, call
        return call

    def _plan(
        self,
        kind: LayerKind,
        slots: Sequence[int],
        held: Ints,
        counts: Sequence[int],
        width: int,
        window: int | None,
        canvas: int,
    ) -> "_Plan":
        """``held`` (rows, 1): buffer rows in use; ``window``: committed tokens that a token sees, None for all."""
        rows = self.rows[kind]
        if len(slots) == 1 and counts[0] == canvas == width:  # one canvas alone: all it reads is visible to all of it
            slot, first = slots[0], int(held[0, 0])
            place = slice(slot * rows + first, slot * rows + first + width)
            begin = 0 if window is None else max(0, first - window)
            return _Plan(None, place, None, slice(slot, slot + 1), begin, first + width, None)
        count = np.array(counts).reshape(-1, 1)
        column = np.arange(width)
        padding_row = len(self._slots) * rows
        write = np.array(slots).reshape(-1, 1) * rows + held + column
        write = np.where(column < count, write, padding_row)
        # Every canvas token sees the same committed tokens and the whole canvas: not a window per query. Padding looks
        # where the last real token does: an empty row of the mask would make NaN.
        seen_by = column[:1] if canvas == width else column
        query = (held + np.minimum(seen_by, count - max(canvas, 1)))[..., None]  # (rows, width or 1, 1)
        low = np.maximum(query - window, 0) if window is not None else np.zeros_like(query)
        in_canvas = ((seen_by >= count - canvas) & (canvas > 0))[..., None]
        high = np.where(in_canvas, (held + count - 1)[..., None], query)
        begin, end = int(low.min()), int((held + count).max())
        key = np.arange(begin, end)
        visible = (key >= low) & (key <= high)  # (rows, width or 1, keys)
        mask = None
        if not visible.all():
            added = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None]
            mask = torch.from_numpy(added).to(self._device, self._dtype)
        neighbours = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        return _Plan(
            write=torch.from_numpy(write.reshape(-1)).to(self._device),
            write_range=slice(int(write[0, 0]), int(write[0, 0]) + width)
            if len(slots) == 1 and counts[0] == width
            else None,
            slots=torch.tensor(slots, device=self._device),
            slot_range=slice(slots[0], slots[0] + len(slots)) if neighbours else None,
            begin=begin,
            end=end,
            mask=mask,
        )

    def stored(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V (tokens, kv_heads, dim) of the context that a layer still holds, for checks."""
        state = self._slots[slot]
        begin = state.start if self._layers[layer].kind == "sliding" else 0
        keys, values = (view[slot, : state.length - begin].clone() for view in self._views[layer])
        return keys, values

    def kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (round_kv(k), round_kv(v)) if self._rounds_to_fp8 else (k, v)

    def places(self, layer: int, plans: "dict[LayerKind, _Plan]") -> "tuple[_Place, _Place]":
        """Where a call's K and V of one layer go, and what it sees of the buffers."""
        plan = plans[self._layers[layer].kind]
        return self._place(layer, 0, plan), self._place(layer, 1, plan)

    def _place(self, layer: int, which: int, plan: "_Plan") -> "_Place":
        flat, view = self._flat[layer][which], self._views[layer][which]
        one_row = seen = None
        if plan.write_range is not None:
            start, stop = plan.write_range.start, plan.write_range.stop
            one_row = flat.narrow(0, start, stop - start).unsqueeze(0)
        if plan.slot_range is not None:
            first, count = plan.slot_range.start, plan.slot_range.stop - plan.slot_range.start
            seen = view.narrow(0, first, count).narrow(1, plan.begin, plan.end - plan.begin).transpose(1, 2)
        return _Place(plan, flat, view, one_row, seen)

    def _make_room(self, slot: int, count: int) -> None:
        """Moves the visible window to the front of the slot's sliding buffers when ``count`` tokens
        don't fit behind it.
        """
        state = self._slots[slot]
        held = state.length - state.start
        if held + count <= self.rows["sliding"]:
            return
        keep = min(held, self._window)
        for layer, pair in zip(self._layers, self._views, strict=True):
            if layer.kind == "sliding":
                for view in pair:
                    # clone: source and destination may overlap
                    view[slot, :keep] = view[slot, held - keep : held].clone()
        state.start = state.length - keep


@dataclass(frozen=True, slots=True)
class _Plan:
    """One call's use of the buffers of one kind of layer."""

    write: Tensor | None  # (rows * width,) flat row that each new token goes to
    write_range: slice | None  # the same, for a single row without padding: a plain copy
    slots: Tensor | None  # (rows,)
    slot_range: slice | None  # the same, when the slots are neighbours: then reading copies nothing
    begin: int  # buffer rows read: [begin, end)
    end: int
    mask: Tensor | None  # (rows, 1, width or 1, end - begin) added to the scores; None: everything read is visible


@dataclass(frozen=True, slots=True)
class _Place:
    """One call's use of one buffer; the views are made once and serve all steps of a canvas."""

    plan: _Plan
    flat: Tensor  # (all rows of all slots, kv_heads, dim)
    view: Tensor  # (slots, rows, kv_heads, dim)
    one_row: Tensor | None  # (1, width, kv_heads, dim): a view of what is written, when it is one piece
    seen: Tensor | None  # (rows, kv_heads, keys, dim): a view of what is read, when the slots are neighbours

    def write(self, new: Tensor) -> Tensor:
        """Stores new (rows, tokens, kv_heads, dim) and returns what the call sees, (rows, kv_heads, keys, dim)."""
        if self.one_row is not None:
            self.one_row.copy_(new)
        else:
            assert self.plan.write is not None  # one of the two is there
            self.flat.index_copy_(0, self.plan.write, new.reshape(-1, *self.flat.shape[1:]))
        if self.seen is not None:
            return self.seen
        assert self.plan.slots is not None  # one of the two is there
        return self.view[:, self.plan.begin : self.plan.end].index_select(0, self.plan.slots).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class CacheCall:
    """Implements canvasrt.ops.protocol.Cache for one call."""

    cache: TorchCache
    plans: "dict[LayerKind, _Plan]"
    positions: Ints  # (rows, tokens) of the new tokens
    _places: dict[int, tuple[_Place, _Place]] = field(default_factory=dict)

    @property
    def masks(self) -> dict[LayerKind, Tensor | None]:
        return {kind: plan.mask for kind, plan in self.plans.items()}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        places = self._places.get(layer)
        if places is None:
            places = self._places[layer] = self.cache.places(layer, self.plans)
        k, v = self.cache.kept(k, v)
        return places[0].write(k), places[1].write(v)
