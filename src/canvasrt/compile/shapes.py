"""Sizes that an engine is compiled for: what a profile or a build plan asks, checked against the model."""

from dataclasses import dataclass

from canvasrt.errors import CapacityError, InputError
from canvasrt.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class EngineShapes:
    """Static and largest dimensions of one text engine. All in tokens, but for slots and canvases.

    The engine has two shape ranges. ``encoder``: one row of 1 to ``chunk`` context tokens, no LM head. ``decoder``: 1
    to ``canvases`` rows of ``canvas`` tokens; a row that denoises sends its tokens through LM head and sampler, a row
    that commits a finished canvas does not.
    """

    slots: int  # requests that hold K/V memory
    context: int  # tokens of a full-attention layer's buffer, the canvas included
    chunk: int
    canvases: int
    canvas: int
    window: int  # committed tokens that a sliding layer's token sees before itself: sliding_window - 1

    @property
    def sliding(self) -> int:
        """Tokens of a sliding layer's buffer: what the next token still sees, one call's tokens, one canvas."""
        return self.window + max(self.chunk, self.canvas) + self.canvas

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest call."""
        return max(self.chunk, self.canvases * self.canvas)


def engine_shapes(spec: ModelSpec, slots: int, context: int, chunk: int, canvases: int) -> EngineShapes:
    """Raises CapacityError for a context beyond the model's, InputError for sizes that contradict each other."""
    if context > spec.max_context:
        raise CapacityError(
            f"context {context} exceeds the {spec.max_context} positions of this model (max_position_embeddings in "
            f"config.json): ask for at most {spec.max_context}"
        )
    if context < 2 * spec.canvas_length:
        raise InputError(
            f"context {context} leaves no room for a prompt beside the canvas of {spec.canvas_length} tokens: ask for "
            f"at least {2 * spec.canvas_length}"
        )
    if canvases > slots:
        raise InputError(f"canvases {canvases} exceeds slots {slots}: a canvas in a call needs a slot of its own")
    return EngineShapes(slots, context, min(chunk, context), canvases, spec.canvas_length, spec.sliding_window - 1)
