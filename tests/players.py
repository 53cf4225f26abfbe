"""Programs that play adapters, each loading a file its own way into a toy transformer.

PEFT and diffusers are the real ones. ComfyUI's code is not installable: its part is written from the key forms and the
scale rule it documents.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import torch
from diffusers import AceStepPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from sidestep.acestep.keymap import to_diffusers, to_original


def play_with_peft(transformer: nn.Module, folder: Path) -> None:
    """Load as ACE-Step does: PEFT, on a decoder with ACE-Step's own module names."""
    decoder = nn.Module()
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            *parents, name = to_original(path).split(".")
            node = decoder
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, nn.Module())
                node = node.get_submodule(parent)
            node.add_module(name, module)
    model = peft.PeftModel.from_pretrained(decoder, folder)
    wrapped = [name for name, module in decoder.named_modules() if isinstance(module, BaseTunerLayer)]
    merged = model.merge_and_unload()
    assert wrapped
    with torch.no_grad():
        for name in wrapped:
            transformer.get_submodule(to_diffusers(name)).weight.copy_(merged.get_submodule(name).weight)


def play_with_diffusers(transformer: nn.Module, folder: Path) -> None:
    """Load with diffusers' own pipeline, whose other parts take no part in it."""
    others = ("vae", "text_encoder", "tokenizer", "condition_encoder", "scheduler")
    AceStepPipeline(transformer=transformer, **dict.fromkeys(others)).load_lora_weights(folder)


def play_with_comfyui(transformer: nn.Module, file: Path) -> None:
    """Add to each weight what ComfyUI's rules make of the keys that name it. Every key must be used."""
    tensors = load_file(file)
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            original = to_original(path)
            flat = original.replace(".", "_")
            names = (
                f"base_model.model.{original}",
                f"diffusion_model.decoder.{original}",
                f"lycoris_{flat}",
                f"lora_unet_decoder_{flat}",
            )
            for name in names:
                change = _comfyui_change(lambda leaf, at=name: tensors.pop(f"{at}.{leaf}", None))
                if change is not None:
                    module.weight.data += change.reshape(module.weight.shape)
    assert not tensors, f"ComfyUI reports {next(iter(tensors))} as not loaded"


def _comfyui_change(take: Callable[[str], torch.Tensor | None]) -> torch.Tensor | None:
    alpha = take("alpha")

    def scaled(change: torch.Tensor, rank: int | None) -> torch.Tensor:
        return change * (1.0 if alpha is None or rank is None else alpha / rank)

    for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")):
        a, b = take(down), take(up)
        if a is not None and b is not None:
            return scaled(b.flatten(1) @ a.flatten(1), a.shape[0])
    hada = [take(f"hada_{leaf}") for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")]
    if hada[0] is not None:
        return scaled((hada[0] @ hada[1]) * (hada[2] @ hada[3]), hada[1].shape[0])
    rank, factors = None, []
    for name in ("lokr_w1", "lokr_w2"):
        whole, a, b = take(name), take(f"{name}_a"), take(f"{name}_b")
        if whole is None and a is None:
            return None
        if whole is None:
            whole, rank = a @ b, b.shape[0]
        factors.append(whole)
    return scaled(torch.kron(*factors), rank)
