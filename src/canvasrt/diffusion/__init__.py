"""The denoising algorithm in NumPy, pure.

Parameters, keyed noise, the sampler's rule, the state of canvas and request.
"""
