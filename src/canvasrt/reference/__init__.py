"""Comparison with the reference implementation, transformers' ``DiffusionGemmaForBlockDiffusion``.

The oracle of this project.
"""
