"""NVIDIA driver and GPUs, from what nvidia-smi prints."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from canvasrt.compile.vram import SHARED_BYTES
from canvasrt.doctor.checks import GB, Check, Group, gb, numbers
from canvasrt.doctor.host import Memory, in_container
from canvasrt.doctor.machine import Answer, Answers, Command, Machine
from canvasrt.errors import InputError
from canvasrt.profiles.detect import QUERY, TIMEOUT_SECONDS, Gpu, Match, match, parse
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names

LEAST_CUDA, LEAST_DRIVER = (13, 0), 580
HEADER: Command = ("nvidia-smi",)
STATE: Command = (
    "nvidia-smi",
    "--query-gpu=index,uuid,memory.total,memory.used,mig.mode.current,compute_mode",
    "--format=csv,noheader,nounits",
)
APPS: Command = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory,name", "--format=csv,noheader,nounits")
LIST: Command = ("nvidia-smi", "-L")
COMMANDS = tuple((command, TIMEOUT_SECONDS) for command in (HEADER, QUERY, STATE, APPS, LIST))
_MUCH = 2 * GB  # used by others: more than a desktop takes
_NVIDIA = "0x10de"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or a slice of one, and what a server could have of it."""

    index: int
    match: Match
    total_bytes: int | None  # as the driver says; of a slice: its own
    available_bytes: int | None  # what nobody else uses

    @property
    def name(self) -> str:
        return self.match.gpu.name


@dataclass(frozen=True, slots=True)
class _State:
    uuid: str
    total_bytes: int | None
    used_bytes: int | None
    mig: bool
    mode: str


def examine(
    machine: Machine, answers: Answers, memory: Memory | None, named: GpuProfile | None
) -> tuple[list[Check], list[Device]]:
    """The checks of driver and GPUs, and the GPUs. ``named``: a profile that the user wants for them."""
    group = Group("GPU")
    said = answers[QUERY]
    if said.missing:
        _no_driver(group, machine)
        return group.checks, []
    if not said.ok:
        group.fault("driver", f"nvidia-smi does not answer: {said.said}", _advice(said, machine))
        return group.checks, []
    try:
        gpus = parse(said.out)
    except InputError as error:
        empty = not said.out.strip()
        reason = "nvidia-smi lists no GPU" if empty else str(error).split(". ")[0]
        group.skipped("driver", reason, "Start the container with --gpus all" if in_container(machine) else "")
        return group.checks, []
    _driver(group, gpus, answers[HEADER], machine)
    profiles = [load_profile(name) for name in profile_names()]
    states, slices, users = _states(answers[STATE]), _slices(answers[LIST]), _users(answers[APPS])
    if not states:
        group.skipped("state of the GPUs", f"nvidia-smi does not tell use and mode: {answers[STATE].said}")
    devices = []
    for index, gpu in enumerate(gpus):
        found = match(gpu, profiles)
        _recognized(group, index, found, named)
        devices.append(_examined(group, index, found, states.get(index), slices.get(index, []), users, memory))
    return group.checks, devices


def _no_driver(group: Group, machine: Machine) -> None:
    pci = "/sys/bus/pci/devices"
    cards = [
        name
        for name in machine.names(pci)
        if (machine.read(f"{pci}/{name}/vendor") or "").strip() == _NVIDIA
        and (machine.read(f"{pci}/{name}/class") or "").startswith("0x03")
    ]
    if in_container(machine) and (cards or "nvidia" in machine.names("/proc/driver")):
        group.fault(
            "driver",
            "the machine has an NVIDIA GPU, and this container was not given it",
            "Start the container with --gpus all (the host needs the NVIDIA Container Toolkit)",
        )
    elif cards:
        group.fault(
            "driver",
            f"there is an NVIDIA GPU ({cards[0]}) and no driver for it",
            f"Install the NVIDIA driver {LEAST_DRIVER} or newer (Ubuntu: sudo ubuntu-drivers install), then restart",
        )
    else:
        group.skipped(
            "driver",
            "no NVIDIA GPU here: the demo, quantization and builds for RTX cards and DGX Spark run, engines do not",
        )


