"""The plot of ``canvasrt bench --url``: throughput and waiting times over the number of clients at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE = (9.0, 3.6)  # inches
DPI = 144
WAITS = (("request_latency_ms", "whole answer", "C0"), ("time_to_first_canvas_ms", "first canvas", "C1"))


def save_plot(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes a PNG. Draws without pyplot, which would look for a screen."""
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    speed, times = figure.subplots(1, 2)
    levels = [run["concurrency"] for run in runs]
    speed.plot(levels, [run["output_tokens_per_second"] for run in runs], "o-")
    speed.set(title="throughput", ylabel="output tokens per second")
    for key, name, colour in WAITS:
        for rank, line in (("p50", "o-"), ("p99", "^:")):
            values = [run[key][rank] if run[key] else None for run in runs]
            times.plot(levels, values, line, color=colour, label=f"{name}, {rank}")
    times.set(title="waiting time", ylabel="ms")
    times.legend(frameon=False)
    for axes in (speed, times):
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
        axes.set_xlabel("requests at once")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=DPI)
