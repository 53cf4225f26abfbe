"""Changes of weights as LoRA factors, and the files in which players read them.

Any change of a weight can be written as B A; how well, at a given rank, is told by its singular values (Eckart and
Young 1936). Every file written here has a scale of 1, so that no player has to know another.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sidestep.acestep.keymap import to_diffusers
from sidestep.adapters.base import SavedAdapter
from sidestep.adapters.lokr import LokrConfig
from sidestep.adapters.lora import DIFFUSERS_FILE, write_peft_folder
from sidestep.adapters.lycoris import file_name
from sidestep.files import write_tensors

Svd = tuple[Tensor, Tensor, Tensor]
"""U (out, n), singular values (n,) in falling order, and V^T (n, in)."""


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


def factorize(svd: Svd, shape: Sequence[int], *, rank: int | None, max_error: float) -> Factors:
    """Find the best low-rank product for a change.

    Args:
        svd: of the change as a matrix.
        shape: of the weight: (out, in), or (out, in, kernel).
        rank: how many singular values to keep, at most; or None for as few as ``max_error`` allows.
        max_error: largest relative error where ``rank`` is None.
    """
    u, s, vh = svd
    # missed[r] is the square of what is missed when r values are kept
    missed = torch.cat([s.double().square().flip(0).cumsum(0).flip(0), s.new_zeros(1, dtype=torch.float64)])
    if rank is None:
        rank = int((missed > max_error**2 * missed[0]).sum())
    rank = max(1, min(rank, len(s)))
    root = s[:rank].sqrt()  # shared evenly, so that neither factor is out of range in half precision
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    return Factors(
        a=a.reshape(-1, *shape[1:]).cpu().contiguous(),
        b=b.reshape(*b.shape, *[1] * (len(shape) - 2)).cpu().contiguous(),
        error=(missed[rank] / missed[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().item(),
    )


def svd_of(saved: SavedAdapter, path: str, weight: Tensor, scale: float) -> Svd:
    """Decompose the change of a weight, by way of the small factors that LoRA, LoKr and LoHa make it of.

    Args:
        saved: the adapter.
        path: original path of the module.
        weight: the base model's, or zeros of its size where the change does not depend on it.
        scale: strength.

    Raises:
        UserError: if the adapter does not fit the weight, or the change is not finite.
    """
    change = saved.change(path, weight, scale).flatten(1)
    if not depends_on_weights(saved):
        leaves = {leaf: tensor.to(weight.device) for leaf, tensor in saved.scaled(path, scale).items()}
        if saved.family == "lora":
            return _svd_of_product(leaves["lora_B.weight"], leaves["lora_A.weight"])
        if saved.family == "lokr":
            return _svd_of_kron(*(_svd_of_leaves(leaves, name) for name in ("lokr_w1", "lokr_w2")))
        if (inner := len(leaves["hada_w1_b"]) * len(leaves["hada_w2_b"])) < min(change.shape):
            # the product, element by element, of two products is one product of their rows and columns' products
            a = torch.einsum("ri,si->rsi", leaves["hada_w1_b"].flatten(1), leaves["hada_w2_b"].flatten(1))
            b = torch.einsum("or,os->ors", leaves["hada_w1_a"], leaves["hada_w2_a"])
            return _svd_of_product(b.reshape(-1, inner), a.reshape(inner, -1))
    return _svd(change)


def _svd(matrix: Tensor) -> Svd:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u.contiguous(), s, vh.contiguous()  # torch.kron needs them so


def _svd_of_product(b: Tensor, a: Tensor) -> Svd:
    b, a = b.flatten(1), a.flatten(1)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = _svd(r_b @ r_a.T)
    return q_b @ u, s, vh @ q_a.T


def _svd_of_leaves(leaves: Mapping[str, Tensor], name: str) -> Svd:
    if name in leaves:
        return _svd(leaves[name].flatten(1))
    return _svd_of_product(leaves[f"{name}_a"], leaves[f"{name}_b"])


def _svd_of_kron(first: Svd, second: Svd) -> Svd:
    (u1, s1, vh1), (u2, s2, vh2) = first, second
    s, order = torch.kron(s1, s2).sort(descending=True)
    return torch.kron(u1, u2)[:, order], s, torch.kron(vh1, vh2)[order]


def lora_factors(saved: SavedAdapter, scale: float) -> dict[str, Factors]:
    """Take the factors of a LoRA as they are, with ``scale`` multiplied into B."""
    scaled = {path: saved.scaled(path, scale) for path in saved.paths}
    return {path: Factors(a=leaves["lora_A.weight"], b=leaves["lora_B.weight"]) for path, leaves in scaled.items()}


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
    for module in saved.paths:
        leaves = saved.scaled(module, scale)
        rank = next((tensor.shape[0] for leaf, tensor in leaves.items() if leaf.endswith("_b")), 1)
        # ComfyUI takes the factors of a Conv1d for what they are only as matrices
        tensors |= {f"{file_name(module)}.{leaf}": tensor.flatten(1).contiguous() for leaf, tensor in leaves.items()}
        tensors[f"{file_name(module)}.alpha"] = torch.tensor(float(rank))
    header = {"format": "pt", **metadata}
    if isinstance(saved.config, LokrConfig):
        header["lokr_config"] = json.dumps(replace(saved.config, alpha=None).header())
    write_tensors(path, tensors, header)
    return path
