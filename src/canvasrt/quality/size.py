"""What a checkpoint takes on disk, and what a denoising step reads of it. Bytes, from the headers."""

from canvasrt.checkpoint import Checkpoint
from canvasrt.tensorfile import read_folder

_EMBEDDING = "model.decoder.embed_tokens.weight"


def readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def bytes_on_disk(checkpoint: Checkpoint) -> int:
    """All tensors, vision included."""
    return sum(info.nbytes for info in read_folder(checkpoint.folder).values())


def bytes_per_step(checkpoint: Checkpoint) -> int:
    """What one denoising step of one canvas has to read of the weights.

    Every matrix once, since the tokens of a canvas together touch all experts; the embedding twice, for the logits and
    for the next step's self-conditioning signal; encoder scalars not at all.
    """
    read = sum(
        info.nbytes
        for name in checkpoint.names()
        if not name.startswith("model.encoder.")
        for info in checkpoint.stored(name).infos()
    )
    return read + sum(info.nbytes for info in checkpoint.stored(_EMBEDDING).infos())
