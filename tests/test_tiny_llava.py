"""The shipped model is a real LLaVA: it loads like one, answers questions and prunes."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

import vlmeff
from tokenpruning import methods
from vlmeff.evaluation.mosaics import make_scene
from vlmeff.evaluation.questions import ask_items, easy_vqa_items, is_right, mosaic_items, objects_right
from vlmeff.loading import embedded_folder

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "demos" / "pictures" / "four-shapes.png"
FOLDER = embedded_folder("tiny_llava")


@pytest.fixture
def loaded() -> tuple[Any, Any]:
    return vlmeff.load("tiny-llava")


def chat(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "url": str(PICTURE)}, {"type": "text", "text": question}]}]


def test_it_loads_through_the_auto_classes() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    inputs = processor(
        images=Image.open(PICTURE), text="USER: <image>\ndescribe the picture. ASSISTANT:", return_tensors="pt"
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 324
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_the_files_are_small_and_the_card_and_zoo_name_the_weights() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    from vlmeff import zoo

    assert zoo.load_zoo().models["tiny-llava"].revision == f"sha256:{digest}"
    assert digest in (FOLDER / "README.md").read_text()


def test_every_result_file_names_the_shipped_weights() -> None:
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    results = [json.loads(f.read_text()) for f in (ROOT / "benchmarks" / "results").glob("*.json")]
    ours = [r for r in results if r.get("model") == "tiny-llava"]
    assert ours
    assert {r["weights_sha256"] for r in ours} == {digest}
    evaluated = [r["model"] for r in results if isinstance(r.get("model"), dict) and r["model"]["id"] == "tiny-llava"]
    assert evaluated
    assert {model["revision"] for model in evaluated} == {f"sha256:{digest}"}


def test_its_adaptinfer_schedule_was_calibrated_on_these_weights_and_is_the_one_of_the_zoo() -> None:
    from vlmeff import zoo

    file = FOLDER.parent / "adaptinfer.json"
    record = zoo.load_zoo().models["tiny-llava"]
    assert json.loads(file.read_text())["about"]["revision"] == record.revision
    of_zoo = vlmeff.AdaptInfer(schedule=record.method_params["adaptinfer"]["schedule"]).schedule
    assert of_zoo == vlmeff.AdaptInfer(schedule=file).schedule


@pytest.mark.parametrize("method", methods.names())
def test_every_method_answers_on_the_shipped_model_with_fewer_tokens(method: str, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    items = easy_vqa_items(limit=24)
    vlmeff.wrap(model, "fast", tokens=method)
    answers = list(ask_items(model, processor, items, max_new_tokens=2))
    report = vlmeff.report(model)
    processed = report.visual_tokens_processed or report.visual_tokens_after
    assert processed < 0.7 * report.visual_tokens_before
    # Pictures of one object, of which almost any third of the tokens shows enough; relevance to the question alone, an
    # ablation, chooses worse than chance.
    right = sum(is_right(item, answer) for item, answer in zip(items, answers, strict=True))
    assert right >= (14 if method == "text" else 22)


def test_open_questions_are_answered_as_the_card_says(loaded: tuple[Any, Any]) -> None:
    items = easy_vqa_items(limit=320)
    right = sum(is_right(i, a) for i, a in zip(items, ask_items(*loaded, items, max_new_tokens=2), strict=True))
    assert right / len(items) >= 0.95  # 97 % on the whole split; 2 % are two standard errors of 320 questions


def test_a_grey_picture_leaves_only_the_prior(loaded: tuple[Any, Any]) -> None:
    items = easy_vqa_items(limit=320, grey=True)
    right = sum(is_right(i, a) for i, a in zip(items, ask_items(*loaded, items, max_new_tokens=2), strict=True))
    assert right / len(items) < 0.45


def test_long_answers_name_the_objects_of_a_mosaic(loaded: tuple[Any, Any]) -> None:
    items = mosaic_items(40, kinds=("describe",), per_scene=1)
    answers = list(ask_items(*loaded, items, max_new_tokens=30))
    pairs = [objects_right(i, a) for i, a in zip(items, answers, strict=True)]
    assert sum(r for r, _ in pairs) / sum(t for _, t in pairs) >= 0.75


def test_generate_agrees_with_the_arg_max_of_the_next_token(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = processor(
        images=Image.open(PICTURE), text="USER: <image>\nhow many shapes are there? ASSISTANT:", return_tensors="pt"
    )
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    assert model(**inputs).logits[0, -1].argmax() == first


def test_the_pipeline_takes_a_wrapped_model(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    vlmeff.wrap(model, preset="balanced")
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    (answer,) = pipe(text=chat("describe the picture."), max_new_tokens=30, return_full_text=False)
    assert "circle" in answer["generated_text"]
    report = vlmeff.report(model)
    assert (report.visual_tokens_before, report.visual_tokens_after) == (324, 162)


def test_a_streamer_yields_the_answer_without_the_prompt(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    vlmeff.wrap(model, preset="fast")
    inputs = processor.apply_chat_template(
        chat("describe the picture."), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    plain = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=120, skip_special_tokens=True)
    arguments = {**inputs, "streamer": streamer, "max_new_tokens": 30, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = processor.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.split() == expected.split()


def test_descriptions_have_eight_to_twenty_four_tokens(loaded: tuple[Any, Any]) -> None:
    import random

    _, processor = loaded
    for objects in (2, 3, 4):
        sentence = make_scene(random.Random(objects), "train", objects=objects).description()
        assert 8 <= len(processor.tokenizer(sentence, add_special_tokens=False).input_ids) <= 24


def test_two_turns_go_on_from_the_pruned_cache(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    vlmeff.wrap(model, preset="quality")
    inputs = processor.apply_chat_template(
        chat("how many shapes are there?"),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    follow = processor.tokenizer(
        "USER: describe the picture. ASSISTANT:", add_special_tokens=False, return_tensors="pt"
    )
    ids = torch.cat([first.sequences, follow["input_ids"]], 1)
    second = model.generate(input_ids=ids, past_key_values=first.past_key_values, max_new_tokens=30, do_sample=False)
    assert torch.equal(second[:, : ids.shape[1]], ids)
    assert "circle" in processor.decode(second[0, ids.shape[1] :], skip_special_tokens=True)
