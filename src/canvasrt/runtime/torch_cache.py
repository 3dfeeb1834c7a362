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
        multiple: int = 1,
    ) -> None:
        """``rounds_to_fp8``: K and V are kept as numbers that an FP8 cache could hold.

        Pieces of contexts are followed by tokens that nobody sees, so that they are a multiple of ``multiple``.
        """
        self._rounds_to_fp8 = rounds_to_fp8
        self._window = spec.sliding_window - 1  # committed tokens that a token sees before itself
        self._canvas = limits.canvas
        self._layers = spec.layers
        self._device = device
        self._dtype = dtype
        self._multiple = multiple
        self._calls: dict[object, CacheCall] = {}  # the ones asked for last, oldest first
        self.rows: dict[LayerKind, int] = {"full": limits.context, "sliding": sliding_rows(spec, limits)}
        self._nobodys = {kind: limits.slots * rows for kind, rows in self.rows.items()}  # first row of no slot
        self.slots = Slots(limits.slots, self._window, self.rows["sliding"])
        self._flat = [
            [
                # The last rows belong to no slot: what nobody sees is written there.
                torch.zeros(
                    self._nobodys[layer.kind] + multiple - 1,
                    layer.kv_heads,
                    layer.head_dim,
                    device=device,
                    dtype=dtype,
                )
                for _ in range(2)
            ]
            for layer in spec.layers
        ]
        self._views = [
            [
                flat[: self._nobodys[layer.kind]].view(limits.slots, self.rows[layer.kind], *flat.shape[1:])
                for flat in pair
            ]
            for layer, pair in zip(spec.layers, self._flat, strict=True)
        ]

    def open(self, pieces: Sequence[tuple[int, int]], canvases: Sequence[int]) -> "CacheCall":
        """Prepares a call: of each slot in ``pieces`` so many tokens that join its context, then whole ``canvases``.

        The call's tokens are one sequence: the pieces one after another, ``CacheCall.unseen`` tokens that nobody sees,
        and the canvases. A slot may bring a piece and a canvas, which then lies behind its piece.
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
        unseen = -sum(count for _, count in pieces) % self._multiple
        parts = [np.arange(each.first, each.first + each.count) for each in (*sequences, *rows)]
        parts.insert(len(sequences), np.zeros(unseen, np.int64))
        call = CacheCall(
            self,
            {
                "full": self._plan("full", sequences, unseen, rows, None),
                "sliding": self._plan("sliding", sequences, unseen, rows, self._window),
            },
            positions=np.concatenate(parts),
            unseen=unseen,
        )
        self._calls[key] = call
        while len(self._calls) > 1 and (
            len(self._calls) > CALLS or sum(each.masked for each in self._calls.values()) > MASKED
        ):
            del self._calls[next(iter(self._calls))]
        return call

    def _plan(
        self,
        kind: LayerKind,
        pieces: "Sequence[_Sequence]",
        unseen: int,
        canvases: "Sequence[_Sequence]",
        window: int | None,
    ) -> "_Plan":
        """``window``: committed tokens that a token sees, None for all."""
        rows, groups, places = self.rows[kind], [], []
        starts = {each.slot: self.slots.start(each.slot) if kind == "sliding" else 0 for each in (*pieces, *canvases)}
        for each in (*pieces, *canvases):
            first = each.slot * rows + each.first - starts[each.slot]
            places.append(np.arange(first, first + each.count))
        nobodys = self._nobodys[kind]
        places.insert(len(pieces), np.arange(nobodys, nobodys + unseen))
        begin = 0
        for piece in pieces:
            groups.append(self._causal(begin, piece, starts[piece.slot], window))
            begin += piece.count
        begin += unseen
        for canvas in canvases:
            groups.append(self._whole(begin, canvas, canvas.first - starts[canvas.slot], window))
            begin += canvas.count
        write = np.concatenate(places)
        one_piece = write[-1] - write[0] == len(write) - 1 and bool((np.diff(write) == 1).all())
        return _Plan(
            write=None if one_piece else torch.from_numpy(write).to(self._device),
            write_range=slice(int(write[0]), int(write[-1]) + 1) if one_piece else None,
            groups=tuple(groups),
        )

    def _causal(self, begin: int, piece: "_Sequence", start: int, window: int | None) -> "_Group":
        """Tokens that see what comes before them; ``start`` is the position of the first that the buffer holds."""
        first = piece.first - start
        query = np.arange(first, first + piece.count)[:, None]
        low = np.zeros_like(query) if window is None else np.maximum(query - window, 0)
        key = np.arange(int(low.min()), first + piece.count)
        # A mask even where it hides nothing: it says that this is a piece of something.
        added = np.where((key >= low) & (key <= query), np.float32(0), np.float32(-np.inf))
        mask = torch.from_numpy(added[None, None]).to(self._device, self._dtype)
        tokens = slice(begin, begin + piece.count)
        return _Group(tokens, piece.slot, int(key[0]), first + piece.count, start + int(key[0]), mask)

    def _whole(self, begin: int, canvas: "_Sequence", first: int, window: int | None) -> "_Group":
        """A canvas, whose tokens all see the same committed tokens and all of it, not a window of their own.

        Each for itself: keys that are padded to those of another canvas would change the order of its sums.
        """
        low = 0 if window is None else max(first - window, 0)
        return _Group(slice(begin, begin + canvas.count), canvas.slot, low, first + canvas.count, 0, None)

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
        seen = tuple(
            view.narrow(0, group.slot, 1).narrow(1, group.begin, group.end - group.begin).transpose(1, 2)
            for group in plan.groups
        )
        return _Buffer(plan, flat, one_piece, seen)

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
    """Tokens of one slot that attend together: a piece of its context, or its canvas."""

    tokens: slice  # of the call's sequence
    slot: int
    begin: int  # buffer rows read: [begin, end)
    end: int
    first: int  # position of the first of them, for pieces
    mask: Tensor | None  # (1, 1, tokens, end - begin), added; None for canvases, which see all that is read


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
    one_piece: Tensor | None  # (1, tokens, kv_heads, dim): a view of what is written
    seen: tuple[Tensor, ...]  # by group, (1, kv_heads, keys, dim): a view of what is read

    def write(self, new: Tensor) -> None:
        """Stores new (1, tokens, kv_heads, dim)."""
        if self.one_piece is not None:
            self.one_piece.copy_(new)
        else:
            assert self.plan.write is not None  # one of the two is there
            self.flat.index_copy_(0, self.plan.write, new[0])


@dataclass(frozen=True, slots=True)
class CacheCall:
    """Implements canvasrt.ops.protocol.Cache for one call, whose tokens are one row (1, tokens)."""

    cache: TorchCache
    plans: "dict[LayerKind, _Plan]"
    positions: Ints  # (tokens,) of the new tokens
    unseen: int  # tokens between the pieces and the canvases
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
            queries = q if len(plan.groups) == 1 and not self.unseen else q[:, group.tokens]
            results.append(ops.attention(queries, keys.seen[index], values.seen[index], group.mask, group.first))
        if self.unseen:
            pieces = sum(group.mask is not None for group in plan.groups)
            results.insert(pieces, results[0].new_zeros(1, self.unseen, results[0].shape[-1]))
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def _of(self, layer: int) -> tuple[_Buffer, _Buffer, _Plan]:
        found = self._buffers.get(layer)
        if found is None:
            found = self._buffers[layer] = self.cache.buffers(layer, self.plans)
        return found
