"""What a TensorRT-RTX plan says about itself: the device memory that a call reserves, its tensors and its kernels.

A plan holds the listing of every graph in it as plain text. The format is NVIDIA's own and undocumented, read here as
version 1.7 writes it, so this serves diagnostics and tests: where the text is missing or different the result says so
and nothing fails. Needs no GPU and no TensorRT.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Literal

# Of a whole range of shapes: each graph's listing runs from here to the first byte that no text has.
_LISTING = re.compile(rb"header \{\n  version = [0-9]+\n[\t\n\x20-\x7e]*")
_REGION = re.compile(r"^  region = \{ name=(\S+) size=(\d+) .*?type=(\w+) place=(\w+)(.*)\}$", re.MULTILINE)
_TENSOR = re.compile(
    r'^  tensor=\{(?P<head>.*?) dims=\{(?P<dims>[^}]*)\}.*? name="(?P<name>[^"]*)".*? region="?(?P<region>[^" ]*)"?'
    r".*? type=(?P<dtype>\w+) \}$",
    re.MULTILINE,
)
_VIEW = re.compile(r'^  sub_tensor=\{ base="([^"]*)".*? name="([^"]*)"', re.MULTILINE)
_STEP = re.compile(r'^  (?P<kind>\w+)=\{ name=(?P<name>"[^"]*"|\S+)(?P<rest>.*)\}$', re.MULTILINE)
_INPUTS = re.compile(r" (?:input|input_args)=\{([^}]*)\}")
_OUTPUTS = re.compile(r" (?:output|output_args)=\{([^}]*)\}")
_QUOTED = re.compile(r'"([^"]*)"')
_PAYLOAD = re.compile(r"const_payload_size=(\d+)")
_REFITTED = re.compile(r"_constant\w+___mye\d+\.\d+$")  # a weight as the caller gives it
_SHAPE_RANGE = re.compile(r" \[profile (\d+)\]")
_NUMBERED = re.compile(r"( \[profile \d+\])?\.\d+$")  # what a plan adds to the name of an input
_BITS = {
    **dict.fromkeys(("fp4_e2m1", "int4"), 4),
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2", "fp8_e8m0", "int8", "uint8", "bool"), 8),
    **dict.fromkeys(("bf16", "half", "fp16"), 16),
    **dict.fromkeys(("float", "int32"), 32),
    **dict.fromkeys(("int64", "double"), 64),
}
_BOOKKEEPING = ("signal", "wait", "shape_call")
_LEAST_COPY_BYTES = 1 << 16  # smaller ones are tables, not copies of matrices

Plan = bytes | memoryview | mmap
# run: the network. fusion: the inside of a kernel that is compiled on the user's GPU. refit: what brings a weight that
# is filled in later into the kernels' layout, once.
GraphKind = Literal["run", "fusion", "refit"]


@dataclass(frozen=True, slots=True)
class Region:
    """Device memory that a call in one shape range (by its index) reserves for temporary tensors."""

    shape_range: int
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlanTensor:
    name: str
    dtype: str  # in the plan's words: "bf16", "fp4_e2m1"
    dims: tuple[int | None, ...]  # None: varies from call to call
    region: str  # empty: of the caller
    constant_bytes: int | None  # of a weight

    @property
    def count(self) -> int | None:
        """Numbers in it; None where that varies."""
        known = [size for size in self.dims if size is not None]
        return math.prod(known) if len(known) == len(self.dims) else None

    @property
    def nbytes(self) -> int | None:
        return None if self.count is None or self.dtype not in _BITS else self.count * _BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel call, copy or the like."""

    kind: str  # "function", "fully_connected", "runtime_fusion", ...
    name: str  # of the kernel where it has one: "__myl_CastMulCast"
    inputs: tuple[str, ...]  # of tensors: a view counts as the tensor that it looks into
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """One listing."""

    kind: GraphKind
    shape_range: int
    regions: tuple[Region, ...]
    tensors: tuple[PlanTensor, ...]
    steps: tuple[Step, ...]

    def temporary(self) -> list[PlanTensor]:
        """Tensors in the reserved regions: several may use the same bytes one after the other."""
        names = {region.name for region in self.regions}
        return [tensor for tensor in self.tensors if tensor.region in names and tensor.constant_bytes is None]


@dataclass(frozen=True, slots=True)
class WeightCopy:
    """A temporary tensor that is made of weights alone, or is as large as a weight: dequantised, or laid out anew."""

    shape_range: int
    tensor: PlanTensor
    step: str  # what makes it


