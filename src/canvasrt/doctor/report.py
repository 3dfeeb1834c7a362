"""All checks of one machine, in groups, then what fits, then what to type."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from canvasrt.doctor import cluster, containers, fits, gpu, host, next_steps, packages
from canvasrt.doctor.checks import Check, Group, Status, gb
from canvasrt.doctor.fits import Fit
from canvasrt.doctor.gpu import Device
from canvasrt.doctor.host import Memory
from canvasrt.doctor.machine import Machine, ask
from canvasrt.doctor.model import Model, Needs, bf16_bytes, illustration, needs, open_model
from canvasrt.doctor.nodes import GpuNode
from canvasrt.errors import InputError
from canvasrt.profiles.profile import GpuProfile, load_profile

FITS = "what fits"


@dataclass(frozen=True, slots=True)
class Request:
    """``profile``: instead of detection. ``kubernetes`` None: where kubectl reaches a cluster."""

    checkpoint: Path | None
    profile: str | None
    volume: str
    ports: dict[str, int]  # by option: http-port, grpc-port, metrics-port
    kubernetes: bool | None


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    checks: tuple[Check, ...]
    fits: tuple[Fit, ...]
    next: tuple[str, ...]

    @property
    def faults(self) -> int:
        return sum(check.status == "fault" for check in self.checks)


def examine(machine: Machine, request: Request) -> Report:
    """Raises InputError for a profile or checkpoint that is none; everything else is a finding."""
    model = open_model(request.checkpoint)
    named = None if request.profile is None else load_profile(request.profile)
    commands = [*gpu.COMMANDS, *containers.COMMANDS]
    if request.kubernetes is not False:
        commands += [(command, cluster.TIMEOUT_SECONDS) for command in (cluster.CONTEXT, cluster.HELM)]
    answers = ask(machine, commands)

    memory = host.memory(machine)
    gpu_checks, devices = gpu.examine(machine, answers, memory, named)
    container_checks, in_docker = containers.examine(machine, answers, bool(devices))
    cluster_checks: list[Check] = []
    nodes: list[GpuNode] = []
    if request.kubernetes is not False:
        cluster_checks, nodes = cluster.examine(machine, answers, request.kubernetes)

    profiles = _profiles(devices, named)
    need, serves = _needs(model, profiles), bool(profiles)
    checks = host.system_checks(machine) + gpu_checks
    checks += host.memory_checks(memory, need, serves) + host.disk_checks(machine, request.volume, need, serves)
    checks += host.port_checks(machine, request.ports) + packages.package_checks(
        machine, profiles, bool(devices), in_docker
    )
    checks += container_checks + cluster_checks

    local, distant = fits.of_devices(model, devices, named), fits.of_nodes(model, nodes)
    if not local and not devices:
        local = [fits.fit(model, named or load_profile("cpu"))]
    checks += _fit_checks(model, local, distant, memory)
    steps = _steps(machine, model, request, local, devices, memory)
    charts = next_steps.in_cluster(model, nodes, distant)
    return Report(model.name, tuple(checks), (*local, *distant), tuple(steps + charts if devices else charts + steps))


def _profiles(devices: Sequence[Device], named: GpuProfile | None) -> list[GpuProfile]:
    """That engines are to run with here: the named one, or those of the GPUs, each once."""
    if named is not None:
        return [named]
    return [load_profile(name) for name in dict.fromkeys(each.match.profile for each in devices) if name is not None]


def _needs(model: Model, profiles: Sequence[GpuProfile]) -> Needs | None:
    """Of the profile that needs most disk; None where the model's dimensions don't divide into any recipe."""
    found = []
    for profile in profiles or [illustration()]:
        try:
            found.append(needs(model, profile))
        except InputError:  # said where it is planned
            continue
    return max(found, key=lambda need: need.bundle_bytes or 0, default=None)


def _fit_checks(model: Model, local: Sequence[Fit], distant: Sequence[Fit], memory: Memory | None) -> list[Check]:
    group = Group(FITS)
    for fit in (*local, *distant):
        name = ", ".join(fit.where) or f"profile {fit.profile}"
        text = f"{fit.profile} with {fit.recipe}: {fit.slots} slots x {fit.context:,} tokens, {fit.canvases} canvases"
        if fit.needed_bytes is None or fit.memory_bytes is None:
            if fit.fits:
                _torch(group, name, bf16_bytes(model), memory)
            else:
                group.add("fault" if fit in local else "warning", name, f"{fit.profile} can't be planned", fit.advice)
            continue
        needed, there = gb(fit.needed_bytes), gb(fit.memory_bytes)
        if fit.fits:
            group.ok(name, f"{text} take {needed} of {there}")
        else:
            status: Status = "warning" if fit.instead or fit not in local else "fault"
            group.add(status, name, f"{text} need {needed}, and {there} are there", fit.advice)
    return group.checks


def _torch(group: Group, name: str, weights: int, memory: Memory | None) -> None:
    text = (
        f"torch runs checkpoints: the weights take {weights / 1e9:.3g} GB in bfloat16 (--dtype), twice that in float32"
    )
    if memory is None:
        group.skipped(name, text)
    elif weights > memory.available_bytes:
        group.skipped(name, f"{text}; {gb(memory.available_bytes)} are available, so this model does not run here")
    else:
        group.ok(name, f"{text}; {gb(memory.available_bytes)} are available")


def _steps(
    machine: Machine,
    model: Model,
    request: Request,
    local: Sequence[Fit],
    devices: Sequence[Device],
    memory: Memory | None,
) -> list[str]:
    """For the GPU with most memory that something fits on."""
    usable = [fit for fit in local if fit.fits or fit.instead]
    if not usable:
        return []
    best = max(usable, key=lambda fit: (fit.fits, fit.memory_bytes or 0))
    if best.where or request.profile is not None:
        named = request.profile or best.profile
        profile = load_profile(named)
        place = next_steps.Place(machine, request.volume, request.ports, memory, bool(devices))
        return next_steps.here(place, model, profile, named, best, needs(model, profile))
    return next_steps.without_gpu(model)
