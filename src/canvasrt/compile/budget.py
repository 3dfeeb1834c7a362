"""Does a model fit a GPU, and if not, what would: answers that are searched for, each checked by the same arithmetic.

The arithmetic is in canvasrt.compile.vram.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product

from canvasrt.compile.sizes import with_recipe
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import GB, Deployment, Setting, VramBudget
from canvasrt.errors import CanvasRTError, CapacityError, InputError
from canvasrt.formats import Weights
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names
from canvasrt.quantize.recipe import Recipe, load_recipe, recipe_names

MOST_SLOTS, MOST_CANVASES = 256, 64  # that a profile may choose
_USEFUL_CANVASES = 8  # a context below this many is proposed only to who asked for less
_ORDER = ("context", "canvases", "chunk", "slots")  # what is given up first
_STARTS: dict[Weights, str] = {"fp8": "8.9 (Ada)", "nvfp4": "10.0 (Blackwell)", "int4": "8.0", "plain": "8.0 (Ampere)"}


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a profile's choices hold a model. Bytes are None where nothing can be said beforehand."""

    ok: bool
    needed_bytes: int | None
    free_bytes: int | None
    advice: str  # empty where it fits


def fits(source: ModelSource, profile: GpuProfile) -> Fit:
    """Never raises for a model that does not fit, or that the GPU can't run: that is the answer."""
    if profile.choices.compiler.value == "torch":
        return Fit(True, None, None, "not compiled: the torch runtime asks the machine for its memory when it starts")
    try:
        check_formats(source, profile)
        on = Deployment.of(source, profile)
        setting = Setting.of(profile, source.spec)
        needed = on.budget(setting)
    except CanvasRTError as error:
        return Fit(False, None, None, str(error))
    if needed.total_bytes <= on.memory_bytes:
        return Fit(True, needed.total_bytes, on.memory_bytes, "")
    return Fit(False, needed.total_bytes, on.memory_bytes, advice(source, profile, setting))


def checked_budget(source: ModelSource, profile: GpuProfile, setting: Setting) -> VramBudget:
    """Raises InputError for formats that the GPU can't run, CapacityError with a way out where it does not fit."""
    check_formats(source, profile)
    on = Deployment.of(source, profile)
    needed = on.budget(setting)
    if needed.total_bytes <= on.memory_bytes:
        return needed
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in needed.items().items())
    raise CapacityError(
        f"{profile.name} has {gigabytes(on.memory_bytes)} GB and this needs {gigabytes(needed.total_bytes)} GB: "
        f"{parts} (the largest stage of the activations is {needed.activations.largest_stage}). "
        + advice(source, profile, setting)
    )


def check_formats(source: ModelSource, profile: GpuProfile) -> None:
    """Raises InputError that names the recipes to use instead."""
    used = dict.fromkeys(form.weights for form in source.formats.values())
    refused = next((weights for weights in used if not profile.runs(weights)), None)
    if refused is None:
        return
    capability = profile.facts.compute_capability
    assert capability is not None, "a profile without a GPU runs every format"
    running = [recipe.name for recipe in _recipes(source) if profile.runs(recipe.format.weights)]
    chosen = profile.choices.recipe.value
    running.sort(key=lambda name: name != chosen)
    use = f"Use --recipe {' or '.join(running)}" if running else "Use the BF16 checkpoint (--recipe none)"
    start = ", from the BF16 checkpoint" if source.checkpoint is not None else ""
    raise InputError(
        f"{profile.name} (compute capability {capability.value}) can't compute with the {refused.upper()} weights of "
        f"{source.folder} ({source.quantization}): they need compute capability {_STARTS[refused]} or newer. "
        f"{use}{start}."
    )


def largest_context(on: Deployment, setting: Setting) -> int | None:
    """Tokens, with everything else as it is; None where none fits. Below the model's most, a number of canvases."""
    canvas, most = on.spec.canvas_length, on.spec.max_context
    return _largest(on, lambda n: replace(setting, context=n), 2 * canvas, most, canvas)


def largest_slots(on: Deployment, setting: Setting) -> int | None:
    return _largest(on, lambda n: replace(setting, slots=n), setting.canvases, MOST_SLOTS, 1)


def largest_canvases(on: Deployment, setting: Setting) -> int | None:
    """More canvases than slots bring slots of their own."""
    return _largest(on, lambda n: replace(setting, canvases=n, slots=max(n, setting.slots)), 1, MOST_CANVASES, 1)


def nearest(on: Deployment, asked: Setting) -> Setting | None:
    """The setting that fits and gives up least: fewest numbers changed, context first, and those as little as can be.

    ``asked`` itself where it fits, None where not even the smallest useful setting does.
    """
    for count in range(1, len(_ORDER) + 1):
        for names in combinations(_ORDER, count):
            found = max(_reduced(on, asked, names), key=lambda setting: _kept(setting, asked), default=None)
            if found is not None:
                return found
    return None


def advice(source: ModelSource, profile: GpuProfile, asked: Setting) -> str:
    """Sentences with every way out that there is: another setting, a smaller recipe, a larger GPU."""
    on = Deployment.of(source, profile)
    setting, recipe = nearest(on, asked), smaller_recipe(source, profile, asked)
    gpu = larger_gpu(source, profile, asked)
    others = []
    if recipe is not None:
        start = " from the BF16 checkpoint" if _is_quantized(source) else ""
        others.append(f"with --recipe {recipe.name}{start}")
    if gpu is not None:
        others.append(f"with --profile {gpu.name} ({gigabytes(Deployment.of(source, gpu).memory_bytes)} GB)")
    if setting is None and not others:
        return "No setting of this GPU, no recipe that it runs and no GPU of the profiles holds it."
    as_asked = f"as asked {' or '.join(others)}" if others else ""
    if setting is None:
        return f"It fits {as_asked}."
    needed = gigabytes(on.budget(setting).total_bytes)
    return f"It fits with {options(setting, asked)} ({needed} GB)" + (f", or {as_asked}." if others else ".")


