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
from sidestep.training.memory import MemoryPlan, choose_checkpointing, plan_memory
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
    """Bytes that a real forward pass keeps, but for the model's own, and those of the velocity that it gives."""
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
        velocity = predict(torch.randn(2, 750, 64), torch.rand(2), torch.randn(2, NUM_TOKENS, width))
    return sum(sizes.values()) + velocity.nbytes


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


@pytest.fixture
def choose(checkpoint_dir, monkeypatch):
    """Decides for a model of four layers whose plans are known: 8 GiB of activations, selectively 4, fully 1."""
    for name in ("NEGLIGIBLE", "FRAGMENTATION", "OVERHEAD_GIB"):
        monkeypatch.setattr(planning, name, 0.0)
    config = train_config(f"checkpoint_dir={checkpoint_dir}")
    model = find_checkpoint(checkpoint_dir, config.model_variant).config

    def plan(model, adapter, optim, memory, dtype):
        kept = {"none": 8.0, "selective": 4.0, "full": 1.0}[memory.gradient_checkpointing]
        share = 0.0 if memory.gradient_checkpointing == "none" else memory.checkpointed_share
        activations = share * kept + (1 - share) * 8.0
        recomputed = 2.0 if share else 0.0
        return MemoryPlan(
            weights=3.0, adapter=0.0, gradients=0.0, optimizer=0.0, activations=activations, recomputed=recomputed
        )

    monkeypatch.setattr(planning, "plan_memory", plan)

    def decide(available_gib, compiled=False, **changed):
        memory = settings(gradient_checkpointing=GradientCheckpointing.auto, **changed)
        chosen = choose_checkpointing(
            model, config.adapter, config.optim, memory, torch.float32, available_gib=available_gib, compiled=compiled
        )
        return str(chosen.gradient_checkpointing), chosen.checkpointed_share * model.num_hidden_layers

    return decide


@pytest.mark.parametrize(
    ("available_gib", "kind", "num_layers"),
    [(11, "none", None), (10.9, "selective", 3), (9, "selective", 4), (8.9, "full", 3), (6, "full", 4), (1, "full", 4)],
)
def test_auto_recomputes_as_little_as_the_memory_allows(choose, available_gib, kind, num_layers):
    chosen = choose(available_gib)
    assert chosen[0] == kind
    assert num_layers is None or chosen[1] == num_layers


def test_auto_recomputes_no_more_layers_than_it_may(choose):
    assert choose(9, checkpointed_share=0.75) == ("full", 3)


def test_auto_leaves_what_is_inside_a_compiled_layer_to_the_compiler(choose):
    assert choose(10.9, compiled=True) == ("full", 2)


def test_auto_recomputes_the_layers_whose_weights_wait_in_main_memory(choose):
    assert choose(100, offloaded_share=0.5) == ("selective", 2)


def test_a_toy_needs_no_plan(checkpoint_dir, monkeypatch):
    monkeypatch.setattr(planning, "plan_memory", None)
    config = train_config(f"checkpoint_dir={checkpoint_dir}")
    model = find_checkpoint(checkpoint_dir, config.model_variant).config
    memory = settings(gradient_checkpointing=GradientCheckpointing.auto)
    chosen = choose_checkpointing(
        model, config.adapter, config.optim, memory, torch.float32, available_gib=8.0, compiled=False
    )
    assert chosen == settings()
