"""Importance of modules, on a model where it is known, and ranks within a budget."""

from __future__ import annotations

import json
import os
import shlex
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sidestep.adapters.lora import LoraConfig, read_rank_pattern
from sidestep.config.gate import compose_or_explain, to_dataclass
from sidestep.config.settings import TrainConfig
from sidestep.errors import UserError
from sidestep.training.fisher import Importance, allocate, analyze, measure, next_command
from sidestep.training.run import open_run
from sidestep.training.signals import Interrupted
from tests.factories import analyze_config, choices_of, run_training, train_config

FITTING = ("adapter.rank=4", "adapter.target_modules=[q_proj,up_proj]")


class Known(nn.Module):
    """y = 3 a(x) + b(x) + 0 c(x): the gradient of a's weight is three times b's, and c has none."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 2, bias=False) for _ in range(3))

    def forward(self, x):
        return 3 * self.a(x) + self.b(x) + 0 * self.c(x)


def test_importance_is_the_mean_squared_gradient_with_its_standard_error():
    model = Known()
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    dataset = SimpleNamespace(songs=[SimpleNamespace(audio="x.wav")])
    example = SimpleNamespace(song=0, latents=torch.zeros(2, 64), condition=torch.zeros(1, 8), weight=1.0)

    class Examples:
        songs = dataset.songs

        def __getitem__(self, position):
            return example

    def forward(batch, step, index):
        return SimpleNamespace(losses=model(inputs[step : step + 1]).sum(dim=1))

    found = measure(forward, model, ["a", "b", "c"], Examples(), 6)
    squares = 2 * inputs.double().square().sum(dim=1)  # the gradient of b's weight is x in each of its two rows
    assert found["b"].mean == pytest.approx(squares.mean().item(), rel=1e-5)
    assert found["b"].error == pytest.approx(squares.std().item() / 6**0.5, rel=1e-5)
    assert found["a"].mean == pytest.approx(9 * found["b"].mean, rel=1e-5)
    assert found["c"].mean == 0
    ranks = allocate(
        {path: Importance(mean=each.mean, error=0, sides=(512, 512)) for path, each in found.items()}, 27, 128
    )
    assert ranks == {"a": 60, "b": 20, "c": 1}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_a_signal_ends_the_measurement_after_the_example_at_hand():
    example = SimpleNamespace(song=0, latents=torch.zeros(2, 64), condition=torch.zeros(1, 8), weight=1.0)
    model, seen = Known(), []

    def forward(batch, step, index):
        seen.append(step)
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return SimpleNamespace(losses=model(torch.ones(1, 4)).sum(dim=1))

    with pytest.raises(Interrupted):
        measure(forward, model, ["a"], [example] * 6, 6)
    assert seen == [0, 1]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("rank", [1, 4, 17, 64])
def test_ranks_use_the_budget_and_no_more(rank):
    generator = torch.Generator().manual_seed(rank)
    sides = [(2048, 2048), (1024, 2048), (6144, 2048)]
    importance = {
        str(i): Importance(mean=torch.rand(1, generator=generator).item() ** 4, error=0, sides=sides[i % 3])
        for i in range(48)
    }
    ranks = allocate(importance, rank, 4 * rank)
    cost = {path: sum(module.sides) for path, module in importance.items()}
    used, budget = sum(ranks[path] * cost[path] for path in ranks), rank * sum(cost.values())
    assert used <= budget
    assert budget - used < max(cost.values())
    assert all(1 <= each <= 4 * rank for each in ranks.values())


def test_equal_importance_gives_the_flat_rank():
    importance = {str(i): Importance(mean=2.0, error=0, sides=(64, 64)) for i in range(5)}
    assert set(allocate(importance, 8, 32).values()) == {8}


def test_a_model_without_gradients_is_refused():
    with pytest.raises(UserError, match="no target module has a gradient"):
        allocate({"x": Importance(mean=0.0, error=0, sides=(4, 4))}, 2, 8)


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory, checkpoint_dir, dataset_dir):
    folder = tmp_path_factory.mktemp("analyzed")
    typed = [
        f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "rank=4", "max_rank=16", "num_examples=6",
        "max_seconds=2", "target_modules=[q_proj,up_proj]", "validation.songs=[song1.wav]",
    ]  # fmt: skip
    return [analyze(analyze_config(*typed, f"output={folder}/{name}.json")) for name in ("one", "other")]


def test_the_analysis_is_the_same_every_time(analyzed):
    one, other = analyzed
    assert one.read_bytes() == other.read_bytes()
    pictures = [one.with_suffix(".png"), one.with_name("one_importance.png")]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_a_run_takes_the_ranks_only_where_the_file_is_named(analyzed, tmp_path, checkpoint_dir, dataset_dir):
    content = json.loads(analyzed[0].read_text())
    pattern = content["rank_pattern"]
    assert len(set(pattern.values())) > 1
    assert all(mean > 0 and error > 0 for mean, error in content["about"]["importance"].values())
    typed = ["adapter=lora", *FITTING]
    config = train_config(*typed, f"adapter.rank_pattern_file={analyzed[0]}").adapter
    assert {path: config.rank_of(path) for path in pattern} == pattern
    assert train_config(*typed).adapter.rank_pattern == {}
    places = [f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "max_epochs=null", "max_steps=1"]
    run_training(tmp_path / "run", *typed, *places, f"adapter.rank_pattern_file={analyzed[0]}")
    saved = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert str(analyzed[0]) not in (tmp_path / "run/final/adapter_model.safetensors").read_bytes().decode("latin-1")
    assert set(saved["rank_pattern"].values()) <= set(pattern.values())


def test_the_command_it_ends_with_trains_with_the_ranks(analyzed, tmp_path):
    path = tmp_path / "ranks, of mine.json"
    path.write_bytes(analyzed[0].read_bytes())
    wanted = ["rank=4", "target_modules=[q_proj,up_proj]", "checkpoint_dir=some where", "dataset_dir=data"]
    wanted.append('validation.songs=["live/*","My Song [Live].wav"]')
    typed = shlex.split(next_command(analyze_config(*wanted), path))
    assert typed[:3] == ["python", "-m", "sidestep.train"]
    config = to_dataclass(compose_or_explain("train", typed[3:]), TrainConfig)
    assert (config.checkpoint_dir, config.model_variant.name) == ("some where", "base")
    assert config.adapter.rank_pattern == json.loads(path.read_text())["rank_pattern"]
    assert config.validation.songs == ["live/*", "My Song [Live].wav"]
    assert "validation.fraction=0.1 " in next_command(analyze_config("validation.fraction=0.1"), path)


def test_songs_that_will_be_held_out_choose_no_ranks(analyzed, tmp_path, checkpoint_dir, dataset_dir, caplog):
    typed = ["adapter=lora", *FITTING, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"]
    typed.append(f"adapter.rank_pattern_file={analyzed[0]}")
    for held_out in ([1], [1, 2]):
        names = ",".join(f"song{number}.wav" for number in held_out)
        config = train_config(*typed, f"validation.songs=[{names}]")
        open_run(config, tmp_path / "run", choices_of(*typed))
        warned = [line for line in caplog.messages if "chosen on 1 of the 2 held-out songs (first song2.wav)" in line]
        assert len(warned) == (held_out == [1, 2])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ((), r"was made with rank=4, and adapter\.rank is 64; type adapter\.rank=4"),
        (("adapter.rank=4",), r"made with target_modules=\[q_proj,up_proj\], .*type adapter\.target_modules=\[q_proj"),
        (
            ("model_variant=turbo", *FITTING),
            "was made for model_variant=base, not turbo; run python -m sidestep.analyze",
        ),
    ],
)
def test_ranks_of_other_modules_another_budget_or_model_are_refused(analyzed, typed, message):
    given = ["adapter=lora", "adapter.rank=64", *typed, f"adapter.rank_pattern_file={analyzed[0]}"]
    with pytest.raises(UserError, match=message):
        train_config(*given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "has no rank_pattern"),
        ('{"rank_pattern": {"q_proj": 0}}', "whole number above 0"),
    ],
)
def test_a_file_that_holds_no_ranks_is_refused(tmp_path, content, message):
    (tmp_path / "ranks.json").write_text(content)
    with pytest.raises(UserError, match=message):
        LoraConfig(rank_pattern_file=str(tmp_path / "ranks.json"))


def test_ranks_are_named_in_one_place_only(analyzed):
    with pytest.raises(UserError, match="leave one out"):
        LoraConfig(rank_pattern_file=str(analyzed[0]), rank_pattern={"q_proj": 2})


@pytest.mark.parametrize(
    ("typed", "message"),
    [("max_rank=8", "max_rank=8 must be at least rank=64"), ("num_examples=1", "num_examples=1 must be at least 2")],
)
def test_settings_that_contradict_each_other_are_refused(typed, message):
    with pytest.raises(UserError, match=message):
        analyze_config(typed)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("song.wav", "song.wav", "must end in .json"),
        ("mine.json", "mine.json", "is another file"),
        ("cover.png", "cover.json", r"cover\.png would be written over .*; type output=<another file>"),
        ("cover_importance.png", "cover.json", r"cover_importance\.png would be written over"),
    ],
)
def test_a_file_that_is_not_of_an_analysis_is_not_written_over(tmp_path, name, output, message):
    mine = '{"rank_pattern": {}, "mine": 1}'
    (tmp_path / name).write_text(mine, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        analyze(analyze_config(f"output={tmp_path / output}"))
    assert (tmp_path / name).read_text(encoding="utf-8") == mine


def test_a_pipe_is_no_file_of_ranks(tmp_path):
    os.mkfifo(tmp_path / "ranks.json")
    with pytest.raises(UserError, match="is another file"):
        analyze(analyze_config(f"output={tmp_path / 'ranks.json'}"))
    with pytest.raises(UserError, match="it is a pipe"):
        read_rank_pattern(tmp_path / "ranks.json")
