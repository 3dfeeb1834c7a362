"""The serving side's text handling: tokenizer, chat template, stop strings."""
