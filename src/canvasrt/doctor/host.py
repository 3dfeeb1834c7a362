"""The machine without its GPU: system, memory, disk, ports."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from canvasrt.doctor.checks import Check, Group, gb, numbers
from canvasrt.doctor.machine import Disk, Machine
from canvasrt.doctor.model import Needs

LEAST_GLIBC = {"x86_64": (2, 28), "aarch64": (2, 35)}  # that NVIDIA's and PyTorch's wheels are built for
LEAST_PYTHON = (3, 11)
LEAST_SHM, GOOD_SHM = 64 << 20, 1 << 30  # the server takes 8 MiB at its start, and more with its requests
_PART = "memory and disk"
_UNLIMITED = 1 << 60  # cgroup v1 writes a number of this size for no limit
ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the machine, or of the container where that has less. Bytes."""

    total_bytes: int
    available_bytes: int
    limited: bool  # by a control group


def in_container(machine: Machine) -> bool:
    if "KUBERNETES_SERVICE_HOST" in machine.environment or ".dockerenv" in machine.names("/"):
        return True
    groups = machine.read("/proc/1/cgroup") or ""
    return ".containerenv" in machine.names("/run") or bool(re.search(r"docker|kubepods|containerd|libpod", groups))


def system_checks(machine: Machine) -> list[Check]:
    group, system = Group("system"), machine.system
    if system.name == "Linux":
        found = re.search(r'^PRETTY_NAME="?([^"\n]{1,80})', machine.read("/etc/os-release") or "", re.MULTILINE)
        kind = ", under WSL 2" if "microsoft" in system.release.lower() else ""
        kind += ", in a container" if in_container(machine) else ""
        group.ok("operating system", f"{found[1] if found else 'Linux'}, kernel {system.release}{kind}")
    else:
        group.warning(
            "operating system",
            f"{system.name or 'unknown'}: clients and helm work here, compilers and servers don't",
            "Build and serve on Linux (on Windows: wsl --install), or in a cluster",
        )
    least = LEAST_GLIBC.get(system.machine)
    if system.machine.lower() not in ARCHITECTURES:
        group.fault(
            "processor",
            f"{system.machine or 'unknown'}: NVIDIA's packages are for x86_64 and aarch64",
            "Use a machine with such a processor",
        )
    else:
        group.ok("processor", system.machine)
    if system.name != "Linux" or least is None:
        group.skipped("glibc", "only asked of Linux on x86_64 and aarch64")
    elif system.glibc is None or numbers(system.glibc) < least:
        wanted = f"{least[0]}.{least[1]}"
        group.fault(
            "glibc",
            f"{system.glibc or 'none'}: the compilers' packages need {wanted} on {system.machine}",
            f"Use a system with glibc {wanted} or newer (Debian 12, Ubuntu 22.04), or a container: python:3.11",
        )
    else:
        group.ok("glibc", system.glibc)
    python = ".".join(map(str, system.python))
    if system.python < LEAST_PYTHON:
        group.fault("Python", f"{python} is too old", "Install Python 3.11 or newer, and CanvasRT for it")
    else:
        group.ok("Python", python)
    return group.checks


def memory(machine: Machine) -> Memory | None:
    """None where Linux does not tell."""
    text = machine.read("/proc/meminfo") or ""
    found = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+([0-9]{1,15}) kB", text, re.MULTILINE)}
    if "MemTotal" not in found or "MemAvailable" not in found:
        return None
    total, available, limited = found["MemTotal"], found["MemAvailable"], False
    for limit, used in _limits(machine):
        if limit < total:
            total, limited = limit, True
        available = min(available, max(limit - used, 0))
    return Memory(total, available, limited)


def memory_checks(has: Memory | None, need: Needs | None, serves: bool) -> list[Check]:
    """``serves``: a GPU is here, or was named. Steps that don't fit can be done elsewhere, so they are warnings."""
    group = Group(_PART)
    if has is None:
        group.skipped("memory", "/proc/meminfo does not tell the memory of this machine")
        return group.checks
    limit = ", the limit of this container" if has.limited else ""
    group.ok("memory", f"{gb(has.available_bytes)} of {gb(has.total_bytes)} are available{limit}")
    if need is None:
        return group.checks
    raise_it = "raise the container's limit (docker run --memory, resources.limits.memory)" if has.limited else ""
    steps = (
        ("quantize", need.quantize_memory_bytes, ""),
        ("build, weights inside", need.inside_memory_bytes, "build with --weights stripped"),
        ("build, weights stripped", need.stripped_memory_bytes, ""),
    )
    for name, needed, instead in steps:
        if needed is None:
            group.skipped(name, "the checkpoint is served as it is stored")
        elif needed <= has.available_bytes:
            group.ok(name, f"fits: about {gb(needed)} for {need.profile}")
        elif name == "quantize" and need.published is not None:
            lacking = f"needs about {gb(needed)} for {need.profile}, {gb(has.available_bytes)} are available"
            group.skipped(name, f"{lacking}; not needed, as {need.published} is quantized")
        else:
            ways = [raise_it, instead, f"do it on a machine with {gb(needed)} and copy the result"]
            fix = ", or ".join(way for way in ways if way)
            last = name == "build, weights stripped" and serves
            group.add(
                "fault" if last else "warning",
                name,
                f"needs about {gb(needed)} for {need.profile}, {gb(has.available_bytes)} are available",
                fix[:1].upper() + fix[1:],
            )
    return group.checks


