"""How far a quantized checkpoint is from its source: compared step by step, and by the answers it gives."""
