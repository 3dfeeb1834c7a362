"""``canvasrt serve``: a Triton Inference Server with the model in it, watched until it is told to stop."""

import json
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from canvasrt.pipeline.prepare import served
from canvasrt.serve.model import check_model
from canvasrt.serve.model_repository import write_repository
from canvasrt.serve.settings import ServeSettings
from canvasrt.serve.supervisor import Addresses, Supervisor, Timing
from canvasrt.serve.triton_files import find_triton, prepare
from canvasrt.wire import MODEL

HttpPort = Annotated[int, typer.Option(min=1, max=65535, help="Port for HTTP.")]
GrpcPort = Annotated[int, typer.Option(min=1, max=65535, help="Port for gRPC, which clients of ours use.")]
MetricsPort = Annotated[int, typer.Option(min=1, max=65535, help="Port for Prometheus, at /metrics.")]


def serve(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint or an engine bundle, or a pipeline file.")
    ],
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. By default this machine only: Triton asks nobody for a password. "
            "In a container: 0.0.0.0."
        ),
    ] = "127.0.0.1",
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting such as slots=4; repeatable."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long requests in flight may go on after SIGTERM or Ctrl-C.")
    ] = 30.0,
    canary_seconds: Annotated[
        float, typer.Option(min=0.1, help="Between two requests that only ask whether the model is alive.")
    ] = 5.0,
    answer_seconds: Annotated[
        float,
        typer.Option(
            min=0.1, help="The longest that such a request may take; after three failures the model is loaded again."
        ),
    ] = 20.0,
    load_seconds: Annotated[float, typer.Option(min=1, help="The longest that the model may take to load.")] = 1800.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show everything that Triton writes.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on standard output when the server is ready.")
    ] = False,
) -> None:
    """Serve a checkpoint or an engine bundle through Triton, over HTTP and gRPC, until SIGTERM or Ctrl-C.

    Says READY on standard error when requests are answered. A model that no longer answers is loaded again.
    """
    if model.suffix in (".yaml", ".yml"):
        model, settings = served(model, settings or [])
    wanted = ServeSettings.parse(model.absolute(), [f"drain_seconds={drain_seconds:g}", *(settings or [])])
    check_model(wanted)
    addresses = Addresses(host, http_port, grpc_port, metrics_port)
    addresses.check()
    timing = Timing(load=load_seconds, canary=canary_seconds, answer=answer_seconds, drain=drain_seconds)
    triton = find_triton(os.environ.get("PATH", ""))

    def ready(pid: int) -> None:
        http, grpc, metrics = map(addresses.url, (http_port, grpc_port, metrics_port))
        _say(
            f"READY: http://{http} grpc://{grpc} http://{metrics}/metrics  try: "
            f'curl http://{http}/v2/models/{MODEL}/generate -d \'{{"text_input": "Hello"}}\''
        )
        if as_json:
            urls = {"http": f"http://{http}", "grpc": grpc, "metrics": f"http://{metrics}/metrics"}
            typer.echo(json.dumps({**urls, "pid": os.getpid(), "triton_pid": pid}))
            sys.stdout.flush()

    # The guard of the supervisor removes it too, for the case that this process is killed.
    with TemporaryDirectory(prefix="canvasrt-serve-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        write_repository(work / "models", wanted)
        launch = prepare(triton, work, os.environ)
        _say(f"loading {model} into {triton.server}")
        code = Supervisor(launch, work / "models", work, addresses, timing, ready, _say, verbose).run()
    raise typer.Exit(code)


def _say(line: str) -> None:
    if not line.startswith("{"):  # the model's log is JSON and carries its own time
        line = f"{datetime.now(UTC):%H:%M:%S} {line}"
    with suppress(OSError):  # a log that nobody reads any more must not stop the server
        typer.echo(line, err=True)
