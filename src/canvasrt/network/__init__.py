"""DiffusionGemma, written once over canvasrt.ops.protocol: attention, moe, layer, sampler, text."""
