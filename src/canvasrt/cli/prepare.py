"""``canvasrt prepare``: makes what a pipeline file asks for, or waits until somebody else has."""

import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from canvasrt.cli.common import Json
from canvasrt.pipeline.child import ChildProcesses
from canvasrt.pipeline.lock import Waiting
from canvasrt.pipeline.prepare import Preparation
from canvasrt.pipeline.settings import load_pipeline
from canvasrt.pipeline.steps import Tools
from canvasrt.pipeline.transfer import Credentials

_SIGNALLED = 128  # and the signal's number: what shells make of it
# What no child process gets: names, and beginnings of names that end in _.
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "AWS_", "OCI_")


def prepare(
    pipeline: Annotated[
        Path, typer.Argument(metavar="PIPELINE.yaml", help="The pipeline file; see docs/preparing.md.")
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Make nothing: wait until the product is there and verified.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="The longest to wait for another process, in seconds; by default for ever."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make what a pipeline file asks for: fetch a checkpoint, quantize it, build its engines, each once and verified.

    What is there already stays, what was cut off goes on, what is damaged is made again. Says on standard error what
    it does.
    """
    began = time.monotonic()
    children = ChildProcesses(_say)
    _end_with(children)
    credentials = _credentials(os.environ)

    def say(line: str) -> None:
        _say(credentials.scrub(line))

    tools = Tools(say, credentials, child_environment(os.environ), children)
    job = Preparation(load_pipeline(pipeline), tools, Waiting(say, timeout=timeout))
    product = job.wait() if wait else job.run()
    if as_json:
        content = {
            "model": str(product.model),
            "checkpoint": None if product.checkpoint is None else str(product.checkpoint),
            "made": [str(folder) for folder in job.made],
            "seconds": round(time.monotonic() - began, 1),
        }
        typer.echo(json.dumps(content))
    else:
        typer.echo(str(product.model))


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what only fetching needs."""
    return {
        name: value
        for name, value in environment.items()
        if not any(name == each or (each.endswith("_") and name.startswith(each)) for each in _TOKENS)
    }


def _credentials(environment: Mapping[str, str]) -> Credentials:
    def get(name: str) -> str | None:
        return environment.get(name) or None  # a Secret's optional key that is empty is none

    return Credentials(
        hf_token=get("HF_TOKEN"),
        hf_endpoint=get("HF_ENDPOINT"),
        aws_key=get("AWS_ACCESS_KEY_ID"),
        aws_secret=get("AWS_SECRET_ACCESS_KEY"),
        aws_session=get("AWS_SESSION_TOKEN"),
        oci_username=get("OCI_USERNAME"),
        oci_password=get("OCI_PASSWORD"),
    )


def _end_with(children: ChildProcesses) -> None:
    """SIGTERM and Ctrl-C end the child and then this process, at once: all that is unfinished can be gone on with.

    As process 1 of a container, none of them would do anything otherwise.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        _say(f"{signal.Signals(number).name}: stopped; the same command goes on from here")
        children.end()
        os._exit(_SIGNALLED + number)  # not by an exception: threads that fetch would be waited for

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)


def _say(line: str) -> None:
    with suppress(OSError):  # a log that nobody reads any more must not stop the work
        typer.echo(f"{datetime.now(UTC):%H:%M:%S} {line}", err=True)
