"""transformers' AutoConfig, AutoModel and AutoProcessor for weights folders.

import timeviper_model
from transformers import AutoModel, AutoProcessor
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedConfig

from timeviper_model.batching.batch import IGNORE_INDEX, Sample, TokenKind, pack_samples
from timeviper_model.batching.prompt import MEDIA_MARKER, Turn, build_sample, jinja_template, time_text
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.config import TimeViperConfig, VisionConfig, eos_token_ids
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.generate import generate_ids
from timeviper_model.inference.video_file import read_picture, read_video
from timeviper_model.layers.projector import combine_towers
from timeviper_model.layers.tome import merge_tokens
from timeviper_model.layers.vision_transformer import PREPROCESSOR_FILE, Preprocessing, VisionTransformer
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.export_files import SECOND_PREPROCESSOR_FILE
from timeviper_model.weights.hub_folder import CONFIG_FILE, local_folder, read_json
from timeviper_model.weights.metadata import METADATA_KEY, trained_time_text
from timeviper_model.weights.vision_tower import load_vision_tower
from timeviper_model.weights.weights_folder import MODEL_TYPE, config_from_dict, from_pretrained, load_tokenizer

ENCODE_BATCH_FRAMES = 32

DEFAULT_IMAGE_SIZE = 384
"""Used when the folder holds no processor."""

LOADING_OPTIONS = {
    "_from_auto",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "config",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "token",
    "trust_remote_code",
    "use_safetensors",
    "_commit_hash",
}
"""Options of transformers' from_pretrained that change nothing here."""


class TimeViperHubConfig(PreTrainedConfig):
    """A weights folder's config.json."""

    model_type = MODEL_TYPE


