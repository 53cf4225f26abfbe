"""Changes of weights as LoRA factors, and the files in which players read them.

Any change of a weight can be written as B A; how well, at a given rank, is told by its singular values (Eckart and
Young 1936). Every file written here has a scale of 1, so that no player has to know another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidestep.acestep.keymap import to_diffusers
from sidestep.adapters.base import SavedAdapter
from sidestep.adapters.lora import write_peft_folder
from sidestep.adapters.lycoris import file_name
from sidestep.files import write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` looks for first in a folder."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The change of one weight, as ``b @ a``."""

    a: Tensor
    """(rank, in), or (rank, in, kernel) for a Conv1d; float32, on the CPU."""
    b: Tensor
    """(out, rank), or (out, rank, 1)."""
    error: float = 0.0
    """Frobenius norm of what the product misses, relative to the change."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def product(self) -> Tensor:
        """Multiply them into the change, in the shape of the weight."""
        return (self.b.flatten(1) @ self.a.flatten(1)).reshape(self.b.shape[0], *self.a.shape[1:])


def factorize(change: Tensor, *, rank: int | None, max_error: float) -> Factors:
    """Find the best low-rank product for a change.

    Args:
        change: (out, in), or (out, in, kernel); finite.
        rank: how many singular values to keep, at most; or None for as few as ``max_error`` allows.
        max_error: largest relative error where ``rank`` is None.
    """
    matrix = change.float().flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        # missed[r] is the square of what is missed when r values are kept
        missed = s.double().square().flip(0).cumsum(0).flip(0)
        rank = max(1, int((missed > max_error**2 * missed[0]).sum()))
    root = s[:rank].sqrt()  # shared evenly, so that neither factor is out of range in half precision
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    error = ((matrix - b @ a).norm() / matrix.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    ones = [1] * (change.ndim - 2)
    return Factors(
        a=a.reshape(-1, *change.shape[1:]).cpu().contiguous(),
        b=b.reshape(*b.shape, *ones).cpu().contiguous(),
        error=error,
    )


def lora_factors(saved: SavedAdapter, scale: float) -> dict[str, Factors]:
    """Take the factors of a LoRA as they are, with ``scale`` multiplied into B."""
    return {
        path: Factors(a=leaves["lora_A.weight"], b=leaves["lora_B.weight"] * scale)
        for path, leaves in saved.modules.items()
    }


def depends_on_weights(saved: SavedAdapter) -> bool:
    """Whether the change to a weight cannot be told without the weight: OFT, and all that is weight-decomposed."""
    leaves = {leaf for leaves in saved.modules.values() for leaf in leaves}
    return saved.family == "oft" or not leaves.isdisjoint({"lora_magnitude_vector", "dora_scale"})


def stand_in(saved: SavedAdapter, path: str) -> Tensor:
    """Give zeros of the weight's size, (out, in), where the adapter does not depend on the weights themselves."""
    rows, columns = saved.config.sides(saved.modules[path])
    if rows is None or columns is None:
        raise ValueError(f"{saved.path}: the size of {path} is only known beside the base model")
    return torch.zeros(rows, columns)


def write_peft(folder: Path, factors: Mapping[str, Factors], metadata: Mapping[str, str]) -> Path:
    """Write the PEFT folder that ACE-Step, diffusers and ComfyUI read at the same strength.

    Args:
        folder: where to write; exists.
        factors: original path of each module -> its factors.
        metadata: for the header of the weights.
    """
    modules = {path: {"lora_A.weight": pair.a, "lora_B.weight": pair.b} for path, pair in factors.items()}
    ranks = {path: pair.rank for path, pair in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != common}
    settings = {
        "alpha_pattern": others,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": False,
        "use_rslora": False,
    }
    write_peft_folder(folder, modules, settings, metadata)
    return folder


def write_diffusers(folder: Path, factors: Mapping[str, Factors], metadata: Mapping[str, str]) -> Path:
    """Write a folder for ``pipeline.load_lora_weights`` in diffusers' own names.

    Diffusers renames the original names only if a q_proj or k_proj is among them, and loads any other file as nothing.
    """
    tensors = {}
    for path, pair in factors.items():
        tensors[f"transformer.{to_diffusers(path)}.lora_A.weight"] = pair.a
        tensors[f"transformer.{to_diffusers(path)}.lora_B.weight"] = pair.b
    write_tensors(folder / DIFFUSERS_FILE, tensors, {"format": "pt", **metadata})
    return folder


def write_comfyui(path: Path, factors: Mapping[str, Factors], metadata: Mapping[str, str]) -> Path:
    """Write one file with ComfyUI's names, and alpha = rank, which is a scale of 1."""
    tensors = {}
    for module, pair in factors.items():
        tensors[f"diffusion_model.decoder.{module}.lora_down.weight"] = pair.a
        tensors[f"diffusion_model.decoder.{module}.lora_up.weight"] = pair.b
        tensors[f"diffusion_model.decoder.{module}.alpha"] = torch.tensor(float(pair.rank))
    write_tensors(path, tensors, {"format": "pt", **metadata})
    return path


def write_comfyui_lycoris(path: Path, saved: SavedAdapter, scale: float, metadata: Mapping[str, str]) -> Path:
    """Write a LoKr or LoHa as one file for ComfyUI, which takes its scale from alpha and the rank."""
    tensors: dict[str, Tensor] = {}
    for module, leaves in saved.modules.items():
        folded = saved.config.folded(leaves)
        rank = next((tensor.shape[0] for leaf, tensor in leaves.items() if leaf.endswith("_b")), 1)
        baked = leaves | {folded: leaves[folded] * scale, "alpha": torch.tensor(float(rank))}
        tensors |= {f"{file_name(module)}.{leaf}": tensor.contiguous() for leaf, tensor in baked.items()}
    write_tensors(path, tensors, {"format": "pt", **metadata})
    return path
