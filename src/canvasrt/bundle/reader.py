"""Opening a bundle: everything checked against its manifest, then engines as memory-mapped bytes.

Files must be regular files in the bundle's own folder, links are refused: what is checked must be what is loaded, and
a bundle is copied as one piece. The folder itself may be a link. Knows nothing of how an engine is run.
"""

import hashlib
import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from canvasrt.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    Manifest,
    build_command,
    command_text,
    digest_of,
)
from canvasrt.errors import BundleError
from canvasrt.fingerprint import fingerprint
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names

Verify = Literal["full", "sizes"]

_LISTED = 5


class EngineBundle:
    """One verified bundle. Attributes: ``path`` as it was given, ``manifest``. Get one with `open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, verify: Verify = "full") -> "EngineBundle":
        """Raises BundleError for a folder that is no bundle, of another format version, incomplete or changed.

        ``full`` reads every byte, ``sizes`` only looks at the files' sizes.
        """
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        for name, entry in bundle.manifest.files.items():
            bundle._check_size(name, entry)
        if verify == "full":
            for name, entry in bundle.manifest.files.items():
                bundle._check_hash(name, entry)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file of the bundle. Raises BundleError for a name that the manifest does not list."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: has no file {name!r}: there are {', '.join(self.manifest.files)}")
        return self.path / name

    def engine(self, name: str) -> memoryview:
        """The plan of an engine, mapped read-only: pages are read when touched. Raises BundleError for another name."""
        engine = self.manifest.engines.get(name)
        if engine is None:
            raise BundleError(f"{self.path}: has no engine {name!r}: there are {', '.join(self.manifest.engines)}")
        return self.map(engine.file)

    def map(self, name: str) -> memoryview:
        """A file of the bundle, mapped read-only. Raises BundleError for one that is not listed, empty or changed."""
        path, nbytes = self.file(name), self.manifest.files[name].nbytes
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise self._damaged(name, f"can't be read ({error.strerror})") from None
        try:
            # Reading past the end of a mapped file would kill the process.
            if os.fstat(handle).st_size != nbytes or nbytes == 0:
                raise self._damaged(name, "is empty or has changed size since it was checked")
            return memoryview(mmap.mmap(handle, nbytes, access=mmap.ACCESS_READ))
        finally:
            os.close(handle)

    def check_gpu(self, compute_capability: str, product: str | None = None) -> None:
        """Raises BundleError on a GPU that the engines were not built for, with the command that builds for it.

        ``compute_capability`` is "12.0"; ``product`` is what the driver or the node label calls the GPU.
        """
        target = self.manifest.target
        if compute_capability == target.compute_capability:
            return
        name = f" ({product})" if product else ""
        fault = (
            f"bundle {self.path} was built for {_sm(target.compute_capability)} ({target.profile}); this GPU is "
            f"{_sm(compute_capability)}{name}. "
        )
        profiles = _profiles_for(compute_capability, product)
        if not profiles:
            raise BundleError(
                f"{fault}No GPU profile of this version is for it: write one, a YAML file like those in "
                f"canvasrt/profiles, and build it: {self._command_for('PROFILE.yaml', 'PROFILE')}"
            )
        others = "".join(f", or --profile {each.name}" for each in profiles[1:])
        raise BundleError(f"{fault}Build it: {self._command_for(profiles[0].name, profiles[0].name)}{others}")

    def check_compiler(self, name: str, version: str) -> None:
        """Raises BundleError where the installed library is not the one whose plans these are, to the last digit."""
        compiler = self.manifest.compiler
        if (compiler.name, compiler.version) != (name, version):
            raise BundleError(
                f"bundle {self.path} was compiled by {compiler.name} {compiler.version}, and {name} {version} is "
                f"installed: install {compiler.name} {compiler.version}, or build it again: {self.command()}"
            )

    def check_servable(self) -> None:
        """Raises BundleError for a bundle without weights that no checkpoint can fill."""
        if self.manifest.weights == "none":
            raise BundleError(
                f"bundle {self.path} was built from a config.json alone, for planning: it can't be served. Build it "
                f"from a checkpoint with weights: {self.command()}"
            )

    def check_checkpoint(self, folder: Path) -> None:
        """Raises BundleError for a checkpoint other than the one whose weights the engines want."""
        wanted = self.manifest.checkpoint
        found = fingerprint(folder, weights=wanted.content is not None)
        if found.layout != wanted.layout:
            fault = (
                "another model, quantization or sharding: config.json or the tensors' names, types and places differ"
            )
        elif found.content != wanted.content:
            fault = "another fine-tune: the tensors are the same, their values are not"
        else:
            return
        raise BundleError(
            f"checkpoint {folder} is not the one that bundle {self.path} was built from ({wanted.folder}). It is "
            f"{fault}. Give that one, or build for this one: "
            f"{build_command(self.manifest, out=_other(self.path, folder.resolve().name), checkpoint=str(folder))}"
        )

    def command(self) -> str:
        """Builds this bundle again."""
        return f"{build_command(self.manifest, out=str(self.path))} --force"

    def _command_for(self, profile: str, label: str) -> str:
        # Sizes and recipe belong to the profile, so this bundle's options do not go along.
        weights = {"weights": self.manifest.weights}
        old = self.manifest.target.profile
        name = self.path.name
        out = self.path.with_name(name.replace(old, label) if old in name else f"{name}-{label}")
        return command_text(self.manifest.checkpoint.folder, profile, str(out), weights)

    def _check_size(self, name: str, entry: FileEntry) -> None:
        try:
            found = os.lstat(self.path / name)
        except FileNotFoundError:
            raise self._damaged(name, "is missing") from None
        except OSError as error:
            raise self._damaged(name, f"can't be read ({error.strerror})") from None
        if stat.S_ISLNK(found.st_mode):
            raise self._damaged(
                name, "is a link, and a bundle holds its files itself (cp -L copies what links lead to)"
            )
        if not stat.S_ISREG(found.st_mode):
            raise self._damaged(name, "is not a file")
        if found.st_size != entry.nbytes:
            raise self._damaged(name, f"has {found.st_size:,} bytes, the manifest says {entry.nbytes:,}")

    def _check_hash(self, name: str, entry: FileEntry) -> None:
        try:
            with (self.path / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise self._damaged(name, f"can't be read ({error.strerror})") from None
        if found != entry.sha256:
            raise self._damaged(name, f"has the SHA-256 {found}, the manifest says {entry.sha256}: its content changed")

    def _damaged(self, name: str, fault: str) -> BundleError:
        return BundleError(
            f"bundle {self.path} is damaged: {name} {fault}. Copy the bundle again, or build it again: {self.command()}"
        )


def already_built(path: Path, build_id: str) -> EngineBundle | None:
    """The bundle at ``path`` if it is of this build and whole, so that nothing is left to build; else None."""
    try:
        return EngineBundle.open(path) if read_manifest(path).build_id == build_id else None
    except BundleError:
        return None


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle's folder; looks at no other file. Raises BundleError as `EngineBundle.open`."""
    file = path / MANIFEST
    content = _content(path, file)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not JSON ({error}): copy the bundle again, or build it again") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int:
        raise BundleError(f"{file} has no format_version, so it is not the manifest of a bundle")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{file} has format version {version}, this canvasrt reads {FORMAT_VERSION}: the bundle was built by a "
            "newer canvasrt. Upgrade canvasrt"
        )
    if version < FORMAT_VERSION:
        raise BundleError(
            f"{file} has format version {version}, this canvasrt reads {FORMAT_VERSION}: build it again: "
            f"{_old_command(raw, path)}"
        )
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        more = f" + {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise BundleError(f"{file}: {'; '.join(problems[:_LISTED])}{more}") from None
    if faults := manifest.faults():
        raise BundleError(f"{file}: {'; '.join(faults)}")
    if digest_of(content, manifest.self_sha256) != manifest.self_sha256:
        raise BundleError(
            f"{file} was changed after it was written: its content does not fit its self_sha256. Copy the bundle "
            f"again, or build it again: {build_command(manifest, out=str(path))} --force"
        )
    return manifest


