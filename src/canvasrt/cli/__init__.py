"""The ``canvasrt`` command.

One file per command. The only package that reads the environment or writes to a terminal.
"""
