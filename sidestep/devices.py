"""Which device and which number format a command computes with."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sidestep.errors import UserError


def resolve_device(choice: str) -> torch.device:
    """Turn auto, cpu, cuda or mps into a device that is there.

    Raises:
        UserError: if the device asked for is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if choice == "auto":
        choice = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[choice]:
        found = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"device={choice} is not available to this PyTorch ({torch.__version__}); it has {found}")
    return torch.device(choice)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn auto into bf16 where the device has it, fp16 on older GPUs, and fp32 elsewhere.

    Raises:
        UserError: if the device cannot compute in the precision asked for.
    """
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "fp32" if device.type != "cuda" else "bf16" if bf16 else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise UserError(f"precision=fp16 needs a CUDA GPU; on {device.type} use precision=fp32 or precision=bf16")
    if precision == "bf16" and not bf16:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"precision=bf16 is not supported by {name}; use precision=fp16 or precision=fp32")
    return precision


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Give the torch dtype of :func:`resolve_precision`."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return names[resolve_precision(precision, device)]


def check_compiler(setting: str) -> None:
    """Look for what torch.compile makes kernels for CUDA with, which otherwise is missed minutes later, in a step.

    Args:
        setting: what needs it, as it was typed.

    Raises:
        UserError: if Triton is missing, or the C compiler that it calls.
    """
    windows = os.name == "nt"
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if windows else "triton"
        raise UserError(f"{setting} needs Triton, which is not installed: pip install {package}; or leave it out")
    if not windows and "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        raise UserError(
            f"{setting} needs a C compiler, and neither gcc nor clang is there; install one, or name it with "
            f"CC=<compiler> in the environment, or leave {setting} out"
        )


def memory_gib(device: torch.device) -> float:
    """Memory that ``vram_profile=auto`` may plan with: the card's, or the machine's for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    import psutil

    return psutil.virtual_memory().total / 2**30


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def place(module: nn.Module, device: torch.device, *, waiting: Iterable[Tensor] = ()) -> None:
    """Put a module on a device, but for the tensors of it that are to wait where they are.

    Unlike ``module.to``, which moves everything, and replaces buffers.
    """
    stay = {id(tensor) for tensor in waiting}
    for tensor in tensors_of(module):
        if id(tensor) not in stay:
            tensor.data = tensor.data.to(device)