def _content(path: Path, file: Path) -> bytes:
    replaced = path.with_name(f"{path.name}.replaced")
    if not path.exists() and replaced.is_dir():
        raise BundleError(
            f"{path} does not exist: a build died while replacing it. The bundle before is {replaced}: rename it back"
        )
    if not path.exists():
        raise BundleError(f"{path} does not exist: name the folder of a bundle, or make one with canvasrt build")
    if not path.is_dir():
        raise BundleError(f"{path} is not a folder: name the folder of the bundle, which holds {MANIFEST}")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} is not a bundle: it holds no {MANIFEST}. canvasrt build makes bundles") from None
    except OSError as error:
        raise BundleError(f"{file} can't be read: {error.strerror}") from None


def _problem(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where}"
    if detail["type"] == "missing":
        return f"missing key {where}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else str(message)


def _old_command(raw: dict[str, Any], path: Path) -> str:
    """As `build_command`, from what an older manifest may still say."""

    def text(section: str, key: str, otherwise: str) -> str:
        content = raw.get(section)
        value = content.get(key) if isinstance(content, dict) else None
        return value if isinstance(value, str) and value else otherwise

    checkpoint, profile = text("checkpoint", "folder", "CHECKPOINT"), text("target", "profile", "PROFILE")
    weights = raw.get("weights")
    options = {"weights": weights} if isinstance(weights, str) else {}
    return f"{command_text(checkpoint, profile, str(path), options)} --force"


def _profiles_for(compute_capability: str, product: str | None) -> list[GpuProfile]:
    """Those that list the product; where none does, those of the compute capability."""
    found = [load_profile(name) for name in profile_names()]
    label = (product or "").replace(" ", "-").lower()
    by_product = [each for each in found if label in [name.lower() for name in each.facts.product_names.value]]
    sm = compute_capability.replace(".", "")
    return by_product or [each for each in found if str(each.sm) == sm]


def _sm(compute_capability: str) -> str:
    return f"sm_{compute_capability.replace('.', '')}"


def _other(path: Path, label: str) -> str:
    return str(path.with_name(f"{path.name}-{label}"))
