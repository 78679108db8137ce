"""tiny-llava's training: what it computes is what the transformers classes compute, and one command does all of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlmeff
from vlmeff.evaluation import mosaics, scenes
from vlmeff.models.tiny_llava import language, tower, train
from vlmeff.models.tiny_llava.architecture import GRID, IMAGE_SIZE, build_model, build_processor
from vlmeff.models.tiny_qwen.pictures import COLORS, SHAPES, Question, Thing, scene_picture, scene_questions

# float32, other order of additions
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_model().eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def drawn(seed: int) -> Image.Image:
    """A picture of the size that nobody resizes, with sharp edges."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))


def test_the_written_out_tower_is_the_tower_and_cut_outs_see_only_themselves(model: Any, processor: Any) -> None:
    pixels = processor.image_processor([drawn(seed) for seed in range(3)], return_tensors="pt")["pixel_values"]
    vision = model.model.vision_tower
    places = torch.tensor([[0, 5, 17, 300], [323, 20, 21, 39]])
    with torch.no_grad():
        expected = vision(pixels, output_hidden_states=True)
        patches, cls = tower.tower_forward(vision, pixels)
        cut, cut_cls = tower.tower_forward(vision, pixels, (torch.tensor([2, 0]), places))
        # The same with the embeddings of the other patches taken away by hand.
        x = vision.embeddings(pixels)
        x = torch.stack([x[2, [0, *(places[0] + 1)]], x[0, [0, *(places[1] + 1)]]])
        x = vision.pre_layrnorm(x)
        for layer in vision.encoder.layers[:-1]:
            x = layer(x, None)
        by_hand = x[:, 1:]
        x = vision.encoder.layers[-1](x, None)
    torch.testing.assert_close(patches, expected.hidden_states[-2][:, 1:], **CLOSE)
    torch.testing.assert_close(cls, expected.pooler_output, **CLOSE)
    torch.testing.assert_close(cut, by_hand, **CLOSE)
    torch.testing.assert_close(cut_cls, vision.post_layernorm(x[:, 0]), **CLOSE)


def test_pixels_are_those_of_the_processor(processor: Any) -> None:
    pictures = tower.draw({"scenes": 2, "mosaics": 2, "single": 2}, 0, random.Random(0), 0)
    image = processor.image_processor
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    ours = tower.pixels_of(pictures, mean, std)
    theirs = image([Image.fromarray(p.pixels) for p in pictures], return_tensors="pt")["pixel_values"]
    # The processor rounds and clips between the two passes of its filter: seen at sharp edges.
    levels = (ours - theirs).abs() * std[:, None, None] * 255
    assert levels.max() <= 8
    assert levels.mean() <= 0.1


def test_windows_hold_the_centre_of_their_thing() -> None:
    pictures = [scene_picture(index, seed=0) for index in range(12)]
    rows, places = tower.cut_windows(pictures, random.Random(0))
    things = [(row, thing) for row, picture in enumerate(pictures) for thing in picture.things]
    assert places.shape == (len(things), tower.WINDOW**2)
    for row, place, (expected, thing) in zip(rows, places, things, strict=True):
        assert row == expected
        assert int(thing.y * GRID) * GRID + int(thing.x * GRID) in place
        corners = [divmod(int(place[i]), GRID) for i in (0, -1)]
        assert [b - a for a, b in zip(*corners, strict=True)] == [tower.WINDOW - 1] * 2
        assert len(set(place.tolist())) == tower.WINDOW**2


