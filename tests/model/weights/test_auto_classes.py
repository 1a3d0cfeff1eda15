"""An exported folder in a notebook: transformers' auto classes, messages with a video's path, generate."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from reference.engine_requests import TOKENIZER
from reference.small_models import SMALL, make_model
from reference.synthetic_media import make_encoder, make_video, picture
from timeviper_model.batching.prompt import CHATML, NEMOTRON, TEMPLATES, Turn, build_sample, jinja_template
from timeviper_model.config import TimeViperConfig, VisionConfig
from timeviper_model.inference.generate import generate
from timeviper_model.inference.video_file import read_video
from timeviper_model.layers.tome import merge_tokens
from timeviper_model.weights.auto_classes import TimeViperForConditionalGeneration
from timeviper_model.weights.vision_tower import load_vision_tower
from timeviper_model.weights.weights_folder import save_pretrained

QUESTION = "What?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    (root / "tower").mkdir()
    make_encoder(root / "tower")
    (root / "tower" / "LICENSE").write_text("licence of the base")
    make_video(root / "film.mp4", range(40))  # 5 s
    vision = VisionConfig(encoder=str(root / "tower"), num_tokens_per_frame=4, merge_heads=4, hidden_size=16)
    text = replace(SMALL.text, vocab_size=len(TOKENIZER))
    model = make_model(TimeViperConfig(text=text, vision=vision, transv=SMALL.transv), dtype=torch.float32)
    metadata = {"max_frames": "4", "time_text": "True", "base_model": str(root / "tower"), "run": "small"}
    save_pretrained(model, root / "weights", tokenizer=TOKENIZER, metadata=metadata)
    return root


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder / "weights", vision_tower=str(folder / "tower"), **options)


IMPORT_AND_LOOK = """
import sys, timeviper_model
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoConfig
assert AutoConfig.for_model("timeviper").model_type == "timeviper"
"""


def test_importing_the_package_is_light_and_registers_its_classes() -> None:
    subprocess.run([sys.executable, "-c", IMPORT_AND_LOOK], check=True)


def test_messages_with_a_video_give_an_answer(folder: Path) -> None:
    model, processor = load(folder), AutoProcessor.from_pretrained(folder / "weights")
    content = [{"type": "video", "path": str(folder / "film.mp4")}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    assert inputs["frames"].shape == (4, 32, 32, 3)  # max_frames of the training
    ids = model.generate(**inputs, max_new_tokens=6)
    found = processor.decode(ids[0, inputs["input_ids"].shape[1] :]).strip()
    tower = load_vision_tower(str(folder / "tower"))
    patches = tower(tower.preprocess(inputs["frames"]))
    features = merge_tokens(patches, 4, num_heads=4).bfloat16().float().flatten(0, 1)
    sentence = "The video lasts for 5.00 seconds, and 4 frames are uniformly sampled from it.\n"
    assert found == generate(model.model, TOKENIZER, sentence + QUESTION, features, max_new_tokens=6)
    assert found
    drawn = [model.generate(**inputs, max_new_tokens=6, do_sample=True, seed=seed) for seed in range(3)]
    assert len({tuple(ids[0].tolist()) for ids in drawn}) > 1


def test_pictures_and_texts_are_messages_too(folder: Path) -> None:
    model, processor = load(folder), AutoProcessor.from_pretrained(folder / "weights")
    image = Image.fromarray(picture(3))
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    assert inputs["frames"].shape == (1, 32, 32, 3)
    assert int((inputs["vision_index"] >= 0).sum()) == 4
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    text = processor.apply_chat_template([{"role": "user", "content": QUESTION}])
    assert "frames" not in text
    assert model.generate(**text, max_new_tokens=2).shape[1] > text["input_ids"].shape[1]
    with pytest.raises(ValueError, match="4 in the prompt"):
        model.generate(**{**inputs, "frames": inputs["frames"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match="a video or image with its path"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "path": "x"}]}])


def test_dtype_and_device_are_chosen_as_in_transformers(folder: Path) -> None:
    assert load(folder).dtype == torch.float32  # as stored
    for dtype in (torch.bfloat16, "bfloat16"):
        assert load(folder, dtype=dtype, device_map="cpu").dtype == torch.bfloat16
    assert load(folder, device_map={"": "cpu"}).device == torch.device("cpu")
    with pytest.raises(ValueError, match="is not a torch dtype"):
        TimeViperForConditionalGeneration.from_pretrained(folder / "weights", dtype="float7")
    with pytest.raises(TypeError, match="from_pretrained does not take quantization_config"):
        TimeViperForConditionalGeneration.from_pretrained(folder / "weights", quantization_config={})
    other = AutoModelForImageTextToText.from_pretrained(folder / "weights")
    assert type(other) is TimeViperForConditionalGeneration


def test_the_folder_is_complete_and_names_no_path_of_the_run(folder: Path) -> None:
    weights = folder / "weights"
    names = {path.name for path in weights.iterdir()}
    assert names >= {
        *("README.md", "NOTICE", "LICENSE", "config.json", "generation_config.json", "preprocessor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    for path in weights.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        assert str(folder).encode() not in path.read_bytes(), path.name
    settings = json.loads((weights / "generation_config.json").read_text())
    assert settings["eos_token_id"] == sorted({TOKENIZER.convert_tokens_to_ids("<SPECIAL_12>"), 12})
    assert "tower" in (weights / "NOTICE").read_text()
    tokenizer = json.loads((weights / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4.57 has no TokenizersBackend
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)  # 4.57 fails on it
    assert AutoConfig.from_pretrained(weights).text_config["hidden_size"] == SMALL.text.hidden_size


CONVERSATIONS = [
    [("user", "What?")],
    [("system", "Be brief."), ("user", "What?"), ("assistant", "A cat."), ("user", "Sure?")],
    [("user", "What?"), ("assistant", "A cat.")],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [NEMOTRON, CHATML], ids=["nemotron", "chatml"])
def test_the_exported_chat_template_is_the_prompt_that_was_trained(template: Any, conversation: Any) -> None:
    asks = conversation[-1][0] == "user"
    turns = [Turn(role=role, text=text) for role, text in conversation]
    sample = build_sample(TOKENIZER, turns, template=template, add_generation_prompt=asks)
    rendered = TOKENIZER.apply_chat_template(
        [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in conversation],
        chat_template=jinja_template(template),
        tokenize=False,
        add_generation_prompt=asks,
    )
    assert rendered == TOKENIZER.decode(sample.input_ids)


def test_a_tokenizer_of_the_folder_renders_it(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "weights")
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    processor = AutoProcessor.from_pretrained(folder / "weights")
    assert text == processor.apply_chat_template(messages, tokenize=False)
    assert text.startswith(TEMPLATES["nemotron"].system[0])


def test_a_video_gives_the_frames_on_screen(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", [0, 3, 7, 16, 17, *range(30, 34)], time_base=Fraction(1, 8))
    frames, seconds = read_video(str(tmp_path / "film.mp4"), 48)
    shown = (0, 2, 3, 4, 7)
    assert len(frames) == len(shown)
    assert seconds == pytest.approx(34 / 8, abs=0.2)
    for frame, number in zip(frames.numpy(), shown, strict=True):
        expected = Image.fromarray(picture(number)).resize((48, 48), Image.Resampling.BICUBIC)
        assert np.abs(frame.astype(int) - np.asarray(expected)).mean() < 12
    first, _ = read_video(str(tmp_path / "film.mp4"), 48, max_frames=2, frame_selection="first")
    assert torch.equal(first, frames[:2])
    spread, _ = read_video(str(tmp_path / "film.mp4"), 48, max_frames=3)
    assert torch.equal(spread, frames[[0, 2, 4]])
