"""What Triton's Python backend loads: the model itself is in the installed package. Written by generate_docs.py."""

from canvasrt.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
