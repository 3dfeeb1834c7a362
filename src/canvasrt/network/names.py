"""Checkpoint names of the tensors that the text network reads, as published (facts.

Transformers, checkpoint headers).
"""

DECODER = "model.decoder."
EMBEDDING = DECODER + "embed_tokens.weight"
FINAL_NORM = DECODER + "norm.weight"
SELF_CONDITIONING = DECODER + "self_conditioning."


def decoder_layer(index: int) -> str:
    return f"{DECODER}layers.{index}."


def encoder_scalar(index: int) -> str:
    return f"model.encoder.language_model.layers.{index}.layer_scalar"
