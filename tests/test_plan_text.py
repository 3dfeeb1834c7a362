"""What is read from the text of plans that TensorRT-RTX really makes, on a machine without a GPU."""

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from canvasrt.bundle.writer import BundleWriter
from canvasrt.compile.plan_text import Graph, PlanText, Region, read_plan_text, reserved_regions
from canvasrt.errors import CapacityError

trt = pytest.importorskip("tensorrt_rtx")

IN, OUT = 1024, 2048
MATRIX = IN * OUT
MOST = (64, 1024)  # tokens of the two shape ranges


class Network:
    """One product of activations and a matrix, in a format."""

    def __init__(self, stripped: bool = False) -> None:
        self.builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        self.network = self.builder.create_network(0)
        self.config = self.builder.create_builder_config()
        self.config.num_compute_capabilities = 1
        self.config.set_compute_capability(trt.ComputeCapability.SM120, 0)
        self.x = self.network.add_input("x", trt.bfloat16, (-1, IN))
        self._stripped = stripped
        self._numbers = np.random.default_rng(0)
        self._kept: list[Any] = []  # the compiler reads them when it builds
        if stripped:
            self.config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            self.config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)

    def scalar(self) -> Any:
        self._kept.append(np.full((), 0.01, np.float32))
        return self.network.add_constant((), trt.Weights(self._kept[-1])).get_output(0)

    def weight(self, name: str, dtype: Any, shape: tuple[int, int], bits: int) -> Any:
        count = shape[0] * shape[1]
        self._kept.append(self._numbers.integers(0x30, 0x38, count * bits // 8, np.uint8))
        weights = trt.Weights(dtype, 0 if self._stripped else self._kept[-1].ctypes.data, count)
        layer = self.network.add_constant(shape, weights)
        layer.name = name
        if self._stripped:
            self.network.set_weights_name(layer.weights, name)
            self.network.mark_weights_refittable(name)
        return layer.get_output(0)

    def dequantized(self, *arguments: Any) -> Any:
        return self.network.add_dequantize(*arguments, trt.bfloat16).get_output(0)

    def plan(self, x: Any, weight: Any) -> bytes:
        plain, transposed = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
        self.finish(self.network.add_matrix_multiply(x, plain, weight, transposed).get_output(0))
        return bytes(self.builder.build_serialized_network(self.network, self.config))

    def finish(self, output: Any) -> None:
        self.network.mark_output(output)
        for most in MOST:
            shapes = self.builder.create_optimization_profile()
            shapes.set_shape("x", (1, IN), (most, IN), (most, IN))
            self.config.add_optimization_profile(shapes)


def bf16(stripped: bool = False) -> bytes:
    made = Network(stripped)
    return made.plan(made.x, made.weight("w", trt.bfloat16, (OUT, IN), 16))


def fp8(stripped: bool = False) -> bytes:
    made = Network(stripped)
    weight = made.dequantized(made.weight("w", trt.DataType.FP8, (OUT, IN), 8), made.scalar())
    x = made.network.add_quantize(made.x, made.scalar(), trt.DataType.FP8).get_output(0)
    return made.plan(made.dequantized(x, made.scalar()), weight)


def nvfp4(w4a4: bool, stripped: bool = False) -> bytes:
    made = Network(stripped)
    packed = made.weight("w", trt.DataType.FP4, (OUT, IN), 4)
    scales = made.dequantized(made.weight("scales", trt.DataType.FP8, (OUT, IN // 16), 8), made.scalar())
    x = made.x
    if w4a4:
        layer = made.network.add_dynamic_quantize(x, 1, 16, trt.DataType.FP4, trt.DataType.FP8)
        layer.set_input(1, made.scalar())
        x = made.dequantized(layer.get_output(0), made.dequantized(layer.get_output(1), made.scalar()))
    return made.plan(x, made.dequantized(packed, scales))


def int4() -> bytes:
    made = Network()
    packed = made.weight("w", trt.DataType.INT4, (OUT, IN), 4)
    return made.plan(made.x, made.dequantized(packed, made.weight("scales", trt.bfloat16, (OUT, IN // 64), 16)))


@pytest.fixture(scope="module")
def w4a16() -> bytes:
    return nvfp4(w4a4=False)


def test_an_nvfp4_matrix_met_by_bf16_is_unpacked_on_every_run_and_that_shows(w4a16: bytes) -> None:
    text = read_plan_text(w4a16)
    copies = text.weight_copies()
    assert [copy.shape_range for copy in copies] == [0, 1]
    for copy in copies:
        assert (copy.tensor.dtype, copy.tensor.count, copy.tensor.nbytes) == ("bf16", MATRIX, 2 * MATRIX)
        assert copy.step.startswith("__myl_Cast")
        assert 2 * MATRIX in [region.nbytes for region in text.regions() if region.shape_range == copy.shape_range]


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (bf16, {"bf16": 2 * MATRIX}),
        (fp8, {"fp8_e4m3": MATRIX}),
        (lambda: nvfp4(w4a4=True), {"fp4_e2m1": MATRIX // 2, "fp8_e4m3": MATRIX // 16}),
        (int4, {"int4": MATRIX // 2, "bf16": 2 * MATRIX // 64}),
        (lambda: fp8(stripped=True), {"fp8_e4m3": MATRIX}),
        (lambda: nvfp4(w4a4=True, stripped=True), {"fp4_e2m1": MATRIX // 2, "fp8_e4m3": MATRIX // 16}),
    ],
    ids=["bf16", "fp8", "nvfp4", "int4", "fp8 stripped", "nvfp4 stripped"],
)
def test_no_other_format_makes_a_copy_of_its_weights(build: Callable[[], bytes], weights: dict[str, int]) -> None:
    text = read_plan_text(build())
    assert text.weight_copies() == []
    found = text.weight_bytes()
    assert {dtype: found[dtype] for dtype in weights} == weights
    assert sum(found.values()) - sum(weights.values()) < 100  # scalars
    reserved = text.reserved_bytes()
    assert sorted(reserved) == [0, 1]
    assert reserved[0] <= reserved[1]
    assert all(region.nbytes > 0 for region in text.regions())


def test_what_a_plan_reserves_grows_with_its_shape_range() -> None:
    """FP8 activations of a call are the only temporary tensor, and the compiler's scratch space."""
    text = read_plan_text(fp8())
    sizes = {(region.shape_range, region.nbytes) for region in text.regions()}
    assert {(index, most * IN) for index, most in enumerate(MOST)} <= sizes
    assert text.reserved_bytes()[1] - text.reserved_bytes()[0] == (MOST[1] - MOST[0]) * IN
    running = [graph for graph in text.graphs if graph.kind == "run"]
    (quantized,) = running[1].temporary()
    assert (quantized.dtype, quantized.dims, quantized.count, quantized.nbytes) == ("fp8_e4m3", (None, IN), None, None)


def test_kernels_are_named() -> None:
    kernels = read_plan_text(nvfp4(w4a4=True)).kernels()
    assert kernels["fully_connected"] == len(MOST)
    assert any(name.startswith("__myl_Dyna") for name in kernels)


def test_what_a_stripped_plan_does_when_it_is_filled_is_no_part_of_a_run() -> None:
    text = read_plan_text(fp8(stripped=True))
    assert [graph.kind for graph in text.graphs] == ["run", "refit"] * 2
    run = next(graph for graph in text.graphs if graph.kind == "run")
    assert [step.name for step in run.steps if step.kind == "fully_connected"] == [
        "(Unnamed Layer* 7) [Matrix Multiply]"
    ]
    (step,) = next(graph for graph in text.graphs if graph.kind == "refit").steps
    assert step.name == "__myl_Tran"
    assert "__myl_Tran" not in text.kernels()


def test_the_plan_is_searched_where_it_lies(tmp_path: Path, w4a16: bytes) -> None:
    expected = reserved_regions(w4a16)
    assert expected
    assert reserved_regions(memoryview(w4a16)) == expected
    with (tmp_path / "text.engine").open("wb") as stream:
        for _ in range(8):
            stream.write(os.urandom(1 << 20) * 20)  # 160 MB
        stream.write(w4a16)
    with (tmp_path / "text.engine").open("rb") as stream:
        plan = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    started = time.process_time()
    assert reserved_regions(memoryview(plan)) == expected == reserved_regions(plan)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("cut", [0, 1, 100, 2_000, 3_000])
def test_half_a_listing_is_read_as_far_as_it_goes(w4a16: bytes, cut: int) -> None:
    start = w4a16.index(b"header {\n  version = ")
    text = read_plan_text(w4a16[: start + cut])
    assert isinstance(text, PlanText)
    assert text.weight_copies() == []
    if not text.graphs:
        assert "the plan holds no" in str(text.reason) or "listings, but none" in str(text.reason)


@pytest.mark.parametrize(
    "plan", [b"", b"ftrt" + bytes(1000), b"header {\n", b"header {\n  version = 9\n}\ndescriptors {\n}\n"]
)
def test_a_plan_that_tells_nothing_gives_nothing_and_a_reason(plan: bytes) -> None:
    assert reserved_regions(plan) == []
    text = read_plan_text(plan)
    assert (text.graphs, text.weight_copies(), text.weight_bytes(), text.reserved_bytes()) == ((), [], {}, {})
    assert text.reason is not None
    assert "as plans of other compilers or versions than TensorRT-RTX 1.7 do" in text.reason


LISTING = """header {
  version = 5
  memory_budget = 1
  region = { name=devmem_topdown_0 size=%d alignment=128 instance=0 type=user place=accelerator unified=false }
  region = { name=system_hmem size=8 alignment=128 instance=0 type=system place=host unified=false }
  region = { name=other size=8 alignment=128 instance=0 type=user place=host unified=false }
  region = { name=d size=9 alignment=128 instance=0 type=user place=accelerator unified=false constant=true }
  region = { name=c size=9 alignment=128 instance=0 type=system place=accelerator unified=false constant=true }
  inputs={ "x [profile 1].1" }
}
descriptors {
  tensor={ alignment=1 const_payload_size=1048576 dims={ 1024 1024 } name="w" offset=0 rank0=0 region=c type=fp8_e4m3 }
  tensor={ alignment=1 const_payload_size=4 dims={ 1 } name="s" offset=0 rank0=1 region=c strides={ 1 } type=float }
  tensor={ alignment=1 dims={ "n" 8 } mem_prop=0 name="x.1" offset=0 rank0=0 region="" strides={ 1 } type=bf16 }
  sub_tensor={ base="x.1" const_offset=0 dims={ 1 "n" 8 } name="part of x^deref" offset=0 rank0=0 type=bf16 }
  sub_tensor={ base="w" const_offset=0 dims={ 512 1024 } name="part of w^deref" offset=0 rank0=0 type=fp8_e4m3 }
  tensor={ alignment=1 dims={ 1024 %d } mem_prop=0 name="t" offset=0 rank0=0 region="devmem_topdown_0" type=%s }
}
main {
 label bb1:
  function={ name=__myl_Kernel fqn=x args={ "w" } input_args={ %s "n^deref" } output_args={ "t" } binary = 0 }
}
shape_main {
 label bb2:
  copy={ name="c" output={"t" } input={"w" } stream=0 }
}
"""


@pytest.mark.parametrize(
    ("width", "dtype", "inputs", "copy"),
    [
        (1024, "bf16", '"w" "s"', True),  # dequantised
        (1024, "bf16", '"w^deref" "x.1"', True),  # by a kernel that does something else too
        (1024, "fp8_e4m3", '"w"', True),  # laid out anew
        (1152, "bf16", '"w" "s"', True),  # and padded: made of weights alone
        (1152, "bf16", '"w^deref"', True),
        (1152, "bf16", "", False),  # filled with a number
        (1152, "bf16", '"w" "x.1"', False),  # an activation of the same order of size
        (1152, "bf16", '"w" "part of x^deref"', False),
        (1152, "bf16", '"part of w^deref"', True),
        (16, "bf16", '"w"', False),  # a table
        (1024, "mystery", '"w"', False),  # nobody knows how large that is
    ],
)
def test_a_copy_is_told_from_an_activation(width: int, dtype: str, inputs: str, copy: bool) -> None:
    text = read_plan_text(b"\0\xff" + (LISTING % (4096, width, dtype, inputs)).encode() + b"\0")
    assert text.regions() == [Region(1, "devmem_topdown_0", 4096)]
    assert [found.tensor.name for found in text.weight_copies()] == ["t"] * copy
    assert text.kernels() == {"__myl_Kernel": 1}
    (graph,) = text.graphs
    assert isinstance(graph, Graph)
    assert [tensor.name for tensor in graph.tensors] == ["w", "s", "x.1", "t"]


def test_a_copy_of_a_weight_that_is_an_input_shows_when_it_is_called_one() -> None:
    """The plan adds to its name the shape range and a number."""
    for name in ("embedding.rows.1", "embedding.rows [profile 1].1"):
        listing = LISTING.replace('"x.1" offset', f'"{name}" offset').replace('dims={ "n" 8 }', "dims={ 64 4096 }")
        text = read_plan_text((listing % (4096, 256, "bf16", f'"{name}"')).encode())
        assert text.weight_copies() == []
        (copy,) = text.weight_copies(inputs=["embedding", "embedding.rows"])
        assert (copy.tensor.name, copy.step) == ("t", "__myl_Kernel")
        assert text.weight_copies(inputs=["embedding"]) == []
        assert text.weight_copies(inputs=["embedding.rows"], least_bytes=1 << 20) == []


def test_a_compiler_that_is_told_of_a_full_disk_says_nothing_and_the_bundle_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`build_serialized_network_to_stream` reports success whatever its stream returns."""

    def no_space(handle: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    made = Network()
    weight = made.weight("w", trt.bfloat16, (OUT, IN), 16)
    product = made.network.add_matrix_multiply(made.x, trt.MatrixOperation.NONE, weight, trt.MatrixOperation.TRANSPOSE)
    made.finish(product.get_output(0))

    class Stream(trt.IStreamWriter):
        def __init__(self, sink: Callable[[bytes], int]) -> None:
            trt.IStreamWriter.__init__(self)
            self.write = sink

    def build() -> None:
        with BundleWriter(tmp_path / "bundle") as bundle, bundle.create("text.engine") as file:
            monkeypatch.setattr(os, "write", no_space)
            made.builder.build_serialized_network_to_stream(made.network, made.config, Stream(file.sink))

    with pytest.raises(CapacityError, match=r"text.engine: the disk is full"):
        build()
    assert list(tmp_path.iterdir()) == []
