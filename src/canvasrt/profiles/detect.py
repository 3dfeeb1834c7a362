"""Which profiles the GPUs of this machine are, from what nvidia-smi says of them.

Knows the names that drivers and node labels give to a GPU. Asks nvidia-smi and nothing else: no CUDA library is loaded.
"""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from canvasrt.errors import InputError
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names

QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits")
TIMEOUT_SECONDS = 20.0  # the driver takes a few to wake GPUs without persistence mode
INSTEAD = "Commands that need to know the GPU take --profile NAME too (canvasrt profiles lists them)."
LEAST_CAPABILITY = "8.0"  # the first with BF16 tensor cores
SAME_MEMORY = 0.03  # editions of a driver differ by less, products by more

Certainty = Literal["product", "guess", "none"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi. None stands for what the driver does not say."""

    name: str  # "NVIDIA GeForce RTX 4090"
    compute_capability: str | None
    memory_bytes: int | None  # none where CPU and GPU share the memory
    driver: str | None


@dataclass(frozen=True, slots=True)
class Match:
    """``product``: the name is one of the profile's. ``guess``: the compute capability is its. ``none``: neither is, so
    engines for ``nearest`` do not run here, but it is the profile to start from.
    """

    gpu: Gpu
    certainty: Certainty
    nearest: str
    notes: tuple[str, ...] = ()  # sentences for people

    @property
    def profile(self) -> str | None:
        return None if self.certainty == "none" else self.nearest


def detect() -> list[Match]:
    """Every GPU of this machine, in nvidia-smi's order. Raises InputError where there is none to be seen."""
    profiles = [load_profile(name) for name in profile_names()]
    return [match(gpu, profiles) for gpu in parse(ask())]


def ask(command: tuple[str, ...] = QUERY, timeout: float = TIMEOUT_SECONDS) -> str:
    """What nvidia-smi prints. Raises InputError that says what to do where it does not answer."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise InputError(
            f"{command[0]} was not found, so this machine's GPU is unknown: install the NVIDIA driver, which brings it "
            f"(in a container: the NVIDIA Container Toolkit, and start it with --gpus all). {INSTEAD}"
        ) from None
    except OSError as error:
        raise InputError(f"{command[0]} could not be started: {error}. {INSTEAD}") from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{command[0]} gave no answer within {timeout:g} seconds: the driver hangs, or a GPU fell off the bus "
            f"(see dmesg). {INSTEAD}"
        ) from None
    if done.returncode:
        said = " ".join((done.stdout + " " + done.stderr).split())[:300] or "nothing"
        hint = (
            "Update the NVIDIA driver: this one can't tell the compute capability"
            if "compute_cap" in said
            else "Check the NVIDIA driver: nvidia-smi alone must list the GPU"
        )
        raise InputError(f"{command[0]} failed with exit code {done.returncode} and said: {said}. {hint}. {INSTEAD}")
    return done.stdout


def parse(text: str) -> list[Gpu]:
    """GPUs from the output of QUERY. Raises InputError for anything else, and for none."""
    gpus = [_gpu(line) for line in text.splitlines() if line.strip()]
    if not gpus:
        raise InputError(
            f"nvidia-smi lists no GPU: the driver sees none, or the container was given none (--gpus all). {INSTEAD}"
        )
    return gpus


def product_of(label: str) -> tuple[str, str | None]:
    """A device name or a value of the node label nvidia.com/gpu.product, as a profile writes it, and its MIG slice.

    ("NVIDIA-H100-80GB-HBM3", "1g.10gb") for NVIDIA-H100-80GB-HBM3-MIG-1g.10gb-SHARED.
    """
    name = re.sub(r"[\s_-]+", "-", label.strip())
    name = re.sub(r"-SHARED$", "", name, flags=re.IGNORECASE)
    found = re.search(r"-MIG-([0-9]+[gc]\..+)$", name, flags=re.IGNORECASE)
    if found is not None:
        name = name[: found.start()]
    if not name.upper().startswith("NVIDIA-"):  # drivers before 470 leave it out
        name = f"NVIDIA-{name}"
    return name, None if found is None else found.group(1)


def match(gpu: Gpu, profiles: Iterable[GpuProfile]) -> Match:
    """The profile of a GPU by its name, else by compute capability and memory, with a note that says so."""
    candidates = [profile for profile in profiles if profile.sm is not None]
    if not candidates:
        raise InputError("no profile describes a GPU, so that none can be recognized")
    name, piece = product_of(gpu.name)
    for profile in candidates:
        if name.lower() in (each.lower() for each in profile.facts.product_names.value):
            return Match(gpu, "product", profile.name, (*_differences(gpu, profile), *_slice_note(piece, profile)))
    nearest = min(candidates, key=lambda profile: _distance(gpu, profile))
    known = f"{gpu.name} is the product of no profile"
    capability = gpu.compute_capability
    if capability is None:
        note = f"{known}, and the driver does not tell its compute capability. {INSTEAD}"
        return Match(gpu, "none", nearest.name, (note,))
    if _number(capability) < _number(LEAST_CAPABILITY):
        note = f"{known}, and compute capability {capability} has no BF16: CanvasRT needs {LEAST_CAPABILITY} or newer."
        return Match(gpu, "none", nearest.name, (note,))
    if _capability(nearest) != capability:
        note = (
            f"{known}, and none has compute capability {capability}. The nearest is {nearest.name} "
            f"({_capability(nearest)}); an engine for it does not run here. Copy its file, change the facts, and give "
            "it with --profile FILE.yaml."
        )
        return Match(gpu, "none", nearest.name, (note,))
    guess = (
        f"{known}: {nearest.name} is a guess by compute capability {capability} and memory. Bandwidth and rates may "
        f"differ, so copy its file to --profile FILE.yaml for figures of your own."
    )
    return Match(gpu, "guess", nearest.name, (guess, *_differences(gpu, nearest), *_slice_note(piece, nearest)))


def _gpu(line: str) -> Gpu:
    fields = [field.strip() for field in line.rsplit(",", 3)]
    if len(fields) != 4 or not fields[0]:
        raise _not_understood(line, "not name, compute_cap, memory.total, driver_version")
    name, capability, memory, driver = (None if _is_missing(field) else field for field in fields)
    if name is None:
        raise _not_understood(line, "a GPU without a name")
    if capability is not None and not re.fullmatch(r"[0-9]{1,2}\.[0-9]", capability):
        raise _not_understood(line, f"compute_cap {capability!r} is no number like 8.9")
    if memory is not None and not re.fullmatch(r"[0-9]{1,9}", memory):
        raise _not_understood(line, f"memory.total {memory!r} is no number of MiB")
    return Gpu(name, capability, None if memory is None else int(memory) * 2**20, driver)


def _is_missing(field: str) -> bool:
    """[N/A], [Not Supported], [Unknown Error], [Insufficient Permissions]: how nvidia-smi says that it can't say."""
    return field in ("", "N/A") or (field.startswith("[") and field.endswith("]"))


def _not_understood(line: str, why: str) -> InputError:
    return InputError(f"nvidia-smi printed the line {line.strip()[:200]!r}, which is not understood: {why}. {INSTEAD}")


def _number(capability: str) -> int:
    """120 for 12.0."""
    return int(capability.replace(".", ""))


def _capability(profile: GpuProfile) -> str:
    assert profile.facts.compute_capability is not None  # candidates have one
    return profile.facts.compute_capability.value


def _distance(gpu: Gpu, profile: GpuProfile) -> tuple[int, bool, float]:
    """How far a profile is from a GPU: compute capability, then whether memory is shared, then memory."""
    assert profile.sm is not None
    apart = 0 if gpu.compute_capability is None else abs(profile.sm - _number(gpu.compute_capability))
    memory = profile.facts.memory_gb
    if gpu.memory_bytes is None or memory is None:
        return apart, not profile.facts.memory_is_shared, 0.0
    return apart, profile.facts.memory_is_shared, abs(memory.value * 1e9 - gpu.memory_bytes)


def _differences(gpu: Gpu, profile: GpuProfile) -> list[str]:
    """What the driver says that is not what the profile says."""
    found = []
    if gpu.compute_capability is not None and gpu.compute_capability != _capability(profile):
        found.append(
            f"The driver says compute capability {gpu.compute_capability}, {profile.name} says "
            f"{_capability(profile)}: check the name of the GPU."
        )
    memory = profile.facts.memory_gb
    if gpu.memory_bytes is None or memory is None or profile.facts.memory_is_shared:
        return found
    here = gpu.memory_bytes / 1e9
    if abs(here - memory.value) > SAME_MEMORY * memory.value:
        less = "less, so its choices may not fit" if here < memory.value else "more, so larger choices may fit"
        found.append(
            f"The driver says {here:.1f} GB, {profile.name} says {memory.value:.1f}: {less}. Ask canvasrt plan with a "
            "copy of the profile that states this memory."
        )
    return found


def _slice_note(piece: str | None, profile: GpuProfile) -> list[str]:
    if piece is None:
        return []
    return [
        f"This is the MIG slice {piece} of a GPU: {profile.name} describes the whole one, so its choices do not fit. "
        "Copy its file and state the memory of the slice."
    ]
