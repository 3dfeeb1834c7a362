"""The TensorRT of the tests has the methods that NVIDIA's has, with the same arguments: in TensorRT-RTX, and but for a
few in datacenter TensorRT.
"""

import inspect
import json
import re
from typing import Any

import pytest
import tensorrt_rtx as trt

from host_tensorrt import HostContext, HostCudaEngine, HostRefitter, HostRuntime, HostRuntimeConfig
from rtx_only import RTX_ONLY
from trt_surface import SURFACE

DOUBLES = {
    "Runtime": HostRuntime,
    "ICudaEngine": HostCudaEngine,
    "IRuntimeConfig": HostRuntimeConfig,
    "IExecutionContext": HostContext,
    "Refitter": HostRefitter,
}
DATACENTER: dict[str, Any] = json.loads(SURFACE.read_text(encoding="utf-8"))["classes"]


def methods(double: type) -> dict[str, Any]:
    return {name: each for name, each in vars(double).items() if inspect.isfunction(each) and not name.startswith("_")}


USED = [(name, method) for name, double in DOUBLES.items() for method in methods(double)]


def given(double: type, method: str) -> list[str]:
    return [name for name in inspect.signature(methods(double)[method]).parameters if name != "self"]


def overloads(kind: str, method: str) -> list[list[str]]:
    """Names of the arguments, from pybind11's docstrings."""
    text = getattr(getattr(trt, kind), method).__doc__
    found = re.findall(rf"{method}\(self: [^,)]*,?\s*(.*?)\) ->", text)
    return [re.findall(r"(?:^|, )(\w+): ", arguments) for arguments in found]


@pytest.mark.parametrize(("kind", "method"), USED)
def test_a_method_takes_what_tensorrt_rtx_takes(kind: str, method: str) -> None:
    assert given(DOUBLES[kind], method) in overloads(kind, method)


@pytest.mark.parametrize(("kind", "method"), USED)
def test_a_method_exists_in_datacenter_tensorrt_unless_it_is_known_not_to(kind: str, method: str) -> None:
    known = DATACENTER[kind]["methods"]
    assert (method in known) != (method in RTX_ONLY)
    if method in known:
        names = [[name.rstrip("=") for name in overload.split()] for overload in known[method]]
        assert given(DOUBLES[kind], method) in names


def test_the_check_would_notice_another_argument_or_method() -> None:
    assert len(USED) >= 19
    assert ["name", "shape"] in overloads("IExecutionContext", "set_input_shape")
    assert ["name", "dims"] not in overloads("IExecutionContext", "set_input_shape")
    assert not hasattr(trt.IExecutionContext, "enqueue_v3")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ICudaEngine", ["num_optimization_profiles"]),
        ("IRuntimeConfig", ["cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"]),
    ],
)
def test_what_is_read_and_written_exists(kind: str, names: list[str]) -> None:
    assert all(isinstance(inspect.getattr_static(getattr(trt, kind), name), property) for name in names)
