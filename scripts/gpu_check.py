"""Measures and checks CanvasRT on this machine's NVIDIA GPU, part by part, into one JSON file.

    .venv/bin/python scripts/gpu_check.py --out gpu.json
    .venv/bin/python scripts/gpu_check.py --parts torch-26b,gemm --steps 50
    .venv/bin/python scripts/gpu_check.py --parts bundle-26b --profile rtx-5090 -- --canvases 4

Every part is a process of its own: what runs out of memory or crashes is recorded with its words, and the others still
run. A library that is missing makes a part "not installed". Options of `canvasrt build` follow ``--``. Exit code 0 when
all parts passed, else 1. What each figure means: docs/measurements/gpu.md.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_parts.dims import shortened, tiny_config
from gpu_parts.environment import facts
from gpu_parts.record import FAILED, PASSED, MissingError, Options, Record

CONFIG = Path(__file__).parents[1] / "tests" / "fixtures" / "diffusiongemma-26b-a4b"
PARTS = {  # module of gpu_parts, loaded only where the part runs: each wants other libraries
    "environment": "environment",
    "rtx-targets": "rtx_targets",
    "contract": "contract",
    "verify": "verify",
    "gemm": "gemm",
    "torch-26b": "torch_model",
    "transformers-26b": "transformers_model",
    "bundle-26b": "bundle",
}
Runner = Callable[[str], dict[str, Any]]
_LINES = 20  # of a crashed part's standard error
TINY = {
    "steps": 2, "warmup": 1, "canvases": (1, 2), "context": 20, "contexts": (15,), "prefill": 32, "chunk": 16,
    "tokens": (8, 16),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = parser().parse_args(words)
    if given.record is not None:
        return run_here(given)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(given.parts, lambda name: in_process(name, words, Path(folder) / name, given.timeout))
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["gpu_check.py", *words],
        **facts(),
        "seconds": round(time.monotonic() - started, 1),
        "parts": results,
    }
    print(report(results))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return 0 if all(result["status"] == PASSED for result in results.values()) else 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, metavar="FILE", help="write everything there as JSON")
    found.add_argument("--parts", type=parts, default=list(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of the parts that need only torch")
    found.add_argument("--config", type=Path, default=CONFIG, help="folder of the config.json: the 26B's by default")
    found.add_argument("--layers", type=int, help="the first layers only, where memory is short for all")
    found.add_argument("--tiny", action="store_true", help="small dimensions, to try the script itself")
    found.add_argument("--steps", type=int, help="that are measured, for each figure")
    found.add_argument("--warmup", type=int, help="steps before them")
    found.add_argument("--canvases", type=numbers, metavar="N,N", help="of the torch and transformers parts")
    found.add_argument("--context", type=int, help="tokens before the canvas, of the same parts")
    found.add_argument("--contexts", type=numbers, metavar="N,N", help="of the bundle, beside its largest")
    found.add_argument("--prefill", type=int, help="tokens of a prompt")
    found.add_argument("--tokens", type=numbers, metavar="N,N", help="of the products of part gemm")
    found.add_argument(
        "--formulations", type=words_of, metavar="A,B", help="of dense, capacity, sparse: part torch-26b"
    )
    found.add_argument("--profile", help="GPU profile, a name or a YAML file; by default the GPU's")
    found.add_argument("--bundle", type=Path, help="for bundle-26b, instead of building one")
    found.add_argument("--checkpoint", type=Path, help="of that bundle")
    found.add_argument("--timeout", type=float, default=3600, help="seconds that a part may take")
    found.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # this process runs one part
    found.add_argument("build", nargs="*", help="options of canvasrt build, behind --")
    return found


def parts(text: str) -> list[str]:
    chosen = words_of(text)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no part: there are {', '.join(PARTS)}")
    return list(chosen)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def words_of(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def options_of(given: argparse.Namespace, folder: Path) -> Options:
    """``folder``: empty, for what the part writes."""
    config = tiny_config(folder / "config") if given.tiny else given.config
    if given.layers is not None:
        config = shortened(config, given.layers, folder / "shortened")
    names = ("steps", "warmup", "canvases", "context", "contexts", "prefill", "tokens", "formulations")
    chosen = {name: value for name in names if (value := getattr(given, name)) is not None}
    return Options(
        config=config,
        folder=folder,
        device=given.device,
        profile=given.profile,
        bundle=given.bundle,
        checkpoint=given.checkpoint,
        build=tuple(given.build),
        **{**(TINY if given.tiny else {}), **chosen},
    )


def run_all(names: Sequence[str], run: Runner) -> dict[str, dict[str, Any]]:
    """What each part found, in order, with the seconds that it took."""
    results = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        found = run(name)
        results[name] = {**found, "seconds": round(time.monotonic() - started, 1)}
        print(f"{name}: {found['status']}", file=sys.stderr, flush=True)
    return results


def in_process(name: str, words: Sequence[str], folder: Path, timeout: float) -> dict[str, Any]:
    """A part in a process of its own; what it had found is kept however it ends."""
    folder.mkdir()
    file = folder / "record.json"
    build = words.index("--") if "--" in words else len(words)
    mine = [*words[:build], "--parts", name, "--record", str(file), *words[build:]]
    error = folder / "stderr"
    with error.open("wb") as stream:
        command = [sys.executable, __file__, *mine]
        child = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            code = child.wait(timeout)
            fault = "" if code in (0, 1) else ended(code)
        except subprocess.TimeoutExpired:
            fault = f"the part was ended after {timeout:g} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the compiler that it may have started
            child.wait()
    found: dict[str, Any] = {"status": FAILED, "reason": "the part wrote nothing"}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    if fault or not file.exists():
        said = error.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
        found |= {"status": FAILED, "reason": fault or found["reason"], "said": said}
    return found


def ended(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    return f"the process was ended by {signal.Signals(-code).name}"


def run_here(given: argparse.Namespace) -> int:
    """One part, in this process."""
    (name,) = given.parts
    record = Record(name, given.record)
    record.save()
    run_part(record, options_of(given, given.record.parent))
    return 0 if record.status == PASSED else 1


def run_part(record: Record, options: Options) -> None:
    """Raises nothing but what ends the process."""
    try:
        try:
            module = importlib.import_module(f"gpu_parts.{PARTS[record.name]}")
        except ImportError as error:
            raise MissingError(f"{error.name or 'a library'} is not installed: {error}") from None
        module.run(options, record)
    except Exception as error:  # the verdict, whatever happened
        record.end(error)
    else:
        record.end()


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the parts, then the tables of each."""
    lines = table([{"part": name, **_summary(result)} for name, result in results.items()])
    for name, result in results.items():
        for key, rows in result.items():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict) and key not in ("failures", "gpus"):
                lines += ["", f"{name}, {key}", "", *table(rows)]
    return "\n".join(lines)


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result.get(key, "") for key in ("status", "seconds", "reason")}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown; a column for every key of any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[cell(row.get(name)) for name in names] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *cells)]


def cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(str(value).split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