def _advice(said: Answer, machine: Machine) -> str:
    text = said.said.lower()
    if "mismatch" in text:
        return "Restart the machine: the driver was updated, and the old one is still loaded"
    if "compute_cap" in text:
        return f"Update the NVIDIA driver to {LEAST_DRIVER} or newer"
    if in_container(machine):
        return "Start the container with --gpus all, and run nvidia-smi on the host"
    if "no answer" in text:
        return "Look for Xid errors: sudo dmesg | grep -i nvrm; then restart the machine"
    return f"Run nvidia-smi alone; if it lists no GPU: sudo modprobe nvidia, or install driver {LEAST_DRIVER} or newer"


def _driver(group: Group, gpus: Sequence[Gpu], header: Answer, machine: Machine) -> None:
    driver = next((gpu.driver for gpu in gpus if gpu.driver), None)
    found = re.search(r"CUDA (?:\w+ )?Version\s*:\s*([\w./!]+)", header.out) if header.ok else None
    cuda = "" if found is None else found[1]
    major = re.match(r"([0-9]{1,6})\.", driver or "")
    update = f"Install driver {LEAST_DRIVER} or newer (Ubuntu: sudo apt install nvidia-driver-580-open), then restart"
    name = driver or "unknown version"
    if found is not None and not numbers(cuda):
        group.fault(
            "driver",
            f"{name}: it does not find its CUDA library",
            "Start the container with -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            if in_container(machine)
            else "Install the driver's compute libraries (Ubuntu: sudo apt install libnvidia-compute-580)",
        )
    elif found is not None and numbers(cuda) < LEAST_CUDA:
        group.fault("driver", f"{name} supports CUDA {cuda}, and engines need CUDA 13", update)
    elif found is not None:
        group.ok("driver", f"{name}, CUDA {cuda}")
    elif major is not None and int(major[1]) < LEAST_DRIVER:
        group.fault("driver", f"{name} is older than CUDA 13, which engines need", update)
    elif major is None:
        group.skipped("driver", "nvidia-smi does not tell the driver's version")
    else:
        group.ok("driver", name)


def _recognized(group: Group, index: int, found: Match, named: GpuProfile | None) -> None:
    gpu, name = found.gpu, f"GPU {index}"
    capability = f"SM {gpu.compute_capability}" if gpu.compute_capability else "compute capability unknown"
    size = f"{gb(gpu.memory_bytes)}" if gpu.memory_bytes else "memory shared with the CPU"
    described = f"{gpu.name} ({capability}, {size})"
    notes = " ".join(found.notes)
    if named is not None:
        asked = named.facts.compute_capability
        if asked is not None and gpu.compute_capability not in (None, asked.value):
            fix = "Leave --profile out, or name one with this compute capability: canvasrt profiles"
            group.fault(name, f"{described} does not run engines for SM {asked.value} ({named.name})", fix)
        else:
            group.ok(name, f"{described}: profile {named.name}, as asked")
    elif found.profile is None:
        group.fault(name, f"{described} has no profile", notes)
    elif found.certainty == "guess" or notes:
        group.warning(name, f"{described}: profile {found.profile}", notes)
    else:
        group.ok(name, f"{described}: profile {found.profile}")


def _examined(
    group: Group,
    index: int,
    found: Match,
    state: _State | None,
    slices: Sequence[tuple[str, int]],
    users: dict[str, list[str]],
    memory: Memory | None,
) -> Device:
    name = f"GPU {index}"
    total, available = _available(found, state, memory)
    if state is None:
        return Device(index, found, total, available)
    if "prohibited" in state.mode:
        group.fault(f"{name} mode", "compute mode Prohibited: nothing may compute", f"sudo nvidia-smi -i {index} -c 0")
    elif "exclusive" in state.mode:
        group.warning(
            f"{name} mode",
            "compute mode Exclusive: one process only, so one server",
            f"sudo nvidia-smi -i {index} -c 0",
        )
    if state.mig:
        total = available = _mig(group, index, slices)
        return Device(index, found, total, available)
    mine = users.get(state.uuid, [])
    if total is not None and available is not None:
        finding = f"{gb(available)} of {gb(total)} are free" + (f"; in use by {', '.join(mine[:5])}" if mine else "")
        if total - available > _MUCH and not found.gpu.memory_bytes:
            group.warning(f"{name} memory", finding, "End what you don't need: ps aux --sort=-rss | head")
        elif total - available > _MUCH:
            group.warning(f"{name} memory", finding, "End what you don't need: nvidia-smi lists it, kill PID ends it")
        else:
            group.ok(f"{name} memory", finding)
    return Device(index, found, total, available)


