"""GPU memory of a text engine, part by part: weights, K/V, activations at the largest shapes, what the driver takes.

Arithmetic from the model's dimensions. The activations agree with the memory that TensorRT-RTX's plans reserve; weights
and what the driver takes were measured on no GPU. docs/planning.md has the formulas and assumptions; the constants that
a measurement would correct are at the top of this file. All sizes in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil

from canvasrt.compile.shapes import EngineShapes, engine_shapes
from canvasrt.compile.sizes import BF16, FLOAT32, bytes_by_format, unpacked_bytes
from canvasrt.compile.source import ModelSource
from canvasrt.errors import InputError
from canvasrt.formats import Weights
from canvasrt.profiles.profile import Formulation, GpuProfile
from canvasrt.spec import ModelSpec

GB = 10**9
DRIVER_BYTES = 700_000_000  # CUDA context, cuBLAS and the kernels that TensorRT-RTX compiles at the first start
RESERVE = 0.03  # of the memory: fragmentation, and what the driver keeps for itself
SHARED_BYTES = 8 * GB  # operating system and server, where GPU and CPU share the memory
# Float32 tensors over the vocabulary that the sampler holds at once with filters, beside one in BF16.
SAMPLER_TENSORS = 4
# Bytes per token and hidden element: residual, attention, MLP and expert results in BF16, one norm in float32.
_STREAM = 4 * BF16 + FLOAT32
_PROJECTED = BF16 + FLOAT32  # a projection as it comes, and normed and rotated
_SCALARS = 64  # per token of a call: ids, positions, uniforms, and what the sampler returns
EXCHANGE_BYTES = 16 << 20  # through which the memory of two slots changes places


@dataclass(frozen=True, slots=True)
class Setting:
    """What a profile or a command line chooses; tokens, but for slots and canvases."""

    slots: int
    context: int
    chunk: int
    canvases: int

    @classmethod
    def of(cls, profile: GpuProfile, spec: ModelSpec) -> "Setting":
        """A profile's choices, for a model with less context than it chooses: the model's."""
        choices = profile.choices
        context = min(choices.context.value, spec.max_context)
        return cls(choices.slots.value, context, min(choices.chunk.value, context), choices.canvases.value)


@dataclass(frozen=True, slots=True)
class Activations:
    """What the largest call of one shape range holds for itself: the tensors of each stage, all of them alive at once.

    The stages run one after the other in the same memory. A compiler gives every tensor a region of its own, as large
    as the largest tensor that comes to lie there: together the largest of every stage, the second largest, and so on.
    """

    residual_bytes: int  # residual stream, norms and projections of one layer, all along
    attention: tuple[int, ...]  # of a full layer: scores, probabilities, copied keys or values, masks of both kinds
    experts: tuple[int, ...]  # tokens gathered, gate and up, their product; weights that had to be unpacked; masks
    sampler: tuple[int, ...]  # over the vocabulary

    @property
    def stages(self) -> dict[str, int]:
        return {"attention": sum(self.attention), "experts": sum(self.experts), "sampler": sum(self.sampler)}

    @property
    def largest_stage(self) -> str:
        return max(self.stages, key=self.stages.__getitem__)

    @property
    def total_bytes(self) -> int:
        stages = [sorted(stage, reverse=True) for stage in (self.attention, self.experts, self.sampler)]
        return self.residual_bytes + sum(max(places) for places in zip_longest(*stages, fillvalue=0))


@dataclass(frozen=True, slots=True)
class VramBudget:
    """What one engine with its two execution contexts takes of a GPU."""

    weights: Mapping[Weights, int]  # by format
    full_kv_bytes: int
    sliding_kv_bytes: int
    encoder: Activations
    decoder: Activations
    io_bytes: int  # as the runtime has them: soft embeddings, one canvas of logits, rotary factors, ids
    overhead_bytes: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def activations(self) -> Activations:
        """Of the shape range that needs more: both share one block, since a GPU runs one call at a time."""
        return max(self.encoder, self.decoder, key=lambda each: each.total_bytes)

    @property
    def total_bytes(self) -> int:
        return sum(self.items().values())

    def items(self) -> dict[str, int]:
        """The rows of a table, which add up to the total."""
        return {
            "weights": self.weight_bytes,
            "K/V of full layers": self.full_kv_bytes,
            "K/V of sliding layers": self.sliding_kv_bytes,
            "activations": self.activations.total_bytes,
            "inputs and outputs": self.io_bytes,
            "driver and reserve": self.overhead_bytes,
        }


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model on a GPU, before slots, context, chunk and canvases are chosen."""

    spec: ModelSpec
    weights: Mapping[Weights, int]
    unpacked_bytes: int
    formulation: Formulation
    memory_bytes: int
    overhead_bytes: int

    @classmethod
    def of(cls, source: ModelSource, profile: GpuProfile) -> "Deployment":
        """Raises InputError for a profile that says nothing about memory."""
        if profile.facts.memory_gb is None:
            raise InputError(
                f"profile {profile.name} states no memory_gb, so that nothing can be planned: add the fact, or take "
                "another profile"
            )
        memory = round(profile.facts.memory_gb.value * GB)
        shared = SHARED_BYTES if profile.facts.memory_is_shared else 0
        return cls(
            spec=source.spec,
            weights=bytes_by_format(source),
            unpacked_bytes=unpacked_bytes(source),
            formulation=profile.choices.moe.value.formulation,
            memory_bytes=memory,
            overhead_bytes=DRIVER_BYTES + ceil(RESERVE * memory) + shared,
        )

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    def shapes(self, setting: Setting) -> EngineShapes:
        """Raises CapacityError or InputError for a setting that is none for this model."""
        return engine_shapes(self.spec, setting.slots, setting.context, setting.chunk, setting.canvases)

    def budget(self, setting: Setting) -> VramBudget:
        """Raises CapacityError or InputError for a setting that is none for this model."""
        return vram_budget(self, self.shapes(setting))

    def fits(self, setting: Setting) -> bool:
        return self.budget(setting).total_bytes <= self.memory_bytes


