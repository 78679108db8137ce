"""Question-aware selection through ``wrap``: the tokens that the text chose lie on what the question names."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import prompts, tiny
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import vlmeff
from tokenpruning.plan import TEXT
from vlmeff.asking import prepare
from vlmeff.errors import ConfigError
from vlmeff.models import tiny_clip
from vlmeff.models.tiny_clip.captions import named_pair


@pytest.fixture(scope="module")
def asked():
    """tiny-llava asked about drawn pictures, its tokens chosen with tiny-clip: per picture (kept, kinds, mask)."""
    model, processor = vlmeff.load("tiny-llava")
    clip, _, tokenizer = tiny_clip.load()
    settings = processor.image_processor
    source = vlmeff.OpenClipText(
        clip=clip,
        tokenizer=tokenizer,
        decode=lambda ids: processor.decode(ids, skip_special_tokens=True).replace("ASSISTANT:", "").strip(),
        image_mean=settings.image_mean,
        image_std=settings.image_std,
    )
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrunePlus(keep=60, beta=0.5), text_source=source)
    out = []
    for seed in range(30):
        picture, thing, text = named_pair(random.Random(f"sources-{seed}"))
        inputs = prepare(processor, picture.image(), f"where is {text}?")
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=1)
        (selection,) = vlmeff.report(model).plan.items[0].selections
        mask = F.adaptive_avg_pool2d(torch.from_numpy(thing.mask).float()[None], 18)[0].flatten()
        out.append((selection.index, selection.kind, mask))
    return out


def test_tokens_kept_for_the_question_lie_on_the_shape_that_it_names(asked):
    shares = []
    for index, kind, mask in asked:
        chosen = index[kind == TEXT]
        assert len(chosen) == 30  # half of the budget
        covered = int((mask > 0).sum())
        # As many of the chosen as there is room for on the shape.
        shares.append(int((mask[chosen] > 0).sum()) / min(30, covered))
    # A random choice of 30 of 324 tokens would cover 9 % of the shape.
    assert sum(shares) / len(shares) > 0.5


def test_the_default_source_compares_tokens_with_the_mean_embedding_of_the_question():
    model = vlmeff.wrap(tiny("llava"), None, tokens=vlmeff.TextTopK(keep=5))
    inputs = prompts(model, [1, 1])
    with torch.no_grad():
        model(**inputs)
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    for row, item in enumerate(vlmeff.report(model).plan.items):
        ids = inputs["input_ids"][row]
        last = int((ids == model.config.image_token_id).nonzero()[-1])
        question = model.get_input_embeddings()(ids[last + 1 :]).mean(0)
        cosine = (features[row] @ question) / features[row].norm(dim=1) / question.norm()
        assert item.selections[0].index.tolist() == sorted(cosine.topk(5).indices.tolist())


def test_the_towers_own_text_half_scores_the_towers_tokens():
    model = tiny("llava")
    vision = model.config.vision_config
    config = CLIPConfig(
        vision_config=vision.to_dict(),
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=8,
    )
    torch.manual_seed(1)
    clip = CLIPModel(config).eval()

    class Tokenizer:
        def __call__(self, texts, **_):
            return Tokens(input_ids=torch.tensor([[1, 2, len(texts[0]) % 7 + 3]]), attention_mask=torch.ones(1, 3))

    class Tokens(dict):
        def to(self, device):
            return self

    source = vlmeff.TowerText(clip, Tokenizer(), lambda ids: " ".join(map(str, ids.tolist())))
    seen = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vlmeff.wrap(model, None, tokens=vlmeff.TextTopK(keep=6), text_source=source)
    inputs = prompts(model, [2])
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        (tower,) = seen
        joint = clip.visual_projection(clip.vision_model.post_layernorm(tower))
    ids = inputs["input_ids"][0]
    placeholders = (ids == model.config.image_token_id).nonzero()[:, 0]
    for number, item in enumerate(vlmeff.report(model).plan.items):
        behind = ids[placeholders[36 * (number + 1) - 1] + 1 :]
        behind = behind[behind != model.config.image_token_id]
        text = clip.get_text_features(**Tokenizer()([" ".join(map(str, behind.tolist()))])).pooler_output[0]
        cosine = F.cosine_similarity(joint[number], text[None])
        assert item.selections[0].index.tolist() == sorted(cosine.topk(6).indices.tolist())
    assert not model.model.multi_modal_projector._forward_pre_hooks


def test_a_text_source_must_be_one():
    with pytest.raises(ConfigError, match=r"text_source='clip'.*EmbeddingText"):
        vlmeff.wrap(tiny("llava"), None, tokens="hiprune++", text_source="clip")