class TimeViperForConditionalGeneration(nn.Module):
    """A model with its vision towers, which are loaded with the first frames."""

    config_class = TimeViperHubConfig
    main_input_name = "input_ids"

    def __init__(
        self, model: TimeViper, *, end_ids: frozenset[int], vision_towers: Sequence[str], config: Any = None
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.config = config
        self._end_ids = end_ids
        self._tower_names = tuple(vision_towers)
        self._towers: list[VisionTransformer] = []

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = "auto",
        device_map: Any = None,
        revision: str | None = None,
        vision_tower: str | Sequence[str] | None = None,
        **options: Any,
    ) -> TimeViperForConditionalGeneration:
        """Loads a weights folder.

        Args:
            dtype: a torch dtype, its name, or "auto" for that of the stored weights.
            device_map: a device, "auto" for the GPU if there is one, or None for the CPU.
            vision_tower: Hugging Face name or folder of each tower, where config.json's cannot be found.
        """
        dtype = options.pop("torch_dtype", dtype)
        if unknown := sorted(options.keys() - LOADING_OPTIONS):
            raise TypeError(f"from_pretrained does not take {', '.join(unknown)}")
        folder = local_folder(name_or_folder, revision=revision)
        raw = read_json(folder / CONFIG_FILE)
        model = from_pretrained(folder, dtype=_dtype(dtype, raw), device=_device(device_map))
        if vision_tower is None:
            vision = model.config.vision
            vision_tower = [tower.encoder for tower in (vision, vision.second) if tower is not None]
        elif isinstance(vision_tower, str):
            vision_tower = [vision_tower]
        return cls(
            model,
            end_ids=_end_ids(folder, model.config),
            vision_towers=vision_tower,
            config=config or TimeViperHubConfig(**raw),
        )

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        vision_index: Tensor | None = None,
        token_kind: Tensor | None = None,
        frames: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """Returns prompt and answer, (1, T + N) ids.

        Args:
            input_ids: (1, T), with `vision_index`, `token_kind` and `frames` as the processor makes them.
            frames: uint8 (F, S, S, 3), all media in order.
            attention_mask: ones, since one prompt has no padding.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1:
            raise ValueError(f"generate takes one prompt, (1, T), not {tuple(input_ids.shape)}")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("a prompt must have no padding: attention_mask must be all ones")
        ids = input_ids[0].tolist()
        sample = Sample(
            input_ids=ids,
            vision_index=[-1] * len(ids) if vision_index is None else vision_index[0].tolist(),
            token_kind=[int(TokenKind.SYSTEM)] * len(ids) if token_kind is None else token_kind[0].tolist(),
            labels=[IGNORE_INDEX] * len(ids),
        )
        rows = self.encode_frames(frames) if frames is not None else self.model.lm_head.weight.new_zeros(0, self._width)
        if len(rows) != sample.num_vision_tokens:
            raise ValueError(f"{len(rows)} vision tokens of the frames for {sample.num_vision_tokens} in the prompt")
        batch = pack_samples([sample], [rows.to("cpu", self.dtype)]).to(self.device, self.dtype)
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature if do_sample else 0.0,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        (answer,) = generate_ids(self.model, [batch], end_ids=self._end_ids, params=params)
        return torch.tensor([[*ids, *answer]], device=input_ids.device)

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """uint8 (F, S, S, 3) to vision tokens (F * N, dim), stored in bfloat16 as in preprocessing."""
        if not self._towers:
            self._towers = [
                load_vision_tower(name, layer=part.layer).to(self.device, self.dtype)
                for name, part in zip(self._tower_names, self._parts, strict=True)
            ]
        chunks = []
        for chunk in torch.split(frames, ENCODE_BATCH_FRAMES):
            first, *others = (
                _merged(tower, part, chunk.to(self.device))
                for tower, part in zip(self._towers, self._parts, strict=True)
            )
            chunks.append((combine_towers(first, *others) if others else first).to(torch.bfloat16))
        return torch.cat(chunks).flatten(0, 1)

    @property
    def _parts(self) -> list[VisionConfig]:
        vision = self.model.config.vision
        return [part for part in (vision, vision.second) if part is not None]

    @property
    def _width(self) -> int:
        return self.model.config.vision.row_size


@dataclass(frozen=True, kw_only=True, slots=True)
class _VideoOptions:
    fps: float
    max_frames: int
    states_length: bool


class TimeViperProcessor:
    """Messages in transformers' format to the inputs of `generate`."""

    def __init__(
        self,
        tokenizer: Any,
        config: TimeViperConfig,
        *,
        metadata: Mapping[str, str] | None = None,
        states_length: bool = False,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._config = config
        self._metadata = metadata or {}
        self._states_length = states_length
        self._image_size = DEFAULT_IMAGE_SIZE if preprocessing is None else preprocessing.image_size
        self._resample = "bicubic" if preprocessing is None else preprocessing.resample
        self._template = chat_template(config.chat_template, tokenizer)
        self.chat_template = jinja_template(self._template)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, revision: str | None = None, **options: Any
    ) -> TimeViperProcessor:
        if unknown := sorted(options.keys() - LOADING_OPTIONS):
            raise TypeError(f"from_pretrained does not take {', '.join(unknown)}")
        folder = local_folder(name_or_folder, revision=revision, patterns=["*.json", "*.jinja", "*.txt", "*.model"])
        raw = read_json(folder / CONFIG_FILE)
        found = [
            Preprocessing.from_processor(read_json(folder / name), image_size=DEFAULT_IMAGE_SIZE, where=str(folder))
            for name in (PREPROCESSOR_FILE, SECOND_PREPROCESSOR_FILE)
            if (folder / name).is_file()
        ]
        return cls(
            load_tokenizer(folder),
            config_from_dict(raw, where=str(folder)),
            metadata=raw.get(METADATA_KEY),
            states_length=trained_time_text(folder) == "always",
            preprocessing=max(found, key=lambda each: each.image_size, default=None),
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
        fps: float = 1.0,
        max_frames: int | None = None,
        states_length: bool | None = None,
    ) -> Any:
        """Reads the media and tokenises the conversation.

        Args:
            messages: role and content; a content is a text or a list of {"type": "text", "text": ...},
                {"type": "video", "path": ...} and {"type": "image", "path": ... or "image": a Pillow image}.
            tokenize: False returns the prompt's text, with <media> for each medium.
            fps: frames per second of a video.
            max_frames: maximum frames per video; None = as in training.
            states_length: whether to state a video's length, as questions about times did in training; None = if all
                prompts did.

        Returns:
            `input_ids`, `attention_mask`, `vision_index`, `token_kind` (1, T) and, with media, `frames`, uint8
            (F, S, S, 3).
        """
        if not return_dict or return_tensors != "pt":
            raise ValueError(f"{return_dict = } and {return_tensors = } are not supported; only True and 'pt' are")
        if not tokenize:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        frames: list[Tensor] = []
        options = _VideoOptions(
            fps=fps,
            max_frames=int(self._metadata.get("max_frames", 256)) if max_frames is None else max_frames,
            states_length=self._states_length if states_length is None else states_length,
        )
        turns = [self._turn(message, frames, options) for message in messages]
        tokens_per_frame = self._config.vision.num_tokens_per_frame
        if self._config.vision.second is not None:
            tokens_per_frame += self._config.vision.second.num_tokens_per_frame
        sample = build_sample(
            self.tokenizer,
            turns,
            [len(each) * tokens_per_frame for each in frames],
            template=self._template,
            add_generation_prompt=add_generation_prompt,
        )
        inputs = {
            "input_ids": torch.tensor([sample.input_ids]),
            "attention_mask": torch.ones(1, len(sample), dtype=torch.int64),
            "vision_index": torch.tensor([sample.vision_index]),
            "token_kind": torch.tensor([sample.token_kind]),
        }
        return BatchFeature(inputs | ({"frames": torch.cat(frames)} if frames else {}))

    def decode(self, ids: Any, *, skip_special_tokens: bool = True, **options: Any) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options))

    def batch_decode(self, ids: Any, *, skip_special_tokens: bool = True, **options: Any) -> list[str]:
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **options) for row in ids]

    def _turn(self, message: Mapping[str, Any], frames: list[Tensor], options: _VideoOptions) -> Turn:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            if part["type"] == "text":
                text += part["text"]
            else:
                text += self._medium(part, frames, options)
        return Turn(role=message["role"], text=text)

    def _medium(self, part: Mapping[str, Any], frames: list[Tensor], options: _VideoOptions) -> str:
        """Appends the medium's frames; returns its place in the text."""
        kind = part["type"]
        source = next((part[key] for key in ("path", kind, "url") if part.get(key) is not None), None)
        if kind not in ("video", "image") or source is None:
            raise ValueError(f"a content part must be a text, or a video or image with its path, not {dict(part)}")
        if kind == "image":
            frames.append(read_picture(source, self._image_size, resample=self._resample))
            return MEDIA_MARKER
        pixels, seconds = read_video(
            str(source),
            self._image_size,
            fps=options.fps,
            max_frames=options.max_frames,
            frame_selection="first" if self._metadata.get("frame_selection") == "first" else "uniform",
            resample=self._resample,
        )
        frames.append(pixels)
        return MEDIA_MARKER + (time_text(seconds, len(pixels)) if options.states_length else "")


