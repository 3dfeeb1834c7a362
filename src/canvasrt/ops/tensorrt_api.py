"""The only import of NVIDIA's compilers on the build side: TensorRT-RTX for RTX cards and DGX Spark, TensorRT for
datacenter GPUs. Both have the same network API, so that everything else takes the module as a value.
"""

from importlib import import_module
from types import ModuleType
from typing import Literal

from canvasrt.errors import InputError

CompilerName = Literal["tensorrt-rtx", "tensorrt"]

_INSTALL = {
    "tensorrt-rtx": "pip install 'canvasrt[rtx]' (package tensorrt_rtx_cu13)",
    "tensorrt": "pip install 'canvasrt[tensorrt]'",
}


def load_compiler(name: CompilerName) -> ModuleType:
    """The compiler's Python module. Raises InputError where it is not installed or its library does not load."""
    try:
        return import_module("tensorrt_rtx") if name == "tensorrt-rtx" else import_module("tensorrt")
    except ImportError as error:
        raise InputError(f"the compiler {name} can't be loaded ({error}): {_INSTALL[name]}") from None
    except OSError as error:  # a library that the bindings load
        raise InputError(f"the compiler {name} is installed, and its library does not load: {error}") from None
