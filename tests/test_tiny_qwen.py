"""tiny-qwen's architecture and training: what training computes is what the transformers classes compute."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmeff
from kvcache import read_recipe
from vlmeff import zoo
from vlmeff.evaluation import mosaics, scenes
from vlmeff.evaluation.questions import ask_items, easy_vqa_items, is_right
from vlmeff.loading import embedded_folder
from vlmeff.models.tiny_qwen import language, pictures, tower, train
from vlmeff.models.tiny_qwen.architecture import MERGE, build_model, build_processor

ROOT = Path(__file__).resolve().parent.parent
FOLDER = embedded_folder("tiny_qwen")

# float32, other order of additions
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_model().eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def drawn(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture with sharp edges, resized by nobody: ``size`` is (width, height) in multiples of 14."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_picture(image: Image.Image) -> pictures.Picture:
    return pictures.Picture(np.asarray(image), np.zeros(image.size[::-1], np.uint8), (), ())


@pytest.mark.parametrize("grid", [(8, 8), (5, 5), (4, 6), (6, 8)])
def test_the_batched_tower_is_the_tower(grid: tuple[int, int], model: Any, processor: Any) -> None:
    images = [drawn((grid[1] * 14, grid[0] * 14), seed) for seed in range(3)]
    inputs = processor.image_processor(images, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, MERGE * grid[0], MERGE * grid[1]]] * 3
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    patches = pictures.patches_of([as_picture(image) for image in images], grid, mean, std)
    one_frame = inputs["pixel_values"].view(3, -1, 3, 2, 49)[:, :, :, 0].flatten(2)
    torch.testing.assert_close(patches, one_frame, **CLOSE)
    with torch.no_grad():
        expected = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        _, tokens = tower.tower_forward(model.model.visual, patches, grid)
    torch.testing.assert_close(tokens.flatten(0, 1), expected, **CLOSE)


def test_packed_conversations_are_computed_as_if_each_stood_alone(model: Any, processor: Any) -> None:
    """Logits at every answer token against the plain model on the processor's prompt with the answer appended."""
    packer = language.Conversations()
    asked = [pictures.Question("a", "what color is the star?", "red"), pictures.Question("b", "where?", "top left")]
    rows, images = [], []
    for number, grid in enumerate([(8, 8), (5, 5)]):
        image = drawn((grid[1] * 14, grid[0] * 14), number)
        inputs = processor.image_processor([image], return_tensors="pt")
        with torch.no_grad():
            tokens = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        rows.append(language.Seen(tokens, grid, asked))
        images.append(image)
    batch = packer.pack(rows, random.Random(1))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds = embeds.masked_scatter(
        (batch["input_ids"] == packer.image)[..., None], torch.cat([row.tokens for row in rows])
    )
    text = model.model.language_model
    with torch.no_grad():
        final, after = language.text_forward(text, embeds, batch["mask"], batch["position_ids"])
        theirs = text(
            inputs_embeds=embeds,
            attention_mask=batch["mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
            output_hidden_states=True,
        )
    torch.testing.assert_close(final, theirs.last_hidden_state, **CLOSE)
    for number, states in enumerate(after):
        torch.testing.assert_close(states, theirs.hidden_states[number], **CLOSE)

    replay = random.Random(1)
    for row, image, ids, states in zip(rows, images, batch["input_ids"], final, strict=True):
        at = len(packer.before) + len(row.tokens)
        for question in packer.choose(row.questions, replay):
            turn, _ = packer.turn(question, replay)
            assert ids[at : at + len(turn)].tolist() == turn
            message = processor.tokenizer.decode(turn).split("<|vision_end|>")[1].split("<|im_end|>")[0].strip()
            content = [{"type": "image"}, {"type": "text", "text": message}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=[image], text=[prompt + question.answer + "<|im_end|>"], return_tensors="pt")
            with torch.no_grad():
                alone = model(**inputs).logits[0, -len(turn) :]
            torch.testing.assert_close(model.lm_head(states[at : at + len(turn)]), alone, **CLOSE)
            at += len(turn)


def test_the_tokenizer_knows_every_word(processor: Any) -> None:
    tokenizer = processor.tokenizer
    texts = {t for s in scenes.samples(300, split="train") for t in (s.question, *s.answers)}
    texts |= {t for s in mosaics.samples(50) for t in (s.question, *s.answers)}
    texts |= {t for _, *both in mosaics.easy_vqa_questions("test") for t in both}
    unknown = {t for t in texts if tokenizer.unk_token_id in tokenizer(t).input_ids}
    assert not unknown
    assert tokenizer("Answer the question using a single word or phrase.").input_ids.count(tokenizer.unk_token_id) == 0


@pytest.mark.parametrize(
    ("size", "tokens"), [((112, 112), 64), ((64, 64), 25), ((128, 128), 64), ((448, 448), 64), ((448, 224), 5 * 11)]
)
def test_a_picture_gets_tokens_by_its_size(size: tuple[int, int], tokens: int, processor: Any) -> None:
    grid = processor.image_processor([drawn(size, 0)], return_tensors="pt")["image_grid_thw"][0]
    assert int(grid.prod()) // MERGE**2 == tokens


def test_cells_belong_to_the_thing_that_covers_most_of_them() -> None:
    picture = pictures.scene_picture(3, seed=0)
    for grid in ((8, 8), (16, 16), (5, 5)):
        found = pictures.instance_grids([picture], grid)[0]
        side = len(picture.instances)
        for row in range(grid[0]):
            for column in range(grid[1]):
                # Uneven cells share their border pixels, as adaptive pooling does.
                y = slice(row * side // grid[0], -(-(row + 1) * side // grid[0]))
                x = slice(column * side // grid[1], -(-(column + 1) * side // grid[1]))
                counts = np.bincount(picture.instances[y, x].ravel(), minlength=len(picture.things) + 1)
                share = counts[1:] / counts.sum()
                expected = int(share.argmax()) + 1 if share.max() >= pictures.ON_OBJECT else 0
                assert int(found[row, column]) == expected
    assert len(set(pictures.centres(picture.things, (8, 8)).values())) == len(picture.things)


def test_centres_lie_on_their_things() -> None:
    for index in range(30):
        picture = pictures.scene_picture(index, seed=1)
        side = len(picture.instances)
        for number, thing in enumerate(picture.things, start=1):
            shown = picture.instances[int(thing.y * side), int(thing.x * side)]
            assert shown == number


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def run(folder: Path, stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            module = nn.Linear(3, 2)

            def loss(step: int, module: nn.Module = module, stop: int = stop) -> tuple[torch.Tensor, str]:
                if step == stop:
                    raise KeyboardInterrupt
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
                return module(x).square().mean(), ""

            try:
                train.train("tower", module, loss, steps=60, work=folder)
            except KeyboardInterrupt:
                assert torch.load(folder / "tower.pt", weights_only=True)["step"] == stop // 25 * 25
        return module.state_dict()

    unbroken, resumed = run(tmp_path / "a", (-1,)), run(tmp_path / "b", (30, 55, -1))
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_one_command_trains_and_exports_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "BATCH", {"scenes": 2, "mosaics": 1, "single": 2, "small": 2})
    monkeypatch.setattr(tower, "CROPS", {"crops": 3, "single": 2})
    monkeypatch.setattr(language, "BATCH", {"scenes": 2, "small": 1, "mosaics": 1, "single": 1})
    monkeypatch.setattr(language, "POOL", {"scenes": 4, "small": 2, "mosaics": 2, "single": 2})
    monkeypatch.setattr(train, "STEPS", {"shapes": 2, "tower": 2, "language": 9})
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--steps", "language=2"])
    train.main()
    model, processor = vlmeff.load(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), type(processor))
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), type(model))
    assert model.dtype == torch.float32
    states = torch.load(tmp_path / "work" / "language.pt", weights_only=True)["modules"]
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == {"shapes": 2, "tower": 2, "language": 2}
    name = "layers.0.mlp.up_proj.weight"
    stored = model.model.language_model.get_parameter(name)
    torch.testing.assert_close(stored, states[f"text.{name}"].half().float(), rtol=0, atol=0)
    assert (tmp_path / "model.safetensors").stat().st_size < 8_000_000


