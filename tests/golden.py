"""The tiny golden model: weights, inputs and outputs of the original ACE-Step code."""

import inspect
import json
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel
from safetensors.torch import load_file

from sidestep.acestep.keymap import split_key

GOLDEN = Path(__file__).parent / "data" / "golden"


def golden_transformer() -> AceStepTransformer1DModel:
    """The decoder in float32, in evaluation mode."""
    config = json.loads((GOLDEN / "config_tiny.json").read_text(encoding="utf-8"))
    widths = inspect.signature(AceStepTransformer1DModel.__init__).parameters.keys() & config.keys()
    transformer = AceStepTransformer1DModel(**{name: config[name] for name in widths})
    weights = {}
    for key, tensor in load_file(GOLDEN / "weights_tiny.safetensors").items():
        part, name = split_key(key)
        if part == "transformer":
            weights[name] = tensor.float()
    transformer.load_state_dict(weights, strict=True)
    return transformer.eval()


def golden_case(case: str = "d2_b2") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The forward arguments of one case, and the original decoder's output for them."""
    tensors = load_file(GOLDEN / "decoder_forward.safetensors")
    names = {
        "hidden_states": "x",
        "timestep": "timestep",
        "timestep_r": "timestep_r",
        "encoder_hidden_states": "encoder_hidden_states",
        "context_latents": "context_latents",
    }
    return {name: tensors[f"{case}.{key}"] for name, key in names.items()}, tensors[f"{case}.out"]
