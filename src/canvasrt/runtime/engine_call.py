"""One call of the text engine as arrays: what each token is, sees and where its K and V go. docs/engine.md lists them.

What a canvas's steps have in common (`constants`) is apart from what changes with each (`step_inputs`), so that only
the second crosses to the GPU every time. NumPy only; knows nothing of devices or memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from canvasrt.bundle.manifest import Shapes
from canvasrt.runtime.protocol import DenoiseRow
from canvasrt.runtime.rows import filter_limits, is_limited
from canvasrt.spec import LayerKind, LayerSpec, ModelSpec

Ints = NDArray[np.int32]
Arrays = dict[str, NDArray[np.generic]]

KEY_STEP = 512  # the full layers read a multiple of it: each length is a shape, with kernels and a graph of its own
TOKEN_STEP = 64  # a piece of a prompt is padded to a multiple of it, for the same reason
_STEPS_PER_DOUBLING = 16


@dataclass(frozen=True, slots=True)
class CallRow:
    """One row of a call: tokens behind what a slot holds, that join its context or are a canvas."""

    slot: int
    held: int  # context tokens
    start: int  # position of the first token in the sliding buffers
    tokens: Ints
    canvas: DenoiseRow | None  # None: they join the context


class Sizes(NamedTuple):
    """All lengths that vary between calls: two calls of the same sizes can share kernels and a captured graph."""

    shape_range: str
    rows: int
    tokens: int  # of each row
    head: int  # tokens that go through LM head and sampler
    limited: int  # of those, the last ones, which have top-k or top-p
    logits: int
    keys: int
    seats: int


@dataclass(frozen=True, slots=True)
class Call:
    """``order``: rows that denoise, as indices into ``rows``, in the order of their tokens in the head's outputs."""

    sizes: Sizes
    rows: tuple[CallRow, ...]
    order: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Calls with the same key have the same constants."""
        rows = tuple(
            (row.slot, row.held, row.start, row.canvas and (row.canvas.top_k, row.canvas.top_p, row.canvas.want_logits))
            for row in self.rows
        )
        return (self.sizes, rows)


class CallBuilder:
    """``key_step`` and ``token_step``: sizes are rounded up to a multiple of them, where there is room."""

    def __init__(self, spec: ModelSpec, shapes: Shapes, key_step: int = KEY_STEP, token_step: int = TOKEN_STEP) -> None:
        self._spec = spec
        self._shapes = shapes
        self._key_step, self._token_step = key_step, token_step
        self.kinds: dict[LayerKind, LayerSpec] = {layer.kind: layer for layer in spec.layers}
        self._frequencies = {kind: _inverse_frequencies(layer) for kind, layer in self.kinds.items()}

    def padded(self, held: int, count: int) -> int:
        """Tokens of a call that adds ``count`` to a slot: padding is written behind them, and nobody sees it."""
        wanted = min(_up(count, self._token_step), self._shapes.chunk)
        return wanted if held + wanted <= self._shapes.context else count

    def prompt(self, row: CallRow, seats: int) -> Call:
        """A piece of a prompt in the encoder's range; ``row.tokens`` are padded already."""
        count = len(row.tokens)
        return Call(Sizes("encoder", 1, count, 0, 0, 0, self._keys([row], count), seats), (row,), ())

    def canvases(self, rows: Sequence[CallRow], seats: int) -> Call:
        """Canvases in the decoder's range, in the order of their places: denoised, or finished and joining."""
        count = self._shapes.canvas
        vocabulary = self._spec.vocab_size
        denoised = [(index, row.canvas) for index, row in enumerate(rows) if row.canvas is not None]
        denoised.sort(key=lambda pair: is_limited(pair[1], vocabulary))  # stable: the engine wants limited rows last
        limited = sum(is_limited(canvas, vocabulary) for _, canvas in denoised)
        logits = sum(canvas.want_logits for _, canvas in denoised)
        sizes = Sizes(
            "decoder", len(rows), count, len(denoised) * count, limited * count, logits * count,
            self._keys(rows, count), seats,
        )  # fmt: skip
        return Call(sizes, tuple(rows), tuple(index for index, _ in denoised))

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Of every input whose shape varies, but for the buffers of slots."""
        by_token, head, limited = (sizes.rows, sizes.tokens), (sizes.head, 1), (sizes.limited, 1)
        found: dict[str, tuple[int, ...]] = {
            "tokens": by_token, "is_canvas": (*by_token, 1), "soft": (*by_token, self._spec.hidden_size),
            "keys": (sizes.keys,), "head_rows": (sizes.head,), "temperature": head, "uniforms": head,
            "top_k": limited, "top_p": limited, "logit_rows": (sizes.logits,),
        }  # fmt: skip
        for kind, layer in self.kinds.items():
            found |= dict.fromkeys((f"cos.{kind}", f"sin.{kind}"), (*by_token, layer.head_dim // 2))
            found |= dict.fromkeys((f"first.{kind}", f"end.{kind}"), by_token)
            found[f"write.{kind}"] = (sizes.rows,)
        if sizes.seats:
            found["seats"] = (sizes.seats,)
        return found

    def constants(self, call: Call) -> Arrays:
        """What stays as it is from step to step."""
        rows, count = call.rows, call.sizes.tokens
        held = np.array([row.held for row in rows], np.int64)[:, None]
        start = np.array([row.start for row in rows], np.int64)[:, None]
        denoising = np.array([row.canvas is not None for row in rows])[:, None]
        position = held + np.arange(count)
        found: Arrays = {"is_canvas": np.repeat(denoising, count, 1)}
        # A canvas token sees the whole canvas, and of what is before it what the canvas's first token sees.
        query = np.where(denoising, held, position)
        end = np.where(denoising, held + count, position + 1)
        for kind in self.kinds:
            sliding = kind == "sliding"
            origin = start if sliding else np.zeros_like(start)
            first = np.maximum(query - self._shapes.window, 0) if sliding else np.zeros_like(query)
            found[f"first.{kind}"], found[f"end.{kind}"] = (
                (first - origin).astype(np.int32),
                (end - origin).astype(np.int32),
            )
            found[f"write.{kind}"] = (held - origin).astype(np.int32)
            angles = position.astype(np.float32)[..., None] * self._frequencies[kind]
            found[f"cos.{kind}"], found[f"sin.{kind}"] = np.cos(angles), np.sin(angles)
        return found | self._head_constants(call)

    def step_inputs(self, call: Call) -> Arrays:
        """What changes with every step."""
        count = call.sizes.tokens
        canvases = [canvas for index in call.order if (canvas := call.rows[index].canvas) is not None]
        temperatures = np.array([canvas.temperature for canvas in canvases], np.float32)
        return {
            "tokens": np.concatenate([row.tokens for row in call.rows]).astype(np.int32, copy=False),
            "temperature": np.repeat(temperatures, count),
            "uniforms": np.concatenate([canvas.uniforms for canvas in canvases] or [np.zeros(0, np.float32)]),
        }

    def _head_constants(self, call: Call) -> Arrays:
        count, vocabulary = call.sizes.tokens, self._spec.vocab_size
        canvases = [canvas for index in call.order if (canvas := call.rows[index].canvas) is not None]
        limits = [filter_limits(canvas, vocabulary) for canvas in canvases if is_limited(canvas, vocabulary)]
        token = np.arange(count)
        starts = np.array(call.order, np.int64)[:, None] * count
        wanted = [place * count + token for place, canvas in enumerate(canvases) if canvas.want_logits]
        return {
            "head_rows": (starts + token).astype(np.int32),
            "top_k": np.repeat(np.array([top_k for top_k, _ in limits], np.float32), count),
            "top_p": np.repeat(np.array([top_p for _, top_p in limits], np.float32), count),
            "logit_rows": np.concatenate(wanted or [token[:0]]).astype(np.int32),
        }

    def _keys(self, rows: Sequence[CallRow], count: int) -> int:
        """Rows of the full layers' buffers that a call reads: more than it needs, so that lengths come again."""
        needed = max(row.held for row in rows) + count
        step = max(self._key_step, (1 << needed.bit_length() - 1) // _STEPS_PER_DOUBLING)
        return min(_up(needed, step), self._shapes.context)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _inverse_frequencies(layer: LayerSpec) -> NDArray[np.float32]:
    """(head_dim / 2,) angles per position: zero for the pairs that the "proportional" embedding leaves unrotated.

    As transformers has them: a power rounded to float32, then float32 divisions. At position 100,000 a last bit of
    them is a thousandth of a radian.
    """
    exponents = np.arange(0, 2 * layer.rotary_pairs, 2, dtype=np.float32) / np.float32(layer.head_dim)
    powers = (np.float64(layer.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    turned = np.float32(1) / powers / np.float32(layer.rope_factor)
    return np.concatenate([turned, np.zeros(layer.head_dim // 2 - layer.rotary_pairs, np.float32)])
