"""Which bundles of a volume may go, so that upgrades don't fill it: those that nobody has asked for for longest.

Knows nothing of who serves a bundle: a volume that several releases share is not for it.
"""

import os
from contextlib import suppress
from pathlib import Path

from canvasrt.bundle.staging import is_bundle
from canvasrt.errors import TimedOutError
from canvasrt.pipeline import transfer as t
from canvasrt.pipeline.lock import Lock, Waiting
from canvasrt.pipeline.receipt import receipt_file


def note_use(bundle: Path) -> None:
    """A bundle is as old as the last run that wanted it: after a rollback, the older build is the younger."""
    with suppress(OSError):  # of a volume that can't be written; nothing will be removed there either
        os.utime(receipt_file(bundle))


def prune(wanted: Path, keep: int, waiting: Waiting) -> list[Path]:
    """Removes bundles beside ``wanted`` until ``keep`` are left with it, and says so. Bundles without a receipt, which
    somebody has put there, and those that are being made, stay.
    """
    ours = [
        folder
        for folder in wanted.parent.glob("*")
        if folder != wanted and not folder.is_symlink() and is_bundle(folder) and receipt_file(folder).is_file()
    ]
    ours.sort(key=lambda folder: receipt_file(folder).stat().st_mtime_ns, reverse=True)
    removed = []
    for folder in ours[keep - 1 :]:
        with suppress(TimedOutError), Lock(folder, Waiting(_nothing, waiting.clock, timeout=0.0)):
            waiting.say(f"removing {folder}: nobody has asked for it for longest, and keep is {keep}")
            receipt_file(folder).unlink(missing_ok=True)
            gone = folder.with_name(
                f"{folder.name}.partial"
            )  # what is cut off here, the next build of this name removes
            t.remove(gone)
            os.rename(folder, gone)
            t.remove(gone)
            removed.append(folder)
    return removed


def _nothing(line: str) -> None:
    pass
