"""Models that ship with vlmeff, and how they were trained."""
