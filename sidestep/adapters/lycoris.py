"""What the LyCORIS families share: their modules on a transformer, and the names in their files.

The modules are made one by one. LyCORIS's own network finds them by patterns that it stores on a class, where
those of one run would leak into the next.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.acestep.keymap import to_original
from sidestep.adapters.base import Adapter
from sidestep.files import write_tensors

if TYPE_CHECKING:
    from torch import nn


def file_name(path: str) -> str:
    """Name a module as LyCORIS files do: ``layers.0.self_attn.to_q`` -> ``lycoris_layers_0_self_attn_q_proj``."""
    return f"lycoris_{to_original(path)}".replace(".", "_")


class LycorisAdapter(Adapter):
    """LyCORIS modules that add their product to the output of the layers they wrap.

    Args:
        transformer: the frozen transformer; gets a child module ``lycoris``.
        paths: diffusers paths of the linear modules to wrap.
        module_class: the LyCORIS module of the family.
        settings: what that class takes by name, such as ``lora_dim`` and ``alpha``.
    """

    def __init__(
        self, transformer: nn.Module, paths: Sequence[str], module_class: Any, settings: Mapping[str, Any]
    ) -> None:
        from torch import nn

        # LyCORIS writes to stdout; what a user must know of it is in `notes`
        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        # its fused kernels are timed and picked anew on every machine, so a run would not repeat itself
        os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")
        self.transformer = transformer
        self.layers: dict[str, Any] = {}
        for path in paths:
            base = transformer.get_submodule(path)
            # bypass: LyCORIS's other form adds the change to the weight in the weight's dtype, and in bf16 that
            # rounds most of a young adapter away
            layer = module_class(file_name(path), base, bypass_mode=True, **settings)
            layer.to(base.weight.device).apply_to()
            self.layers[to_original(path)] = layer
        # as a child of the transformer, where DistributedDataParallel and `.to(device)` find the parameters
        transformer.add_module(
            "lycoris", nn.ModuleDict({file_name(path): layer for path, layer in self.layers.items()})
        )

    def weights(self) -> dict[str, dict[str, nn.Parameter]]:
        return {path: dict(layer.named_parameters()) for path, layer in self.layers.items()}

    def scale_of(self, path: str) -> float:
        return float(self.layers[path].scale)  # 1 where LyCORIS keeps all factors full

    def write(self, path: Path, algorithm: str, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Write the weights, each with its ``alpha``, as one LyCORIS file in float32.

        Args:
            path: the file.
            algorithm: LyCORIS's name of the family.
            settings: what a loader rebuilds the modules from, under ``<algorithm>_config`` in the header.
            metadata: for the header.
        """
        tensors = {
            f"{file_name(module_path)}.{leaf}": tensor.detach().cpu().contiguous()
            for module_path, layer in self.layers.items()
            for leaf, tensor in [("alpha", layer.alpha.float()), *layer.named_parameters()]
        }
        header = {"algo": algorithm, "format": "lycoris", f"{algorithm}_config": json.dumps(settings), **metadata}
        write_tensors(path, tensors, header)

    def detach(self) -> None:
        for layer in self.layers.values():
            layer.restore()
            # LyCORIS leaves the original forward behind as an attribute of the module, where it hides the class's
            del layer.org_module[0].forward
        del self.transformer.lycoris
