"""MAR image generators (arXiv 2406.11838): configurations, official checkpoints, plain sampling, training loss."""
