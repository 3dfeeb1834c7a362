"""What every runner must do (tests/contract.py), on this GPU: the torch runner in float32, and a compiled bundle."""

from collections.abc import Callable, Mapping
from typing import Any

from canvasrt.errors import CanvasRTError
from canvasrt.runtime.cuda_device import open_device
from gpu_parts.record import MissingError, Options, PartError, Record, library
from gpu_parts.small import CHUNK, CONTEXT, bundles, facts, small_checkpoint, tests_module

Opener = Callable[..., Any]


def run(options: Options, record: Record) -> None:
    """A runner that can't be opened here fails or is missing by itself; the part passes where both hold."""
    library("pytest")
    missing: list[str] = []
    for name, make in {"torch": torch_opener, "bundle": bundle_opener}.items():
        try:
            opener = make(options, record)
        except MissingError as error:
            missing.append(f"{name}: {error}")
            record.note(missing=missing)
        except (CanvasRTError, PartError) as error:
            record.fail(name, error)
        else:
            check(record, {name: opener})
    if missing and not record.failures:
        raise MissingError("; ".join(missing))


def check(record: Record, openers: Mapping[str, Opener], only: str = "") -> None:
    """Every check of the contract by itself, on a runner that each opener opens."""
    checks = [each for each in tests_module("contract").CHECKS if only in each.__name__]
    for name, opener in openers.items():
        for each in checks:
            label = each.__name__.removeprefix("check_").replace("_", " ")
            try:
                each(opener)
            except Exception as error:  # pytest's own, DeviceError, and what nobody expected
                message = str(error).strip() or type(error).__name__
                record.row("checks", runner=name, check=label, result="FAILED")
                record.fail(f"{name}: {label}", _short(error, message))
            except BaseException as error:
                if type(error).__module__.startswith(("_pytest", "pytest")):  # what pytest.raises fails with
                    record.row("checks", runner=name, check=label, result="FAILED")
                    record.fail(f"{name}: {label}", str(error))
                else:
                    raise
            else:
                record.row("checks", runner=name, check=label, result="ok")


def torch_opener(options: Options, record: Record) -> Opener:
    torch = library("torch")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise PartError("torch sees no NVIDIA GPU: check the driver, or use --device cpu")
    checkpoint = small_checkpoint(options.folder / "checkpoint")
    from canvasrt.runtime.torch_runner import TorchRunner

    def open_runner(slots: int, chunk: int = CHUNK) -> Any:
        return TorchRunner.open(checkpoint, options.device, slots=slots, context=CONTEXT, chunk=chunk)

    return open_runner


def bundle_opener(options: Options, record: Record) -> Opener:
    """BF16: equality within the runner must hold all the same, but where a check allows 1e-5 it may not."""
    open_device()  # first: without a GPU no check would say more
    made = bundles(options, small_checkpoint(options.folder / "checkpoint"))
    record.note(bundle=facts(made.bundle()) | {"numbers": "bf16"})
    return made.opener()


def _short(error: Exception, message: str) -> BaseException | str:
    """An assertion's text says all; anything else comes with its traceback."""
    return message if isinstance(error, AssertionError) else error
