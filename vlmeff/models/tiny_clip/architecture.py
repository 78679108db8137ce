"""tiny-clip: a CLIP small enough to ship and to train on one CPU core, built from open_clip's own ``CLIP`` class.

64 px pictures in 8 px patches give 8 x 8 tokens. They are averaged instead of read out through a class token, so that
each projected token lies in the joint space of pictures and texts: its cosine with a text says how much that patch has
to do with the text. The folder ``weights`` is an open_clip "local-dir" as well.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import torch

IMAGE_SIZE = 64
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
CONTEXT = 44  # longest caption: four shapes with size and place
PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
WORDS = """
    . , : ? a an the is are in at on of to and there only just exactly single one two three four no not shape shapes
    object objects circle circles rectangle rectangles triangle triangles black blue brown gray grey green red teal
    yellow small little tiny big large top bottom left right above below picture image shows has have contain does do
    which what where how color find present it this that see you many
""".split()
VOCABULARY = (PAD, UNKNOWN, *WORDS, END)  # the end has the highest id: that is where CLIP reads the text out

MODEL: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "layers": 5,
        "width": 128,
        "head_width": 32,
        "mlp_ratio": 2.0,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": len(VOCABULARY),
        "hf_tokenizer_name": "tiny-clip",  # says that the tokenizer lies beside the weights
        "tokenizer_kwargs": {"clean": "whitespace"},
        "width": 96,
        "heads": 4,
        "layers": 2,
        "mlp_ratio": 2.0,
    },
}
PREPROCESS: dict[str, Any] = {
    "size": (IMAGE_SIZE, IMAGE_SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def build_model() -> Any:
    """The ``open_clip.CLIP`` with random weights (seed torch first)."""
    from open_clip import CLIP
    from open_clip.model import set_model_preprocess_cfg

    model = CLIP(**MODEL)
    set_model_preprocess_cfg(model, {"mode": "RGB", "fill_color": 0, **PREPROCESS})
    return model


def build_tokenizer() -> Any:
    """A lower-casing word-level transformers tokenizer; a word that it does not know becomes ``<unk>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, VOCABULARY.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END, model_max_length=CONTEXT
    )


def build_preprocess() -> Any:
    """open_clip's transform from a PIL picture to [3, 64, 64] float32, for inference."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**PREPROCESS), is_train=False)


def folder() -> Path:
    return Path(str(importlib.resources.files("vlmeff.models.tiny_clip"))) / "weights"


def load(*, device: str | torch.device = "cpu", weights: Path | None = None) -> tuple[Any, Any, Any]:
    """The trained model: (``open_clip.CLIP`` in evaluation mode, preprocess, tokenizer), as open_clip's own functions
    return them.

    Args:
        device: where the model goes.  weights: another folder that ``train`` has written.
    Raises:
        ModelLoadError: the folder lacks the weights or they do not fit the architecture.
    """
    from open_clip.tokenizer import HFTokenizer
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from vlmeff.errors import ModelLoadError

    source = weights or folder()
    model = build_model()
    try:
        # Stored in float16; loading copies into the float32 parameters.
        model.load_state_dict(load_file(source / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(
            f"tiny-clip could not be loaded from {source}: {error}. Reinstall vlmeff, or pass weights= a folder that "
            "python -m vlmeff.models.tiny_clip.train has written."
        ) from error
    tokenizer = HFTokenizer(str(source), context_length=CONTEXT, **MODEL["text_cfg"]["tokenizer_kwargs"])
    return model.to(device).eval(), build_preprocess(), tokenizer
