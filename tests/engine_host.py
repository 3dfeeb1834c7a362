"""Runs an engine's network definition on the CPU: the interpreter computes, and this does what a runtime would do.

An EngineRunner, so that whatever holds for a runner can be asked of the network that is handed to the compiler. Every
call must fit one of the shape ranges that the engine is built for. What nobody may read is poisoned: K/V memory that
was never written holds ``poison``, the soft embeddings of a slot without a canvas NaN.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

import canvasrt.network.sampler
from canvasrt.compile.engine import NEXT, ROWS, MoeShapes, describe, ranges
from canvasrt.compile.shapes import engine_shapes
from canvasrt.compile.source import ModelSource
from canvasrt.engine_weights import made
from canvasrt.network.names import EMBEDDING
from canvasrt.ops.tensorrt_graph import EnginePrecision, Graph
from canvasrt.ops.tensorrt_weights import EngineWeights
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, RunnerLimits
from canvasrt.runtime.rows import check_denoise, check_encode, check_slot
from trt_interpreter import Interpreter

Tensors = dict[str, torch.Tensor]
POISON = 7.0


class QuietLogger(trt.ILogger):
    """Keeps what TensorRT says: the interpreter asks slices for sizes that are known at run time only."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity <= trt.ILogger.WARNING:
            self.lines.append(msg)


LOGGER = QuietLogger()  # TensorRT keeps the logger of the first builder of a process


