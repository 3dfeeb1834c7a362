"""Where the inputs of a build lie: the repository's build/ folder, or the copy that the installed package holds."""

from pathlib import Path

from canvasrt.errors import InputError

_PACKAGE = Path(__file__).parent
_PLACES = (_PACKAGE / "_build", _PACKAGE.parents[1] / "build")  # of a wheel, of a checkout


def input_folder(name: str) -> Path:
    """``recipes`` or ``calibration``. Raises InputError in an installation that lacks them."""
    for place in _PLACES:
        if (place / name).is_dir():
            return place / name
    raise InputError(f"this installation of canvasrt has no build/{name}: install it again, or give a file of your own")
