"""tiny-clip: a trained CLIP of 0.9 M parameters. ``model, preprocess, tokenizer = tiny_clip.load()``."""

from vlmeff.models.tiny_clip.architecture import load

__all__ = ["load"]
