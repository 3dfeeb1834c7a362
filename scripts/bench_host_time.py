"""How long the TensorRT runtime itself takes for a step, beside the GPU: Python between two calls of the driver.

    .venv/bin/python scripts/bench_host_time.py

30 layers, canvases of 256 tokens, on the tests' GPU (this machine's memory) with an engine that computes nothing; what
that GPU's driver takes counts along. The median of many steps. No GPU, no weights worth the name.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1] / "tests"
CANVAS, CONTEXT, CHUNK, VOCABULARY, PROMPT = 256, 2048, 512, 640, 100
WARMUP = 6  # a step is captured the third time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvases", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import host_tensorrt
    from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
    from host_bundles import Host, host_bundle
    from tiny import Dims, write

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        dims = Dims(layers="ssssf" * 6, canvas=CANVAS, context=2 * CONTEXT, vocab=VOCABULARY)
        checkpoint = write(Path(folder) / "checkpoint", dims)
        sizes = {"context": CONTEXT, "chunk": CHUNK, "canvases": given.canvases, "slots": given.canvases}
        bundle = host_bundle(Path(folder) / "bundle", checkpoint, **sizes)
        runner = Host().load(bundle).runner
        host_tensorrt.HostContext._execute = lambda *arguments: None
        for slot in range(given.canvases):
            runner.encode([EncodeRow(slot, rng.integers(2, VOCABULARY, PROMPT).astype(np.int32), 0)])
        print("| canvases | ms per step |\n| --- | --- |")
        for count in sorted({1, given.canvases // 2, given.canvases} - {0}):
            rows = [
                DenoiseRow(slot, canvas.astype(np.int32), 0.7, rng.random(CANVAS, dtype=np.float32), first=False)
                for slot, canvas in enumerate(rng.integers(2, VOCABULARY, (count, CANVAS)))
            ]
            times = []
            for _ in range(WARMUP + given.steps):
                started = time.perf_counter()
                runner.denoise(rows)
                times.append(time.perf_counter() - started)
            print(f"| {count} | {1e3 * statistics.median(times[WARMUP:]):.3f} |")


if __name__ == "__main__":
    main()
