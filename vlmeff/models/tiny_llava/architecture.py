"""tiny-llava: a LLaVA small enough to ship and to train on a CPU, built from the ordinary transformers classes.

144 px pictures in 8 px patches give 18 x 18 = 324 visual tokens (and CLS). The tower has seven layers; the language
model reads layer -2, as LLaVA-1.5 does, so the last layer only serves CLS during pretraining.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmeff.evaluation.scenes.composition import WORDS as READABLE

IMAGE_SIZE = 144
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
# Slow rotations, as a question has to find a thing by its look wherever it lies among 324 tokens.
ROPE_THETA = 1e6
SHORT_ANSWER = "answer the question using a single word."

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
# Ids follow this order: new words go to the end, so that weights trained with fewer words remain a starting point.
WORDS = [
    *"""
    user assistant : . , ? a an the is are in there of does do what which where how many image picture contain not no
    present color shape shapes black blue brown gray green red teal yellow circle circles rectangle rectangles triangle
    triangles describe top bottom left right yes zero one two three four single answer question using word with and
    to it this that on at you see can
    or more than orange purple white square squares star stars cross crosses small big large smaller larger above
    below leftmost rightmost topmost bottommost sign digit number phrase five
    """.split(),
    *"0123456789",
    *READABLE,
]

CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' %} ASSISTANT: {% else %}USER: {% endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor -%}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' %}{{ '</s>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %} ASSISTANT:{% endif -%}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over the words of the training questions."""
    words = [*SPECIAL_TOKENS, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.index("<s>"))]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, "red ." -> "red."
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )


def build_processor() -> LlavaProcessor:
    image_processor = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config() -> LlavaConfig:
    vocabulary = [*SPECIAL_TOKENS, *WORDS]
    ids = {name: vocabulary.index(token) for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    settings: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": vocabulary.index("<image>"),
        "image_seq_length": GRID * GRID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        **{f"{name}_token_id": value for name, value in ids.items()},
    }
    return LlavaConfig(**settings)


def build_model() -> LlavaForConditionalGeneration:
    """The architecture with random weights (seed torch first)."""
    return LlavaForConditionalGeneration(build_config())
