"""scikit-learn's digits as MAR latents, and a classifier that says whether a sample looks like its class.

1797 pictures of 8 x 8 pixels with values 0..16 that ship with the package: nothing is downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmeff.errors import MissingExtraError

if TYPE_CHECKING:
    from sklearn.svm import SVC

HIGHEST = 16.0


def pictures() -> tuple[Tensor, Tensor]:
    """([1797, 1, 8, 8] float32 in [-1, 1], labels [1797])."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train", "the digits of tiny-mar") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / (HIGHEST / 2) - 1
    return images, torch.from_numpy(data.target).long()


def classifier() -> tuple[SVC, float]:
    """An RBF support vector machine (C = 10) of the pictures with even index, and its accuracy on the others."""
    from sklearn.svm import SVC

    images, labels = pictures()
    x, y = features(images), labels.numpy()
    machine = SVC(C=10.0, gamma="scale").fit(x[::2], y[::2])
    return machine, float((machine.predict(x[1::2]) == y[1::2]).mean())


def features(images: Tensor) -> np.ndarray:
    """[B, 1, 8, 8] in [-1, 1] -> [B, 64] in 0..1, what the classifier sees."""
    return ((images.flatten(1) + 1) / 2).clamp(0, 1).double().numpy()


def recognised(machine: SVC, images: Tensor, labels: Tensor) -> float:
    """Share of pictures that the classifier gives the label they were drawn for."""
    return float((machine.predict(features(images)) == labels.numpy()).mean())
