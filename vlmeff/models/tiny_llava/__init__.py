"""tiny-llava: a trained LLaVA of 1.8 M parameters. ``vlmeff.load("tiny-llava")``."""
