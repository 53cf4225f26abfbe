"""Plans of memory against what PyTorch really keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.conditioning import context_latents
from sidestep.config.settings import GradientCheckpointing, MemorySettings, Quantization
from sidestep.training import memory as planning
from sidestep.training.forward import predict_velocity
from sidestep.training.memory import MemoryPlan, plan_memory
from tests.factories import train_config

NUM_TOKENS = 20


def settings(**changed) -> MemorySettings:
    values = {
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": GradientCheckpointing.none,
        "checkpointed_share": 1.0,
        "base_quantization": Quantization.none,
        "max_seconds": 30.0,
    }
    # settings that memory plans do not know keep their defaults
    others = {key: 0.0 for key in MemorySettings.__dataclass_fields__ if key not in values}
    return MemorySettings(**(others | values | changed))


def planned(checkpoint_dir: Path, *typed: str, dtype: torch.dtype = torch.float32, **changed) -> MemoryPlan:
    config = train_config(f"checkpoint_dir={checkpoint_dir}", *typed)
    model = find_checkpoint(checkpoint_dir, config.model_variant).config
    return plan_memory(model, config.adapter, config.optim, settings(**changed), dtype)


def kept_for_backward(checkpoint_dir: Path, *typed: str) -> int:
    """Bytes that a real forward pass keeps, but for the model's own."""
    config = train_config(f"checkpoint_dir={checkpoint_dir}", *typed)
    checkpoint = find_checkpoint(checkpoint_dir, config.model_variant)
    transformer = checkpoint.load_transformer(device=torch.device("cpu"), dtype=torch.float32)
    config.adapter.attach(transformer)
    WindowedAttention(transformer)
    own = {t.untyped_storage().data_ptr() for t in [*transformer.parameters(), *transformer.buffers()]}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    width = checkpoint.config.encoder_hidden_size
    predict = predict_velocity(transformer.train(), context_latents(checkpoint.silence(), 750))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predict(torch.randn(2, 750, 64), torch.rand(2), torch.randn(2, NUM_TOKENS, width))
    return sum(sizes.values())


@pytest.mark.parametrize(
    "adapter", ["lora", "lokr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "loha", "oft"))]
)
def test_the_plan_is_what_a_forward_pass_keeps(adapter, checkpoint_dir, monkeypatch):
    monkeypatch.setattr(planning, "CONDITION_TOKENS", NUM_TOKENS)
    plan = planned(checkpoint_dir, f"adapter={adapter}")
    assert plan.activations * 2**30 == pytest.approx(kept_for_backward(checkpoint_dir, f"adapter={adapter}"), rel=0.05)


def test_a_plan_grows_with_the_excerpt_and_shrinks_with_what_is_given_up(checkpoint_dir):
    whole = planned(checkpoint_dir)
    assert planned(checkpoint_dir, max_seconds=60.0).activations == pytest.approx(2 * whole.activations, rel=0.2)
    kinds = [GradientCheckpointing.none, GradientCheckpointing.selective, GradientCheckpointing.full]
    by_kind = [planned(checkpoint_dir, gradient_checkpointing=kind) for kind in kinds]
    assert by_kind[0].activations > by_kind[1].activations > by_kind[2].activations
    assert by_kind[0].recomputed == 0 < by_kind[2].recomputed < by_kind[0].activations
    half = planned(checkpoint_dir, gradient_checkpointing=GradientCheckpointing.full, checkpointed_share=0.5)
    assert half.activations == pytest.approx((by_kind[0].activations + by_kind[2].activations) / 2)
    stored = [planned(checkpoint_dir, dtype=torch.bfloat16, base_quantization=kind).weights for kind in Quantization]
    assert stored[0] == whole.weights / 2
    assert stored[0] > stored[1] > stored[2]


def test_optimisers_differ_in_what_they_keep(checkpoint_dir):
    adamw, small = (planned(checkpoint_dir, f"optim={name}") for name in ("adamw", "adamw8bit"))
    assert adamw.optimizer == 2 * adamw.adapter == 4 * small.optimizer
