"""tiny-qwen: Qwen2.5-VL small enough to ship and to train on a CPU, built from the ordinary transformers classes.

7 px patches merged 2 x 2: a visual token covers 14 x 14 px, so a picture of 112 px gives 64 of them and one of 70 px
gives 25. Resolution is dynamic between 56 x 56 and 112 x 112 px of area. Blocks 2 and 5 of the tower attend to the
whole picture, the others within windows of 56 px. As in the real models, the tower knows places only relative to each
other; the language model reads them from its three-dimensional positions (M-RoPE).
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vlmeff.evaluation.scenes.composition import WORDS as READABLE

PATCH_SIZE = 7
MERGE = 2
SIDE = PATCH_SIZE * MERGE  # pixels that a visual token covers
IMAGE_SIZE = 112
WINDOW = 56
MIN_PIXELS, MAX_PIXELS = 56 * 56, IMAGE_SIZE * IMAGE_SIZE
# Fewer, slower rotations than the real models' 1e6: width has the slowest ones and must tell eight columns apart.
ROPE_THETA = 10.0
SHORT_ANSWER = "answer the question using a single word."

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
WORDS = [
    *"""
    user assistant system . , ? : a an the is are in there of to on than more does do what which where how many or one
    image picture contain not no yes present color shape shapes sign digit word number big small large larger smaller
    black blue brown gray green red teal yellow orange purple white
    circle circles rectangle rectangles triangle triangles square squares star stars cross crosses
    phrase describe top bottom left right above below leftmost rightmost topmost bottommost
    zero two three four five answer question using single with and it this that at you see can
    """.split(),
    *"0123456789",
    *READABLE,
]

CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over the words of the training questions; names as Qwen's."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, "red ." -> "red."
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|endoftext|>", "<|unk|>", "<|im_end|>")],
        padding_side="left",
        model_max_length=2048,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    # Sizes twice: transformers 5 reads ``size``, older code the other two.
    sizes: dict[str, Any] = {
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_config() -> Qwen2_5_VLConfig:
    vocabulary = [*SPECIAL_TOKENS, *WORDS]
    ids = {name: vocabulary.index(token) for name, token in (("pad", "<|endoftext|>"), ("eos", "<|im_end|>"))}
    hidden = 128
    vision = {
        "depth": 6,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": WINDOW,
        "fullatt_block_indexes": [2, 5],
        "out_hidden_size": hidden,
    }
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": hidden,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": ROPE_THETA},
        "tie_word_embeddings": False,
        "pad_token_id": ids["pad"],
        "bos_token_id": None,
        "eos_token_id": ids["eos"],
    }
    tokens: dict[str, Any] = {
        f"{name}_token_id": vocabulary.index(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        tie_word_embeddings=False,
        **(tokens | {f"{name}_token_id": value for name, value in ids.items()}),
    )


def build_model() -> Qwen2_5_VLForConditionalGeneration:
    """The architecture with random weights (seed torch first)."""
    return Qwen2_5_VLForConditionalGeneration(build_config())
