"""The runtime for transformers vision-language models."""