@contextlib.contextmanager
def short_search(halvings: int) -> Iterator[None]:
    """Networks described meanwhile search top-k and top-p in fewer steps: those are a third of a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvasrt.network.sampler, "BISECTIONS", halvings)
        yield


class HostEngine:
    """``slots`` requests of ``context`` tokens; the K/V of a row is copied into a call and back, where a GPU binds it.

    ``calls`` counts runs of the network, ``overflows`` those repeated with more seats, and ``last`` keeps what the last
    one was given and gave. ``key_step``: of the full layers' buffers, a call reads a multiple of that many tokens.
    """

    key_step = 1

    def __init__(
        self,
        source: ModelSource,
        precision: EnginePrecision = "fp32",
        moe: MoeShapes | None = None,
        slots: int = 3,
        context: int = 128,
        chunk: int = 16,
    ) -> None:
        spec = self.spec = source.spec
        self.shapes = engine_shapes(spec, slots, context, chunk, slots)
        self.moe = moe or MoeShapes("dense")
        builder = trt.Builder(LOGGER)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        graph = Graph(trt, network, precision)
        weights = EngineWeights(graph, spec, source.formats, source.checkpoint, fill=True)
        (embedding,) = describe(graph, weights, spec, self.shapes, self.moe)
        self.ranges = ranges(spec, self.shapes, self.moe)
        self.interpreter = Interpreter(network)
        self.network, self._alive = network, (builder, graph)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        rows = torch.from_numpy(made(source.weights(), embedding).copy()).view(self._dtype)
        self._embedding = rows.view(spec.vocab_size, spec.hidden_size)
        self._forget(POISON)

    def _forget(self, poison: float) -> None:
        spec, slots = self.spec, self.shapes.slots
        self._buffers = {}
        for layer in spec.layers:
            length = self.shapes.context if layer.kind == "full" else self.shapes.sliding
            for name in ("k", "v"):
                shape = (slots, layer.kv_heads, length, layer.head_dim)
                self._buffers[f"{name}.{layer.index}"] = torch.full(shape, poison, dtype=self._dtype)
        self._length = [0] * slots
        self._start = [0] * slots  # position of the first token in the sliding buffers
        self._soft = torch.full((slots, spec.canvas_length, spec.hidden_size), torch.nan, dtype=self._dtype)
        self._has_soft = [False] * slots
        self.calls = self.overflows = 0
        self.last: tuple[Tensors, Tensors] = ({}, {})

    def fresh(self, poison: float = POISON) -> "HostEngine":
        """Another runner over the same network, with memory of its own."""
        other = copy.copy(self)
        other._forget(poison)
        return other

    @property
    def limits(self) -> RunnerLimits:
        shapes = self.shapes
        return RunnerLimits(shapes.slots, shapes.context, shapes.chunk, shapes.canvas, self.spec.vocab_size)

    def length(self, slot: int) -> int:
        check_slot(self.limits, slot)
        return self._length[slot]

    def can_rewind(self, slot: int, length: int) -> bool:
        return length in (0, self._length[slot]) or (
            length < self._length[slot] and max(0, length - self.shapes.window) >= self._start[slot]
        )

    def stored(self, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V that a layer keeps of a slot's context, (tokens, kv_heads, head_dim) each."""
        first = self._start[slot] if self.spec.layers[layer].kind == "sliding" else 0
        held = self._length[slot] - first
        keys, values = (self._buffers[f"{name}.{layer}"][slot, :, :held].transpose(0, 1) for name in ("k", "v"))
        return keys, values

    def release(self, slot: int) -> None:
        check_slot(self.limits, slot)
        self._length[slot] = self._start[slot] = 0
        self._soft[slot], self._has_soft[slot] = torch.nan, False

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        check_encode(self.limits, self._length, rows)
        for row in rows:
            if row.position < self._length[row.slot]:
                window_start = max(0, row.position - self.shapes.window)
                assert row.position == 0 or window_start >= self._start[row.slot], "the window was dropped"
                self._length[row.slot] = row.position
                self._start[row.slot] = min(self._start[row.slot], row.position)
            for first in range(0, len(row.tokens), self.shapes.chunk):
                piece = row.tokens[first : first + self.shapes.chunk]
                self._call("encoder", {row.slot: piece}, [])
                self._length[row.slot] += len(piece)

    def commit(self, rows: Sequence[EncodeRow], beside: Sequence[DenoiseRow]) -> list[DenoiseResult]:
        """Finished canvases encoded in the same call of the decoder's range in which others are denoised."""
        check_encode(self.limits, self._length, rows)
        check_denoise(self.limits, self._length, beside)
        assert all(row.position == self._length[row.slot] for row in rows)
        results = self._denoise(beside, rows)
        for row in rows:
            self._length[row.slot] += len(row.tokens)
        return results

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Any = None) -> list[DenoiseResult]:
        """One call of the network, or as many as there are rows that want logits: a call gives those of one canvas."""
        check_denoise(self.limits, self._length, rows)
        later = {row.slot for row in [row for row in rows if row.want_logits][1:]}
        calls = [[row for row in rows if row.slot not in later], *([row] for row in rows if row.slot in later)]
        found = {
            row.slot: each for call in calls if call for row, each in zip(call, self._denoise(call, []), strict=True)
        }
        return [found[row.slot] for row in rows]

    def _denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[EncodeRow]) -> list[DenoiseResult]:
        tokens = {row.slot: row.canvas for row in rows} | {row.slot: row.tokens for row in commits}
        order = sorted(rows, key=self._is_limited)  # those with limits last
        out = self._call("decoder", tokens, order)
        size = self.shapes.canvas
        logits = iter(out["logits"].split(size))
        results = {}
        for place, row in enumerate(order):
            part = slice(place * size, (place + 1) * size)
            self._soft[row.slot], self._has_soft[row.slot] = out["soft.next"][part], True
            values = (out[name][part].numpy() for name in ("argmax", "sampled", "entropy"))
            results[row.slot] = DenoiseResult(*values, next(logits).numpy() if row.want_logits else None)
        return [results[row.slot] for row in rows]

    def _call(self, name: str, tokens: dict[int, np.ndarray], head: list[DenoiseRow]) -> Tensors:
        """``tokens`` by slot. A call binds neighbouring slots: those in between that have none write scratch."""
        slots = range(min(tokens), max(tokens) + 1)
        count = len(next(iter(tokens.values())))
        for slot in slots:
            self._make_room(slot, count)
        inputs = {**self._places(slots, count, head), **self._head(slots, head)}
        idle = np.zeros(count, np.int32)
        inputs["tokens"] = torch.from_numpy(np.stack([tokens.get(slot, idle) for slot in slots]))
        part = slice(slots.start, slots.stop)
        inputs |= {each: buffer[part] for each, buffer in self._buffers.items()}
        if self.moe.formulation == "capacity":
            capacity = self.moe.decoder_capacity if name == "decoder" else self.moe.encoder_capacity
            inputs["seats"] = torch.arange(min(capacity, len(slots) * count)).float()
        outputs = self._run(name, inputs)
        # Without seats for all, later layers ran on wrong numbers, and may want more seats still with the right ones.
        while "busiest" in outputs and (busiest := int(outputs["busiest"].item())) > len(inputs["seats"]):
            self.overflows += 1
            inputs["seats"] = torch.arange(busiest).float()
            inputs |= {each: outputs[each + NEXT] for each in self._buffers}  # an engine has written it in place
            outputs = self._run(name, inputs)
        for each, buffer in self._buffers.items():
            buffer[part] = outputs[each + NEXT]
        return outputs

    def _run(self, name: str, inputs: Tensors) -> Tensors:
        self._check_ranges(name, inputs)
        self.calls += 1
        outputs = self.interpreter.run(inputs)
        self.last = (dict(inputs), outputs)
        return outputs

    def _places(self, slots: range, count: int, rows: list[DenoiseRow]) -> Tensors:
        """Positions as rotary factors, what each token sees, and where its K and V go."""
        held = torch.tensor([self._length[slot] for slot in slots])[:, None]
        start = torch.tensor([self._start[slot] for slot in slots])[:, None]
        position = held + torch.arange(count)
        denoising = torch.tensor([slot in {row.slot for row in rows} for slot in slots])[:, None]
        keys = int(held.max()) + count
        keys = min(-(-keys // self.key_step) * self.key_step, self.shapes.context)
        inputs = {
            "is_canvas": denoising.expand(-1, count).unsqueeze(-1).clone(),
            "soft": torch.zeros(len(slots), count, self.spec.hidden_size, dtype=self._dtype),
            "keys": torch.arange(keys).int(),
        }
        for row in rows:
            if not row.first and self._has_soft[row.slot]:
                inputs["soft"][slots.index(row.slot)] = self._soft[row.slot]
        # A canvas token sees the whole canvas, and of what is before it what the canvas's first token sees.
        query = torch.where(denoising, held, position)
        for kind, layer in {layer.kind: layer for layer in self.spec.layers}.items():
            origin = start if kind == "sliding" else torch.zeros_like(start)
            first = (query - self.shapes.window).clamp(min=0) if kind == "sliding" else torch.zeros_like(query)
            end = torch.where(denoising, held + count, position + 1)
            inputs[f"first.{kind}"], inputs[f"end.{kind}"] = (first - origin).int(), (end - origin).int()
            inputs[f"write.{kind}"] = (held - origin).flatten().int()
            exponents = torch.arange(0, 2 * layer.rotary_pairs, 2, dtype=torch.float) / layer.head_dim
            turned = 1.0 / layer.rope_theta**exponents / layer.rope_factor
            still = torch.zeros(layer.head_dim // 2 - layer.rotary_pairs)
            angles = position.float()[..., None] * torch.cat([turned, still])
            inputs[f"cos.{kind}"], inputs[f"sin.{kind}"] = angles.cos(), angles.sin()
        return inputs

    def _head(self, slots: range, rows: list[DenoiseRow]) -> Tensors:
        size, vocabulary = self.shapes.canvas, self.spec.vocab_size

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(size).view(-1, 1)

        limited = [row for row in rows if self._is_limited(row)]
        wanted = [torch.arange(place * size, (place + 1) * size) for place, row in enumerate(rows) if row.want_logits]
        uniforms = np.concatenate([row.uniforms for row in rows]) if rows else np.zeros(0, np.float32)
        starts = [slots.index(row.slot) * size for row in rows]
        return {
            "head_rows": (torch.tensor(starts).view(-1, 1) + torch.arange(size)).flatten().int(),
            "temperature": column([row.temperature for row in rows]),
            "uniforms": torch.from_numpy(uniforms).view(-1, 1),
            "top_k": column([float(min(row.top_k or vocabulary, vocabulary)) for row in limited]),
            "top_p": column([row.top_p if row.top_p < 1 else 2.0 for row in limited]),
            "logit_rows": torch.cat(wanted).int() if wanted else torch.zeros(0, dtype=torch.int32),
            EMBEDDING: self._embedding,
            EMBEDDING + ROWS: self._embedding,
        }

    def _is_limited(self, row: DenoiseRow) -> bool:
        return row.top_k not in (0, self.spec.vocab_size) or row.top_p < 1

    def _make_room(self, slot: int, count: int) -> None:
        held = self._length[slot] - self._start[slot]
        if held + count <= self.shapes.sliding:
            return
        keep = min(held, self.shapes.window)
        for layer in self.spec.layers:
            if layer.kind == "sliding":
                for name in ("k", "v"):
                    buffer = self._buffers[f"{name}.{layer.index}"][slot]
                    buffer[:, :keep] = buffer[:, held - keep : held].clone()
        self._start[slot] = self._length[slot] - keep

    def _check_ranges(self, name: str, inputs: Tensors) -> None:
        """Raises AssertionError for an input outside the engine's shape range, or one that varies and has none."""
        spans = self.ranges[name]
        for each, tensor in inputs.items():
            shape = tuple(tensor.shape)
            low, _, high = spans[each]
            fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            assert fits, f"{each} {shape} is outside the {name} range {low} to {high}"
