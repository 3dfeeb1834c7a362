"""What a runner's K/V memory costs and whether it fits, decided before anything is allocated. All sizes in bytes."""

from dataclasses import dataclass, replace

from canvasrt.errors import CapacityError
from canvasrt.runtime.protocol import RunnerLimits
from canvasrt.spec import ModelSpec

# logits, scaled, shifted, weights, probabilities, and one intermediate result (network/sampler.py)
SAMPLER_TENSORS = 6


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    weight_bytes: int
    full_kv_bytes: int  # full-attention layers: one buffer of the whole context per slot
    sliding_kv_bytes: int  # sliding layers: bounded, whatever the context
    soft_bytes: int  # self-conditioning signal of one canvas per slot
    sampler_bytes: int  # float32 tensors over the vocabulary that a denoising call of all slots holds at once

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.full_kv_bytes + self.sliding_kv_bytes + self.soft_bytes + self.sampler_bytes


def sliding_rows(spec: ModelSpec, limits: RunnerLimits) -> int:
    """Tokens in a sliding layer's buffer: the window that the next token still sees, one chunk, one canvas."""
    return spec.sliding_window - 1 + max(limits.chunk, limits.canvas) + limits.canvas


def budget(spec: ModelSpec, limits: RunnerLimits, element_bytes: int) -> MemoryBudget:
    """``element_bytes`` is the size of one number of the dtype that weights and K/V are held in."""

    def kv(kind: str, rows: int) -> int:
        per_token = sum(2 * layer.kv_heads * layer.head_dim for layer in spec.layers if layer.kind == kind)
        return limits.slots * rows * per_token * element_bytes

    elements = 0
    for shape in spec.tensors().values():
        count = 1
        for size in shape:
            count *= size
        elements += count
    return MemoryBudget(
        weight_bytes=elements * element_bytes,
        full_kv_bytes=kv("full", limits.context),
        sliding_kv_bytes=kv("sliding", sliding_rows(spec, limits)),
        soft_bytes=limits.slots * limits.canvas * spec.hidden_size * element_bytes,
        sampler_bytes=SAMPLER_TENSORS * limits.slots * limits.canvas * spec.vocab_size * 4,
    )


def check_budget(spec: ModelSpec, limits: RunnerLimits, element_bytes: int, available_bytes: int) -> MemoryBudget:
    """The budget, or CapacityError that names the largest context that fits ``available_bytes`` with these slots."""
    if limits.context > spec.max_context:
        raise CapacityError(
            f"context {limits.context} exceeds the {spec.max_context} positions of this model "
            f"(max_position_embeddings in config.json). Ask for at most {spec.max_context}."
        )
    if limits.context <= limits.canvas:
        raise CapacityError(
            f"context {limits.context} has no room for a prompt: a canvas alone takes {limits.canvas} tokens"
        )
    needed = budget(spec, limits, element_bytes)
    if needed.total_bytes <= available_bytes:
        return needed
    per_token = needed.full_kv_bytes // limits.context
    fitting = (available_bytes - needed.total_bytes + needed.full_kv_bytes) // per_token if per_token else 0
    least = budget(spec, replace(limits, slots=1, context=limits.canvas + 1), element_bytes)
    if fitting > limits.canvas:
        advice = f"The largest context that fits with {limits.slots} slots is {fitting}."
    elif limits.slots > 1 and least.total_bytes <= available_bytes:
        advice = f"Use fewer slots than {limits.slots}."
    else:
        advice = "This model needs a machine with more memory, or a quantized checkpoint."
    raise CapacityError(
        f"context {limits.context} with {limits.slots} slots needs {_gib(needed.total_bytes)} "
        f"({_gib(needed.weight_bytes)} weights, {_gib(needed.full_kv_bytes)} K/V of full layers, "
        f"{_gib(needed.sliding_kv_bytes)} of sliding layers, {_gib(needed.soft_bytes + needed.sampler_bytes)} for "
        f"denoising), and {_gib(available_bytes)} are free. {advice}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
