"""The last word of a run: the adapter's files, tried before they are called done, and how to use them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sidestep.acestep.probe import probe
from sidestep.adapters import Adapter
from sidestep.adapters.files import apply_adapters, read_adapter
from sidestep.config.settings import TrainConfig
from sidestep.data.dataset import Example, SongDataset
from sidestep.errors import UserError

log = logging.getLogger(__name__)

PROBE_FRAMES = 250  # ten seconds tell whether an adapter acts; a whole song would need the memory of a training step


def verify_saved(folder: Path, adapter: Adapter, transformer: nn.Module, example: Example, silence: Tensor) -> None:
    """Load the files of ``folder`` into the bare base model and compare outputs with the trained adapter.

    The adapter is taken off for this and stays off. Where memory does not suffice to compute outputs, a warning says
    so, and the tensors alone are compared.

    Args:
        folder: holds the adapter's files.
        adapter: what was trained, attached to ``transformer``.
        transformer: the model it was trained on.
        example: any excerpt.
        silence: the checkpoint's latents of silence, (S, 64).

    Raises:
        UserError: if the files give something else than the trained adapter, or nothing at all.
    """
    saved = read_adapter(folder)
    _check_tensors(saved.modules, adapter.baked())
    transformer.eval()
    latents, condition = example.latents[:PROBE_FRAMES], example.condition.float()
    try:
        try:
            trained = probe(transformer, latents, condition, silence)
        finally:
            adapter.detach()
        base = probe(transformer, latents, condition, silence)
        applied = apply_adapters(transformer, [(saved, 1.0)], keep=False)
        try:
            reloaded = probe(transformer, latents, condition, silence)
        finally:
            applied.detach()
    except torch.OutOfMemoryError:
        log.warning(
            "there is too little memory left to play the saved adapter; its tensors are those that were trained"
        )
        return
    effect, error = (trained - base).abs().max().item(), (reloaded - trained).abs().max().item()
    if torch.equal(reloaded, base):
        raise UserError(
            "the trained adapter does not change the model's output at all; "
            "train longer or with a higher optim.lr; checkpoints are kept"
        )
    # in bf16 two ways of computing the same thing differ by some roundings of the output
    rounding = 8 * torch.finfo(next(transformer.parameters()).dtype).eps * base.abs().max().item()
    if error > 0.05 * effect + rounding:
        raise UserError(
            f"the saved adapter does not give what was trained: outputs differ by {error:.3g}, where the adapter's "
            f"own effect is {effect:.3g}; checkpoints are kept; please report this"
        )


def _check_tensors(saved: Mapping[str, Mapping[str, Tensor]], trained: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compare every tensor that a player would read with what was trained, both with the scale multiplied in.

    Outputs alone would not tell half a young adapter from a whole one where the model computes in bf16.
    """
    for path, leaves in trained.items():
        for leaf, tensor in leaves.items():
            read = saved.get(path, {}).get(leaf)
            if read is None or not torch.allclose(read, tensor.detach().float().cpu(), rtol=1e-5, atol=1e-12):
                raise UserError(
                    f"the saved adapter does not hold what was trained at {path}.{leaf}; checkpoints are kept; "
                    f"please report this"
                )


def write_card(folder: Path, config: TrainConfig, dataset: SongDataset, step: int, epoch: float) -> None:
    """Write README.md beside the adapter: what it is, where to load it, with which shift and steps."""
    variant = config.model_variant
    tags = ", ".join(f"`{tag}`" for tag in dataset.info.settings["custom_tags"])
    trigger = [f"- Trigger word: put {tags} into the prompt."] if tags else []
    lines = [
        f"# Adapter for ACE-Step 1.5 {variant.name}",
        "",
        f"Trained by sidestep for {step} steps ({epoch:g} passes over {len(dataset.songs)} songs).",
        "",
        *trigger,
        f"- Base model: `{variant.folder}` ({variant.repo}).",
        f"- Sample with shift {config.shift:g} and {config.num_inference_steps} steps, "
        f"guidance {variant.guidance_scale:g}.",
        "",
        "## Where to load it",
        "",
        *config.adapter.players(),
        "",
        "The strength it was trained at is part of the file, so play it at 1.0.",
        "",
        "In ACE-Step, switch quantisation of the model off: adapters are added to full weights.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
