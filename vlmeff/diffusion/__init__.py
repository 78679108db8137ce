"""Quantized video diffusion transformers: schemes, families, training with fake quantization, checkpoints."""
