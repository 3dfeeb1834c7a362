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

from canvasrt.network.attention import Rotary
from canvasrt.ops.protocol import Ops
from canvasrt.ops.torch_formats import round_kv
from canvasrt.runtime.memory import sliding_rows
from canvasrt.runtime.protocol import RunnerLimits
from canvasrt.runtime.slots import Slots
from canvasrt.spec import LayerKind, ModelSpec

Tensor = torch.Tensor
Ints = NDArray[np.int64]

CALLS = 32  # calls whose plans are kept: planning one takes 0.3 ms, a twelfth of a step of the demo
MASKED = 1 << 20  # numbers in the masks of all that are kept; a single one may have more


class TorchCache:
    """The memory of all ``slots``.

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
        self._canvas = limits.canvas
        self._layers = spec.layers
        self._device = device
        self._dtype = dtype
        self._calls: dict[object, CacheCall] = {}  # the ones asked for last, oldest first
        self.rows: dict[LayerKind, int] = {"full": limits.context, "sliding": sliding_rows(spec, limits)}
        self.slots = Slots(limits.slots, self._window, self.rows["sliding"])
        self._flat = [
            [
                torch.zeros(
                    limits.slots * self.rows[layer.kind], layer.kv_heads, layer.head_dim, device=device, dtype=dtype
                )
                for _ in range(2)
            ]
            for layer in spec.layers
        ]
        self._views = [
            [flat.view(limits.slots, self.rows[layer.kind], *flat.shape[1:]) for flat in pair]
            for layer, pair in zip(spec.layers, self._flat, strict=True)
        ]

    def open(self, pieces: Sequence[tuple[int, int]], canvases: Sequence[int]) -> "CacheCall":
        """Prepares a call: of each slot in ``pieces`` so many tokens that join its context, then whole ``canvases``.

        The call's tokens are one sequence, the pieces one after another and then the canvases, without padding. A slot
        may bring both; its canvas lies behind its piece.
        """
        joining = dict(pieces)
        for slot in {*joining, *canvases}:
            self._make_room(slot, joining.get(slot, 0) + (self._canvas if slot in canvases else 0))
        used = sorted({*joining, *canvases})
        states = tuple((slot, self.slots.length(slot), self.slots.start(slot)) for slot in used)
        key = (tuple(pieces), tuple(canvases), states)
        if (known := self._calls.pop(key, None)) is not None:
            self._calls[key] = known
            return known  # the steps of a canvas share everything but the tokens, and so do prompts of the same length
        sequences = [_Sequence(slot, self.slots.length(slot), count) for slot, count in pieces]
        behind = [self.slots.length(slot) + joining.get(slot, 0) for slot in canvases]
        rows = [_Sequence(slot, first, self._canvas) for slot, first in zip(canvases, behind, strict=True)]
        call = CacheCall(
            self,
            {
                "full": self._plan("full", sequences, rows, None),
                "sliding": self._plan("sliding", sequences, rows, self._window),
            },
            positions=np.concatenate([np.arange(each.first, each.first + each.count) for each in (*sequences, *rows)]),
        )
        self._calls[key] = call
        while len(self._calls) > 1 and (
            len(self._calls) > CALLS or sum(each.masked for each in self._calls.values()) > MASKED
        ):
            del self._calls[next(iter(self._calls))]
        return call

    def _plan(
        self, kind: LayerKind, pieces: "Sequence[_Sequence]", canvases: "Sequence[_Sequence]", window: int | None
    ) -> "_Plan":
        """``window``: committed tokens that a token sees, None for all."""
        rows, groups, places = self.rows[kind], [], []
        starts = {each.slot: self.slots.start(each.slot) if kind == "sliding" else 0 for each in (*pieces, *canvases)}
        for each in (*pieces, *canvases):
            first = each.slot * rows + each.first - starts[each.slot]
            places.append(np.arange(first, first + each.count))
        begin = 0
        for piece in pieces:
            groups.append(self._causal(begin, piece, piece.first - starts[piece.slot], window))
            begin += piece.count
        if canvases:
            groups.append(self._whole(begin, canvases, [each.first - starts[each.slot] for each in canvases], window))
        write = np.concatenate(places)
        one_piece = write[-1] - write[0] == len(write) - 1 and bool((np.diff(write) == 1).all())
        return _Plan(
            write=None if one_piece else torch.from_numpy(write).to(self._device),
            write_range=slice(int(write[0]), int(write[-1]) + 1) if one_piece else None,
            groups=tuple(groups),
        )

    def _causal(self, begin: int, piece: "_Sequence", first: int, window: int | None) -> "_Group":
        """Tokens that see what comes before them; ``first`` is the buffer row of the first."""
        query = np.arange(first, first + piece.count)[:, None]
        low = np.zeros_like(query) if window is None else np.maximum(query - window, 0)
        key = np.arange(int(low.min()), first + piece.count)
        visible = (key >= low) & (key <= query)
        return self._group(begin, [piece], int(key[0]), first + piece.count, visible[None])

    def _whole(self, begin: int, canvases: "Sequence[_Sequence]", firsts: list[int], window: int | None) -> "_Group":
        """Canvases: all tokens of one see the same committed tokens and the whole canvas, not a window of their own."""
        first = np.array(firsts).reshape(-1, 1, 1)
        low = np.zeros_like(first) if window is None else np.maximum(first - window, 0)
        key = np.arange(int(low.min()), int(first.max()) + self._canvas)
        visible = (key >= low) & (key < first + self._canvas)
        return self._group(begin, canvases, int(key[0]), int(key[-1]) + 1, visible)

    def _group(
        self, begin: int, sequences: "Sequence[_Sequence]", low: int, high: int, visible: NDArray[np.bool_]
    ) -> "_Group":
        """``visible`` (rows, tokens or 1, keys)."""
        mask = None
        if not visible.all():
            added = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None]
            mask = torch.from_numpy(added).to(self._device, self._dtype)
        slots = [each.slot for each in sequences]
        neighbours = slots == list(range(slots[0], slots[0] + len(slots)))
        return _Group(
            tokens=slice(begin, begin + sum(each.count for each in sequences)),
            slots=None if neighbours else torch.tensor(slots, device=self._device),
            slot_range=slice(slots[0], slots[0] + len(slots)) if neighbours else None,
            rows=len(slots),
            begin=low,
            end=high,
            mask=mask,
        )

    def stored(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V (tokens, kv_heads, dim) of the context that a layer still holds, for checks."""
        begin = self.slots.start(slot) if self._layers[layer].kind == "sliding" else 0
        keys, values = (view[slot, : self.slots.length(slot) - begin].clone() for view in self._views[layer])
        return keys, values

    def kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (round_kv(k), round_kv(v)) if self._rounds_to_fp8 else (k, v)

    def buffers(self, layer: int, plans: "dict[LayerKind, _Plan]") -> "tuple[_Buffer, _Buffer, _Plan]":
        """A call's use of the K and the V buffer of one layer."""
        plan = plans[self._layers[layer].kind]
        keys, values = (self._buffer(layer, which, plan) for which in range(2))
        return keys, values, plan

    def _buffer(self, layer: int, which: int, plan: "_Plan") -> "_Buffer":
        flat, view = self._flat[layer][which], self._views[layer][which]
        one_piece = None
        if plan.write_range is not None:
            start, stop = plan.write_range.start, plan.write_range.stop
            one_piece = flat.narrow(0, start, stop - start).unsqueeze(0)
        seen: list[Tensor | None] = []
        for group in plan.groups:
            if group.slot_range is None:
                seen.append(None)
            else:
                rows = view.narrow(0, group.slot_range.start, group.rows)
                seen.append(rows.narrow(1, group.begin, group.end - group.begin).transpose(1, 2))
        return _Buffer(plan, flat, view, one_piece, tuple(seen))

    def _make_room(self, slot: int, count: int) -> None:
        moved = self.slots.make_room(slot, count)
        if moved is None:
            return
        first, keep = moved
        for layer, pair in zip(self._layers, self._views, strict=True):
            if layer.kind == "sliding":
                for view in pair:
                    # clone: source and destination may overlap
                    view[slot, :keep] = view[slot, first : first + keep].clone()


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens that a call adds behind what a slot holds."""

    slot: int
    first: int  # position of the first of them
    count: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of equal length that attend together: one piece of a context, or all canvases of a call."""

    tokens: slice  # of the call's sequence
    rows: int
    slots: Tensor | None  # (rows,)
    slot_range: slice | None  # the same, when the slots are neighbours: then reading copies nothing
    begin: int  # buffer rows read: [begin, end)
    end: int
    mask: Tensor | None  # (rows, 1, tokens of a row or 1, end - begin), added; None: everything read is visible