def disk_checks(machine: Machine, volume: str, need: Needs | None, serves: bool) -> list[Check]:
    group, disk = Group(_PART), machine.disk(volume)
    if disk is None:
        group.fault(
            "disk", f"{volume} does not answer, or is no folder", "Give a folder that can be read: --volume DIR"
        )
    elif need is None:
        group.ok("disk", f"{gb(disk.free_bytes)} free at {disk.place}")
    else:
        _room(group, disk, need, serves)
    shm = machine.disk("/dev/shm")
    inside = in_container(machine)
    if shm is None or shm.place != "/dev/shm":
        group.skipped("shared memory", "there is no /dev/shm")
    elif shm.total_bytes < LEAST_SHM:
        group.fault(
            "shared memory",
            f"/dev/shm has {shm.total_bytes / 2**20:.0f} MiB: server and model exchange tensors there",
            "Start the container with --shm-size 1g" if inside else "sudo mount -o remount,size=1G /dev/shm",
        )
    elif shm.total_bytes < GOOD_SHM and inside:
        group.warning(
            "shared memory",
            f"/dev/shm has {shm.total_bytes / 2**20:.0f} MiB: enough for a few requests at once",
            "Start the container with --shm-size 1g",
        )
    else:
        group.ok("shared memory", f"/dev/shm has {shm.total_bytes / 2**20:,.0f} MiB")
    return group.checks


def _room(group: Group, disk: Disk, need: Needs, serves: bool) -> None:
    parts = {
        "BF16 checkpoint": need.source_bytes,
        "quantized checkpoint": need.quantized_bytes,
        "bundle": need.bundle_bytes,
        "building it": need.build_disk_bytes,
    }
    listed = ", ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)
    whole = sum(size or 0 for size in parts.values())
    source, quantized = need.source_bytes or 0, need.quantized_bytes or 0
    least = max(source + quantized, (quantized or source) + (need.bundle_bytes or 0) + need.build_disk_bytes)
    finding = f"{gb(disk.free_bytes)} free at {disk.place}; {need.profile} needs {gb(whole)} ({listed})"
    if disk.free_bytes >= whole:
        group.ok("disk", finding)
    elif disk.free_bytes >= least:
        fix = "Delete the BF16 checkpoint once it is quantized, or give a larger place: --volume DIR"
        group.warning("disk", finding, fix)
    else:
        fix = f"Free {gb(least - disk.free_bytes)}, or give another place: --volume DIR"
        group.add("fault" if serves else "warning", "disk", finding, fix)


def port_checks(machine: Machine, ports: dict[str, int]) -> list[Check]:
    """``ports``: by the name of `canvasrt serve`'s option, such as http-port."""
    group = Group("ports")
    for option, port in ports.items():
        twice = [name for name, other in ports.items() if other == port and name != option]
        problem = machine.port_problem(port)
        if twice:
            group.warning(f"{port}", f"is asked for twice: {option} and {twice[0]}", "Give three ports that differ")
        elif problem:
            group.warning(
                f"{port}",
                f"can't be listened on ({problem})",
                f"See who has it: ss -ltnp 'sport = :{port}'; or serve elsewhere: canvasrt serve MODEL --{option} N",
            )
        else:
            group.ok(f"{port}", f"free, for {option.removesuffix('-port')}")
    return group.checks


def _limits(machine: Machine) -> list[tuple[int, int]]:
    """Limit and use of memory of every control group that this process is in, version 2 and 1. Bytes."""
    found = []
    for line in (machine.read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds == "":
            base, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = "/sys/fs/cgroup/memory"
        else:
            continue
        # A container sees its own group at the root, whatever path it is told.
        inner = PurePosixPath(base + "/" + path.strip("/"))
        for folder in dict.fromkeys((inner, *inner.parents)):
            if not str(folder).startswith(base):
                break
            limit = _number(machine.read(f"{folder}/{names[0]}"))
            if limit is not None and limit < _UNLIMITED:
                used = _number(machine.read(f"{folder}/{names[1]}")) or 0
                stat = re.search(rf"^{names[2]} ([0-9]{{1,19}})$", machine.read(f"{folder}/memory.stat") or "", re.M)
                found.append((limit, max(used - (int(stat[1]) if stat else 0), 0)))  # cached files give way
    return found


def _number(text: str | None) -> int | None:
    """None for "max" too."""
    found = re.fullmatch(r"\s*([0-9]{1,19})\s*", text or "")
    return None if found is None else int(found[1])
