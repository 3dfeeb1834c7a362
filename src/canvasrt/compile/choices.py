"""What is planned or built: the profile's choices, replaced by what was asked for, cut to the model, with reasons."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from canvasrt.compile.sizes import with_recipe
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import Setting
from canvasrt.errors import InputError
from canvasrt.profiles.profile import GpuProfile, Moe
from canvasrt.quantize.recipe import load_recipe

SETTINGS = ("context", "slots", "canvases", "chunk")
_CUT = {
    "context": "all that the model has positions for",
    "slots": "one for every canvas",
    "canvases": "one for every slot",
    "chunk": "the whole context",
}


@dataclass(frozen=True, slots=True)
class Reason:
    """One choice: ``context``, ``8192``, and why."""

    what: str
    value: str
    reason: str


def chosen_source(folder: Path, profile: GpuProfile, recipe: str | None) -> tuple[ModelSource, str]:
    """The model, and why its weights have the format that they have.

    ``recipe`` is for weights that are not there or still BF16. Raises InputError for a checkpoint that is quantized
    already.
    """
    source = ModelSource.open(folder)
    chosen = profile.choices.recipe
    if source.checkpoint is None:
        name, why = (chosen.value, chosen.reason) if recipe is None else (recipe, "--recipe")
    elif recipe is not None and source.checkpoint.quantization is not None:
        raise InputError(
            f"{folder} is quantized already ({source.quantization}): leave --recipe out, or take the BF16 checkpoint"
        )
    elif recipe in (None, "none"):
        return source, "as the checkpoint is stored"
    else:
        name, why = str(recipe), "--recipe; the checkpoint is BF16 and would have to be quantized"
    return with_recipe(source, None if name == "none" else load_recipe(name)), why


def chosen_setting(
    profile: GpuProfile, source: ModelSource, asked: Mapping[str, int | None]
) -> tuple[Setting, tuple[Reason, ...]]:
    """``asked`` has the keys SETTINGS; None is left to the profile."""
    default, choices = Setting.of(profile, source.spec), profile.choices
    slots, canvases = asked["slots"], asked["canvases"]
    setting = Setting(
        slots=slots or max(default.slots, canvases or 1),
        context=asked["context"] or default.context,
        chunk=asked["chunk"] or default.chunk,
        canvases=canvases or min(default.canvases, slots or default.canvases),
    )
    setting = replace(setting, chunk=min(setting.chunk, setting.context))
    rows = []
    for name in SETTINGS:
        given, choice, value = asked[name], getattr(choices, name), getattr(setting, name)
        why = choice.reason if given is None else f"--{name}"
        if value != (given or choice.value):
            said = f"the profile says {choice.value:,}" if given is None else f"--{name} says {given:,}"
            why = f"{_CUT[name]}; {said}"
        rows.append(Reason(name, f"{value:,}", why))
    rows.append(Reason("K/V", choices.kv_type.value, choices.kv_type.reason))
    rows.append(Reason("experts", experts_text(choices.moe.value), choices.moe.reason))
    rows.append(Reason("compiler", choices.compiler.value, choices.compiler.reason))
    return setting, tuple(rows)


def experts_text(moe: Moe) -> str:
    if moe.formulation != "capacity":
        return moe.formulation
    return f"capacity: {moe.encoder_capacity} tokens per expert to encode, {moe.decoder_capacity} to denoise"
