"""What fits: a profile's choices on a GPU's memory, as `canvasrt plan` counts, or the nearest setting that does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from canvasrt.compile.budget import advice, check_formats, nearest, options
from canvasrt.compile.vram import GB, Deployment, Setting
from canvasrt.doctor.gpu import Device
from canvasrt.doctor.model import Model
from canvasrt.doctor.nodes import GpuNode
from canvasrt.errors import CanvasRTError
from canvasrt.profiles.profile import GpuProfile, load_profile

_STEP = GB // 10  # to which free memory is rounded down, so that the same is said of equal GPUs
_NEVER = "No setting fits what is free, nor does this one fit the whole GPU."


@dataclass(frozen=True, slots=True)
class Fit:
    """``where`` are the GPUs or nodes that this is said of. Bytes are None where nothing is planned."""

    where: tuple[str, ...]
    profile: str
    recipe: str
    fits: bool
    slots: int
    context: int
    chunk: int
    canvases: int
    needed_bytes: int | None
    memory_bytes: int | None  # that there is: of the profile, of the slice, or what is free here
    instead: str  # options with which it fits; empty where it fits as it is, or with none
    advice: str  # a sentence; empty where it fits


def of_devices(model: Model, devices: Sequence[Device], profile: GpuProfile | None) -> list[Fit]:
    """``profile`` instead of the detected ones. GPUs of which the same is said share one."""
    found = []
    for device in devices:
        name = device.match.profile
        chosen = profile or (load_profile(name) if name is not None else None)
        if chosen is not None:
            found.append((f"GPU {device.index}", fit(model, chosen, device.total_bytes, device.available_bytes)))
    return _together(found)


def of_nodes(model: Model, nodes: Sequence[GpuNode]) -> list[Fit]:
    return _together(
        [(f"node {each.name}", fit(model, load_profile(each.profile), each.memory_bytes)) for each in nodes]
    )


def fit(model: Model, profile: GpuProfile, total_bytes: int | None = None, available_bytes: int | None = None) -> Fit:
    """``total_bytes``: memory of this GPU or slice. ``available_bytes``: of it, what nobody uses."""
    choices, stated = profile.choices, profile.facts.memory_gb
    setting = Setting.of(profile, model.source.spec)
    said = Fit(
        (), profile.name, choices.recipe.value, True, setting.slots, setting.context, setting.chunk, setting.canvases,
        None, None, "", "",
    )  # fmt: skip
    if choices.compiler.value == "torch" or stated is None:
        return said
    if total_bytes is not None and total_bytes < stated.value * GB - _STEP:  # less is rounding
        less = stated.model_copy(update={"value": max(total_bytes, _STEP) / GB})
        profile = profile.model_copy(update={"facts": profile.facts.model_copy(update={"memory_gb": less})})
    try:
        source = model.planned(profile)
        said = replace(said, recipe=source.quantization.removeprefix("recipe "))
        check_formats(source, profile)
        whole = Deployment.of(source, profile)
        free = whole.memory_bytes if available_bytes is None else available_bytes // _STEP * _STEP
        on = replace(whole, memory_bytes=min(whole.memory_bytes, free))
        needed = on.budget(setting).total_bytes
        said = replace(said, needed_bytes=needed, memory_bytes=on.memory_bytes, fits=on.fits(setting))
        if said.fits:
            return said
        near = nearest(on, setting)
        instead = "" if near is None else options(near, setting)
        if on.memory_bytes == whole.memory_bytes:
            return replace(said, instead=instead, advice=advice(source, profile, setting))
        ways = [f"with {instead}"] * bool(instead)
        ways += ["as asked once the memory is free that others use"] * whole.fits(setting)
        return replace(said, instead=instead, advice=f"It fits {', or '.join(ways)}." if ways else _NEVER)
    except CanvasRTError as error:
        return replace(said, fits=False, advice=str(error))


def _together(found: Sequence[tuple[str, Fit]]) -> list[Fit]:
    places: dict[Fit, list[str]] = {}
    for where, each in found:
        places.setdefault(each, []).append(where)
    return [replace(each, where=tuple(where)) for each, where in places.items()]
