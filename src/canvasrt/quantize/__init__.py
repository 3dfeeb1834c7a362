"""Makes quantized checkpoints with NVIDIA ModelOpt: recipe, calibration through the canvas loop, export, report."""
