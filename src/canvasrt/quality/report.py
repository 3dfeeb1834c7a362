"""quality.json beside a quantized checkpoint, and the tables that are printed of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from canvasrt.errors import CheckpointError
from canvasrt.quality.compare import Comparison
from canvasrt.quality.size import readable

NAME = "quality.json"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found about one quantized checkpoint. Shares are of 1, sizes in bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # read() validates with it

    recipe: str
    source: str  # folder name
    arithmetic: str  # "exact": rounded as a GPU engine rounds
    prompts: int
    comparison: Comparison
    solved: float | None  # share of the prompts with a known answer that got exactly that; None without any
    source_solved: float | None
    bytes_on_disk: int
    source_bytes_on_disk: int
    bytes_per_step: int
    source_bytes_per_step: int


def write(report: Report, folder: Path) -> None:
    """quality.json, and quality.md for people."""
    (folder / NAME).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    (folder / "quality.md").write_text(markdown([report]), encoding="utf-8")


def read(folder: Path) -> Report:
    """Raises CheckpointError for a folder without a report, or with one of another version."""
    file = folder / NAME
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {NAME}: canvasrt quantize writes it, canvasrt verify {folder} --source CHECKPOINT too"
        )
    try:
        return TypeAdapter(Report).validate_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])
        raise CheckpointError(f"{file} is not a report of this version of canvasrt ({faults}): make it again") from None


def rows(reports: Sequence[Report]) -> list[list[str]]:
    """A table: a row of headings, then a line per measure with a column per report, the source first."""
    first = reports[0]
    comparisons = [report.comparison for report in reports]

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    return [
        ["", first.source, *(report.recipe for report in reports)],
        ["KL, nats per position", "0", *(f"{each.kl:.2e}" for each in comparisons)],
        ["KL, median of the prompts", "0", *(f"{each.kl_median:.2e}" for each in comparisons)],
        ["same most likely token", "100.0%", *(share(each.top1_agreement) for each in comparisons)],
        ["entropy difference, nats", "0", *(f"{each.entropy_difference:+.1e}" for each in comparisons)],
        [
            "steps per canvas",
            f"{first.comparison.source_steps_per_canvas:.2f}",
            *(f"{each.steps_per_canvas:.2f}" for each in comparisons),
        ],
        ["solved", share(first.source_solved), *(share(report.solved) for report in reports)],
        ["on disk", readable(first.source_bytes_on_disk), *(readable(report.bytes_on_disk) for report in reports)],
        [
            "read per step",
            readable(first.source_bytes_per_step),
            *(readable(report.bytes_per_step) for report in reports),
        ],
    ]


def markdown(reports: Sequence[Report]) -> str:
    head, *body = rows(reports)
    lines = [head, ["---"] * len(head), *body]
    prompts = " and ".join(sorted({str(report.prompts) for report in reports}))
    arithmetic = " and ".join(sorted({report.arithmetic for report in reports}))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{prompts} held-out prompts, {arithmetic} arithmetic.\n"
