"""Nodes of a cluster: which GPU each has, by the labels of GPU Feature Discovery, and so which profile."""

import re
from dataclasses import dataclass

from pydantic import Field

from canvasrt.doctor.checks import GB, Check, Group, Said
from canvasrt.profiles.detect import Gpu, Match, match, product_of
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names

GPU = "nvidia.com/gpu"
_OPERATOR = "helm install --wait gpu-operator nvidia/gpu-operator -n gpu-operator --create-namespace"


class _Metadata(Said):
    name: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _Condition(Said):
    type: str = ""
    status: str = ""


class _NodeInfo(Said):
    architecture: str = ""


class _Status(Said):
    allocatable: dict[str, str] | None = None
    conditions: list[_Condition] | None = None
    node_info: _NodeInfo = Field(default_factory=_NodeInfo)


class _Spec(Said):
    unschedulable: bool = False


class Node(Said):
    metadata: _Metadata = Field(default_factory=_Metadata)
    spec: _Spec = Field(default_factory=_Spec)
    status: _Status = Field(default_factory=_Status)


class Nodes(Said):
    items: list[Node]


class Named(Said):
    metadata: _Metadata = Field(default_factory=_Metadata)


class NamedList(Said):
    items: list[Named]


@dataclass(frozen=True, slots=True)
class GpuNode:
    name: str
    gpus: int  # that a Pod may ask for; 0 where only DRA gives them
    profile: str
    certain: bool
    memory_bytes: int | None  # as the label says
    slice: str  # "1g.10gb", where a Pod gets such a slice of a GPU


def node_checks(nodes: Nodes, dra: bool, asked: bool) -> tuple[list[Check], list[GpuNode]]:
    """``dra``: the cluster has the device class gpu.nvidia.com. ``asked``: the user wants this cluster."""
    group, found, plain = Group("kubernetes"), [], 0
    profiles = [load_profile(name) for name in profile_names()]
    for node in nodes.items:
        labels, allocatable = node.metadata.labels or {}, node.status.allocatable or {}
        name, gpus = f"node {node.metadata.name}", _count(allocatable.get(GPU))
        slices = {key: _count(value) for key, value in allocatable.items() if key.startswith("nvidia.com/mig-")}
        product = labels.get("nvidia.com/gpu.product")
        if product is None and not gpus and not any(slices.values()):
            plain += 1
            continue
        if product is None:
            group.warning(
                name,
                f"has {gpus or sum(slices.values())} GPUs and no label that says which (GPU Feature Discovery)",
                "Install the GPU Operator, which labels nodes, or choose the node yourself: --set "
                f"gpu.nodeSelection=none --set nodeSelector.'kubernetes\\.io/hostname'={node.metadata.name}",
            )
            continue
        here = _matched(product, labels, profiles)
        count, own = _described(gpus, slices)
        arch = labels.get("kubernetes.io/arch") or node.status.node_info.architecture or "amd64"
        finding = f"{count} {product}, {arch}"
        if here.profile is None:
            group.warning(name, f"{finding}: no profile", " ".join(here.notes))
            continue
        finding = f"{finding}: profile {here.profile}"
        problem, fix = _problem(node, here, arch, gpus + sum(slices.values()), dra)
        if problem:
            group.warning(name, f"{finding}; {problem}", fix)
        elif slices or here.notes:
            resource = f"; the Pod asks for one with --set gpu.mig={own}" if own else ""
            group.warning(name, finding, (" ".join(here.notes) or "The profile is of the whole GPU") + resource)
        else:
            group.ok(name, finding)
        if gpus or slices or dra:
            piece = ("" if gpus else own) or product_of(product)[1] or ""
            memory = slice_bytes(piece) or here.gpu.memory_bytes
            found.append(GpuNode(node.metadata.name, gpus, here.profile, here.certainty == "product", memory, piece))
    if plain:
        group.ok("nodes without GPUs", f"{plain} of {len(nodes.items)}")
    if not found:
        group.add(
            "fault" if asked else "warning",
            "GPU nodes",
            "no node has a GPU that a profile is known for and a Pod could ask for",
            f"Add a node with a GPU, and NVIDIA's device plugin: {_OPERATOR}",
        )
    return group.checks, found


def slice_bytes(name: str) -> int | None:
    """Memory of the MIG slice "1g.10gb"."""
    found = re.search(r"\.([0-9]{1,4})gb", name)
    return None if found is None else int(found[1]) * GB


def _matched(product: str, labels: dict[str, str], profiles: list[GpuProfile]) -> Match:
    major, minor = (labels.get(f"nvidia.com/gpu.compute.{part}", "") for part in ("major", "minor"))
    memory = labels.get("nvidia.com/gpu.memory", "")
    capability = f"{major}.{minor}" if major.isdecimal() and minor.isdecimal() else None
    mib = int(memory) if memory.isdecimal() and len(memory) < 10 else 0
    return match(Gpu(product, capability, mib * 2**20 or None, None), profiles)


def _problem(node: Node, here: Match, arch: str, gpus: int, dra: bool) -> tuple[str, str]:
    """Why no Pod of ours starts there, and what helps; empty where one does."""
    profile, name = load_profile(here.nearest), node.metadata.name
    ready = next((each.status for each in node.status.conditions or [] if each.type == "Ready"), "True")
    if arch not in profile.facts.cpu_architectures.value:
        known = ", ".join(profile.facts.cpu_architectures.value)
        return (
            f"the profile is for {known}",
            f"Copy the profile, change its cpu_architectures, and use images for {arch}",
        )
    if ready != "True":
        return "not ready", f"kubectl describe node {name}"
    if node.spec.unschedulable:
        return "takes no Pods", f"kubectl uncordon {name}"
    if not gpus and not dra:
        return "no Pod can ask for its GPUs", f"Install NVIDIA's device plugin: {_OPERATOR}"
    return "", ""


def _described(gpus: int, slices: dict[str, int]) -> tuple[str, str]:
    """How many GPUs, for people, and the name of a slice where it has them."""
    has = {key: count for key, count in slices.items() if count}
    if not has:
        return f"{gpus} x", ""
    return ", ".join(f"{count} x {key.removeprefix('nvidia.com/')}" for key, count in has.items()) + " of", max(
        has
    ).removeprefix("nvidia.com/mig-")


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < 6 else 0
