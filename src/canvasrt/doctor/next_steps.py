"""The commands to type next, for what fits."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from canvasrt.doctor.fits import Fit
from canvasrt.doctor.host import Memory
from canvasrt.doctor.machine import Machine
from canvasrt.doctor.model import ILLUSTRATION, PUBLISHED, Model, Needs
from canvasrt.doctor.nodes import GpuNode
from canvasrt.profiles.profile import GpuProfile

PORTS = {"http-port": 8000, "grpc-port": 8001, "metrics-port": 8002}  # as `canvasrt serve` takes them
_EXTRAS = {"tensorrt-rtx": ("rtx", "tensorrt_rtx_cu13"), "tensorrt": ("tensorrt", "tensorrt_cu13")}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the commands are typed."""

    machine: Machine
    volume: str
    ports: dict[str, int]  # by option
    memory: Memory | None
    has_gpu: bool


def here(place: Place, model: Model, profile: GpuProfile, named: str, fit: Fit, need: Needs) -> list[str]:
    """Checkpoint, bundle and server. ``named``: the profile as --profile takes it."""
    missing, compiler = [], profile.choices.compiler.value
    if compiler in _EXTRAS and place.machine.version(_EXTRAS[compiler][1]) is None:
        missing.append(_EXTRAS[compiler][0])
    steps, checkpoint, quantizes = _checkpoint(model, need, place.volume)
    if quantizes and place.machine.version("nvidia-modelopt") is None:
        missing.append("quantize")
    if missing:
        steps.insert(0, f"pip install 'canvasrt[{','.join(missing)}]'")
    if compiler == "torch":
        return [*steps, f"canvasrt generate {checkpoint} --prompt Hello"]
    bundle = _path(place.volume, f"engines/{profile.name}" + ("" if need.recipe == "none" else f"-{need.recipe}"))
    stripped = place.memory is not None and place.memory.available_bytes < need.inside_memory_bytes
    build = f"canvasrt build --checkpoint {checkpoint} --profile {shlex.quote(named)} --out {bundle}"
    weights, filled = (" --weights stripped", f" --set checkpoint={checkpoint}") if stripped else ("", "")
    build += weights + (f" {fit.instead}" if fit.instead else "")
    ports = "".join(f" --{option} {port}" for option, port in place.ports.items() if port != PORTS[option])
    serve = f"canvasrt serve {bundle}{filled}{ports}"
    if not place.has_gpu:
        serve += "  # on the machine with the GPU"
        build += "  # on the machine with the GPU" if compiler == "tensorrt" else ""
    return [*steps, build, serve]


def without_gpu(model: Model) -> list[str]:
    checkpoint = "examples/sudoku/checkpoint" if model.folder is None else shlex.quote(str(model.folder))
    lines = ["make demo  # in a checkout of CanvasRT"] if model.folder is None else []
    if model.has_weights:
        lines.append(f"canvasrt generate {checkpoint} --prompt Hello")
    return [*lines, f"canvasrt doctor --profile {ILLUSTRATION}  # what another GPU needs: canvasrt profiles"]


def in_cluster(model: Model, nodes: Sequence[GpuNode], fits: Sequence[Fit]) -> list[str]:
    """One line per profile of the cluster, the certain ones first."""
    found: dict[str, bool] = {}
    for node in sorted(nodes, key=lambda each: (not each.certain, -each.gpus)):
        fit = next((each for each in fits if f"node {node.name}" in each.where), None)
        if fit is None or not (fit.fits or fit.instead):
            continue
        line = f"helm install demo helm/canvasrt -f helm/canvasrt/profiles/{node.profile}.yaml"
        line += "".join(f" --set model.{name}={value}" for name, value in re.findall(r"--(\w+) (\d+)", fit.instead))
        line += f" --set gpu.mig={node.slice}" if node.slice and not node.gpus else ""
        line += "" if model.folder is None else " --set model.source=hf://ORG/NAME"
        found[line + ("" if node.gpus or node.slice else " --set gpu.dra.enabled=true")] = True
    return list(found)


def _checkpoint(model: Model, need: Needs, volume: str) -> tuple[list[str], str, bool]:
    """The commands that bring the checkpoint, where it then is, and whether they quantize."""
    if model.folder is not None and (model.is_quantized or (need.recipe == "none" and model.has_weights)):
        return [], shlex.quote(str(model.folder)), False
    if need.published is not None:
        name = need.published
        folder = _path(volume, f"checkpoints/{name.partition('/')[2].lower()}")
        return [f"hf download {name} --local-dir {folder}"], folder, False
    steps = []
    if model.folder is None:
        folder = _path(volume, f"checkpoints/{PUBLISHED.partition('/')[2].lower()}")
        steps.append(f"hf download {PUBLISHED} --local-dir {folder}")
    else:
        folder = shlex.quote(str(model.folder))
        if not model.has_weights:
            steps.append(f"# put the safetensors files beside {folder}/config.json")
    if need.recipe == "none":
        return steps, folder, False
    name = model.folder.resolve().name if model.folder is not None else PUBLISHED.partition("/")[2].lower()
    out = _path(volume, f"checkpoints/{name}-{need.recipe}")
    return [*steps, f"canvasrt quantize {folder} --recipe {need.recipe} --out {out}"], out, True


def _path(volume: str, inner: str) -> str:
    return inner if volume == "." else shlex.quote(f"{volume.rstrip('/')}/{inner}")