@dataclass(frozen=True, slots=True)
class _Plan:
    """One call's use of the buffers of one kind of layer."""

    write: Tensor | None  # (tokens,) flat row that each new token goes to
    write_range: slice | None  # the same, where they lie in one piece: a plain copy
    groups: tuple[_Group, ...]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """One call's use of one buffer; the views are made once and serve all steps of a canvas."""

    plan: _Plan
    flat: Tensor  # (all rows of all slots, kv_heads, dim)
    view: Tensor  # (slots, rows, kv_heads, dim)
    one_piece: Tensor | None  # (1, tokens, kv_heads, dim): a view of what is written
    seen: tuple[Tensor | None, ...]  # by group, (rows, kv_heads, keys, dim): a view of what is read

    def write(self, new: Tensor) -> None:
        """Stores new (1, tokens, kv_heads, dim)."""
        if self.one_piece is not None:
            self.one_piece.copy_(new)
        else:
            assert self.plan.write is not None  # one of the two is there
            self.flat.index_copy_(0, self.plan.write, new[0])

    def read(self, index: int) -> Tensor:
        """What the group of that index sees, (rows, kv_heads, keys, dim)."""
        seen, group = self.seen[index], self.plan.groups[index]
        if seen is not None:
            return seen
        assert group.slots is not None  # one of the two is there
        return self.view[:, group.begin : group.end].index_select(0, group.slots).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class CacheCall:
    """Implements canvasrt.ops.protocol.Cache for one call, whose tokens are one row (1, tokens)."""

    cache: TorchCache
    plans: "dict[LayerKind, _Plan]"
    positions: Ints  # (tokens,) of the new tokens
    rotary: dict[LayerKind, Rotary[Tensor]] = field(default_factory=dict)  # of the positions; the runner's to fill
    _buffers: dict[int, tuple[_Buffer, _Buffer, _Plan]] = field(default_factory=dict)

    @property
    def masked(self) -> int:
        """Numbers that its masks hold."""
        masks = [group.mask for plan in self.plans.values() for group in plan.groups]
        return sum(mask.numel() for mask in masks if mask is not None)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values, _ = self._of(layer)
        k, v = self.cache.kept(k, v)
        keys.write(k)
        values.write(v)

    def attend(self, ops: Ops[Tensor], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.append(layer, k, v)  # of all groups: a canvas sees the piece before it
        keys, values, plan = self._of(layer)
        results = []
        for index, group in enumerate(plan.groups):
            queries = q
            if len(plan.groups) > 1 or group.rows > 1:
                queries = q[0, group.tokens].view(group.rows, -1, *q.shape[2:])
            mixed = ops.attention(queries, keys.read(index), values.read(index), group.mask)
            results.append(mixed if group.rows == 1 else mixed.view(1, -1, mixed.shape[-1]))
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def _of(self, layer: int) -> tuple[_Buffer, _Buffer, _Plan]:
        found = self._buffers.get(layer)
        if found is None:
            found = self._buffers[layer] = self.cache.buffers(layer, self.plans)
        return found