@dataclass(frozen=True, slots=True)
class PlanText:
    """Everything that was found. Without graphs, ``reason`` says why."""

    graphs: tuple[Graph, ...]
    reason: str | None = None

    def regions(self) -> list[Region]:
        return [region for graph in self._running() for region in graph.regions]

    def reserved_bytes(self) -> dict[int, int]:
        """By shape range: what a call reserves on the GPU, beside weights, inputs and outputs."""
        found: Counter[int] = Counter()
        for graph in self._running():
            found[graph.shape_range] += sum(region.nbytes for region in graph.regions)
        return dict(found)

    def weight_bytes(self) -> dict[str, int]:
        """By dtype, as the kernels want them. Shape ranges share their weights, so the one with most of them counts."""
        found: dict[str, int] = {}
        for shape_range in {graph.shape_range for graph in self._running()}:
            own: Counter[str] = Counter()
            for graph in self._running():
                for tensor in graph.tensors if graph.shape_range == shape_range else ():
                    own[tensor.dtype] += tensor.constant_bytes or 0
            found |= {dtype: max(size, found.get(dtype, 0)) for dtype, size in own.items() if size}
        return found

    def kernels(self) -> Counter[str]:
        """How often each kernel, copy or the like is called, all shape ranges together."""
        steps = [step for graph in self._running() for step in graph.steps if step.kind not in _BOOKKEEPING]
        named = ("function", "runtime_fusion")
        return Counter(step.name if step.kind in named else step.kind for step in steps)

    def weight_copies(self, inputs: Collection[str] = (), least_bytes: int = _LEAST_COPY_BYTES) -> list[WeightCopy]:
        """Copies of weights that are made again on every call: there should be none. ``inputs`` are weights too."""
        return [copy for graph in self._running() for copy in _copies(graph, inputs, least_bytes)]

    def _running(self) -> list[Graph]:
        return [graph for graph in self.graphs if graph.kind == "run"]


def read_plan_text(plan: Plan) -> PlanText:
    """Searches the whole plan without copying it: a fifth of a second for 200 MB."""
    listings = [match.group().decode("ascii") for match in _LISTING.finditer(plan)]
    graphs = tuple(_graph(listing) for listing in listings)
    if any(graph.kind == "run" for graph in graphs):
        return PlanText(graphs)
    found = "no listing" if not listings else "listings, but none that names device memory"
    return PlanText((), f"the plan holds {found}, as plans of other compilers or versions than TensorRT-RTX 1.7 do")


def reserved_regions(plan: Plan) -> list[Region]:
    """Temporary device memory; empty where the plan does not tell, and `read_plan_text` says why."""
    return read_plan_text(plan).regions()


def _graph(listing: str) -> Graph:
    header, _, rest = listing.partition("\ndescriptors {\n")
    descriptors, _, steps = rest.partition("\nmain {\n")
    main = steps.partition("\nshape_main {\n")[0]  # what computes sizes on the CPU follows
    marked = _SHAPE_RANGE.search(listing)
    shape_range = int(marked.group(1)) if marked else 0
    regions = tuple(
        Region(shape_range, name, int(size))
        for name, size, kind, place, more in _REGION.findall(header)
        if kind == "user" and place == "accelerator" and "constant=true" not in more
    )
    views = {_plain(name): base for base, name in _VIEW.findall(descriptors)}
    return Graph(_kind(header), shape_range, regions, tuple(_tensors(descriptors)), tuple(_steps(main, views)))


def _kind(header: str) -> GraphKind:
    if "\n  memory_budget = " not in header:
        return "fusion"
    inputs = _QUOTED.findall(header.partition("\n  inputs={")[2].partition("}\n")[0])
    return "refit" if inputs and all(map(_REFITTED.search, inputs)) else "run"


def _tensors(descriptors: str) -> Iterator[PlanTensor]:
    for match in _TENSOR.finditer(descriptors):
        if "is_scratchspace=1" in match.group():
            continue
        payload = _PAYLOAD.search(match["head"])
        dims = tuple(int(size) if size.isdecimal() else None for size in _words(match["dims"]))
        constant = None if payload is None else int(payload.group(1))
        yield PlanTensor(match["name"], match["dtype"], dims, match["region"], constant)


def _words(text: str) -> list[str]:
    """``4 "a name" 256`` as three."""
    return re.findall(r'"[^"]*"|\S+', text)


def _steps(main: str, views: dict[str, str]) -> Iterator[Step]:
    for match in _STEP.finditer(main):
        inputs, outputs = (_names(each.search(match["rest"]), views) for each in (_INPUTS, _OUTPUTS))
        yield Step(match["kind"], match["name"].strip('"'), inputs, outputs)


def _names(match: re.Match[str] | None, views: dict[str, str]) -> tuple[str, ...]:
    names = [] if match is None else map(_plain, _QUOTED.findall(match.group(1)))
    return tuple(views.get(name, name) for name in names)


def _plain(name: str) -> str:
    return name.removesuffix("^deref")


def _copies(graph: Graph, inputs: Collection[str], least_bytes: int) -> Iterator[WeightCopy]:
    temporary = {tensor.name: tensor for tensor in graph.temporary()}
    callers = {tensor.name for tensor in graph.tensors if not tensor.region}
    constants = {
        tensor.name: tensor.count
        for tensor in graph.tensors
        if tensor.constant_bytes is not None or _NUMBERED.sub("", tensor.name) in inputs
    }
    sizes = set(constants.values())
    from_weights = set(constants)
    for step in graph.steps:
        read = [name for name in step.inputs if name in temporary or name in constants or name in callers]
        if read and from_weights.issuperset(read):  # what else it reads are sizes
            from_weights.update(step.outputs)
        for tensor in (temporary[name] for name in step.outputs if name in temporary):
            if (tensor.nbytes or 0) >= least_bytes and (tensor.name in from_weights or tensor.count in sizes):
                yield WeightCopy(graph.shape_range, tensor, step.name)