def smaller_recipe(source: ModelSource, profile: GpuProfile, asked: Setting) -> Recipe | None:
    """Of the recipes with fewer bytes that this GPU runs and that fit as asked: the profile's choice, else one that is
    multiplied in its own format, else the one with the most bytes, so the least loss.
    """
    weights = Deployment.of(source, profile).weight_bytes
    found: list[tuple[bool, bool, int, Recipe]] = []
    for recipe in _recipes(source):
        on = Deployment.of(with_recipe(source, recipe), profile)
        if on.weight_bytes < weights and profile.runs(recipe.format.weights) and on.fits(asked):
            native = recipe.format.activations != "none"
            found.append((recipe.name == profile.choices.recipe.value, native, on.weight_bytes, recipe))
    return max(found, key=lambda item: item[:3])[3] if found else None


def larger_gpu(source: ModelSource, profile: GpuProfile, asked: Setting) -> GpuProfile | None:
    """The GPU with the least memory of those that have more, run these weights and hold them as asked."""
    held: list[tuple[int, GpuProfile]] = []
    memory = Deployment.of(source, profile).memory_bytes
    for other in _gpus():
        on = Deployment.of(source, other)
        runs = all(other.runs(weights) for weights in on.weights)
        if other.name != profile.name and on.memory_bytes > memory and runs and on.fits(asked):
            held.append((on.memory_bytes, other))
    return min(held, key=lambda item: item[0])[1] if held else None


def options(setting: Setting, asked: Setting) -> str:
    """The command-line options that turn ``asked`` into ``setting``."""
    changed = [name for name in _ORDER if getattr(setting, name) != getattr(asked, name)]
    return " ".join(f"--{name} {getattr(setting, name)}" for name in changed)


def gigabytes(size: int) -> str:
    return f"{size / GB:.2f}"


def _largest(on: Deployment, setting: Callable[[int], Setting], least: int, most: int, step: int) -> int | None:
    """``most``, or the largest least + k * step below it that fits: memory grows with every number of a setting."""
    if on.fits(setting(most)):
        return most
    low, high = -1, (most - least) // step
    while low < high:
        middle = (low + high + 1) // 2
        if on.fits(setting(least + middle * step)):
            low = middle
        else:
            high = middle - 1
    return None if low < 0 else least + low * step


def _reduced(on: Deployment, asked: Setting, names: tuple[str, ...]) -> Iterator[Setting]:
    """Settings that fit, with no more of the named numbers than asked, and none of those could be larger alone."""
    first, *others = names
    for values in product(*(_smaller(on, asked, name) for name in others)):
        rest = replace(asked, **dict(zip(others, values, strict=True)))
        if rest.canvases > rest.slots and first not in ("canvases", "slots"):
            continue
        found = _raised(on, rest, first, _range(on, rest, first)[0], asked)
        if found is None:
            continue
        # Canvases once more, and last: they are bounded by slots too, which may have grown since.
        for name in (*others, *(name for name in names if name == "canvases")):
            found = _raised(on, found, name, getattr(found, name), asked) or found
        yield found


def _raised(on: Deployment, setting: Setting, name: str, least: int, asked: Setting) -> Setting | None:
    """The setting with as much of a number as fits, from ``least`` up to what was asked for."""
    _, most, step = _range(on, replace(asked, slots=setting.slots) if name == "canvases" else asked, name)
    value = _largest(on, partial(_changed, setting, name), least, most, step)
    return None if value is None else _changed(setting, name, value)


def _range(on: Deployment, setting: Setting, name: str) -> tuple[int, int, int]:
    """Least, most and step of a number that may be given up."""
    canvas, asked = on.spec.canvas_length, int(getattr(setting, name))
    if name == "context":
        return min(max(2 * canvas, min(asked, _USEFUL_CANVASES * canvas)), asked), asked, canvas
    if name == "chunk":
        return min(asked, canvas), asked, canvas
    if name == "slots":
        return min(setting.canvases, asked), asked, 1
    return 1, min(asked, setting.slots), 1


def _changed(setting: Setting, name: str, value: int) -> Setting:
    return replace(setting, **{name: value})


def _smaller(on: Deployment, setting: Setting, name: str) -> list[int]:
    """Halves of a number, down to the least."""
    least, value, _ = _range(on, replace(setting, canvases=1) if name == "slots" else setting, name)
    values = []
    while value > least:
        value = max(value // 2, least)
        values.append(value)
    return values


def _kept(setting: Setting, asked: Setting) -> float:
    return (
        (setting.context / asked.context)
        * (setting.canvases / asked.canvases)
        * (setting.chunk / asked.chunk)
        * (setting.slots / asked.slots)
    )


def _is_quantized(source: ModelSource) -> bool:
    return source.checkpoint is not None and source.checkpoint.quantization is not None


def _recipes(source: ModelSource) -> list[Recipe]:
    """Those whose blocks the model's matrices divide into."""
    found = []
    for name in recipe_names():
        recipe = load_recipe(name)
        try:
            recipe.check(source.spec)
        except InputError:
            continue
        found.append(recipe)
    return found


def _gpus() -> list[GpuProfile]:
    profiles = [load_profile(name) for name in profile_names()]
    return [each for each in profiles if each.facts.memory_gb is not None and each.choices.compiler.value != "torch"]
