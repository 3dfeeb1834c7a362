"""Writes the SHA-256 of every file that an image may install beside its pin: `.venv/bin/python deploy/lock.py`.

The pins stay as they are written in requirements/*.txt below; pip is asked which file it would take for each Python and
processor that we know, and nothing is downloaded but metadata. torch and TensorRT's libraries are not here: they come
from other indexes, under versions that the Dockerfiles name.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FOLDER = Path(__file__).parents[1] / "requirements"
FILES = ("wheels", "server", "rtx", "tensorrt", "torch", "builder")
PYTHONS = ("3.11", "3.12")  # of the machine that tests, and of the images
MACHINES = ("x86_64", "aarch64")
GLIBC = range(5, 37)  # Debian 12 has 2.36
SOURCES = ("tensorrt_rtx_cu13", "tensorrt_cu13")  # published as source only: a few lines of Python each

_PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s\\]+)", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    """Version of each package in a requirements file, by the name as it is written there."""
    return dict(_PIN.findall(text))


def hashes(wanted: dict[str, str]) -> dict[str, set[str]]:
    """For each name the hashes of all files that fit."""
    found: dict[str, set[str]] = {name: set() for name in wanted}
    names = {_plain(name): name for name in wanted}
    wheels = [f"{name}=={version}" for name, version in wanted.items() if name not in SOURCES]
    sources = [f"{name}=={version}" for name, version in wanted.items() if name in SOURCES]
    asked = [[*_platform(python, machine), *wheels] for python in PYTHONS for machine in MACHINES if wheels]
    asked += [["--no-binary=:all:", *sources]] if sources else []
    for options in asked:
        for item in _report(options)["install"]:
            archive = item["download_info"]["archive_info"]
            found[names[_plain(item["metadata"]["name"])]].add(archive["hashes"]["sha256"])
    return found


def locked(text: str) -> str:
    """The same file with hashes anew; comments and order stay."""
    known = hashes(pins(text))
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("--hash")]
    out = []
    for line in lines:
        pin = _PIN.match(line)
        if pin is None:
            out.append(line)
            continue
        found = [f"    --hash=sha256:{each}" for each in sorted(known[pin[1]])]
        out.append(" \\\n".join([pin[0], *found]))
    return "\n".join(out) + "\n"


def _report(options: list[str]) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        # PyPI and nothing else: an index that this machine is set up with may have files of its own.
        alone = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
        subprocess.run([*command, "--report", str(report), "--target", folder, *options], check=True, env=alone)
        return dict(json.loads(report.read_text()))


def _platform(python: str, machine: str) -> list[str]:
    tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC] + [f"manylinux2014_{machine}"]
    abis = [f"cp{python.replace('.', '')}", "abi3", "none"]
    return [
        "--only-binary=:all:",
        *(f"--platform={tag}" for tag in tags),
        f"--python-version={python}",
        "--implementation=cp",
        *(f"--abi={abi}" for abi in abis),
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    for each in FILES:
        file = FOLDER / f"{each}.txt"
        file.write_text(locked(file.read_text()))
