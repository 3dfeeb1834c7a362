"""Does TensorRT-RTX run on this GPU, and with plans of which targets: a product and an attention in BF16, every stage's
outcome by itself.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvasrt.runtime.cuda_device import CudaDevice, open_device
from canvasrt.runtime.tensorrt_engine import TensorRTEngine, library_log
from gpu_parts.record import Options, PartError, Record, described, library

TARGETS = ("SM80", "SM89", "SM120", "CURRENT")
ROWS, WIDTH = 24, 64
TOLERANCE = 0.02  # of the largest number: BF16 keeps 8 bits
Floats = NDArray[np.float32]
Build = Callable[[Any, str], bytes]


def run(options: Options, record: Record, build: Build | None = None, device: CudaDevice | None = None) -> None:
    """Passes where one target runs with right numbers: which ones do stands in the table."""
    trt = library("tensorrt_rtx")
    library("cuda.bindings.driver")
    record.note(version=str(trt.__version__), tolerance=TOLERANCE)
    error: Exception | None = None
    if device is None:
        try:
            device = open_device()
        except Exception as found:  # plans are built all the same
            error = found
    for target in TARGETS:
        record.row("targets", target=target, **outcome(trt, target, device, build or plan_of))
    if error is not None:
        raise error
    rows = record.tables["targets"]
    record.note(runs=[row["target"] for row in rows if row.get("result") == "ok"])
    if not record.figures["runs"]:
        raise PartError("no target's plan runs: " + "; ".join(f"{row['target']}: {_last(row)}" for row in rows))


def outcome(trt: Any, target: str, device: CudaDevice | None, build: Build) -> dict[str, str]:
    """What each stage said, as far as it came: "ok" or its message."""
    found: dict[str, str] = {}
    stage = "build"
    try:
        plan = build(trt, target)
        found[stage] = "ok"
        if device is None:
            return found
        stage = "deserialize"
        engine = TensorRTEngine(trt, device, memoryview(plan), ["decoder"], f"plan of {target}")
        found[stage] = "ok"
        stage = "execute"
        x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
        product, attention = executed(engine, device, x)
        found[stage] = "ok"
        stage = "result"
        errors = [difference(mine, wanted) for mine, wanted in zip((product, attention), expected(x), strict=True)]
        found["product_error"], found["attention_error"] = (f"{error:.2e}" for error in errors)
        found[stage] = "ok" if max(errors) <= TOLERANCE else f"differs from NumPy by {max(errors):.3f} of the largest"
    except Exception as error:  # whatever this target does, the next one is tried
        found[stage] = described(error)["message"]
    return found


def matrix() -> Floats:
    return np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32) / np.float32(WIDTH**0.5)


def expected(x: Floats) -> tuple[Floats, Floats]:
    """x @ W, and softmax(p @ p^T / sqrt(n)) @ p of the product p."""
    product = x @ matrix()
    scores = product @ product.T / np.float32(WIDTH**0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return product, weights / weights.sum(-1, keepdims=True) @ product


def difference(mine: Floats, wanted: Floats) -> float:
    """NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(mine - wanted).max() / np.abs(wanted).max(), nan=np.inf))


def describe(trt: Any, network: Any, kept: list[Any]) -> None:
    """``kept``: memory that the network points to."""
    x = network.add_input("x", trt.float32, (-1, WIDTH))
    weights = np.ascontiguousarray(matrix())
    kept.append(weights)
    matrix_in = network.add_constant((WIDTH, WIDTH), trt.Weights(weights)).get_output(0)
    half, wide = trt.DataType.BF16, trt.float32
    scale = np.full((1, 1), WIDTH**-0.5, np.float32)
    kept.append(scale)
    factor = network.add_constant((1, 1), trt.Weights(scale)).get_output(0)
    none, transposed = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    cast_x, cast_w = (network.add_cast(each, half).get_output(0) for each in (x, matrix_in))
    product = network.add_matrix_multiply(cast_x, none, cast_w, none).get_output(0)
    scores = network.add_matrix_multiply(product, none, product, transposed).get_output(0)
    wide_scores = network.add_cast(scores, wide).get_output(0)
    scaled = network.add_elementwise(wide_scores, factor, trt.ElementWiseOperation.PROD).get_output(0)
    softmax = network.add_softmax(scaled)
    softmax.axes = 2  # a bit for each axis: the keys
    shares = network.add_cast(softmax.get_output(0), half).get_output(0)
    mixed = network.add_matrix_multiply(shares, none, product, none).get_output(0)
    for name, tensor in {"product": product, "attention": mixed}.items():
        output = network.add_cast(tensor, wide).get_output(0)
        output.name = name
        network.mark_output(output)


def plan_of(trt: Any, target: str) -> bytes:
    """Raises PartError with what the compiler said."""
    builder, network, config, kept = prepared(trt, target)
    plan = builder.build_serialized_network(network, config)
    del kept
    if plan is None:
        raise PartError(f"the compiler refused: {library_log(trt)[1].last() or 'it gave no reason'}")
    return bytes(plan)


def prepared(trt: Any, target: str) -> tuple[Any, Any, Any, list[Any]]:
    """Builder, network, configuration, and memory that must live as long as they do."""
    logger, said = library_log(trt)
    said.errors.clear()  # of the target before
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    kept: list[Any] = []
    describe(trt, network, kept)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, WIDTH), (ROWS, WIDTH), (2 * ROWS, WIDTH))
    config.add_optimization_profile(profile)
    return builder, network, config, kept


def executed(engine: TensorRTEngine, device: CudaDevice, x: Floats) -> tuple[Floats, Floats]:
    """product and attention, (ROWS, WIDTH) each."""
    engine.reserve()
    context = engine.context("decoder")
    addresses = {name: device.allocate(x.nbytes) for name in ("x", "product", "attention")}
    pinned = device.pinned(x.nbytes)
    pinned.array[:] = x.view(np.uint8).reshape(-1)
    device.upload(addresses["x"], pinned, x.nbytes)
    context.bind({"x": x.shape}, addresses)
    context.enqueue()
    device.synchronize()
    found = []
    for name in ("product", "attention"):
        device.download(pinned, addresses[name], x.nbytes)
        device.synchronize()
        found.append(pinned.array.view(np.float32).reshape(x.shape).copy())
    return found[0], found[1]


def _last(row: dict[str, str]) -> str:
    stages = [row[stage] for stage in ("build", "deserialize", "execute", "result") if stage in row]
    return stages[-1]
