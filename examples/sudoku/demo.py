"""What ``make demo`` runs: loads the demo checkpoint, solves puzzles with the canvas shown live, checks the solutions;
then quantizes it with ModelOpt, solves them again in NVFP4, compiles that for an RTX 5090, and serves the checkpoint
with Triton.

Exits with 1 when fewer than 95 % of the puzzles are solved, before or after.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from served import solve_over_grpc
from solve import CHECKPOINT, as_prompt, as_request, count_solved, held_out, solve_all

from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.live import LiveView, step_of
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.measure import Tally
from canvasrt.runtime.torch_runner import TorchRunner
from canvasrt.serve.tokenizer import TextCodec

ENGINES = Path(__file__).parents[2] / "engines"
GOAL = 0.95
AT_ONCE = 8


def show(runner: TorchRunner, source: Checkpoint, codec: TextCodec, puzzles: int, delay: float) -> None:
    """One request, drawn while it is denoised, and the verdict on its answer."""
    grids = held_out(1, puzzles, seed=8)[0]
    print(as_prompt(grids) + "\n")
    request = as_request(source, codec, runner.limits.context, as_prompt(grids), seed=1)
    view = LiveView(1, delay)
    answer = ""
    for event in run_requests(runner, {0: request}):
        if event.kind == "end":
            answer = codec.decode(event.state.output)
            view.end(0, answer)
        elif event.kind == "step":
            view.show(0, step_of(codec, event.state))
    view.close()
    print(f"{count_solved(answer, grids)} of {puzzles} solved\n")


def run(*arguments: str | Path) -> None:
    """The command that a user would run, shown and run."""
    words = [str(argument) for argument in arguments]
    print(f"$ canvasrt {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "canvasrt.cli.main", *words], check=True)


def quantize(folder: Path) -> Checkpoint:
    """The demo checkpoint with its experts in NVFP4."""
    run("quantize", CHECKPOINT, "--recipe", "nvfp4-experts", "--out", folder, "--no-report")
    return Checkpoint.open(folder)


def compile_for_rtx_5090(checkpoint: Path) -> None:
    """Into engines/, to look at later. This machine needs no GPU for it."""
    bundle = ENGINES / "demo-rtx-5090-nvfp4"
    run("build", "--checkpoint", checkpoint, "--profile", "rtx-5090", "--out", bundle, "--force")
    run("inspect", bundle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=128, help="held-out puzzles to solve after the live ones")
    parser.add_argument("--pairs", type=int, default=0, help="requests of two puzzles each to solve at last")
    parser.add_argument("--delay", type=float, default=0.35, help="seconds to show each denoising step for")
    arguments = parser.parse_args()
    source = Checkpoint.open(CHECKPOINT)
    codec = TextCodec.load(CHECKPOINT)
    runner = TorchRunner(source, slots=AT_ONCE, context=512)
    delay = arguments.delay if sys.stdout.isatty() else 0.0
    print("A 6x6 sudoku. Every row, column and 2x3 box must hold 1 to 6; the canvas starts as noise.\n")
    show(runner, source, codec, puzzles=1, delay=delay)
    print("Two puzzles in one request: the answer spans two canvases.\n")
    show(runner, source, codec, puzzles=2, delay=delay)
    solved = 0
    for name, at_once in [("one at a time", 1), (f"{AT_ONCE} at once", AT_ONCE)]:
        tally = Tally()
        requests = held_out(arguments.puzzles)
        one = TorchRunner(source, slots=at_once, context=512)
        solved = solve_all(one, source, codec, requests, tally)
        figures = tally.figures()
        print(
            f"{name}: {solved} of {len(requests)} puzzles solved, {figures['tokens_per_second']:.0f} tokens/s, "
            f"{figures['steps_per_canvas']:.1f} steps per canvas, "
            f"{figures['tokens_per_forward']:.1f} tokens per forward"
        )
    if arguments.pairs:
        pairs = solve_all(runner, source, codec, held_out(arguments.pairs, puzzles=2), Tally())
        print(f"two in one request: {pairs} of {2 * arguments.pairs} puzzles solved")
    with tempfile.TemporaryDirectory() as folder:
        made = quantize(Path(folder) / "checkpoint-nvfp4-experts")
        exact = TorchRunner(made, slots=AT_ONCE, context=512, exact=True)
        after = solve_all(exact, made, codec, held_out(arguments.puzzles), Tally())
        print(
            f"NVFP4 experts, {made.nbytes() / source.nbytes():.0%} of the bytes: {after} of {arguments.puzzles} "
            "puzzles solved, in the exact arithmetic of a GPU engine"
        )
        compile_for_rtx_5090(made.folder)
    print(f"(torch {torch.__version__} on {torch.get_num_threads()} CPU threads, float32)")
    print("\nThe same checkpoint in a Triton Inference Server, a puzzle over gRPC:\n", flush=True)
    grids = held_out(1, 1, seed=9)[0]
    if not solve_over_grpc(grids, delay):
        sys.exit("the puzzle was not solved over gRPC: run make test")
    print("solved, and the server is stopped")
    if min(solved, after) < GOAL * arguments.puzzles:
        sys.exit(f"fewer than {GOAL:.0%} solved: the checkpoint or the runtime is damaged; run make test")


if __name__ == "__main__":
    main()
