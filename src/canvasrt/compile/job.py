"""One build from start to end: a plan becomes a bundle, or a message says why not and what would.

Nothing appears under the bundle's name before it is whole, and a build that would give the same bundle again does
nothing.
"""

from dataclasses import asdict, dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from canvasrt import __version__
from canvasrt.bundle import manifest as m
from canvasrt.bundle.reader import EngineBundle, already_built
from canvasrt.bundle.writer import BundleWriter, model_files
from canvasrt.compile.budget import checked_budget
from canvasrt.compile.buildplan import BuildPlan
from canvasrt.compile.choices import SETTINGS, Reason, chosen_setting, chosen_source
from canvasrt.compile.compiler import BuildLog, Compiled, Progress, Request, TensorInfo, compile_text
from canvasrt.compile.engine import ROWS, MoeShapes
from canvasrt.compile.plan_text import read_plan_text
from canvasrt.compile.scratch import Scratch
from canvasrt.compile.shapes import EngineShapes, engine_shapes
from canvasrt.compile.source import ModelSource
from canvasrt.compile.target import Target, find_target
from canvasrt.engine_weights import EngineWeight, made
from canvasrt.errors import InputError
from canvasrt.fingerprint import fingerprint
from canvasrt.profiles.profile import GpuProfile, Moe, load_profile
from canvasrt.quantize.recipe import load_recipe