def register_config(module: Any) -> None:
    """Adds the class to transformers' auto classes; called after their module is imported."""
    module.AutoConfig.register(MODEL_TYPE, TimeViperHubConfig, exist_ok=True)


def register_model(module: Any) -> None:
    for name in ("AutoModel", "AutoModelForImageTextToText"):
        getattr(module, name).register(TimeViperHubConfig, TimeViperForConditionalGeneration, exist_ok=True)


def register_processor(module: Any) -> None:
    module.AutoProcessor.register(TimeViperHubConfig, TimeViperProcessor, exist_ok=True)


def _merged(tower: VisionTransformer, part: VisionConfig, frames: Tensor) -> Tensor:
    patches = tower(tower.preprocess(frames))
    return merge_tokens(patches, part.num_tokens_per_frame, num_heads=part.merge_heads)


def _dtype(dtype: torch.dtype | str | None, raw: Mapping[str, Any]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = (raw.get("dtype") or raw.get("torch_dtype") or "float32") if dtype in ("auto", None) else dtype
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype = } is not a torch dtype, its name or 'auto'")
    return found


def _device(device_map: Any) -> str:
    if isinstance(device_map, Mapping):
        if len(set(device_map.values())) != 1:
            raise ValueError(f"{device_map = } is not supported: the model runs on one device")
        device_map = next(iter(device_map.values()))
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device_map is None else str(torch.device(device_map))


def _end_ids(folder: Path, config: TimeViperConfig) -> frozenset[int]:
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    found = frozenset([ids] if isinstance(ids, int) else ids or ())
    return found | eos_token_ids(config.text)
