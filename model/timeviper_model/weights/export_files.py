"""Files next to the weights: tokenizer, chat template, generation settings, processor, model card and licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from timeviper_model.batching.prompt import TEMPLATES, end_token_ids, jinja_template
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.config import TimeViperConfig, VisionConfig
from timeviper_model.layers.vision_transformer import PREPROCESSOR_FILE
from timeviper_model.weights.hub_folder import REPOSITORY_NAME, local_folder

BASE_MODEL_KEY = "base_model"
"""Key in the metadata: name of the language model that training started from."""

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")

SECOND_PREPROCESSOR_FILE = f"second_{PREPROCESSOR_FILE}"


def public_name(name_or_folder: str) -> str:
    """Returns a Hugging Face name as it is, and of a folder only its last part."""
    is_name = REPOSITORY_NAME.fullmatch(name_or_folder) and not Path(name_or_folder).exists()
    return name_or_folder if is_name else Path(name_or_folder).name


def public_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Shortens paths and URIs to their last part."""
    return {
        key: Path(value).name if value.startswith("/") or "://" in value else value for key, value in metadata.items()
    }


def public_vision(vision: VisionConfig) -> VisionConfig:
    second = vision.second and public_vision(vision.second)
    return replace(vision, encoder=public_name(vision.encoder), second=second)


def write_tokenizer(folder: Path, tokenizer: Any, config: TimeViperConfig) -> None:
    """Writes tokenizer, chat template and generation settings, for transformers 4.57 and 5."""
    tokenizer.save_pretrained(folder)
    if config.chat_template in TEMPLATES:  # else the tokenizer's own is the prompt
        (folder / "chat_template.jinja").write_text(jinja_template(TEMPLATES[config.chat_template]))
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = json.loads(path.read_text())
        for key in ("name_or_path", "auto_map", "is_local", "local_files_only"):
            values.pop(key, None)
        if (folder / "tokenizer.json").is_file():
            values["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a class that 4.57 lacks
        if isinstance(values.get("extra_special_tokens"), list):  # 4.57 expects an object here
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        _write_json(path, values)
    ends = sorted(end_token_ids(tokenizer, chat_template(config.chat_template, tokenizer), config.text))
    settings = {
        "bos_token_id": config.text.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": config.text.pad_token_id,
        "do_sample": False,
        "max_new_tokens": 256,
    }
    _write_json(folder / "generation_config.json", settings)


def write_processors(folder: Path, vision: VisionConfig) -> None:
    """Copies the towers' processors where they are on this machine."""
    for tower, target in ((vision, PREPROCESSOR_FILE), (vision.second, SECOND_PREPROCESSOR_FILE)):
        if tower is None:
            continue
        try:
            source = local_folder(tower.encoder, patterns=[PREPROCESSOR_FILE], cached_only=True) / PREPROCESSOR_FILE
            values = json.loads(source.read_text())
        except (ValueError, OSError):
            continue
        _write_json(folder / target, values | {"processor_class": "TimeViperProcessor"})


def write_card(folder: Path, config: TimeViperConfig, metadata: Mapping[str, str]) -> None:
    """Writes README.md, and NOTICE with the licences of the weights that training started from."""
    base = metadata.get(BASE_MODEL_KEY)
    towers = [tower.encoder for tower in (config.vision, config.vision.second) if tower is not None]
    names = list(dict.fromkeys(public_name(name) for name in [*([base] if base else []), *towers]))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: video-text-to-text",
        "license: other",
        "base_model:",
        *(f"- {name}" for name in names),
        "---",
        "",
        "# TimeViper",
        "",
        f"A video-language model: {', '.join(names)} and {_describe_sites(config)}.",
        "",
        "```python",
        "import timeviper_model  # registers the classes",
        "from transformers import AutoModel, AutoProcessor",
        "",
        'processor = AutoProcessor.from_pretrained("FOLDER")',
        'model = AutoModel.from_pretrained("FOLDER", dtype="auto", device_map="auto")',
        'content = [{"type": "video", "path": "film.mp4"}, {"type": "text", "text": "What happens?"}]',
        'inputs = processor.apply_chat_template([{"role": "user", "content": content}])',
        "print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "```",
        "",
        "Training: " + ", ".join(f"{key} {value}" for key, value in public_metadata(metadata).items()) + ".",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
    notice = [
        "These weights are derived from the weights named below, whose licences apply to them:",
        "",
        *(f"- {name}" + (f" (https://huggingface.co/{name})" if "/" in name else "") for name in names),
    ]
    (folder / "NOTICE").write_text("\n".join([*notice, ""]))
    if base is not None:
        _copy_licences(folder, base)


def _copy_licences(folder: Path, base: str) -> None:
    try:
        source = local_folder(base, patterns=LICENCE_FILES, cached_only=True)
    except ValueError:
        return
    for pattern in LICENCE_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / (path.name if path.name != "NOTICE" else "NOTICE-base"))


def _describe_sites(config: TimeViperConfig) -> str:
    if not config.transv:
        return "no TransV site"
    return "TransV sites at " + ", ".join(
        f"layer {site.layer} ({site.select}, keep {site.keep:g})" for site in config.transv
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
