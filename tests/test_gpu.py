"""What only a CUDA device can show; `pytest -m gpu`."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from sidestep.adapters.lora import LoraConfig
from sidestep.config.settings import GradientCheckpointing
from sidestep.training.checkpointing import enable_gradient_checkpointing
from sidestep.training.offload import OffloadedBlocks, first_blocks
from tests.factories import run_training
from tests.test_checkpointing import losses_of_steps, small_transformer
from tests.test_train import assert_same_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHOICES = {
    "bf16": ("precision=bf16",),
    "fp16": ("precision=fp16",),
    "compiled": ("precision=bf16", "compile=true"),
    "selective": ("precision=bf16", "vram_profile.gradient_checkpointing=selective"),
    "full": ("precision=bf16", "vram_profile.gradient_checkpointing=full"),
    "int8": ("precision=bf16", "vram_profile.base_quantization=int8"),
    "nf4": ("precision=bf16", "vram_profile.base_quantization=nf4"),
    "adamw8bit": ("precision=bf16", "optim=adamw8bit", "optim.paged=true"),
    "batches": ("precision=bf16", "vram_profile.batch_size=4"),
    "flex": ("precision=bf16", "attention_kernel=flex", "vram_profile.batch_size=4"),
    "offloaded": ("precision=bf16", "vram_profile.gradient_checkpointing=full", "vram_profile.offloaded_share=1"),
}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def places(checkpoint_dir, dataset_dir):
    return f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"


@pytest.mark.parametrize("adapter", ["lora", "lokr"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_gpu_trains_as_a_processor_does(tmp_path, places, adapter, choice):
    batch = [word for word in CHOICES[choice] if word.startswith("vram_profile.batch_size")]
    settings = (f"adapter={adapter}", *places, "max_epochs=2")
    run_training(tmp_path / "cpu", *settings, *batch)
    run_training(tmp_path / "gpu", *settings, "device=cuda", *CHOICES[choice])
    tolerance = 0.1 if choice == "nf4" else 0.03
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


@pytest.mark.parametrize("choice", ["bf16", "fp16", "int8", "adamw8bit", "offloaded"])
def test_a_run_on_a_gpu_goes_on_where_it_stopped(tmp_path, places, choice):
    settings = ("adapter=lora", *places, "device=cuda", *CHOICES[choice])
    run_training(tmp_path / "whole", *settings, "max_epochs=4")
    run_training(tmp_path / "parts", *settings, "max_epochs=2")
    run_training(tmp_path / "parts", *settings, "max_epochs=4")
    assert_same_weights(tmp_path / "whole/final", tmp_path / "parts/final")


def test_weights_that_wait_in_main_memory_take_none_of_the_card_and_change_nothing():
    device = torch.device("cuda")
    results, peaks = [], []
    for share in (0.0, 1.0):
        transformer = small_transformer(num_layers=8, width=1024).to(device, torch.bfloat16)
        weights = sum(parameter.nbytes for parameter in transformer.layers.parameters())
        parameters = list(LoraConfig(rank=8).attach(transformer).parameters())
        enable_gradient_checkpointing(transformer, GradientCheckpointing.full, 1.0)
        OffloadedBlocks(first_blocks(transformer, share), device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results.append(losses_of_steps(transformer, parameters))
        peaks.append(torch.cuda.max_memory_allocated())
        del transformer, parameters
        gc.collect()
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    assert peaks[0] - peaks[1] > 0.7 * weights  # two of eight blocks are there
