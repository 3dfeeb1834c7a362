"""The last part of the demo: Triton serves the checkpoint, and a client watches a puzzle being solved over gRPC."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import urlopen

from puzzles import Grid
from solve import CHECKPOINT, as_prompt, count_solved

from canvasrt.cli.live import LiveView, draft_of
from canvasrt.client.connection import Client

PORTS = ("--http-port", "18000", "--grpc-port", "18001", "--metrics-port", "18002")
SHOWN = ("requests_total", "canvases_total", "denoising_steps_total", "output_tokens_total", "slots", "slots_kept")


@contextmanager
def running() -> Iterator[dict[str, str]]:
    """`canvasrt serve` as a user would run it; its addresses once it is ready."""
    words = ["serve", str(CHECKPOINT), *PORTS, "--json"]
    print(f"$ canvasrt {' '.join(words)}", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "canvasrt.cli.main", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            sys.exit("the server did not start: what it says stands above")
        yield json.loads(line)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def solve_over_grpc(grids: list[Grid], delay: float) -> int:
    """Streams one request with a draft of every step, shows the server's metrics, and returns how many were solved."""
    answer = ""
    with running() as addresses:
        view = LiveView(1, delay)
        with Client(addresses["grpc"]) as client:
            messages = [{"role": "user", "content": as_prompt(grids)}]
            for response in client.generate(messages=messages, seed=1, stream_drafts=1):
                if response.is_draft:
                    view.show(0, draft_of(response, answer))
                else:
                    answer += response.text_output
        view.end(0, answer)
        view.close()
        time.sleep(1)  # counters and gauges are written twice a second
        with urlopen(addresses["metrics"], timeout=10) as metrics:
            lines = metrics.read().decode().splitlines()
        wanted = tuple(f"canvasrt_{name}{after}" for name in SHOWN for after in (" ", "{"))
        print("\n".join(["", addresses["metrics"], *(line for line in lines if line.startswith(wanted))]), flush=True)
    return count_solved(answer, grids)
