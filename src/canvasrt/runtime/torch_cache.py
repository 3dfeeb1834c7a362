"""K/V slots of the torch runner: where tokens are written, what each call may see, and the bounded sliding buffers.

Full-attention layers keep the whole context. Sliding layers keep a buffer that tokens are appended to linearly; when
it is full, the window that the next token still sees moves to the front. Keys are stored after RoPE, so a buffer index
and a position are independent. A canvas is written behind the context as scratch and overwritten by whatever comes
next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from canvasrt.errors import CapacityError
from canvasrt.runtime.memory import sliding_rows
from canvasrt.runtime.protocol import RunnerLimits
from canvasrt.spec import LayerKind, ModelSpec

Tensor = torch.Tensor


@dataclass(slots=True)
class _Slot:
    length: int = 0  # context tokens
    start: int = 0  # position of the first token in the sliding buffers


class TorchCache:
    """The memory of all slots.

    Buffers are (slots, rows, kv_heads, dim): a token's K of all heads is one contiguous write.
    """

    def __init__(self, spec: ModelSpec, limits: RunnerLimits, device: torch.device, dtype: torch.dtype) -> None:
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

    def check_rewind(self, slot: int, length: int) -> None:
        start = self._slots[slot].start
        if 0 < length < self._slots[slot].length and max(0, length - self._window) < start:
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
        held = torch.tensor([s.length for s in states]).view(-1, 1)
        start = torch.tensor([s.start for s in states]).view(-1, 1)
        call = CacheCall(
            self,
            {
                "full": self._plan("full", slots, held, counts, width, None, canvas),
                "sliding": self._plan("sliding", slots, held - start, counts, width, self._window, canvas),
            },
            positions=held + torch.arange(width),
        )
        self._last_key, self._last_call = key, call
        return call

    def _plan(
        self,
        kind: LayerKind,
        slots: Sequence[int],
        held: Tensor,
        counts: Sequence[int],
        width: int,
        window: int | None,
        canvas: int,
    ) -> "_Plan":
        """``held`` (rows, 1): buffer rows in use; ``window``: committed tokens that a token sees, None for all."""
        rows = self.rows[kind]
        count = torch.tensor(counts).view(-1, 1)
        column = torch.arange(width)
        padding_row = len(self._slots) * rows
        write = torch.tensor(slots).view(-1, 1) * rows + held + column
        write = torch.where(column < count, write, padding_row)
        # Every canvas token sees the same committed tokens and the whole canvas: not a window per query. Padding looks
        # where the last real token does: an empty row of the mask would make NaN.
        seen_by = column[:1] if canvas == width else column
        query = (held + torch.minimum(seen_by, count - max(canvas, 1))).unsqueeze(-1)  # (rows, width or 1, 1)
        low = (query - window).clamp(min=0) if window is not None else torch.zeros_like(query)
        in_canvas = ((seen_by >= count - canvas) & (canvas > 0)).unsqueeze(-1)
        high = torch.where(in_canvas, (held + count - 1).unsqueeze(-1), query)
        begin, end = int(low.min()), int((held + count).max())
        key = torch.arange(begin, end)
        visible = (key >= low) & (key <= high)  # (rows, width or 1, keys)
        mask = None if bool(visible.all()) else torch.where(visible, 0.0, -torch.inf).unsqueeze(1)
        neighbours = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        return _Plan(
            write=write.flatten().to(self._device),
            write_range=slice(int(write[0, 0]), int(write[0, 0]) + width)
            if len(slots) == 1 and counts[0] == width
            else None,
            slots=torch.tensor(slots, device=self._device),
            slot_range=slice(slots[0], slots[0] + len(slots)) if neighbours else None,
            begin=begin,
            end=end,
            mask=None if mask is None else mask.to(self._device, self._dtype),
        )

    def stored(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V (tokens, kv_heads, dim) of the context that a layer still holds, for checks."""
        state = self._slots[slot]
        begin = state.start if self._layers[layer].kind == "sliding" else 0
        keys, values = (view[slot, : state.length - begin].clone() for view in self._views[layer])
        return keys, values

    def write(self, layer: int, plans: "dict[LayerKind, _Plan]", k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (rows, tokens, kv_heads, dim).

        Returns what the call sees of them, (rows, kv_heads, keys, dim).
        """
        plan = plans[self._layers[layer].kind]
        return self._write_one(layer, 0, plan, k), self._write_one(layer, 1, plan, v)

    def _write_one(self, layer: int, which: int, plan: "_Plan", new: Tensor) -> Tensor:
        flat = self._flat[layer][which]
        if plan.write_range is not None:
            flat[plan.write_range] = new[0]
        else:
            flat.index_copy_(0, plan.write, new.reshape(-1, *flat.shape[1:]))
        view = self._views[layer][which]
        if plan.slot_range is not None:
            seen = view[plan.slot_range, plan.begin : plan.end]
        else:
            seen = view[:, plan.begin : plan.end].index_select(0, plan.slots)
        return seen.transpose(1, 2)

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

    write: Tensor  # (rows * width,) flat row that each new token goes to
    write_range: slice | None  # the same, for a single row without padding: a plain copy
    slots: Tensor  # (rows,)
    slot_range: slice | None  # the same, when the slots are neighbours: then reading copies nothing
    begin: int  # buffer rows read: [begin, end)
    end: int
    mask: Tensor | None  # (rows, 1, width or 1, end - begin) added to the scores; None: everything read is visible


@dataclass(frozen=True, slots=True)
class CacheCall:
    """Implements canvasrt.ops.protocol.Cache for one call."""

    cache: TorchCache
    plans: "dict[LayerKind, _Plan]"
    positions: Tensor  # (rows, tokens) of the new tokens, on the CPU

    @property
    def masks(self) -> dict[LayerKind, Tensor | None]:
        return {kind: plan.mask for kind, plan in self.plans.items()}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.write(layer, self.plans, k, v)
