"""The primitives the network is written in (protocol.py) and their lowerings, one file per backend."""
