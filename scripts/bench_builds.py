"""Builds the 26B for GPUs from its config.json alone and measures it: plan, time, RAM, and the memory that a call
reserves on the GPU, beside what the planner says.

    .venv/bin/python scripts/bench_builds.py [--profile rtx-5090] [--json FILE]
    .venv/bin/python scripts/bench_builds.py --profile rtx-5090 --layers 12 -- --context 8192 --canvases 1

Prints a Markdown table, a row per profile; options of `canvasrt build` follow ``--``. ``--layers`` builds the first
layers only: for the RTX 5090 twelve reserve what all do within 1 %, six less, as a single full layer keeps no mask for
others. Each build is a process of its own, one after the other.
Needs the compiler of RTX GPUs and no GPU: nothing is executed. Exit code 1 where a build of the whole model exceeds
LIMITS.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from canvasrt.bundle.manifest import Manifest
from canvasrt.bundle.reader import EngineBundle
from canvasrt.compile.choices import chosen_source
from canvasrt.compile.plan_text import Graph, PlanTensor, Region, read_plan_text
from canvasrt.compile.shapes import EngineShapes
from canvasrt.compile.vram import Deployment, VramBudget, vram_budget
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names
from canvasrt.spec import ModelSpec

CONFIG = Path(__file__).parents[1] / "tests" / "fixtures" / "diffusiongemma-26b-a4b"
LIMITS = {"seconds": 300.0, "ram_bytes": 6e9, "plan_bytes": 250e6}
GB, MB = 1e9, 1e6
BITS = {"bf16": 16, "float": 32, "int32": 32, "bool": 8, "fp8_e4m3": 8, "fp4_e2m1": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="append", choices=rtx_profiles(), help="may be repeated; default: all")
    parser.add_argument("--config", type=Path, default=CONFIG, help="folder of the config.json")
    parser.add_argument("--layers", type=int, help="build the first layers only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("options", nargs="*", help="of canvasrt build, behind --")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.profile or rtx_profiles():
        with tempfile.TemporaryDirectory() as folder:
            config = arguments.config
            if arguments.layers is not None:
                config = shortened(config, arguments.layers, Path(folder) / "config")
            rows.append(measured(name, config, Path(folder) / "bundle", arguments.options))
        print(f"{name}: {rows[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    found = {"command": [*sys.argv], "cores": len(os.sched_getaffinity(0)), "builds": rows}
    print(f"\n{rows[0]['compiler']}, on {found['cores']} CPU cores; no GPU was used.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    missed = [] if arguments.layers else list(over_limits(rows))
    print("".join(f"{each}\n" for each in missed), end="", file=sys.stderr)
    return 1 if missed else 0


def rtx_profiles() -> list[str]:
    return [name for name in profile_names() if load_profile(name).choices.compiler.value == "tensorrt-rtx"]


def shortened(config: Path, layers: int, folder: Path) -> Path:
    """A folder with the config.json of a model that has the first ``layers`` layers only."""
    content = json.loads((config / "config.json").read_text(encoding="utf-8"))
    text = content["text_config"]
    text["layer_types"] = text["layer_types"][:layers]
    text["num_hidden_layers"] = layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def measured(name: str, config: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Builds and looks at what came of it. Exits with the command's own message where it fails."""
    command = [sys.executable, "-m", "canvasrt.cli.main", "build", "--checkpoint", str(config), "--profile", name]
    command += ["--weights", "stripped", "--out", str(out), "--json", *options]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if child.returncode != 0:
        sys.exit(f"{name}: the build failed with exit code {child.returncode}")
    facts = json.loads(output)
    bundle = EngineBundle.open(out)
    manifest = bundle.manifest
    build = manifest.engines["text"].build
    budget, spec = planned(manifest, config)
    moe = manifest.moe
    ranges = {}
    graphs = [graph for graph in read_plan_text(bytes(bundle.engine("text"))).graphs if graph.kind == "run"]
    for index, (shape_range, shapes) in enumerate(manifest.engines["text"].shape_ranges.items()):
        graph = next(each for each in graphs if each.shape_range == index)
        largest = max(graph.regions, key=lambda region: region.nbytes)
        rows, tokens = shapes["tokens"].max
        activations = getattr(budget, shape_range)
        ranges[shape_range] = {
            "reserved_bytes": sum(region.nbytes for region in graph.regions),
            "planned_bytes": activations.total_bytes,
            "largest_bytes": largest.nbytes,
            "largest": list(contents(graph, largest, spec, rows, tokens, manifest.shapes.context)),
            "regions": sorted((region.nbytes for region in graph.regions), reverse=True),
        }
    return {
        "profile": name,
        "recipe": manifest.checkpoint.quantization.removeprefix("recipe "),
        "shapes": manifest.shapes.model_dump(),
        "options": options,
        "experts": " ".join(
            [moe.formulation] + [f"{moe.encoder_capacity}/{moe.decoder_capacity}"] * (moe.formulation == "capacity")
        ),
        "compiler": facts["compiler"],
        "plan_bytes": facts["plan_bytes"],
        "seconds": round(seconds, 1),
        "compiler_seconds": facts["seconds"],
        "ram_bytes": usage.ru_maxrss * 1024,
        "compiler_ram_bytes": facts["peak_ram_bytes"],
        "layers": sum(build.layers.values()),
        "ranges": ranges,
    }


