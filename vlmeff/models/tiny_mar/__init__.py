"""tiny-mar: a trained MAR generator of handwritten digits and its draft. ``vlmeff.load("tiny-mar")``."""
