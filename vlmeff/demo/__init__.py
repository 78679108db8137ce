"""The Gradio demo: a model's answer beside its preset's, and which patches that looked at. Extra ``demo``."""
