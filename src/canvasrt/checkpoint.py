"""Named tensors of a checkpoint folder, memory-mapped and lazily read.

Knows the folder's files and how each tensor of the model is stored in them, quantized or not. Knows nothing of what a
weight means, of arithmetic, or of devices.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from canvasrt.errors import CheckpointError
from canvasrt.formats import Quantization, read_quantization
from canvasrt.layout import Stored, stored_tensors
from canvasrt.spec import ModelSpec, read_config
from canvasrt.tensorfile import AGAIN, TensorInfo, read_folder

_ARRAY_DTYPES: dict[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
}


class Checkpoint:
    """The text tensors of one validated checkpoint folder.

    Attributes: `folder`; `spec`, the ModelSpec of its config.json; `quantization`, what the folder declares, or None.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, tensors: Mapping[str, Stored], quantization: Quantization | None = None
    ) -> None:
        """Use `Checkpoint.open`: this trusts that `tensors` are those of `spec` and lie within their files."""
        self.folder = folder
        self.spec = spec
        self.quantization = quantization
        self._stored = dict(tensors)
        self._infos = {info.name: info for stored in tensors.values() for info in stored.infos()}
        self._maps: dict[Path, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Validate config.json and every safetensors header in `folder`; reads no tensor data.

        Raises CheckpointError for a missing, damaged or foreign checkpoint, or one quantized in a way that this version
        can't run; the message names the file.
        """
        folder = Path(folder)
        config = read_config(folder)
        quantization = read_quantization(folder, config)
        spec = ModelSpec.from_config(config, str(folder / "config.json"))
        found = read_folder(folder)
        return cls(folder, spec, stored_tensors(folder, spec, quantization, found), quantization)

    def names(self) -> tuple[str, ...]:
        """Names of all text tensors of the model, in the order of `ModelSpec.tensors`."""
        return tuple(self._stored)

    def stored(self, name: str) -> Stored:
        """How a text tensor of the model is stored. Raises CheckpointError for a name that is none."""
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.folder}: no text tensor is named {name!r}. names() lists those that exist.")
        return stored

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor in the files. Raises CheckpointError for a name that is none."""
        info = self._infos.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.folder}: no text tensor is named {name!r} in the files. names() lists the model's, stored() "
                "the parts that a quantized one is stored in."
            )
        return info

    def array(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """A zero-copy read-only view of a stored tensor in its shape; the pages are read when touched.

        F32 comes as float32, F16 as float16, BF16 as uint16 and FP8 as uint8 **bit patterns**: arithmetic on them is
        meaningless, widen BF16 with ``(bits.astype(np.uint32) << 16).view(np.float32)``. The view may be unaligned,
        and it keeps the file mapped. Raises CheckpointError for an unknown name, or where the file changed size since
        `open`.
        """
        info = self.info(name)
        data = self._map(info.file)[info.offset : info.offset + info.nbytes]
        return np.asarray(data).view(_ARRAY_DTYPES[info.dtype]).reshape(info.shape)

    def nbytes(self) -> int:
        """Bytes of all text tensors together, as stored."""
        return sum(info.nbytes for info in self._infos.values())

    def _map(self, file: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if file not in self._maps:
            try:
                mapped = np.memmap(file, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be mapped ({error}). {AGAIN}") from None
            end = max(info.offset + info.nbytes for info in self._infos.values() if info.file == file)
            # reading past the end of a mapped file kills the process with SIGBUS
            if mapped.size < end:
                raise CheckpointError(f"{file}: {end - mapped.size} bytes were cut off since it was opened. {AGAIN}")
            self._maps[file] = mapped
        return self._maps[file]
