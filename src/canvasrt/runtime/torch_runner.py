"""EngineRunner on torch: the CPU development runtime, and the check of other runners on any NVIDIA GPU.

Float32 on a CPU by default. All tokens of a call are one sequence without padding; only attention tells rows apart.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CapacityError, InputError
from canvasrt.network.attention import Rotary
from canvasrt.network.moe import Moe, MoeChoice
from canvasrt.network.sampler import Filters, Prediction
from canvasrt.network.text import Canvas, Phase, TextInputs, text_network
from canvasrt.ops.torch_exact import ExactTorchOps
from canvasrt.ops.torch_ops import TorchOps
from canvasrt.ops.torch_weights import TorchWeights
from canvasrt.runtime.allocator import keep_freed_memory
from canvasrt.runtime.memory import MemoryBudget, check_budget
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, RunnerLimits
from canvasrt.runtime.rows import check_denoise, check_encode, check_slot, filter_limits, is_limited
from canvasrt.runtime.torch_cache import CacheCall, TorchCache
from canvasrt.spec import LayerKind, LayerSpec

Tensor = torch.Tensor

_NOTHING = np.zeros(0, dtype=np.int32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSE_PRODUCTS = 250_000  # of a token and all experts of a layer, up to which a CPU is faster with all of them
TABLE = 4096  # positions whose rotary factors are computed once
CHUNK = 256  # context tokens per row and pass on a CPU: larger ones only cost activation memory


class TorchRunner:
    """Runs a checkpoint with torch.

    ``device`` is "cpu" or "cuda"; ``dtype`` "float32" or "bfloat16"; ``context`` is tokens per slot, the model's
    maximum by default; ``moe`` picks the formulation of the expert layer; by default ``dense`` for few
    tokens and small experts, else ``sparse``.

    A quantized checkpoint is dequantized once, and then as fast as any other. With ``exact`` its activations, K and V
    are rounded too, as a GPU engine rounds them: slower, and what such an engine will compute.
    Raises CapacityError when the memory does not suffice or the context exceeds the model, CheckpointError for NaN
    weights, InputError for an unknown device or dtype, or for ``exact`` in bfloat16.
    """

    weights_type = TorchWeights  # a benchmark of a model that nobody has here makes up its own

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        dtype: str = "float32",
        slots: int = 1,
        context: int | None = None,
        chunk: int = CHUNK,
        moe: MoeChoice | None = None,
        exact: bool = False,
    ) -> None:
        self._spec = spec = checkpoint.spec
        self._device = torch_device(device)
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        if exact and dtype != "float32":
            raise InputError("exact arithmetic rounds float32 numbers itself: use dtype float32 with it")
        if slots < 1 or chunk < 1:
            raise InputError(f"a runner needs at least one slot and a chunk of one token, not {slots} and {chunk}")
        self._limits = RunnerLimits(
            slots=slots,
            context=spec.max_context if context is None else context,
            chunk=chunk,
            canvas=spec.canvas_length,
            vocabulary=spec.vocab_size,
        )
        if self._device.type == "cpu":
            keep_freed_memory()
        torch_dtype = DTYPES[dtype]
        available = available_bytes(self._device)
        self.memory: MemoryBudget = check_budget(spec, self._limits, torch_dtype.itemsize, available)
        self._dtype = torch_dtype
        self._exact = exact and checkpoint.quantization is not None
        self._moe = moe or self._formulation()
        weights = self.weights_type(checkpoint, self._device, torch_dtype)
        self._ops = self._lowering(weights)
        kv_fp8 = checkpoint.quantization is not None and checkpoint.quantization.kv_cache == "fp8"
        self._cache = TorchCache(
            spec,
            self._limits,
            self._device,
            torch_dtype,
            rounds_to_fp8=self._exact and kv_fp8,
            # Tokens that nobody sees would take seats of experts.
            multiple=1 if self._moe.formulation == "capacity" else self._ops.row_multiple,
        )
        self._no_signal = torch.zeros(1, spec.canvas_length, spec.hidden_size, device=self._device, dtype=torch_dtype)
        self._soft = [self._no_signal] * slots  # replaced after each step, never written to
        kinds: dict[LayerKind, LayerSpec] = {layer.kind: layer for layer in spec.layers}
        self._frequencies = {kind: _inverse_frequencies(layer).to(self._device) for kind, layer in kinds.items()}
        first_positions = np.arange(min(self._limits.context, TABLE))
        self._tables = {kind: self._factors(kind, first_positions) for kind in kinds}
        self._pending: dict[
            int, NDArray[np.int32]
        ] = {}  # slot -> at most a chunk of tokens, noted down but not encoded
        self._load_all_weights()

    @classmethod
    def open(cls, folder: Path | str, device: str = "cpu", dtype: str = "float32", **options: Any) -> "TorchRunner":
        """Opens a checkpoint folder; ``options`` are those of the constructor."""
        return cls(Checkpoint.open(folder), device, dtype, **options)

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def length(self, slot: int) -> int:
        check_slot(self._limits, slot)
        return self._lengths()[slot]

    def can_rewind(self, slot: int, length: int) -> bool:
        return 0 <= length <= self.length(slot) and self._cache.slots.can_rewind(slot, length)

    def release(self, slot: int) -> None:
        check_slot(self._limits, slot)
        self._pending.pop(slot, None)
        self._cache.slots.release(slot)
        self._soft[slot] = self._no_signal

    def stored(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """K and V that a layer keeps of a slot's context, (tokens, kv_heads, head_dim) each: for verification."""
        self._encode_pending(slot)
        return self._cache.stored(layer, slot)

    @torch.inference_mode()
    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Appends the rows' tokens; the last piece of each is only noted down and joins the next call that needs it."""
        lengths = self._lengths()
        check_encode(self._limits, lengths, rows)
        for row in rows:
            self._cache.slots.check_rewind(row.slot, row.position)
        left: list[tuple[int, NDArray[np.int32]]] = []
        for row in rows:
            held = self._cache.slots.length(row.slot)
            kept = self._pending.pop(row.slot, _NOTHING)[: max(row.position - held, 0)]
            if row.position < held:
                self._cache.slots.rewind(row.slot, row.position)
            left.append((row.slot, np.concatenate([kept, row.tokens])))
        chunk = self._limits.chunk
        while longer := [(slot, tokens) for slot, tokens in left if len(tokens) > chunk]:
            self._encode_pieces([(slot, tokens[:chunk]) for slot, tokens in longer])
            left = [(slot, tokens[chunk:] if len(tokens) > chunk else tokens) for slot, tokens in left]
        self._pending.update(left)

    def _lengths(self) -> list[int]:
        return [
            length + len(self._pending.get(slot, _NOTHING)) for slot, length in enumerate(self._cache.slots.lengths())
        ]

    @torch.inference_mode()
    def _encode_pending(self, slot: int) -> None:
        if slot in self._pending:
            self._encode_pieces([(slot, self._pending.pop(slot))])

    def _encode_pieces(self, pieces: list[tuple[int, NDArray[np.int32]]]) -> None:
        call = self._cache.open([(slot, len(tokens)) for slot, tokens in pieces], [])
        self._run("encoder", [*(tokens for _, tokens in pieces), np.zeros(call.unseen, np.int32)], call, None)
        for slot, tokens in pieces:
            self._cache.slots.commit(slot, len(tokens))

    @torch.inference_mode()
    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Callable[[], None] | None = None) -> list[DenoiseResult]:
        check_denoise(self._limits, self._lengths(), rows)
        if meanwhile is not None:
            meanwhile()
        if not rows:
            return []
        # The sampler looks for limits in the last rows only, and neighbouring slots are read without a copy.
        vocabulary = self._limits.vocabulary
        order = sorted(range(len(rows)), key=lambda index: (is_limited(rows[index], vocabulary), rows[index].slot))
        results = self._denoise([rows[index] for index in order])
        return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]

    def _denoise(self, rows: Sequence[DenoiseRow]) -> list[DenoiseResult]:
        size = self._limits.canvas
        slots = [row.slot for row in rows]
        # Tokens that wait to be encoded come along: a prompt costs one call with the first step, not one of its own.
        pieces = [(slot, self._pending.pop(slot)) for slot in slots if slot in self._pending]
        call = self._cache.open([(slot, len(tokens)) for slot, tokens in pieces], slots)
        joining = sum(len(tokens) for _, tokens in pieces) + call.unseen
        tokens = [*(tokens for _, tokens in pieces), np.zeros(call.unseen, np.int32), *(row.canvas for row in rows)]
        canvas = Canvas(
            soft_embeddings=self._signals(rows, joining),
            temperature=self._per_token(rows, [row.temperature for row in rows]),
            uniforms=torch.from_numpy(np.concatenate([row.uniforms for row in rows])).to(self._device).view(-1, 1),
            filters=self._filters(rows),
            head_rows=torch.arange(joining, joining + len(rows) * size, device=self._device) if joining else None,
            wants_logits=any(row.want_logits for row in rows),
        )
        prediction = self._run("mixed" if joining else "decoder", tokens, call, canvas)
        assert prediction is not None  # only the encoder phase predicts nothing
        for slot, piece in pieces:
            self._cache.slots.commit(slot, len(piece))
        soft = prediction.soft_embeddings.view(len(rows), 1, size, -1)
        for index, slot in enumerate(slots):
            self._soft[slot] = soft[index]
        return _results(rows, prediction, size)

    def _run(
        self, phase: Phase, parts: Sequence[NDArray[np.int32]], call: CacheCall, canvas: Canvas[Tensor] | None
    ) -> Prediction[Tensor] | None:
        """One call over the tokens of all parts, one behind the other as one row."""
        whole = np.concatenate(parts)  # a copy in any case: canvases may be read-only, and torch has no such tensors
        tokens = torch.from_numpy(whole).to(self._device).unsqueeze(0)
        is_canvas = None
        if canvas is not None and canvas.head_rows is not None:
            is_canvas = torch.ones(1, len(whole), 1, dtype=torch.bool, device=self._device)
            is_canvas[:, : len(whole) - len(canvas.head_rows)] = False
        inputs = TextInputs(tokens, self._rotary_of(call), call, canvas, is_canvas, narrows=is_canvas is not None)
        chosen = self._moe
        seats = torch.arange(chosen.capacity, device=self._device).float() if chosen.capacity else None
        outputs = text_network(self._ops, self._spec, inputs, phase, Moe(chosen.formulation, seats))
        if outputs.busiest is not None and outputs.busiest.item() > chosen.capacity:
            # Repeating is safe: the call writes the same places again.
            outputs = text_network(self._ops, self._spec, inputs, phase, Moe("sparse"))
        return outputs.prediction

    def _lowering(self, weights: TorchWeights) -> TorchOps:
        if self._exact:
            return ExactTorchOps(weights)
        if self._device.type == "cpu" and self._dtype == torch.float32:
            from canvasrt.ops.torch_fused import FusedTorchOps  # half a second, which no other runner needs

            return FusedTorchOps(weights)
        return TorchOps(weights)

    def _formulation(self) -> MoeChoice:
        """Small experts: one dense product costs less than sorting tokens by expert.

        The same for calls of all sizes: the formulations round differently.
        """
        spec = self._spec
        products = 3 * spec.experts * spec.expert_size * spec.hidden_size
        small = self._device.type == "cpu" and products <= DENSE_PRODUCTS
        return MoeChoice("dense" if small and not self._exact else "sparse")

    def _rotary_of(self, call: CacheCall) -> dict[LayerKind, Rotary[Tensor]]:
        if not call.rotary:
            if int(call.positions.max()) < min(self._limits.context, TABLE):
                rows = torch.from_numpy(call.positions).to(self._device)
                for kind, table in self._tables.items():
                    call.rotary[kind] = Rotary(table.cos[rows].unsqueeze(0), table.signed_sin[rows].unsqueeze(0))
            else:
                call.rotary.update({kind: self._factors(kind, call.positions[None]) for kind in self._frequencies})
        return call.rotary

    def _factors(self, kind: LayerKind, positions: NDArray[np.int64]) -> Rotary[Tensor]:
        """Of positions (...): both (..., 1, head_dim), the axis of length 1 for the heads."""
        column = torch.from_numpy(positions.astype(np.float32)[..., None, None]).to(self._device)
        angles = column * self._frequencies[kind]
        cos, sin = angles.cos(), angles.sin()
        return Rotary(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))

    def _per_token(self, rows: Sequence[DenoiseRow], values: Sequence[float]) -> Tensor:
        """(rows * canvas, 1) float32 from one value per row."""
        per_token = np.repeat(np.array(values, dtype=np.float32), self._limits.canvas)
        return torch.from_numpy(per_token).to(self._device).view(-1, 1)

    def _signals(self, rows: Sequence[DenoiseRow], joining: int) -> Tensor | None:
        """(1, joining + rows * canvas, hidden): what each slot kept from its last step, zero for a canvas's first and
        for joining tokens. None: all of it is zero.
        """
        # Chosen, not multiplied by 0: nothing of an earlier request may leak, not even as 0 * NaN.
        kept = [self._no_signal if row.first else self._soft[row.slot] for row in rows]
        if all(each is self._no_signal for each in kept):
            return None
        signals = kept[0] if len(kept) == 1 else torch.cat(kept, 1)
        return functional.pad(signals, (0, 0, joining, 0)) if joining else signals

    def _filters(self, rows: Sequence[DenoiseRow]) -> Filters[Tensor] | None:
        vocabulary = self._limits.vocabulary
        limited = [row for row in rows if is_limited(row, vocabulary)]
        if not limited:
            return None
        top_k, top_p = zip(*(filter_limits(row, vocabulary) for row in limited), strict=True)
        return Filters(self._per_token(limited, top_k), self._per_token(limited, top_p))

    def _load_all_weights(self) -> None:
        """Runs one token and two steps of a canvas: a damaged tensor must stop the start, not a request."""
        self.encode([EncodeRow(0, np.zeros(1, np.int32), 0)])
        self._encode_pending(0)
        size = self._limits.canvas
        for first in (True, False):  # the first has no self-conditioning
            self.denoise([DenoiseRow(0, np.zeros(size, np.int32), 1.0, np.zeros(size, np.float32), first)])
        self.release(0)


