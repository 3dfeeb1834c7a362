"""``canvasrt plan``: does a model fit a GPU, with which settings, and how fast could it be?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from canvasrt.cli.common import Json
from canvasrt.cli.plan_report import Plan, plan_as_json, print_plan, print_torch_plan, weights_of
from canvasrt.compile.budget import check_formats, checked_budget, largest_canvases, largest_context, largest_slots
from canvasrt.compile.choices import Reason, chosen_setting, chosen_source
from canvasrt.compile.forecast import forecast_prefill, forecast_steps
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import Deployment, Setting
from canvasrt.profiles.profile import GpuProfile, load_profile
from canvasrt.runtime.memory import budget as torch_budget
from canvasrt.runtime.protocol import RunnerLimits

FLOAT32 = 4


def plan(
    checkpoint: Annotated[
        Path, typer.Option(help="Folder of a DiffusionGemma checkpoint; its config.json alone is enough.")
    ],
    profile: Annotated[str, typer.Option(help="A GPU profile by name, or a YAML file.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe that the weights would be quantized by, or none for BF16. By default what the checkpoint is "
            "stored in; for a config.json alone, the profile's choice."
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Context tokens per slot, the canvas included.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Requests that hold K/V memory at once.")] = None,
    canvases: Annotated[int | None, typer.Option(min=1, help="Canvases that one denoising call takes.")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Context tokens that one encoder call takes.")] = None,
    as_json: Json = False,
) -> None:
    """Say what of a GPU's memory a model takes, which settings fit, and how fast it could be at most.

    Nothing is built and nothing is measured. Exit code 3 when it does not fit, with the nearest setting that does.
    """
    gpu = load_profile(profile)
    source, origin = chosen_source(checkpoint, gpu, recipe)
    asked = {"context": context, "slots": slots, "canvases": canvases, "chunk": chunk}
    setting, reasons = chosen_setting(gpu, source, asked)
    if gpu.choices.compiler.value == "torch":
        _plan_torch(source, gpu, setting, as_json)
        return
    check_formats(source, gpu)
    made = _plan(source, gpu, setting, (Reason("weights", weights_of(source), origin), *reasons))
    if as_json:
        typer.echo(json.dumps(plan_as_json(made)))
    else:
        print_plan(made)
    checked_budget(source, gpu, setting)


def _plan(source: ModelSource, profile: GpuProfile, setting: Setting, reasons: tuple[Reason, ...]) -> Plan:
    on = Deployment.of(source, profile)
    needed = on.budget(setting)
    return Plan(
        source=source,
        profile=profile,
        reasons=reasons,
        setting=setting,
        budget=needed,
        memory_bytes=on.memory_bytes,
        fits=needed.total_bytes <= on.memory_bytes,
        largest={
            "context": largest_context(on, setting),
            "slots": largest_slots(on, setting),
            "canvases": largest_canvases(on, setting),
        },
        steps=tuple(forecast_steps(source, profile, setting)),
        prefill=tuple(forecast_prefill(source, profile, setting)),
    )


def _plan_torch(source: ModelSource, profile: GpuProfile, setting: Setting, as_json: bool) -> None:
    spec = source.spec
    limits = RunnerLimits(setting.slots, setting.context, setting.chunk, spec.canvas_length, spec.vocab_size)
    needed = torch_budget(spec, limits, FLOAT32)
    if as_json:
        memory = asdict(needed) | {"total_bytes": needed.total_bytes}
        typer.echo(json.dumps({"profile": profile.name, "setting": asdict(setting), "fits": None, "budget": memory}))
    else:
        print_torch_plan(profile, setting, needed)
