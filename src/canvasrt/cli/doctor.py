"""``canvasrt doctor``: what fits this machine, and what to mend."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from canvasrt.cli.common import Json, working
from canvasrt.doctor.machine import ThisMachine
from canvasrt.doctor.next_steps import PORTS
from canvasrt.doctor.report import FITS, Report, Request, examine
from canvasrt.serve.triton_files import find_triton

FAULTS = 1
_MARKS = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "fault": ("FAULT", "bold red"), "skipped": ("-", "dim")}
_INDENT = 8  # of a finding behind its mark


def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="What is to be served: a folder of a checkpoint, or of a config.json. By default the 26B."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="A GPU profile by name, or a YAML file, instead of detection.")
    ] = None,
    volume: Annotated[Path, typer.Option(help="Folder where checkpoints and engines will lie.")] = Path("."),
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Port for HTTP.")] = PORTS["http-port"],
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="Port for gRPC.")] = PORTS["grpc-port"],
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Port for Prometheus.")] = PORTS["metrics-port"],
    kubernetes: Annotated[
        bool | None,
        typer.Option(
            "--kubernetes/--no-kubernetes",
            help="Check the cluster of kubectl's context. By default where there is one that answers.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what of the chain runs on this machine and in its cluster, what fits, and what to mend.

    Nothing is changed. Exit code 1 where something is at fault.
    """
    ports = {"http-port": http_port, "grpc-port": grpc_port, "metrics-port": metrics_port}
    machine = ThisMachine(os.environ, _triton)
    with working("looking"):
        report = examine(machine, Request(checkpoint, profile, str(volume), ports, kubernetes))
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _print(report)
    if report.faults:
        raise typer.Exit(FAULTS)


def _triton(path: str) -> str:
    found = find_triton(path)
    return f"{found.server}{' (bundled with nvidia-pytriton)' if found.bundled else ''}"


def _print(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)  # a line each, also in a file
    group = ""
    for check in report.checks:
        if check.group != group:
            group = check.group
            title = f"{group} for {report.model}" if group == FITS else group
            console.print(Text(f"\n{title[0].upper()}{title[1:]}", style="bold"))
        mark, style = _MARKS[check.status]
        line = Text(f"  {mark:<{_INDENT - 2}}", style=style)
        console.print(line.append(f"{check.name}: {check.finding}", style="dim" if check.status == "skipped" else ""))
        if check.fix:
            console.print(Text(f"{'':{_INDENT}}-> {check.fix}"))
    if report.next:
        console.print(Text("\nNext", style="bold"))
        for command in report.next:
            console.print(Text(f"  {command}"))
    counts = {status: sum(check.status == status for check in report.checks) for status in ("fault", "warning")}
    said = [f"{count} {status}{'' if count == 1 else 's'}" for status, count in counts.items() if count]
    console.print(f"\n{' and '.join(said) or 'Nothing to mend'}.")
