"""Trains a tiny SigLIP-shaped vision tower on the 32 pictures and saves it as a Hugging Face folder.

Stands in for google/siglip-so400m-patch14-384. Every patch token of hidden_states[-2] learns to identify the picture in
the frame. Features are centred with mean square 1, since the projector has no input norm.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from timeviper_platform.data.synthetic.pictures import ALL_PICTURES, COLORS, SHAPES, Picture

logger = logging.getLogger(__name__)

IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE = 64, 16, 64
NOTHING = len(ALL_PICTURES)
BATCH_SIZE = 64


def train_encoder(frames_FHWC: np.ndarray, labels_F: np.ndarray, *, steps: int, seed: int) -> SiglipVisionModel:
    """Trains the vision tower on batches of BATCH_SIZE frames.

    Args:
        frames_FHWC: uint8, IMAGE_SIZE square.
        labels_F: indices into ALL_PICTURES, or NOTHING.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipVisionModel(_encoder_config())
        for embedding in (model.embeddings.patch_embedding.weight, model.embeddings.position_embedding.weight):
            nn.init.trunc_normal_(embedding, std=0.05)
        # A fixed orthogonal head makes shape as visible in the features as colour. With a learned head, a language
        # model guessed shapes at chance after 450 steps.
        directions = nn.init.orthogonal_(torch.empty(1 + len(COLORS) + len(SHAPES), HIDDEN_SIZE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(2, steps + 1), pct_start=0.1)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        chosen = rng.integers(len(frames_FHWC), size=BATCH_SIZE)
        features = used_features(model, frames_FHWC[chosen])
        loss = _loss(features @ directions.T, features, torch.from_numpy(labels_F[chosen]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            logger.info("encoder: step %d of %d, loss %.3f", step + 1, steps, loss.item())
    _standardise(model, frames_FHWC[:512])
    return model.eval()


def save_encoder(model: SiglipVisionModel, folder: Path) -> None:
    model.save_pretrained(str(folder))
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def used_features(model: SiglipVisionModel, frames_FHWC: np.ndarray) -> Tensor:
    """hidden_states[-2] of uint8 frames, (F, P, D)."""
    pixels = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    hidden = model.embeddings(pixels)
    for block in model.encoder.layers[:-1]:
        hidden = block(hidden, attention_mask=None)
    return hidden


def picture_label(picture: Picture | None) -> int:
    return NOTHING if picture is None else ALL_PICTURES.index(picture)


def _encoder_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=3,  # hidden_states[-2] is used: the last block never runs
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )


def _loss(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Presence, colour and shape at every patch, plus a penalty for channels of unequal scale."""
    shown = labels != NOTHING
    present, color, shape = torch.split(logits, [1, len(COLORS), len(SHAPES)], dim=-1)
    num_patches = logits.shape[1]
    loss = F.binary_cross_entropy_with_logits(present[..., 0], shown.float()[:, None].expand(-1, num_patches))
    colors, shapes = labels[shown] // len(SHAPES), labels[shown] % len(SHAPES)
    loss = loss + F.cross_entropy(color[shown].flatten(0, 1), colors.repeat_interleave(num_patches))
    loss = loss + F.cross_entropy(shape[shown].flatten(0, 1), shapes.repeat_interleave(num_patches))
    channels = features.flatten(0, 1)
    return loss + 0.1 * ((channels.std(0) - 1) ** 2 + channels.mean(0) ** 2).mean()


@torch.no_grad()
def _standardise(model: SiglipVisionModel, frames_FHWC: np.ndarray) -> None:
    """Centres the used features and scales them to mean square 1.

    Pre-norm blocks ignore a common factor on everything written to the residual stream; the last used block's output
    bias shifts the features alone.
    """
    features = used_features(model, frames_FHWC).flatten(0, 1)
    mean = features.mean(0)
    factor = 1.0 / (features - mean).square().mean().sqrt()
    used = list(model.encoder.layers[:-1])
    writers = [model.embeddings.patch_embedding, *(m for b in used for m in (b.self_attn.out_proj, b.mlp.fc2))]
    for writer in writers:
        writer.weight *= factor
        writer.bias *= factor
    model.embeddings.position_embedding.weight *= factor
    used[-1].mlp.fc2.bias -= mean * factor