def use_threads(count: int) -> None:
    """CPU threads of every runner in this process; all cores by default."""
    torch.set_num_threads(count)


def torch_device(name: str) -> torch.device:
    """Raises InputError for another name than cpu and cuda, or where there is no GPU."""
    if name not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is unknown: use cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no NVIDIA GPU: check the driver, or use cpu")
    return torch.device(name)


def available_bytes(device: torch.device) -> int:
    """Memory that is free now. Raises CapacityError where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError as error:
        raise CapacityError(f"can't tell how much memory is free: {error}") from error
    raise CapacityError("can't tell how much memory is free: /proc/meminfo has no MemAvailable line")


def _inverse_frequencies(layer: LayerSpec) -> Tensor:
    """(head_dim / 2,) angles per position: zero for the pairs that the "proportional" embedding leaves unrotated."""
    exponents = torch.arange(0, 2 * layer.rotary_pairs, 2, dtype=torch.float) / layer.head_dim
    rotated = 1.0 / layer.rope_theta**exponents / layer.rope_factor
    return torch.cat([rotated, torch.zeros(layer.head_dim // 2 - layer.rotary_pairs)])


def _results(rows: Sequence[DenoiseRow], prediction: Prediction[Tensor], size: int) -> list[DenoiseResult]:
    argmax = prediction.argmax.to("cpu", torch.int32).view(-1, size).numpy()
    sampled = prediction.sampled.to("cpu", torch.int32).view(-1, size).numpy()
    entropy = prediction.entropy.to("cpu").view(-1, size).numpy()
    logits: list[NDArray[np.float32] | None] = [None] * len(rows)
    if prediction.logits is not None:
        kept = prediction.logits.view(len(rows), size, -1)
        logits = [kept[index].cpu().numpy() if row.want_logits else None for index, row in enumerate(rows)]
    return [DenoiseResult(argmax[index], sampled[index], entropy[index], logits[index]) for index in range(len(rows))]