def vram_budget(on: Deployment, shapes: EngineShapes) -> VramBudget:
    spec, canvas = on.spec, shapes.canvas
    head_dims = {layer.kind: layer.head_dim for layer in spec.layers}
    tokens = shapes.chunk + shapes.canvases * canvas  # of a call of each shape range
    soft = (shapes.slots * canvas + tokens) * spec.hidden_size * BF16  # kept; those that a call takes or gives
    # Rotary factors and numbers per token: what steps have in common, and what is sent with each.
    inputs = 2 * tokens * (sum(head_dims.values()) * FLOAT32 + _SCALARS)
    counts = (shapes.context + shapes.most_tokens) * FLOAT32
    logits = canvas * spec.vocab_size * FLOAT32  # of one canvas, for who asks for them
    return VramBudget(
        weights=on.weights,
        full_kv_bytes=shapes.slots * shapes.context * kv_per_token(spec, "full"),
        sliding_kv_bytes=shapes.slots * shapes.sliding * kv_per_token(spec, "sliding"),
        encoder=_activations(on, shapes, 1, shapes.chunk, 0),
        decoder=_activations(on, shapes, shapes.canvases, canvas, shapes.canvases * canvas),
        io_bytes=soft + inputs + counts + logits + EXCHANGE_BYTES,
        overhead_bytes=on.overhead_bytes,
    )


def kv_per_token(spec: ModelSpec, kind: str) -> int:
    """Bytes of one token's keys and values in all layers of a kind."""
    return sum(2 * layer.kv_heads * layer.head_dim for layer in spec.layers if layer.kind == kind) * BF16


def _activations(on: Deployment, shapes: EngineShapes, rows: int, width: int, head_rows: int) -> Activations:
    """Of a call with ``rows`` sequences of ``width`` tokens, ``head_rows`` of which go through LM head and sampler."""
    spec, tokens = on.spec, rows * width
    full = [layer for layer in spec.layers if layer.kind == "full"]
    projected = max((spec.heads + 2 * layer.kv_heads) * layer.head_dim for layer in spec.layers)
    inner = max(projected * _PROJECTED, 3 * spec.mlp_size * BF16)
    scores = spec.heads * tokens * shapes.context * BF16
    copied = rows * shapes.context * max(layer.kv_heads * layer.head_dim for layer in full) * BF16  # keys, then values
    # The first full layer writes its mask, a line for every query head of a group, and those after it read that.
    folded = max(spec.heads // layer.kv_heads for layer in full) * tokens if len(full) > 1 else 0
    masks = (folded * shapes.context * BF16, tokens * shapes.sliding * BF16)
    places = tokens * spec.experts  # a call that overflows its capacity is repeated with room for all in every expert
    widths = [2 * spec.expert_size, spec.expert_size]
    if on.formulation != "dense":
        widths.append(spec.hidden_size)
    vocabulary = head_rows * spec.vocab_size
    return Activations(
        residual_bytes=tokens * (spec.hidden_size * _STREAM + inner),
        attention=(scores, scores, copied, *masks),
        experts=(*(places * each * BF16 for each in widths), on.unpacked_bytes, *masks),
        sampler=(*(vocabulary * FLOAT32 for _ in range(SAMPLER_TENSORS)), vocabulary * BF16),
    )
