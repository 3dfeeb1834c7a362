"""What we use of TensorRT exists in datacenter TensorRT 11.4, and the check that says so is shown to fail."""

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

import canvasrt
from rtx_only import ALLOWED_RTX_ONLY
from trt_surface import SURFACE, Surface, Use, record, recorded_faults, static_faults

ROOT = Path(__file__).parents[1]
PACKAGE = Path(canvasrt.__file__).parent
FOLDERS = ("ops/tensorrt*.py", "compile/*.py", "runtime/tensorrt*.py", "runtime/refit.py", "runtime/open_bundle.py")
SOURCES = [file for pattern in FOLDERS for file in sorted(PACKAGE.glob(pattern))]

TABLE: dict[str, Any] = json.loads(SURFACE.read_text(encoding="utf-8"))
DATACENTER = Surface(TABLE)
ENTRY = "IBuilderConfig.set_compute_capability"
GUARD_LINE = "if trt.__name__ == 'tensorrt_rtx':"


def static(
    tmp_path: Path, source: str, allowed: tuple[str, ...] = (), name: str = "lowering.py", modules: tuple[str, ...] = ()
) -> list[str]:
    file = tmp_path / name
    file.write_text(source, encoding="utf-8")
    reasons = dict.fromkeys(allowed, "a reason")
    return static_faults([file], DATACENTER, reasons, *[modules] * bool(modules))


def test_the_sources_use_only_what_datacenter_tensorrt_has() -> None:
    assert static_faults(SOURCES, DATACENTER, ALLOWED_RTX_ONLY) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("\ntrt.DataType.FP6", "2: 11.4.0.106 has no DataType.FP6"),
        ("trt.DataType.FP8.bits", "1: 11.4.0.106 has no DataType.bits"),
        ("self._trt.BuilderFlag.FP16", "1: 11.4.0.106 has no BuilderFlag.FP16"),
        ("self.api.trt.CudaGraphStrategy.NONE", "1: 11.4.0.106 has no CudaGraphStrategy"),
        ("make().trt.float64", "1: 11.4.0.106 has no float64"),
        ("trt.INetworkDefinition.add_magic", "1: 11.4.0.106 has no INetworkDefinition.add_magic"),
        ("trt.Logger.Severity.LOUD", "1: 11.4.0.106 has no ILogger.Severity.LOUD"),
        ("trt.IShuffleLayer.shuffle", "1: 11.4.0.106 has no IShuffleLayer.shuffle"),
        ("class Writer(trt.IStreamSink):\n    pass", "1: 11.4.0.106 has no IStreamSink"),
        ("def f(x: trt.ITensors) -> None: ...", "1: 11.4.0.106 has no ITensors"),
        ("import tensorrt_rtx as other\nother.DataType.FP6", "2: 11.4.0.106 has no DataType.FP6"),
        ("import tensorrt_rtx\ntensorrt_rtx.DataType.FP6", "2: 11.4.0.106 has no DataType.FP6"),
        ("getattr(trt, 'IRuntimeCache')", "1: 11.4.0.106 has no IRuntimeCache"),
        ("getattr(trt.DataType, 'FP6').value", "1: 11.4.0.106 has no DataType.FP6"),
        ("DT = self.api.trt.DataType\nDT.FP6", "2: 11.4.0.106 has no DataType.FP6"),
        ("t = trt\nDT = t.DataType\nDT.FP8.bits", "3: 11.4.0.106 has no DataType.bits"),
        ("W = trt.Weights\nW(1, 2)", "2: 11.4.0.106 has Weights.__init__(type= | type ptr count | a), which does not "),
        ("DT = trt.DataType\ngetattr(DT, name)", "2: a name of TensorRT that is computed is not checked"),
        ("trt.Weights(kind=1)", "1: 11.4.0.106 has Weights.__init__(type= | type ptr count | a), which does not take "),
        ("trt.Weights(1, 2)", "1: 11.4.0.106 has Weights.__init__(type= | type ptr count | a), which does not take 2 "),
        ("trt.Builder()", "1: 11.4.0.106 has Builder.__init__(logger), which does not take 0 by position"),
        ("trt.volume(1, axis=2)", "1: 11.4.0.106 has volume(iterable), which does not take 1 by position, axis="),
        ("trt.IStreamWriter.__init__(self, 1)", "1: 11.4.0.106 has IStreamWriter.__init__(), which does not take 1 "),
        ("trt.ITensor()", "1: 11.4.0.106 has no ITensor.__init__"),
        ("getattr(trt, name)\ntrt.DataType", "1: a name of TensorRT that is computed is not checked: spell it out"),
        ("getattr(trt.DataType, name.upper())\ntrt.DataType", "1: a name of TensorRT that is computed is not checked"),
        ("from tensorrt_rtx import Builder\ntrt.DataType", "1: names imported from TensorRT are not checked: "),
    ],
)
def test_a_planted_violation_is_the_only_one_and_is_named_by_line(tmp_path: Path, source: str, expected: str) -> None:
    (fault,) = static(tmp_path, source)
    assert fault.startswith(f"lowering.py:{expected}")


