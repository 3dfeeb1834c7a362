"""The two products of one layer's dense expert formulation, alone: with [2*E*F, H], then with [H, E*F]."""

from collections.abc import Callable
from typing import Any

from canvasrt.spec import ModelSpec
from gpu_parts.record import Options, PartError, Record, library
from gpu_parts.timing import measured, torch_clock

NAMES = {"cuda": ("bfloat16", "float8_e4m3fn"), "cpu": ("float32", "bfloat16")}


def run(options: Options, record: Record) -> None:
    """Each number type by itself: a GPU without FP8 tensor cores fails in that one only."""
    torch = library("torch")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise PartError("torch sees no NVIDIA GPU: check the driver, or use --device cpu")
    spec = ModelSpec.load(options.config)
    inner = spec.experts * spec.expert_size
    shapes = {"gate_up": (2 * inner, spec.hidden_size), "down": (spec.hidden_size, inner)}
    record.note(weights={name: list(shape) for name, shape in shapes.items()}, device=options.device)
    for name in NAMES[options.device]:
        for product, shape in shapes.items():
            try:
                _products(torch, options, record, name, product, shape)
            except Exception as error:  # the others are still of use
                record.fail(f"{name} {product}", error)
            if options.device == "cuda":
                torch.cuda.empty_cache()


def _products(torch: Any, options: Options, record: Record, name: str, product: str, shape: tuple[int, int]) -> None:
    dtype = getattr(torch, name)
    rows, columns = shape
    weight = _random(torch, shape, dtype, options.device)
    clock = torch_clock(torch, options.device)
    for tokens in options.tokens:
        x = _random(torch, (tokens, columns), dtype, options.device)
        with torch.inference_mode():
            times = measured(_call(torch, x, weight, dtype), clock, options.steps, options.warmup)
        seconds = (times["gpu_ms"] or times["ms"] or 0.0) / 1e3
        result_bytes = 4 if dtype == torch.float32 else 2
        nbytes = (rows * columns + tokens * columns) * dtype.itemsize + tokens * rows * result_bytes
        record.row(
            "products", numbers=name, product=product, tokens=tokens, **times,
            tflops=2 * tokens * rows * columns / seconds / 1e12, gb_s=nbytes / seconds / 1e9,
        )  # fmt: skip


def _call(torch: Any, x: Any, weight: Any, dtype: Any) -> Callable[[], object]:
    if dtype.itemsize > 1:
        return lambda: torch.nn.functional.linear(x, weight)
    one = torch.ones((), device=x.device)
    columns = weight.t()  # column-major, as FP8 tensor cores want the second matrix
    return lambda: torch._scaled_mm(x, columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _random(torch: Any, shape: tuple[int, int], dtype: Any, device: str) -> Any:
    """In pieces: random numbers come in BF16 at the least, and a whole second copy may not fit."""
    torch.manual_seed(0)
    whole = torch.empty(shape, dtype=dtype, device=device)
    step = max(1, (64 << 20) // shape[1])
    for start in range(0, shape[0], step):
        part = whole[start : start + step]
        part.copy_(torch.randn(part.shape, dtype=torch.float32, device=device))
    return whole