def _available(found: Match, state: _State | None, memory: Memory | None) -> tuple[int | None, int | None]:
    """Memory of the GPU, and what nobody uses; the driver's own share counts as free, as in the planner."""
    total = found.gpu.memory_bytes or (state.total_bytes if state else None)
    if total is not None:
        used = state.used_bytes if state is not None else None
        return total, None if used is None else max(total - used, 0)
    if memory is None or not load_profile(found.nearest).facts.memory_is_shared:
        return None, None
    # The planner keeps SHARED_BYTES for the system, which uses a part of them already.
    return memory.total_bytes, min(memory.total_bytes, memory.available_bytes + SHARED_BYTES)


def _mig(group: Group, index: int, slices: Sequence[tuple[str, int]]) -> int | None:
    """Bytes of the largest slice."""
    if not slices:
        group.fault(
            f"GPU {index} MIG",
            "MIG is on, and there is no slice to compute on",
            f"Turn it off: sudo nvidia-smi -i {index} -mig 0; or make slices: sudo nvidia-smi mig -cgi PROFILE -C",
        )
        return None
    names = ", ".join(name for name, _ in slices)
    most = max(size for _, size in slices)
    group.warning(
        f"GPU {index} MIG",
        f"MIG is on, slices {names}: an engine has one of them, {gb(most)} at most",
        f"Plan for the slice (below), or turn it off: sudo nvidia-smi -i {index} -mig 0",
    )
    return most


def _states(said: Answer) -> dict[int, _State]:
    """By index; without the lines that are not understood."""
    found = {}
    for line in said.out.splitlines() if said.ok else ():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 6 and re.fullmatch(r"[0-9]{1,4}", fields[0]):
            total, used = (_mib(field) for field in fields[2:4])
            found[int(fields[0])] = _State(fields[1], total, used, fields[4] == "Enabled", fields[5].lower())
    return found


def _users(said: Answer) -> dict[str, list[str]]:
    """Who computes, by the GPU's uuid: "python (PID 123, 20.1 GB)"."""
    found: dict[str, list[str]] = {}
    for line in said.out.splitlines() if said.ok else ():
        fields = [field.strip() for field in line.split(",", 3)]
        if len(fields) == 4 and fields[1].isdecimal():
            size = _mib(fields[2])
            program = fields[3].split("/")[-1].split()  # without its arguments, which are nobody's business
            known = (
                f"{program[0] if program else 'a process'} (PID {fields[1]}{'' if size is None else ', ' + gb(size)})"
            )
            found.setdefault(fields[0], []).append(known)
    return found


def _slices(said: Answer) -> dict[int, list[tuple[str, int]]]:
    """MIG devices by GPU: ("1g.10gb", bytes), as ``nvidia-smi -L`` names them."""
    found: dict[int, list[tuple[str, int]]] = {}
    index = -1
    for line in said.out.splitlines() if said.ok else ():
        if gpu := re.match(r"GPU ([0-9]{1,4}):", line):
            index = int(gpu[1])
        elif piece := re.match(r"\s+MIG ([0-9]+[gc]\.(?:[0-9]+[gc]\.)?([0-9]{1,4})gb\S*)", line):
            found.setdefault(index, []).append((piece[1], int(piece[2]) * GB))
    return found


def _mib(field: str) -> int | None:
    return int(field) * 2**20 if re.fullmatch(r"[0-9]{1,9}", field) else None