def test_names_that_exist_are_no_violation(tmp_path: Path) -> None:
    source = """
import tensorrt_rtx as trt
class Writer(trt.IStreamWriter):
    def __init__(self):
        trt.IStreamWriter.__init__(self)
def lower(network: trt.INetworkDefinition, other):
    trt.float32, trt.DataType.FP4.itemsize, trt.Logger.WARNING, trt.Logger.Severity.ERROR, trt.Weights(*other)
    trt.Weights(trt.DataType.FP8, 0, count=3), trt.Weights(), trt.Dims([1]), trt.Dims(shape=[1]), trt.DataType(1)
    network.add_magic(trt.Builder(trt.Logger(min_severity=trt.Logger.INFO)).x, trt.Permutation([0]), getattr(other, x))
    kind = trt.DataType
    kind = other
    kind.FP6
    trt.__version__.partition("."), trt.DataType.__members__
"""
    assert static(tmp_path, source) == []


def test_the_names_of_the_module_object_can_be_chosen(tmp_path: Path) -> None:
    assert static(tmp_path, "api.DataType.FP6", modules=("api",)) == ["lowering.py:1: 11.4.0.106 has no DataType.FP6"]


@pytest.mark.parametrize("source", ["", "network.add_shuffle(x)", "pytrt.DataType.FP6", "trt"])
def test_sources_without_tensorrt_are_a_violation(tmp_path: Path, source: str) -> None:
    (fault,) = static(tmp_path, source)
    assert fault == "no file uses TensorRT through a name of trt, _trt, so nothing was checked"


def test_no_file_at_all_is_a_violation() -> None:
    (fault,) = static_faults([], DATACENTER, {})
    assert fault.startswith("no file uses TensorRT")


def test_what_only_rtx_has_must_be_in_the_list(tmp_path: Path) -> None:
    source = f"{GUARD_LINE} trt.ComputeCapability.SM120"
    assert static(tmp_path, source) == ["lowering.py:1: 11.4.0.106 has no ComputeCapability"]
    assert static(tmp_path, source, ("ComputeCapability",)) == []


USE = "config.set_compute_capability(trt.DataType.FP4, 0)"


@pytest.mark.parametrize(
    "source",
    [
        f"if api.is_rtx:\n    {USE}",
        f"if hasattr(config, 'set_compute_capability'):\n    {USE}",
        f"if api.is_rtx and ready:\n    for x in y:\n        {USE}",
        f"if not api.is_rtx:\n    pass\nelse:\n    {USE}",
        f"if target.compiler != 'tensorrt_rtx' or late:\n    pass\nelse:\n    {USE}",
        f"def f():\n    if not api.is_rtx:\n        return\n    {USE}",
        f"{USE} if api.is_rtx else None",
        f"None if not api.is_rtx else {USE}",
        f"api.is_rtx and {USE}",
        f"match compiler:\n    case 'tensorrt_rtx':\n        {USE}",
        f"def build_for_rtx():\n    {USE}",
        f"class RtxBuilder:\n    def build(self):\n        {USE}",
    ],
)
def test_a_use_behind_a_guard_is_allowed(tmp_path: Path, source: str) -> None:
    assert static(tmp_path, source, (ENTRY,)) == []


@pytest.mark.parametrize(
    "source",
    [
        f"def f():\n    {USE}",
        f"if api.is_rtx:\n    pass\nelse:\n    {USE}",
        f"if not api.is_rtx:\n    {USE}",
        f"if api.is_rtx or late:\n    {USE}",
        f"if not (api.is_rtx and ready):\n    {USE}",
        f"if target.compiler != 'tensorrt_rtx':\n    {USE}",
        f"if target.compiler == 'tensorrt':\n    {USE}",
        f"if hasattr(config, 'progress_monitor'):\n    {USE}",
        f"match compiler:\n    case 'tensorrt':\n        {USE}",
        f"{USE} and api.is_rtx",
        f"def f():\n    if api.is_rtx:\n        return\n    {USE}",
        f"def f():\n    if not api.is_rtx:\n        log()\n    {USE}",
        "getattr(config, 'set_compute_capability')(trt.DataType.FP4, 0)",
    ],
)
def test_a_use_without_a_guard_is_a_violation(tmp_path: Path, source: str) -> None:
    (fault,) = static(tmp_path, source, (ENTRY,))
    line = next(n for n, text in enumerate(source.splitlines(), start=1) if "set_compute_capability" in text)
    assert fault == f"lowering.py:{line}: {ENTRY} is only in TensorRT-RTX and is used without a guard"


