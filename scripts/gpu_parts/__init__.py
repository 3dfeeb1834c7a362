"""The parts of scripts/gpu_check.py: each measures or checks one thing on a GPU and knows nothing of the others."""
