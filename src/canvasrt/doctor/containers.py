"""Docker and what lets containers use GPUs."""

import re

from pydantic import ConfigDict
from pydantic.alias_generators import to_pascal

from canvasrt.doctor.checks import Check, Group, NotUnderstoodError, Said, numbers, understood
from canvasrt.doctor.machine import Answers, Command, Machine

DOCKER: Command = ("docker", "--version")
INFO: Command = ("docker", "info", "--format", "{{json .}}")
COMPOSE: Command = ("docker", "compose", "version")
TOOLKIT: Command = ("nvidia-ctk", "--version")
CONTAINERD: Command = ("containerd", "--version")
TIMEOUT_SECONDS = 10.0
COMMANDS = tuple((command, TIMEOUT_SECONDS) for command in (DOCKER, INFO, COMPOSE, TOOLKIT, CONTAINERD))
_TOOLKIT_PAGE = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html"
_CDI_FOLDERS = ("/etc/cdi", "/var/run/cdi")


class _Info(Said):
    """Docker writes its keys in CamelCase; DiscoveredDevices is there from version 28.2 on."""

    model_config = ConfigDict(alias_generator=to_pascal)

    server_version: str = ""
    runtimes: dict[str, object] | None = None
    discovered_devices: list[dict[str, object]] | None = None


def examine(machine: Machine, answers: Answers, gpu: bool) -> tuple[list[Check], bool]:
    """The checks, and whether Docker can give a GPU to a container."""
    group = Group("containers")
    toolkit = _version(answers, TOOLKIT)
    cdi = any(re.search(r"nvidia.*\.(ya?ml|json)$", name) for folder in _CDI_FOLDERS for name in machine.names(folder))
    ready = False
    if answers[DOCKER].missing:
        group.skipped("Docker", "not installed; it is needed only for our images")
    elif (info := _daemon(group, answers)) is not None:
        group.ok("Docker", f"{info.server_version}, the daemon answers")
        devices = [str(each.get("ID", "")) for each in info.discovered_devices or []]
        listed = any(name.startswith("nvidia.com/gpu") for name in devices)
        runtime = "nvidia" in (info.runtimes or {})
        ready = runtime or listed or cdi
        if runtime or listed:
            ways = [way for way, has in (("the nvidia runtime", runtime), ("CDI devices", listed)) if has]
            group.ok("GPUs in containers", f"Docker has {' and '.join(ways)}")
        elif cdi:
            group.ok("GPUs in containers", "a CDI file names them: docker run --device nvidia.com/gpu=all")
        elif not gpu:
            group.skipped("GPUs in containers", "there is no GPU to give")
        elif toolkit is None:
            group.warning(
                "GPUs in containers",
                "Docker can't give GPUs to containers",
                f"Install the NVIDIA Container Toolkit ({_TOOLKIT_PAGE}), then run this again",
            )
        else:
            group.warning(
                "GPUs in containers",
                "the NVIDIA Container Toolkit is there, and Docker does not know it",
                "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker",
            )
        _compose(group, answers)
    for name, command in (("NVIDIA Container Toolkit", TOOLKIT), ("containerd", CONTAINERD)):
        version = _version(answers, command)
        if version is not None:
            group.ok(name, version)
        else:
            group.skipped(name, "not installed" if answers[command].missing else answers[command].said)
    return group.checks, ready and gpu


def _daemon(group: Group, answers: Answers) -> _Info | None:
    """What the daemon says, or a check that says why it does not."""
    answer = answers[INFO]
    said = f"{answer.err} {answer.out}".lower()
    if not answer.ok and "permission denied" in said:
        group.warning(
            "Docker",
            "the daemon runs, and this user may not talk to it",
            "sudo usermod -aG docker $USER, then log in again",
        )
        return None
    if not answer.ok and ("cannot connect" in said or "is the docker daemon running" in said):
        group.warning("Docker", "the daemon does not answer", "sudo systemctl start docker")
        return None
    try:
        info = understood(answer, _Info)
    except NotUnderstoodError as error:
        group.skipped("Docker", f"docker info: {error}")
        return None
    if not info.server_version:
        group.skipped("Docker", "docker info names no server: another program under this name, or no daemon")
        return None
    return info


def _compose(group: Group, answers: Answers) -> None:
    version = _version(answers, COMPOSE)
    if version is None or numbers(version) < (2, 0):
        fix = "sudo apt install docker-compose-plugin (from Docker's own packages)"
        group.warning(
            "Docker Compose", f"{version or 'the plugin is missing'}: version 2 is needed for compose files", fix
        )
    else:
        group.ok("Docker Compose", version)


def _version(answers: Answers, command: Command) -> str | None:
    """The first number with dots that a command prints."""
    answer = answers[command]
    found = re.search(r"\bv?([0-9]+\.[0-9]+[\w.+~-]*)", answer.out) if answer.ok else None
    return None if found is None else found[1]
