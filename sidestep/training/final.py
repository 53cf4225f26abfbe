"""The last word of a run: the adapter's files, tried before they are called done, and how to use them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sidestep.acestep.conditioning import context_latents
from sidestep.adapters import Adapter
from sidestep.adapters.files import attach_saved
from sidestep.config.settings import TrainConfig
from sidestep.data.dataset import Example, SongDataset
from sidestep.errors import UserError

PROBE_FRAMES = 250  # ten seconds tell whether an adapter acts; a whole song would need the memory of a training step


def verify_saved(folder: Path, adapter: Adapter, transformer: nn.Module, example: Example, silence: Tensor) -> None:
    """Load the files of ``folder`` into the bare base model and compare outputs with the trained adapter.

    The adapter is taken off for this and stays off.

    Args:
        folder: holds the adapter's files.
        adapter: what was trained, attached to ``transformer``.
        transformer: the model it was trained on.
        example: any excerpt.
        silence: the checkpoint's latents of silence, (S, 64).

    Raises:
        UserError: if the files give something else than the trained adapter, or nothing at all.
    """
    transformer.eval()
    trained = _probe(transformer, example, silence)
    adapter.detach()
    base = _probe(transformer, example, silence)
    saved = attach_saved(transformer, folder)
    reloaded = _probe(transformer, example, silence)
    saved.detach()
    effect, error = (trained - base).abs().max().item(), (reloaded - trained).abs().max().item()
    if torch.equal(reloaded, base):
        raise UserError(
            "the trained adapter does not change the model's output at all; "
            "train longer or with a higher optim.lr; checkpoints are kept"
        )
    rounding = 8 * torch.finfo(next(transformer.parameters()).dtype).eps * base.abs().max().item()
    if error > 0.05 * effect + rounding:
        raise UserError(
            f"the saved adapter does not give what was trained: outputs differ by {error:.3g}, where the adapter's "
            f"own effect is {effect:.3g}; checkpoints are kept; please report this"
        )


@torch.no_grad()
def _probe(transformer: nn.Module, example: Example, silence: Tensor) -> Tensor:
    """Output (1, T, 64) for the beginning of an excerpt, halfway to a fixed noise."""
    device = next(transformer.parameters()).device
    latents = example.latents[:PROBE_FRAMES].unsqueeze(0)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((1,), 0.5, device=device)
    output = transformer(
        hidden_states=((latents + noise) / 2).to(device),
        timestep=t,
        timestep_r=t,
        encoder_hidden_states=example.condition.float().unsqueeze(0).to(device),
        context_latents=context_latents(silence, latents.shape[1]).unsqueeze(0).to(device),
        return_dict=False,
    )[0]
    return output.float().cpu()


def write_card(folder: Path, config: TrainConfig, dataset: SongDataset, step: int, epoch: float) -> None:
    """Write README.md beside the adapter: what it is, where to load it, with which shift and steps."""
    variant = config.model_variant
    tags = ", ".join(f"`{tag}`" for tag in dataset.info.settings["custom_tags"])
    files = sorted(path.name for path in folder.iterdir())
    is_lora = "adapter_config.json" in files
    trigger = [f"- Trigger word: put {tags} into the prompt."] if tags else []
    if is_lora:
        where = [
            "- ACE-Step: load this folder (the one that holds `adapter_config.json`) as a LoRA.",
            "- diffusers: `pipeline.load_lora_weights(<this folder>)`.",
            "- ComfyUI: put `adapter_model.safetensors` into its LoRA folder.",
            "",
            "The strength it was trained at is part of the weights, so all of them play it the same at 1.0.",
        ]
    else:
        where = [
            f"- ACE-Step: load `{files[0]}`.",
            f"- ComfyUI: put `{files[0]}` into its LoRA folder.",
        ]
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
        *where,
        "",
        "In ACE-Step, switch quantisation of the model off: adapters are added to full weights.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
