"""The exceptions that CanvasRT raises on purpose.

Every message tells what is wrong, where, and what to do about it. Anything else that escapes is a bug.
Knows nothing of HTTP status codes or exit codes: the gateway and the command line map these classes to theirs.
"""


class CanvasRTError(Exception):
    """Base of every error that CanvasRT raises on purpose."""


class InputError(CanvasRTError):
    """A request, option or file of the user is wrong; trying again without a change cannot help."""


class CheckpointError(InputError):
    """A model folder is missing, damaged, or of a kind that CanvasRT does not run."""


class BundleError(InputError):
    """An engine bundle is missing, damaged, of another format version, or not for this GPU or checkpoint."""


class CompileError(CanvasRTError):
    """NVIDIA's compiler refused a network, or does not run on this machine."""


class CapacityError(CanvasRTError):
    """A limit of memory, context or slots was reached; the message names the limit."""
