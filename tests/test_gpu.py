"""What only a CUDA device can show; `pytest -m gpu`."""

from __future__ import annotations

import json

import pytest
import torch

from tests.factories import run_training
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


@pytest.mark.parametrize("choice", ["bf16", "fp16", "int8", "adamw8bit"])
def test_a_run_on_a_gpu_goes_on_where_it_stopped(tmp_path, places, choice):
    settings = ("adapter=lora", *places, "device=cuda", *CHOICES[choice])
    run_training(tmp_path / "whole", *settings, "max_epochs=4")
    run_training(tmp_path / "parts", *settings, "max_epochs=2")
    run_training(tmp_path / "parts", *settings, "max_epochs=4")
    assert_same_weights(tmp_path / "whole/final", tmp_path / "parts/final")