def test_card_and_result_name_the_shipped_weights() -> None:
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) <= 8_000_000
    digest = hashlib.sha256(weights).hexdigest()
    assert digest in (FOLDER / "README.md").read_text()
    results = [json.loads(f.read_text()) for f in (ROOT / "benchmarks" / "results").glob("*.json")]
    ours = [r for r in results if isinstance(r, dict) and r.get("model") == "tiny-qwen"]
    assert {r["weights_sha256"] for r in ours} == {digest}
    evaluated = [r["model"] for r in results if isinstance(r.get("model"), dict) and r["model"]["id"] == "tiny-qwen"]
    assert [model["revision"] for model in evaluated] == [f"sha256:{digest}"]


def test_random_pruning_loses_what_the_gate_asks_for() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "tiny_qwen_accuracy.json").read_text())
    full, pruned = (result["settings"][name]["scenes"] for name in ("all tokens", "random"))
    lost = [kind for kind in full if full[kind]["score"] >= 60 and pruned[kind]["loss"] >= 5]
    assert len(lost) >= 2
    assert result["gate"]["passed"]
    assert result["gate"]["types_random_loses_5_points"] == lost


def test_the_shipped_model_answers_open_questions_and_prunes() -> None:
    model, processor = vlmeff.load(FOLDER)
    items = easy_vqa_items(limit=96)
    for tokens, least in ((None, 0.9), ("hiprune", 0.8)):  # 98 % were measured; 96 questions
        if tokens:
            vlmeff.wrap(model, preset=None, tokens=tokens, keep=1 / 3)
        answers = list(ask_items(model, processor, items, max_new_tokens=2))
        right = sum(is_right(i, a) for i, a in zip(items, answers, strict=True))
        assert right / len(items) >= least
    report = vlmeff.report(model)
    assert (report.visual_tokens_before, report.visual_tokens_after) == (25 * report.rows, 8 * report.rows)


def test_its_recipe_was_calibrated_on_these_weights_and_keeps_what_it_says() -> None:
    file = FOLDER.parent / "prefixkv.json"
    recipe = read_recipe(file)
    assert recipe.model["id"] == "tiny-qwen"
    assert recipe.model["revision"] == zoo.load_zoo().models["tiny-qwen"].revision
    made = recipe.calibration
    assert (made["dataset"], made["samples"], made["token_pruning"]) == ("scenes", 48, None)
    assert max(made["half_difference"].values()) <= 0.03
    model, processor = vlmeff.load("tiny-qwen")
    vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=0.5, recipe=file))
    (answer,) = ask_items(model, processor, easy_vqa_items(limit=1), max_new_tokens=2)
    assert answer
    layers = vlmeff.report(model).retention.layers
    n = layers[0].prompt_tokens[0]
    assert [layer.kept[0] for layer in layers] == recipe.budgets(keep_ratio=0.5, n=n)
