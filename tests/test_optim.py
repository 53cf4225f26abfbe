"""Every optimiser trains, and goes on exactly where it stopped."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from sidestep.errors import UserError
from tests.factories import run_training, train_config
from tests.test_train import assert_same_weights

OPTIMIZERS = {
    "adamw": (),
    "adamw8bit": (),
    "adafactor": (),
    "prodigy": ("optim.lr=1.0", "optim.d_coef=10"),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS)[1:])  # adamw is stopped and continued in tests/test_train.py
def test_stopping_and_going_on_gives_the_same_adapter(tmp_path, checkpoint_dir, dataset_dir, name):
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}")
    # a rank at which some tensors have the 4,096 values from which adamw8bit uses 8 bits
    settings = (f"optim={name}", *OPTIMIZERS[name], *places, "adapter=lora", "adapter.rank=64", "max_epochs=null")
    run_training(tmp_path / "whole", *settings, "max_steps=6")
    run_training(tmp_path / "parts", *settings, "max_steps=3")
    run_training(tmp_path / "parts", *settings, "max_steps=6")
    assert_same_weights(tmp_path / "whole/final", tmp_path / "parts/final")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_finds_the_least_squares(name):
    torch.manual_seed(0)
    target = torch.randn(64, 64)
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    config = train_config(f"optim={name}", *OPTIMIZERS[name], "optim.weight_decay=0").optim
    optimizer = config.build([weight])
    for _ in range(300):
        optimizer.zero_grad()
        (weight - target).square().mean().backward()
        optimizer.step()
    assert (weight - target).square().mean() < 0.05 * target.square().mean()


def test_adamw8bit_keeps_a_quarter_of_the_state():
    weight = torch.nn.Parameter(torch.zeros(256, 256))

    def state_bytes(name):
        optimizer = train_config(f"optim={name}").optim.build([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))

    assert state_bytes("adamw8bit") < 0.27 * state_bytes("adamw")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_running_means_are_in_pages_again_after_a_checkpoint(monkeypatch):
    """There are no pages on a CPU; what counts is that bitsandbytes makes the room, as it does for a new run."""
    from sidestep.training.paged import PagedAdamW8bit

    made = []
    make = PagedAdamW8bit.get_state_buffer
    monkeypatch.setattr(
        PagedAdamW8bit, "get_state_buffer", lambda *args, **options: made.append(make(*args, **options)) or made[-1]
    )

    def stepped(optimizer, weight):
        for step in range(3):
            weight.grad = torch.linspace(-1, step + 1, weight.numel()).view_as(weight)
            optimizer.step()

    first, second = (torch.nn.Parameter(torch.ones(256, 256)) for _ in range(2))
    whole, parts = PagedAdamW8bit([first]), PagedAdamW8bit([second])
    stepped(whole, first)
    made.clear()
    parts.load_state_dict(whole.state_dict())
    state = parts.state[second]
    assert [id(state[key]) for key in ("state1", "state2")] == [id(buffer) for buffer in made]
    second.data.copy_(first)
    stepped(whole, first)
    stepped(parts, second)
    assert torch.equal(first, second)


def test_prodigy_logs_the_learning_rate_it_found(tmp_path, checkpoint_dir, dataset_dir):
    run_training(
        tmp_path / "run",
        *("optim=prodigy", *OPTIMIZERS["prodigy"], "schedule.warmup_steps=0", "max_epochs=8"),
        *(f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "adapter=lora", "adapter.rank=64"),
    )
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rates[0] == pytest.approx(1e-6)
    assert 1e-5 < rates[-1] < 0.1


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_named_with_its_installation(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    config = train_config(f"optim={name}", *OPTIMIZERS[name]).optim
    with pytest.raises(UserError, match=rf"optim={name} needs {package} .*pip install 'sidestep\["):
        config.build([torch.nn.Parameter(torch.zeros(2))])


def test_paged_state_is_refused_without_a_gpu():
    config = train_config("optim=adamw8bit", "optim.paged=true").optim
    with pytest.raises(UserError, match=r"optim\.paged=true needs a CUDA GPU, and this is cpu"):
        config.build([torch.nn.Parameter(torch.zeros(2))])


def test_a_learning_rate_of_adamw_is_refused_for_prodigy():
    with pytest.raises(UserError, match=r"optim\.lr=0\.0001 is a factor of the learning rate that prodigy finds"):
        train_config("optim=prodigy", "optim.lr=1e-4")