def test_a_file_for_rtx_is_a_guard(tmp_path: Path) -> None:
    assert static(tmp_path, USE, (ENTRY,), name="tensorrt_rtx_target.py") == []


def test_an_entry_that_is_no_longer_used_is_a_violation(tmp_path: Path) -> None:
    assert static(tmp_path, "trt.DataType", (ENTRY,)) == [f"ALLOWED_RTX_ONLY: {ENTRY} is not used"]


def test_an_entry_that_both_have_is_a_violation(tmp_path: Path) -> None:
    faults = static(tmp_path, f"{GUARD_LINE} config.set_flag(trt.BuilderFlag)", ("IBuilderConfig.set_flag",))
    assert faults == ["ALLOWED_RTX_ONLY: 11.4.0.106 has IBuilderConfig.set_flag too"]


def test_every_entry_names_something_of_rtx_and_has_a_reason() -> None:
    for entry, reason in ALLOWED_RTX_ONLY.items():
        owner, _, name = entry.rpartition(".")
        assert hasattr(getattr(tensorrt_rtx, owner) if owner else tensorrt_rtx, name), entry
        assert reason


def lower(trt: Any) -> Any:
    """A network and a configuration with every way of using the module: what is given back is the plan's stream."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            assert severity > trt.Logger.WARNING, message

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size = 0

        def write(self, data: Any) -> int:
            self.size += len(data)
            return len(data)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, *phase: Any) -> None: ...

        def phase_finish(self, *phase: Any) -> None: ...

        def step_complete(self, *step: Any) -> bool:
            return True

    builder = trt.Builder(Log())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, trt.Dims([-1, 8]))
    weights = trt.Weights(np.ones((8, 8), np.float32))
    constant = network.add_constant(shape=(8, 8), weights=weights)
    network.set_weights_name(weights, "w")
    none = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(x, none, constant.get_output(0), none)
    shuffle = network.add_shuffle(product.get_output(0))
    shuffle.reshape_dims = (0, 0)
    shuffle.name = "shuffle"
    both = network.add_concatenation([shuffle.get_output(0), x])
    both.axis = 1
    network.mark_output(both.get_output(0))
    assert both.get_input(1) == x
    assert [layer.name for layer in network].count("shuffle") == 1
    first = network.get_layer(0)
    first.__class__ = trt.IConstantLayer
    assert (tuple(first.shape), first.type) == ((8, 8), trt.LayerType.CONSTANT)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    config.progress_monitor = Monitor()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 8), (2, 8), (4, 8))
    assert config.add_optimization_profile(profile) == 0
    assert len(profile.get_shape("x")) == 3
    writer = Writer()
    assert builder.build_serialized_network_to_stream(network, config, writer)
    return writer


@pytest.fixture(scope="module")
def uses() -> dict[Use, None]:
    trt, seen = record(tensorrt_rtx)
    assert lower(trt).size > 1000
    return seen


def test_a_recorded_network_uses_only_what_datacenter_tensorrt_has(uses: dict[Use, None]) -> None:
    assert recorded_faults(uses, DATACENTER, ALLOWED_RTX_ONLY) == []


def test_the_record_has_classes_arguments_and_assignments(uses: dict[Use, None]) -> None:
    expected = {
        Use("", "IStreamWriter"),
        Use("", "float32"),
        Use("MatrixOperation", "NONE"),
        Use("Builder", "__init__", "call", 1),
        Use("IStreamWriter", "__init__", "call", 0),
        Use("INetworkDefinition", "add_constant", "call", 0, ("shape", "weights")),
        Use("INetworkDefinition", "add_concatenation", "call", 1),
        Use("IShuffleLayer", "reshape_dims", "set"),
        Use("IShuffleLayer", "name", "set"),
        Use("IConstantLayer", "shape"),
        Use("IBuilderConfig", "num_compute_capabilities", "set"),
        Use("IOptimizationProfile", "set_shape", "call", 4),
    }
    assert expected - uses.keys() == set()


def test_what_only_rtx_has_is_a_violation_of_a_record_without_the_list(uses: dict[Use, None]) -> None:
    assert recorded_faults(uses, DATACENTER, {}) == [
        "11.4.0.106 has no ComputeCapability",
        "11.4.0.106 has no IBuilderConfig.num_compute_capabilities",
        "11.4.0.106 has no IBuilderConfig.set_compute_capability",
    ]


@pytest.mark.parametrize(
    ("owner", "name", "instead", "expected"),
    [
        ("MatrixOperation", "members/NONE", None, "has no MatrixOperation.NONE"),
        ("INetworkDefinition", "methods/add_shuffle", None, "has no INetworkDefinition.add_shuffle"),
        ("IShuffleLayer", "write/reshape_dims", None, "has no IShuffleLayer.reshape_dims"),
        ("ILayer", "methods/get_input", None, "has no IConcatenationLayer.get_input"),
        ("INetworkDefinition", "methods/add_constant", "dims weights", "0 by position, shape=, weights="),
        ("INetworkDefinition", "methods/add_constant", "shape weights name", "0 by position, shape=, weights="),
        ("INetworkDefinition", "methods/add_constant", "arg0 arg1", "0 by position, shape=, weights="),
        ("IOptimizationProfile", "methods/set_shape", "input min max", "4 by position"),
        ("IOptimizationProfile", "methods/set_shape", "input | input min opt max more", "4 by position"),
    ],
)
def test_a_planted_difference_is_the_only_violation_of_a_record(
    uses: dict[Use, None], owner: str, name: str, instead: str | None, expected: str
) -> None:
    table = copy.deepcopy(TABLE)
    group, _, member = name.partition("/")
    names = table["classes"][owner][group]
    if instead is None:
        names.pop(member) if isinstance(names, dict) else names.remove(member)
    else:
        names[member] = instead.split(" | ")
        expected = f"has {owner}.{member}({instead}), which does not take {expected}"
    assert recorded_faults(uses, Surface(table), ALLOWED_RTX_ONLY) == [f"11.4.0.106 {expected}"]


def test_a_property_that_cannot_be_set_and_a_class_that_is_missing_are_violations(uses: dict[Use, None]) -> None:
    table = copy.deepcopy(TABLE)
    layer = table["classes"]["IConcatenationLayer"]
    layer["read"], layer["write"] = layer["write"], []
    del table["classes"]["IStreamWriter"]
    assert recorded_faults(uses, Surface(table), ALLOWED_RTX_ONLY) == [
        "11.4.0.106 cannot set IConcatenationLayer.axis",
        "11.4.0.106 has no IStreamWriter",
    ]


def test_attributes_of_a_base_class_count_and_an_entry_on_the_base_holds_for_them() -> None:
    inherited = Use("IShuffleLayer", "num_ranks", "set")
    added = Use("IShuffleLayer", "color", "set")
    assert recorded_faults([inherited], DATACENTER, {}) == []
    assert recorded_faults([added], DATACENTER, {}) == ["11.4.0.106 has no IShuffleLayer.color"]
    assert recorded_faults([added], DATACENTER, {"ILayer.color": "a reason"}) == []
    assert recorded_faults([added], DATACENTER, {"IGatherLayer.color": "a reason"}) != []


def test_a_record_sees_a_planted_use_of_the_real_module() -> None:
    trt, seen = record(tensorrt_rtx)
    config = trt.Builder(logger=trt.Logger(trt.Logger.ERROR)).create_builder_config()
    assert config.get_compute_capability(0) is not None
    assert config.get_flag(flag=trt.BuilderFlag.REQUIRE_USER_ALLOCATION) is False
    assert recorded_faults(seen, DATACENTER, ALLOWED_RTX_ONLY) == [
        "11.4.0.106 has no BuilderFlag.REQUIRE_USER_ALLOCATION",
        "11.4.0.106 has no IBuilderConfig.get_compute_capability",
    ]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tensorrt_api", ROOT / "scripts" / "tensorrt_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_reads_installed_bindings_the_way_it_read_those_of_the_fixture() -> None:
    script = load_script()
    installed = script.surface_of("tensorrt_rtx")
    assert script.text_of(TABLE) == SURFACE.read_text(encoding="utf-8")
    for name in ("INetworkDefinition", "Weights", "IShuffleLayer", "IAttention", "Refitter", "DataType"):
        rows = [dict(surface["classes"][name]) for surface in (TABLE, installed)]
        for row in rows:
            row["methods"] = {key: value for key, value in row.get("methods", {}).items() if "plugin" not in key}
            row["read"] = set(row.get("read", [])) - {"has_implicit_batch_dimension"}
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f(self: a.b.T) -> None", ""),
        ("f(self: a.b.T, x: int, y: a.E = <E.A: 0>) -> None", "x y="),
        ("2. f(self: a.T, x: list[tuple[int, int]], y: Callable[[int, str], bool] = None) -> a.T", "x y="),
        ("f(arg0: int) -> None", "arg0"),
    ],
)
def test_the_script_reads_the_parameters_of_a_signature(line: str, expected: str) -> None:
    assert load_script()._parameters(line, types=False) == expected


def test_the_fixture_names_no_folder() -> None:
    text = SURFACE.read_text(encoding="utf-8")
    assert "/" not in text
    assert "\\" not in text
