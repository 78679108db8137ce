"""tiny-qwen: a trained model of the Qwen2.5-VL architecture with 2.6 M parameters. ``vlmeff.load("tiny-qwen")``."""
