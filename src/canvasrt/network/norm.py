"""RMSNorm with weight: float32 inside, the model's precision outside.

Reference: transformers ``DiffusionGemmaRMSNorm``.
"""

from canvasrt.ops.protocol import Ops, T
from canvasrt.spec import ModelSpec


def norm(ops: Ops[T], spec: ModelSpec, x: T, name: str) -> T:
    return weighted(ops, ops.rms(x, spec.rms_norm_eps), name)


def weighted(ops: Ops[T], normed: T, name: str) -> T:
    """``normed`` in float32 times the vector ``name``."""
    return ops.cast(ops.multiply(normed, ops.weight(name, "float32")), "model")
