"""What this machine, and the cluster it reaches, can do with a model, and what to mend first.

Checks are pure: they read a `Machine`, which tests replace. Nothing here starts an engine or loads a CUDA library.
"""
