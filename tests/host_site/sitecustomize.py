"""On PYTHONPATH, gives an engine process a GPU that is this machine's memory: see host_process.py."""

import sys
from pathlib import Path

if "canvasrt.serve.engine_process" in sys.orig_argv:
    sys.path.append(str(Path(__file__).parents[1]))
    import host_process

    host_process.install()
