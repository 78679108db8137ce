"""Speculative decoding: continuous tokens of MAR image generators, and text of vision-language models."""