ENGINE, EMBEDDING_FILE, LOG = "text.engine", "embedding.bin", "build.log"
_KERNEL_BYTES = 300_000_000  # of a plan, beside its weights


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that can start: everything decided and checked, nothing compiled."""

    plan: BuildPlan
    profile: GpuProfile
    target: Target
    source: ModelSource
    shapes: EngineShapes
    moe: Moe
    weights: m.WeightsMode
    reasons: tuple[Reason, ...]
    identity: m.CheckpointIdentity
    build_id: str

    @property
    def out(self) -> Path:
        return Path(self.plan.out)


def prepare(plan: BuildPlan) -> Prepared:
    """Reads headers and decides.

    Raises InputError or CheckpointError for a profile, checkpoint or option that can't be built, CapacityError with the
    nearest setting that fits where it does not fit the GPU, and CompileError with the command to run elsewhere where
    the compiler can't run here.
    """
    if not Path(plan.out).name:
        raise InputError(f"--out {plan.out} names no folder of its own: give a new one, such as engines/NAME")
    profile = load_profile(plan.profile)
    if plan.moe is not None:
        profile = _with_moe(profile, plan.moe)
    source, why = _source(plan, profile)
    setting, reasons = chosen_setting(profile, source, {name: getattr(plan, name) for name in SETTINGS})
    target = find_target(profile, plan)
    budget = checked_budget(source, profile, setting)
    shapes = engine_shapes(source.spec, setting.slots, setting.context, setting.chunk, setting.canvases)
    weights: m.WeightsMode = "none" if source.checkpoint is None else plan.weights
    identity = _identity(source)
    content = plan.model_dump(mode="json", exclude={"checkpoint", "out"}) | {"files": model_files(source.folder)}
    if plan.recipe not in (None, "none"):
        content["recipe"] = load_recipe(str(plan.recipe)).model_dump(mode="json")
    build_id = m.build_id(
        canvasrt=__version__,
        compiler=m.Compiler(name=target.compiler, version=target.version),
        target=m.Target(compute_capability=target.capability, profile=profile.name),
        checkpoint=identity,
        profile=profile.model_dump(mode="json"),
        plan=content,
        weights=weights,
        options=plan.options(),
    )
    memory = Reason("GPU memory", f"{budget.total_bytes / 1e9:.1f} GB", "planned: canvasrt plan shows the parts")
    every = (Reason("weights", source.quantization, why), *reasons, memory)
    moe = profile.choices.moe.value
    return Prepared(plan, profile, target, source, shapes, moe, weights, every, identity, build_id)


def _source(plan: BuildPlan, profile: GpuProfile) -> tuple[ModelSource, str]:
    folder = Path(plan.checkpoint)
    source, why = chosen_source(folder, profile, plan.recipe)
    if plan.recipe not in (None, "none") and ModelSource.open(folder).checkpoint is not None:
        raise InputError(
            f"{plan.checkpoint} has weights, and an engine takes them as they are stored: quantize them first "
            f"(canvasrt quantize {plan.checkpoint} --recipe {plan.recipe}), then build the result without --recipe"
        )
    if source.checkpoint is None and plan.weights == "inside":
        source.weights()  # says what is missing
    return source, why


def built(prepared: Prepared) -> EngineBundle | None:
    """The bundle that is there already and equal to what would be built."""
    return already_built(prepared.out, prepared.build_id)


def build(prepared: Prepared, progress: Progress, force: bool = False) -> EngineBundle:
    """Compiles and writes the bundle.

    Raises BundleError for a target that is taken, CapacityError for a full disk, CompileError where the compiler
    refuses; Ctrl-C ends it. All of them leave no half bundle behind.
    """
    source, log = prepared.source, BuildLog()
    inside = prepared.weights == "inside"
    moe = prepared.moe
    request = Request(
        source=source,
        shapes=prepared.shapes,
        moe=MoeShapes(moe.formulation, moe.encoder_capacity or 0, moe.decoder_capacity or 0),
        compiler=prepared.target.compiler,
        sm=prepared.target.sm,
        filled=inside,
    )
    weight_bytes = source.weights().nbytes() if inside else 0
    most = 2 * weight_bytes + _KERNEL_BYTES  # in the plan, and put together beside it while it is made
    with BundleWriter(prepared.out, force=force, expected_bytes=most) as bundle:
        bundle.copy_model_files(source.folder)
        with Scratch(bundle.folder) as scratch, bundle.create(ENGINE, weight_bytes) as file:
            compiled = compile_text(request, file.sink, scratch, progress, log)
        given = [(weight, EMBEDDING_FILE if inside else None) for weight in compiled.inputs]
        for weight, name in given:
            if name is not None:
                with bundle.create(name, weight.nbytes) as embedding:
                    embedding.write(made(source.weights(), weight).data)
        bundle.write(LOG, _log(prepared, log).encode())
        reserved = _regions(compiled, bundle.folder / ENGINE)
        bundle.finish(_manifest(prepared, compiled, given, reserved))
    return EngineBundle.open(prepared.out, verify="sizes")


def _manifest(
    prepared: Prepared,
    compiled: Compiled,
    given: list[tuple[EngineWeight, str | None]],
    reserved: tuple[m.Region, ...] | None,
) -> m.Manifest:
    source, spec = prepared.source, prepared.source.spec
    placeholders = prepared.weights != "inside"
    formats: dict[str, int] = {}
    for weight in (*compiled.weights, *compiled.inputs):
        formats[weight.dtype] = formats.get(weight.dtype, 0) + weight.nbytes
    engine = m.Engine(
        file=ENGINE,
        shape_ranges={
            name: {tensor: m.ShapeRange(min=low, opt=mid, max=high) for tensor, (low, mid, high) in shapes.items()}
            for name, shapes in compiled.ranges.items()
        },
        tensors=tuple(_tensor(info) for info in compiled.tensors),
        build=m.BuildFacts(
            seconds=round(compiled.seconds, 1),
            peak_ram_bytes=compiled.peak_ram_bytes,
            layers=compiled.layers,
            weight_bytes=formats,
            reserved=reserved,
        ),
        weight_map=tuple(_entry(source, weight, None) for weight in compiled.weights) if placeholders else (),
        given=tuple(_entry(source, weight, file) for weight, file in given),
    )
    return m.Manifest(
        build_id=prepared.build_id,
        canvasrt=__version__,
        compiler=m.Compiler(name=prepared.target.compiler, version=compiled.version),
        target=m.Target(compute_capability=prepared.target.capability, profile=prepared.profile.name),
        checkpoint=prepared.identity,
        weights=prepared.weights,
        options=prepared.plan.options(),
        precision="bf16",
        kv_type="bf16",
        shapes=m.Shapes(**asdict(prepared.shapes), sliding=prepared.shapes.sliding),
        moe=m.Moe(**prepared.moe.model_dump()),
        model={
            "layers": len(spec.layers),
            "hidden_size": spec.hidden_size,
            "experts": spec.experts,
            "vocab_size": spec.vocab_size,
            "canvas_length": spec.canvas_length,
        },
        reasons=tuple(m.Reason(**asdict(reason)) for reason in prepared.reasons),
        profile=prepared.profile.model_dump(mode="json"),
        plan=prepared.plan.model_dump(mode="json"),
        log=LOG,
        engines={"text": engine},
    )


def _tensor(info: TensorInfo) -> m.EngineTensor:
    mode: Any = "input" if info.is_input else "output"
    aliases = info.aliases
    if info.is_input and info.name.endswith(ROWS):
        aliases = info.name.removesuffix(ROWS)
    return m.EngineTensor(name=info.name, mode=mode, dtype=info.dtype.lower(), shape=info.shape, aliases=aliases)


def _entry(source: ModelSource, weight: EngineWeight, file: str | None) -> m.WeightEntry:
    """What a runtime needs to make this weight again: canvasrt.engine_weights.EngineWeight, and where the parts lie."""
    copied = weight.dtype in ("fp8", "fp4")
    one = len(weight.parts) == 1 and weight.parts[0].count == 1 and not weight.columns
    transform = ("copy" if one else "concat") if copied else weight.dtype
    parts = []
    if source.checkpoint is not None:
        for part in weight.parts:
            info = source.checkpoint.info(part.tensor)
            parts.append(
                m.WeightPart(
                    file=info.file.name, offset=info.offset, nbytes=info.nbytes, tensor=part.tensor, count=part.count
                )
            )
    return m.WeightEntry(
        name=weight.name,
        dtype=weight.dtype,
        shape=weight.shape,
        nbytes=weight.nbytes,
        transform=transform,
        parts=tuple(parts),
        columns=weight.columns,
        file=file,
    )


def _regions(compiled: Compiled, plan: Path) -> tuple[m.Region, ...] | None:
    """What the plan reserves on the GPU; None where its text does not tell."""
    with plan.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        text = read_plan_text(content)
    if text.reason is not None:
        return None
    names = list(compiled.ranges)
    return tuple(
        m.Region(shape_range=names[each.shape_range], name=each.name, nbytes=each.nbytes) for each in text.regions()
    )


def _identity(source: ModelSource) -> m.CheckpointIdentity:
    found = fingerprint(source.folder, weights=source.checkpoint is not None)
    return m.CheckpointIdentity(
        folder=source.folder.resolve().name,
        quantization=source.quantization,
        layout=found.layout,
        content=found.content,
    )


def _with_moe(profile: GpuProfile, moe: Moe) -> GpuProfile:
    choice = profile.choices.moe.model_copy(update={"value": moe, "reason": "the build plan's moe"})
    choices = profile.choices.model_copy(update={"moe": choice})
    return profile.model_copy(update={"choices": choices})


def _log(prepared: Prepared, log: BuildLog) -> str:
    chosen = [f"{each.what}: {each.value}  # {each.reason}" for each in prepared.reasons]
    compiler = f"{prepared.target.compiler} {prepared.target.version}"
    return "\n".join(["choices", *chosen, "", f"messages of {compiler}", *log.lines, ""])