def planned(manifest: Manifest, config: Path) -> tuple[VramBudget, ModelSpec]:
    """What the planner says of the setting that was built."""
    profile = GpuProfile.model_validate(manifest.profile)
    recipe: Any = manifest.plan["recipe"]
    source, _ = chosen_source(config, profile, recipe)
    shapes = manifest.shapes.model_dump(exclude={"sliding"})
    return vram_budget(Deployment.of(source, profile), EngineShapes(**shapes)), source.spec


def contents(graph: Graph, region: Region, spec: ModelSpec, rows: int, tokens: int, context: int) -> Iterator[str]:
    """What is as large as a region in the largest call, of what lies in it one after the other."""
    found = {
        f"{name} ({tensor.dtype})"
        for tensor in graph.temporary()
        for name, count in [counted(tensor, spec, rows, tokens, context)]
        if tensor.region == region.name and count * BITS.get(tensor.dtype, 0) // 8 == region.nbytes
    }
    yield from sorted(found)


def counted(tensor: PlanTensor, spec: ModelSpec, rows: int, tokens: int, context: int) -> tuple[str, int]:
    """What a tensor is, and how many numbers it has in the largest call; 0 for the small ones."""
    dims = tensor.dims
    if spec.vocab_size in dims:
        return "logits", rows * tokens * spec.vocab_size
    if dims[:2] == (spec.experts, None):
        return "experts", spec.experts * rows * tokens * math.prod(size or 1 for size in dims[2:])
    if len(dims) == len(("groups", "queries", "keys")) and dims[-1] is None:
        return "scores of a full layer", spec.heads * rows * tokens * context
    return "", 0


def table(rows: list[dict[str, Any]]) -> str:
    """GPU memory as reserved / planned."""
    header = [
        "profile", "recipe", "experts", "plan, MB", "seconds", "RAM, GB", "encoder, GB", "decoder, GB",
        "largest region, GB", "which holds", "network layers",
    ]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for row in rows:
        ranges = row["ranges"]
        largest = max(ranges.values(), key=lambda each: each["reserved_bytes"])
        memory = [f"{each['reserved_bytes'] / GB:.3f} / {each['planned_bytes'] / GB:.3f}" for each in ranges.values()]
        lines.append([
            row["profile"], row["recipe"], row["experts"], f"{row['plan_bytes'] / MB:.1f}", f"{row['seconds']:.0f}",
            f"{row['ram_bytes'] / GB:.2f}", *memory, f"{largest['largest_bytes'] / GB:.3f}",
            "; ".join(largest["largest"]), f"{row['layers']:,}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def over_limits(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for name, limit in LIMITS.items():
            if row[name] >= limit:
                yield f"{row['profile']}: {name} {row[name]:,.0f} is not below {limit:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
