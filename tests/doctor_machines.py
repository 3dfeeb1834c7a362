"""Machines as `canvasrt doctor` sees them, with what their programs print."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from canvasrt.doctor import cluster, containers, gpu
from canvasrt.doctor.checks import Check
from canvasrt.doctor.machine import Answer, Command, Disk, System
from canvasrt.doctor.report import FITS, Report, Request, examine
from canvasrt.errors import InputError
from canvasrt.profiles import profile
from canvasrt.profiles.detect import QUERY

GIB = 1 << 30
LINUX = System("Linux", "6.8.0-85-generic", "x86_64", "2.39", (3, 12))
MISSING = Answer(problem="not found", missing=True)
PORTS = {"http-port": 8000, "grpc-port": 8001, "metrics-port": 8002}
ALL = {"tensorrt_rtx_cu13": "1.7.1.116", "tensorrt_cu13": "11.2.0", "cuda-bindings": "13.5.0", "torch": "2.13.0"}
TABLE = """+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver}             Driver Version: {driver}      CUDA Version: {cuda}     |
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
"""


@dataclass
class FakeMachine:
    answers: dict[Command, Answer] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    packages: dict[str, str] = field(default_factory=dict)
    has_triton: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    system: System = LINUX
    asked: list[Command] = field(default_factory=list)

    def run(self, command: Command, timeout: float) -> Answer:
        assert 0 < timeout <= 20
        self.asked.append(command)
        return self.answers.get(command, MISSING)

    def stop(self) -> None:
        raise AssertionError("nothing is to be stopped")

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def names(self, folder: str) -> list[str]:
        return self.folders.get(folder, [])

    def disk(self, path: str) -> Disk | None:
        return self.disks.get(path)

    def port_problem(self, port: int) -> str:
        return "Address already in use" if port in self.taken else ""

    def version(self, package: str) -> str | None:
        return self.packages.get(package)

    def triton(self) -> str:
        if not self.has_triton:
            raise InputError("no Triton Inference Server found on PATH. Use NVIDIA's container")
        return "/opt/tritonserver/bin/tritonserver"


def printed(text: str, code: int = 0, err: str = "") -> Answer:
    return Answer(text, err, code)


def looked(machine: FakeMachine, **request: Any) -> Report:
    asked: dict[str, Any] = {
        "checkpoint": None,
        "profile": None,
        "volume": ".",
        "ports": PORTS,
        "kubernetes": None,
    }
    with patch.object(profile, "load_settings", _load_once):
        return examine(machine, Request(**(asked | request)))


_load_once = cache(profile.load_settings)  # every report reads every profile, which takes a tenth of a second


def meminfo(total: float, available: float) -> str:
    """GiB."""
    kib = [int(size * 2**20) for size in (total, available)]
    return f"MemTotal:       {kib[0]} kB\nMemFree:          123456 kB\nMemAvailable:   {kib[1]} kB\nSwapTotal: 0 kB\n"


def host(memory: float, disk: float, shm: float = 32) -> FakeMachine:
    """GiB of memory, disk and /dev/shm."""
    places = {".": Disk("/home/ada", int(2 * disk) * GIB, int(disk * GIB))}
    shared = Disk("/dev/shm", int(shm * GIB), int(shm * GIB))
    files = {
        "/proc/meminfo": meminfo(memory, memory - 3),
        "/etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
    }
    return FakeMachine(files=files, disks=places | {"/dev/shm": shared})


def smi(
    driver: str, cuda: str, lines: list[str], states: list[str], apps: str = "", listed: str = ""
) -> dict[Command, Answer]:
    return {
        gpu.HEADER: printed(TABLE.format(driver=driver, cuda=cuda)),
        QUERY: printed("".join(f"{line}, {driver}\n" for line in lines)),
        gpu.STATE: printed("".join(f"{line}\n" for line in states)),
        gpu.APPS: printed(apps),
        gpu.LIST: printed(listed),
    }


def docker(**info: Any) -> dict[Command, Answer]:
    said = {"ID": "7c1b", "ServerVersion": "28.5.1", "Runtimes": {"runc": {"path": "runc"}}, "DefaultRuntime": "runc"}
    said |= {"HttpProxy": "http://ada:hunter2@proxy:3128", "CDISpecDirs": ["/etc/cdi", "/var/run/cdi"]}
    return {
        containers.DOCKER: printed("Docker version 28.5.1, build e180ab8\n"),
        containers.INFO: printed(json.dumps(said | info) + "\n"),
        containers.COMPOSE: printed("Docker Compose version v2.40.2\n"),
        containers.TOOLKIT: printed("NVIDIA Container Toolkit CLI version 1.18.0\ncommit: f8daa5e2\n"),
        containers.CONTAINERD: printed("containerd containerd.io 1.7.28 b98a3aac\n"),
    }


def rtx_5090() -> FakeMachine:
    machine = host(62, 900)
    state = "0, GPU-5d2a, 32607, 611, [N/A], Default"
    machine.answers = smi("610.57.04", "13.3", ["NVIDIA GeForce RTX 5090, 12.0, 32607"], [state])
    machine.answers |= docker(Runtimes={"nvidia": {"path": "nvidia-container-runtime"}, "runc": {"path": "runc"}})
    machine.packages = dict(ALL)
    return machine


def spark() -> FakeMachine:
    """GPU and CPU share 119.7 GiB, and nvidia-smi tells nothing of it."""
    machine = host(119.7, 3000)
    machine.system = System("Linux", "6.14.0-1015-nvidia", "aarch64", "2.39", (3, 12))
    state = "0, GPU-9e0c, [N/A], [N/A], [N/A], Default"
    apps = "GPU-9e0c, 4711, [N/A], /usr/bin/python3\n"
    machine.answers = smi("580.126.09", "13.0", ["NVIDIA GB10, 12.1, [N/A]"], [state], apps)
    machine.answers |= docker(DiscoveredDevices=[{"Source": "cdi", "ID": "nvidia.com/gpu=all"}])
    machine.packages = dict(ALL)
    return machine


def h100_old() -> FakeMachine:
    """Two GPUs: one in use and for nobody else, one in slices."""
    machine = host(1000, 5000)
    lines = ["NVIDIA H100 80GB HBM3, 9.0, 81559"] * 2
    states = ["0, GPU-aaaa, 81559, 60000, Disabled, Prohibited", "1, GPU-bbbb, 81559, 100, Enabled, Default"]
    apps = "GPU-aaaa, 99, 59800, /opt/conda/bin/python train.py --token=hunter2, --more\n"
    listed = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)\n"
        "  MIG 1g.10gb     Device  0: (UUID: MIG-c6d4)\n  MIG 3g.40gb     Device  1: (UUID: MIG-0b1f)\n"
    )
    machine.answers = smi("535.183.01", "12.2", lines, states, apps, listed)
    return machine


def node(
    name: str, labels: dict[str, str], allocatable: dict[str, str], arch: str = "amd64", **spec: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/arch": arch, "kubernetes.io/hostname": name} | labels},
        "spec": {"podCIDR": "10.244.1.0/24"} | spec,
        "status": {
            "allocatable": {"cpu": "128", "memory": "1056Gi", "pods": "110"} | allocatable,
            "conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": "True"}],
            "nodeInfo": {"architecture": arch, "kubeletVersion": "v1.33.4", "osImage": "Ubuntu 24.04.3 LTS"},
        },
    }


def gpu_labels(product: str, capability: str, mib: int | None, count: int = 8) -> dict[str, str]:
    major, minor = capability.split(".")
    labels = {"nvidia.com/gpu.product": product, "nvidia.com/gpu.count": str(count), "nvidia.com/gpu.present": "true"}
    labels |= {"nvidia.com/gpu.compute.major": major, "nvidia.com/gpu.compute.minor": minor}
    return labels if mib is None else labels | {"nvidia.com/gpu.memory": str(mib)}


H100_LABELS = gpu_labels("NVIDIA-H100-80GB-HBM3", "9.0", 81559)
NODES = [
    node("control", {"node-role.kubernetes.io/control-plane": ""}, {}),
    node("gpu-1", H100_LABELS, {"nvidia.com/gpu": "8"}),
    node("gpu-2", H100_LABELS, {"nvidia.com/gpu": "8"}),
    node("spark-1", gpu_labels("NVIDIA-GB10", "12.1", None, 1), {"nvidia.com/gpu": "1"}, "arm64"),
    node("unlabelled", {}, {"nvidia.com/gpu": "4"}),
]


def listed(items: list[dict[str, Any]], kind: str = "List") -> Answer:
    return printed(json.dumps({"apiVersion": "v1", "kind": kind, "items": items, "metadata": {"resourceVersion": ""}}))


def kubernetes(
    nodes: list[dict[str, Any]], version: str = "v1.33.4", groups: tuple[str, ...] = ()
) -> dict[Command, Answer]:
    versions = {"clientVersion": {"major": "1", "minor": "35"}, "serverVersion": {"major": "1", "gitVersion": version}}
    apis = {"kind": "APIGroupList", "groups": [{"name": name, "versions": []} for name in ("apps", "batch", *groups)]}
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    classes = [{"metadata": {"name": "slow"}}, {"metadata": {"name": "local-path", "annotations": default}}]
    return {
        cluster.CONTEXT: printed("lab\n"),
        cluster.HELM: printed("v4.1.4+g05fa379\n"),
        cluster.VERSION: printed(json.dumps(versions)),
        cluster.NODES: listed(nodes),
        cluster.CLASSES: listed(classes),
        cluster.APIS: printed(json.dumps(apis)),
        cluster.DEVICES: printed("", 1, 'error: the server doesn\'t have a resource type "deviceclasses"\n'),
        **{command: printed("yes\n") for command in cluster.MAY.values()},
    }


def laptop() -> FakeMachine:
    machine = host(31, 200)
    machine.answers = kubernetes(NODES, groups=("monitoring.coreos.com", "resource.k8s.io"))
    machine.packages = {"tritonclient": "2.73.0"}
    machine.has_triton = False
    return machine


def container() -> FakeMachine:
    """A limit of 8 GiB, of which 5 are in use and 2 of those only cached files; Docker's 64 MiB of shared memory."""
    machine = rtx_5090()
    machine.answers = {key: value for key, value in machine.answers.items() if key[0] == "nvidia-smi"}
    machine.folders["/"] = [".dockerenv", "bin", "etc"]
    machine.disks["/dev/shm"] = Disk("/dev/shm", 64 << 20, 64 << 20)
    machine.files |= {
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{5 * GIB}\n",
        "/sys/fs/cgroup/memory.stat": f"anon {3 * GIB}\ninactive_file {2 * GIB}\nactive_file 0\n",
    }
    return machine


def bare() -> FakeMachine:
    """Nothing but Python on a system that tells nothing."""
    return FakeMachine(has_triton=False)


EVERY = {
    "rtx-5090": rtx_5090,
    "spark": spark,
    "h100-old": h100_old,
    "laptop": laptop,
    "container": container,
    "bare": bare,
}
PUBLISHED = Path(__file__).parent / "fixtures" / "diffusiongemma-26b-a4b"


def check(report: Report, name: str, group: str | None = None) -> Check:
    """Of what fits only where ``group`` says so: those have the same names."""
    (found,) = [
        each
        for each in report.checks
        if each.name == name and (each.group == group or (not group and each.group != FITS))
    ]
    return found


def status(report: Report, name: str) -> str:
    return check(report, name).status


def well_formed(report: Report) -> None:
    assert len({(each.group, each.name) for each in report.checks}) == len(report.checks)
    for each in report.checks:
        assert each.finding
        assert not re.search(r"[\n\r]", each.finding + each.fix), each
        assert bool(each.fix) or each.status in ("ok", "skipped"), each