@pytest.mark.parametrize("kept", [None, [[3, 40, 41, 200], [0, 9, 100, 323]]])
def test_packed_conversations_are_computed_as_if_each_stood_alone(
    kept: list[list[int]] | None, model: Any, processor: Any
) -> None:
    """Logits at every token of every conversation against the plain model on the processor's prompt.

    With ``kept``, against the plain language model on the kept tokens at their own positions.
    """
    packer = language.Conversations()
    asked = [Question("a", "what color is the star?", "red"), Question("describe", "where?", "a red star top left.")]
    images = [drawn(seed) for seed in range(2)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    text = model.model.language_model
    with torch.no_grad():
        tokens = tower.tower_forward(model.model.vision_tower, pixels)[0]
        rows = [language.Seen(t, (GRID, GRID), asked) for t in tokens]
        batch = packer.pack(rows, random.Random(1), kept)
        chosen = [t if kept is None else t[kept[i]] for i, t in enumerate(tokens)]
        visual = model.model.multi_modal_projector(torch.cat(chosen))
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds = embeds.masked_scatter((batch["input_ids"] == packer.image)[..., None], visual)
        final, _ = language.text_forward(text, embeds, batch["mask"], batch["position_ids"])

    replay = random.Random(1)
    for number, (ids, states) in enumerate(zip(batch["input_ids"], final, strict=True)):
        start = len(packer.before) + len(chosen[number])
        at = start
        for turns in packer.choose(asked, replay):
            said: list[int] = []
            for index, question in enumerate(turns):
                said += packer.turn(question, replay, first=index == 0)[0]
            assert ids[at : at + len(said)].tolist() == said
            with torch.no_grad():
                if kept is None:
                    prompt = torch.tensor([[*ids[:start].tolist(), *said]])
                    alone = model(
                        input_ids=prompt, pixel_values=pixels[[number]], attention_mask=torch.ones_like(prompt)
                    ).logits[0, -len(said) :]
                else:
                    own = torch.cat([embeds[number, :start], embeds[number, at : at + len(said)]])[None]
                    where = [*range(len(packer.before)), *(len(packer.before) + i for i in kept[number])]
                    first = len(packer.before) + GRID * GRID
                    positions = torch.tensor([[*where, *range(first, first + len(said))]])
                    mask = torch.ones_like(positions)  # or gaps would start new sequences
                    states_alone = text(
                        inputs_embeds=own, position_ids=positions, attention_mask=mask, use_cache=False
                    ).last_hidden_state
                    alone = model.lm_head(states_alone[0, -len(said) :])
            torch.testing.assert_close(model.lm_head(states[at : at + len(said)]), alone, **CLOSE)
            at += len(said)


def test_words_that_end_a_name_have_the_place_of_what_they_name() -> None:
    red, blue, circle, star = COLORS.index("red"), COLORS.index("blue"), SHAPES.index("circle"), SHAPES.index("star")
    things = (Thing(red, circle, 0, 0.1, 0.9), Thing(blue, circle, 1, 0.6, 0.2), Thing(blue, star, 0, 0.7, 0.8))
    first, second, third = ((int(t.y * GRID), int(t.x * GRID)) for t in things)
    nowhere = (language.NOWHERE, language.NOWHERE)
    for text, expected in {
        "is the red circle to the left of the small blue star ?": [first, third],
        "is there a red star ?": [nowhere],
        "what color is the small circle ?": [first],
        "what shape is the large one ?": [second],
        "what shape is the blue one ?": [],  # two of them
        "what is in the top right ?": [second],
        "what color is the shape in the top left ?": [nowhere],
        "what color is the bottommost shape ?": [first],
        "what color is the rightmost shape ?": [third],
        "how many shapes are there ? answer the question using a single word .": [],
    }.items():
        words = text.split()
        found = [language.named_place(words, i, things) for i in range(len(words))]
        assert [place for place in found if place is not None] == expected


def test_every_name_in_a_scenes_question_is_found() -> None:
    """The generator only speaks of things that its words fit alone."""
    for index in range(20):
        things = language.scene_things(index, seed=0)
        for question in scene_questions(index, seed=0):
            words = question.text.removesuffix("?").split()
            found = [p for i in range(len(words)) if (p := language.named_place(words, i, things)) is not None]
            expected = {"beside": 2, "larger": 2, "counting": 0, "theme": 0, "more": 0}.get(question.kind, 1)
            if question.kind == "existence":  # "is there a red circle?" may speak of several
                assert found == [] or (language.NOWHERE in found[0]) == (question.answer == "no")
            else:
                assert (len(found), language.NOWHERE in {x for p in found for x in p}) == (expected, False), question


def test_prompts_of_training_are_those_of_the_chat_template(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SUFFIX_SHARE", 0.0)
    packer = language.Conversations()
    question, second = Question("a", "where is it?", "top left"), Question("b", "what color is it?", "red")
    turns = [packer.turn(q, random.Random(0), first=i == 0)[0] for i, q in enumerate((question, second))]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": question.answer},
        {"role": "user", "content": second.text},
        {"role": "assistant", "content": second.answer},
    ]
    text = processor.apply_chat_template(messages)
    expected = processor.tokenizer(text.replace("<image>", "<image>" * (GRID * GRID))).input_ids
    assert [*packer.before, *[packer.image] * (GRID * GRID), *turns[0], *turns[1]] == expected


def test_the_tokenizer_knows_every_word(processor: Any) -> None:
    tokenizer = processor.tokenizer
    texts = {t for s in scenes.samples(300, split="train") for t in (s.question, *s.answers)}
    texts |= {t for s in mosaics.samples(50) for t in (s.question, *s.answers)}
    texts |= {t for s in mosaics.descriptions(50) for t in (s.question, *s.answers)}
    texts |= {t for _, *both in mosaics.easy_vqa_questions("test") for t in both}
    texts.add("Answer the question using a single word or phrase.")
    assert not {t for t in texts if tokenizer.unk_token_id in tokenizer(t).input_ids}


def test_one_command_trains_and_exports_a_model_from_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"scenes": 2, "mosaics": 1, "single": 1}
    for module, name in ((tower, "BATCH"), (tower, "CUTS"), (language, "BATCH"), (language, "POOL")):
        monkeypatch.setattr(module, name, few)
    monkeypatch.setattr(train, "STEPS", {"cuts": 1, "tower": 1, "language": 9})
    # An earlier model with a shorter vocabulary.
    torch.manual_seed(5)
    earlier = build_model()
    earlier.resize_token_embeddings(70, mean_resizing=False)
    earlier.save_pretrained(tmp_path / "earlier")
    out = tmp_path / "out"
    command = ["train", "--out", str(out), "--start", str(tmp_path / "earlier"), "--steps", "language=2"]
    monkeypatch.setattr("sys.argv", command)
    train.main()
    model, processor = vlmeff.load(out)
    assert type(processor).__name__ == "LlavaProcessor"
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == {"cuts": 1, "tower": 1, "language": 2}
    answering = torch.load(out / "work" / "language.pt", weights_only=True)["modules"]
    name = "layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.model.language_model.get_parameter(name), answering[f"text.{name}"])
    # Learning rates of three steps have hardly moved it from where it started.
    started = earlier.model.language_model.get_parameter(name)
    assert (answering[f"text.{name}"] - started).abs().max() < 0.02
    words = answering["text.embed_tokens.weight"]
    assert len(words) == model.config.text_config.vocab_size
    torch.testing.assert_close(words[:70], earlier.get_input_embeddings().weight, atol=0.02, rtol=0)
    assert (out / "model.safetensors").stat().st_size < 8_000_000
