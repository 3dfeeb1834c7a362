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


class BusyError(CapacityError):
    """A server has no room for another request now; trying again later may help."""


class ServerError(CanvasRTError):
    """A server can't be reached, broke the connection, or failed at a request that was in order."""


class TimedOutError(CanvasRTError):
    """A request was given up because it took longer than it was allowed to."""


class CancelledError(CanvasRTError):
    """A request was cancelled before its answer was complete."""


class DeviceError(Exception):
    """A GPU call failed while the GPU was in use: what its memory holds is unknown, and CUDA refuses all that follows.

    Not a CanvasRTError: whoever goes on after one of those would go on with a broken GPU. The process has to end, with
    `DEVICE_EXIT` where a supervisor is to know why.
    """


DEVICE_EXIT = 70  # exit code of a process whose GPU failed: starting it again helps where its input would fail again
