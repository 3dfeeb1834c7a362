"""Entry point: collects the commands and turns our errors into one line and an exit code."""

import sys

import typer

from canvasrt import __version__
from canvasrt.cli import bench, build, chat, doctor, generate, inspect, plan, prepare, profiles, quantize, serve, verify
from canvasrt.errors import (
    DEVICE_EXIT,
    CancelledError,
    CanvasRTError,
    CapacityError,
    DeviceError,
    ServerError,
    TimedOutError,
)

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_CAPACITY = 3
EXIT_INTERRUPTED = 130
OPTIONAL = {  # module, extra that installs it
    "torch": "torch", "numba": "torch", "modelopt": "quantize", "safetensors": "quantize", "grpc": "client",
    "tritonclient": "client", "matplotlib": "client", "boto3": "fetch", "oras": "fetch",
}  # fmt: skip

app = typer.Typer(
    name="canvasrt",
    help="Runs DiffusionGemma: text that emerges from noise, canvas by canvas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"canvasrt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("quantize")(quantize.quantize)
app.add_typer(profiles.app, name="profiles")
app.command("plan")(plan.plan)
app.command("build")(build.build)
app.command("inspect")(inspect.inspect)
app.command("prepare")(prepare.prepare)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)


def _exit_code(error: CanvasRTError) -> int:
    if isinstance(error, CapacityError):
        return EXIT_CAPACITY
    return EXIT_FAILED if isinstance(error, ServerError | TimedOutError | CancelledError) else EXIT_INPUT


def main() -> None:
    """Runs the command line.

    Exit codes: 0 done, 1 a check or the server failed, 2 wrong input, 3 a limit was reached, 70 the GPU failed,
    130 interrupted.
    """
    try:
        app()
    except CanvasRTError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(_exit_code(error))
    except DeviceError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(DEVICE_EXIT)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        typer.echo(f"error: this command needs {error.name}: pip install 'canvasrt[{OPTIONAL[error.name]}]'", err=True)
        sys.exit(EXIT_INPUT)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            typer.echo("interrupted", err=True)
        raise


if __name__ == "__main__":
    main()
