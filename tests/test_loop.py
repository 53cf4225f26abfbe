"""The loop's wiring, against the same steps written out by hand from the facts."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.data.dataset import SongDataset
from sidestep.errors import UserError
from sidestep.seeds import derive_seed
from sidestep.training.run import Run
from sidestep.training.state import load_checkpoint
from sidestep.training.validation import Validation
from tests.factories import run_training, train_config, write_dataset
from tests.test_train import assert_same_weights


def test_three_steps_equal_the_same_steps_written_by_hand(tmp_path, checkpoint_dir):
    """Unequal songs in one batch, accumulation, dropped conditions, clipping, weight decay and a cosine schedule.

    The reference trains on each song alone, so it has no padding and no masks, and draws what ACE-Step's forward
    draws: dropout, noise, and the larger of two logit-normal times.
    """
    data = write_dataset(tmp_path / "data", checkpoint_dir, lengths=[60, 24, 38, 50])
    settings = (
        f"checkpoint_dir={checkpoint_dir}",
        f"dataset_dir={data}",
        "max_epochs=null",
        "max_steps=3",
        "vram_profile.batch_size=3",
        "vram_profile.gradient_accumulation_steps=2",
        "condition_dropout=0.5",
        "schedule=cosine",
        "schedule.warmup_steps=1",
        "optim.max_grad_norm=0.05",
        "optim.weight_decay=0.1",
        "seed=5",
    )
    run_training(tmp_path / "run", *settings)

    config = train_config(*settings)
    checkpoint = find_checkpoint(checkpoint_dir, config.model_variant)
    transformer = checkpoint.load_transformer(device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(derive_seed(5, "adapter"))
    adapter = config.adapter.attach(transformer)
    parameters = list(adapter.parameters())
    silence, null_condition = checkpoint.silence(), checkpoint.null_condition()
    dataset = SongDataset(data, max_seconds=2, seed=5, batch_size=3)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1)
    factors = [1.0, 1.0, 0.01]  # warm-up of one step, then half a cosine over two
    num_dropped = 0
    for step in range(3):
        total = torch.zeros(())
        for micro_batch in range(2):
            first = (step * 2 + micro_batch) * 3
            songs = [dataset[first + i] for i in range(3)]
            longest = max(len(song.latents) for song in songs)
            draw = torch.Generator().manual_seed(derive_seed(5, "noise", step, micro_batch))
            dropped = torch.rand(3, generator=draw) < 0.5
            noise = torch.randn(3, longest, 64, generator=draw)
            t = torch.maximum(*(torch.sigmoid(torch.randn(3, generator=draw) - 0.4) for _ in range(2)))
            num_dropped += int(dropped.sum())
            for i, song in enumerate(songs):
                length = len(song.latents)
                noisy = (1 - t[i]) * song.latents + t[i] * noise[i, :length]
                condition = null_condition.expand(7, -1) if dropped[i] else song.condition
                context = torch.cat([silence[:length], torch.ones(length, 64)], dim=1)
                time = t[i : i + 1]
                velocity = transformer(noisy[None], time, time, condition[None], context[None], return_dict=False)[0]
                total = total + (velocity[0] - (noise[i, :length] - song.latents)).square().mean() / 6
        optimizer.zero_grad()
        total.backward()
        norm = torch.stack([parameter.grad.square().sum() for parameter in parameters]).sum().sqrt()
        for parameter in parameters:
            parameter.grad *= min(1.0, 0.05 / (norm.item() + 1e-6))
        optimizer.param_groups[0]["lr"] = 0.01 * factors[step]
        optimizer.step()

        logged = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[step])
        assert logged["loss"] == pytest.approx(total.item(), rel=1e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert logged["lr"] == pytest.approx(0.01 * factors[step])
    assert 0 < num_dropped < 18
    trained = load_checkpoint(tmp_path / "run/checkpoints/epoch_4").adapter
    torch.testing.assert_close(trained, adapter.state_dict(), atol=1e-5, rtol=1e-4)


def test_a_finished_run_frees_its_model_and_before_it_is_checked_its_optimizer(
    tmp_path, checkpoint_dir, dataset_dir, monkeypatch
):
    """In a sweep the next point loads its own, and the check of final/ needs memory."""
    import weakref

    from sidestep.acestep.checkpoint import Checkpoint
    from sidestep.training.optim import AdamWConfig
    from sidestep.training.run import Run

    alive: list[weakref.ref[torch.nn.Module]] = []
    load = Checkpoint.load_transformer

    def remember(self, **options):
        transformer = load(self, **options)
        alive.append(weakref.ref(transformer))
        return transformer

    built: list[torch.optim.Optimizer] = []
    held: list[int] = []
    build, save, finish = AdamWConfig.build, Run.save_checkpoint, Run.finish

    def count(stage):
        def counted(*arguments, **options):
            held.append(len(built[0].state))
            return stage(*arguments, **options)

        return counted

    monkeypatch.setattr(Checkpoint, "load_transformer", remember)
    monkeypatch.setattr(AdamWConfig, "build", lambda *a: built.append(build(*a)) or built[0])
    monkeypatch.setattr(Run, "save_checkpoint", count(save))
    monkeypatch.setattr(Run, "finish", count(finish))
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}")
    run_training(tmp_path / "run", *places, "precision=bf16", "max_epochs=null", "max_steps=1")
    built.clear()
    gc.collect()
    assert [reference() for reference in alive] == [None]
    assert held == [64, 0]


def test_a_run_whose_frozen_weights_wait_in_main_memory_trains_and_evaluates_the_same(
    tmp_path, checkpoint_dir, dataset_dir, monkeypatch
):
    """And from its first evaluation to the trial of the saved adapter nothing brings them all to the device."""
    settings = (
        "adapter=lora", f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "max_epochs=2",
        "validation.fraction=0.3", "vram_profile.gradient_checkpointing=full",
    )  # fmt: skip
    plain = run_training(tmp_path / "plain", *settings)
    seen = []

    def looking(method):
        def look(self, *args):
            transformer = next(arg for arg in args if hasattr(arg, "time_embed"))
            frozen = [[p for p in layer.parameters() if not p.requires_grad] for layer in transformer.layers]
            seen.append({len({p.untyped_storage().data_ptr() for p in layer}) for layer in frozen})
            return method(self, *args)

        return look

    def moving(module, *where, **options):
        assert not hasattr(module, "time_embed"), f"the whole transformer is moved to {where}"
        return move(module, *where, **options)

    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", moving)
    for name in ("_measure_base", "evaluate", "conclude"):
        monkeypatch.setattr(Validation, name, looking(getattr(Validation, name)))
    monkeypatch.setattr(Run, "finish", looking(Run.finish))
    waiting = run_training(tmp_path / "waiting", *settings, "vram_profile.offloaded_share=1")
    assert waiting == plain
    assert seen == [{1}] * 4  # a layer that waits is one piece of main memory
    assert_same_weights(tmp_path / "plain/final", tmp_path / "waiting/final")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["attention_kernel=flex"], "attention_kernel=flex needs a CUDA GPU, and this is cpu"),
        (["compile=true"], "compile=true needs a CUDA GPU, and this is cpu"),
        (
            ["compile=true", "vram_profile.gradient_checkpointing=full", "vram_profile.offloaded_share=1"],
            "compile=true cannot follow weights that wait in main memory",
        ),
    ],
)
def test_what_this_device_cannot_do_is_refused_before_anything_is_loaded(
    tmp_path, checkpoint_dir, dataset_dir, settings, message
):
    with pytest.raises(UserError, match=message):
        run_training(tmp_path, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", *settings)
