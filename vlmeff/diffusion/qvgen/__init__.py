"""QVGen: quantization-aware training with an auxiliary module that decays (arXiv 2505.11497)."""
