"""DiffusionGemma on NVIDIA GPUs: quantize, compile, serve and deploy.

Imports nothing, so that the version can be read without any dependency.
"""

__version__ = "0.1.0"
