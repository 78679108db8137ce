"""Checks of what is installed."""

from __future__ import annotations

import importlib.metadata

from vlmeff.errors import EnvironmentMismatchError


def check_torchvision() -> None:
    """Raise when torchvision was built for another torch: transformers imports it and then fails far from the cause."""
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError) as error:
        torch, torchvision_version = (importlib.metadata.version(n) for n in ("torch", "torchvision"))
        raise EnvironmentMismatchError(
            f"torchvision {torchvision_version} does not fit torch {torch} ({error}). Reinstall both together: "
            "pip install --force-reinstall torch torchvision"
        ) from error
