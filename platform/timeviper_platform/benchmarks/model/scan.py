"""Row group `scan`: our Mamba-2 mixer against transformers' PyTorch one, and against itself at other lengths."""

from __future__ import annotations

from typing import Any

import torch

from timeviper_model.batching.segments import Segments
from timeviper_model.config import HybridConfig
from timeviper_model.layers.mamba2 import Mamba2Mixer
from timeviper_model.layers.nemotron_h import init_mamba
from timeviper_model.weights.families import text_config_to_dict
from timeviper_platform.benchmarks.measure import Row, compare
from timeviper_platform.benchmarks.model.models import narrow_config

COMMAND = "python jobs/benchmark.py model --only scan"


@torch.inference_mode()
def scan_rows(*, width: int = 256, num_tokens: int = 16384, repeats: int = 5) -> list[Row]:
    """Ours against transformers at `num_tokens`, and ours at 4 times against half as many."""
    ours, theirs = make_mixers(width)
    hidden = torch.randn(4 * num_tokens, width, generator=torch.Generator().manual_seed(0))
    against = compare(
        lambda: run_ours(ours, hidden[:num_tokens]), lambda: theirs(hidden[None, :num_tokens]), repeats=repeats
    )
    growth = compare(lambda: run_ours(ours, hidden[: num_tokens // 2]), lambda: run_ours(ours, hidden), repeats=repeats)
    name = f"Mamba-2 mixer, width {width}, fp32"
    return [
        Row(
            name=f"{name}: times faster than transformers' at {num_tokens} tokens (noise {against.noise:.0%})",
            value=against.speedup,
            unit="x",
            bar=">= 2",
            command=COMMAND,
        ),
        Row(
            name=f"{name}: time of {4 * num_tokens} tokens over {num_tokens // 2} (noise {growth.noise:.0%})",
            value=growth.speedup,
            unit="x",
            bar="<= 9",
            command=COMMAND,
        ),
    ]


def run_ours(mixer: Mamba2Mixer, hidden_TD: torch.Tensor) -> torch.Tensor:
    """One sequence through our mixer, (T, D)."""
    mixed: torch.Tensor = mixer(hidden_TD, Segments(torch.zeros(len(hidden_TD), dtype=torch.long), 1))
    return mixed


def make_mixers(width: int) -> tuple[Mamba2Mixer, Any]:
    """Our mixer, and transformers' with the same weights and time step limits."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    text = narrow_config(width, plan=(), pattern="M").text
    assert isinstance(text, HybridConfig)
    ours = Mamba2Mixer(text).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(ours.in_proj.weight, 0.0, width**-0.5, generator=generator)
    init_mamba(ours, text, generator)
    config = NemotronHConfig(**(text_config_to_dict(text) | {"time_step_limit": text.time_step_limit}))
    theirs = NemotronHMamba2Mixer(config, layer_idx=0).eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    theirs.time_step_limit = text.time_step_limit  # transformers 5.23 clamps to (time_step_min, inf)
    return ours, theirs
