"""Whole runs on the toy model, on the CPU, in seconds."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.adapters.files import attach_saved
from sidestep.errors import UserError
from sidestep.files import _HOST
from sidestep.reporting.runs import _point
from sidestep.training import loop
from sidestep.training.state import load_checkpoint
from sidestep.training.tracking import RunRecord, drop_later_lines, read_record
from tests.factories import run_training, train_config, write_dataset

FAMILIES = {
    "lora with dropout": ("adapter=lora", "adapter.dropout=0.1", "adapter.alpha=8"),
    "lokr": ("adapter=lokr", "adapter.rank=2"),
}
WEIGHTS = {"lora": "adapter_model.safetensors", "lokr": "lokr_weights.safetensors"}


@pytest.fixture
def places(checkpoint_dir: Path, dataset_dir: Path) -> tuple[str, str]:
    return f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return {name: tensor.clone() for name, tensor in load_file(path).items()}  # not a view of a file that may change


def assert_same_weights(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_at_an_epoch_and_going_on_gives_the_same_adapter(tmp_path, places, family):
    settings = (*FAMILIES[family], *places, "save_every_epochs=1", "vram_profile.gradient_accumulation_steps=2")
    whole = run_training(tmp_path / "whole", *settings, "max_epochs=4")
    run_training(tmp_path / "parts", *settings, "max_epochs=2")
    parts = run_training(tmp_path / "parts", *settings, "max_epochs=4")

    assert_same_weights(tmp_path / "whole/final", tmp_path / "parts/final")
    assert_same_weights(tmp_path / "whole/checkpoints/epoch_3", tmp_path / "parts/checkpoints/epoch_3")
    assert parts == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_inside_an_epoch_and_going_on_gives_the_same_adapter(tmp_path, places, family):
    settings = (*FAMILIES[family], *places, "vram_profile.gradient_accumulation_steps=2", "max_epochs=null")
    run_training(tmp_path / "whole", *settings, "max_steps=5")
    run_training(tmp_path / "parts", *settings, "max_steps=3")  # 6 of 4 songs: in the middle of the second epoch
    run_training(tmp_path / "parts", *settings, "max_steps=5")

    assert_same_weights(tmp_path / "whole/final", tmp_path / "parts/final")
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("point_at", ["folder", "file"])
def test_resume_from_goes_back_to_an_earlier_checkpoint_once(tmp_path, places, point_at, caplog):
    settings = ("adapter=lora", *places, "save_every_epochs=1", "max_epochs=3")
    run_training(tmp_path / "run", *settings)
    expected = weights(tmp_path / "run/final")
    earlier = tmp_path / "run/checkpoints/epoch_1"
    target = earlier if point_at == "folder" else earlier / "training_state.pt"

    caplog.clear()
    run_training(tmp_path / "run", *settings, f"resume_from={target}")
    assert "epoch_1 at step 4" in caplog.text
    torch.testing.assert_close(weights(tmp_path / "run/final"), expected, rtol=0, atol=0)
    (aside,) = (tmp_path / "run/set_aside").iterdir()
    assert sorted(path.name for path in aside.iterdir()) == ["epoch_2", "epoch_3"]

    caplog.clear()  # the same command again does not throw away what came after
    run_training(tmp_path / "run", *settings, f"resume_from={target}")
    assert "is finished at step 12" in caplog.text
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoints/epoch_3")
    shutil.rmtree(earlier)  # as rotation would
    caplog.clear()
    run_training(tmp_path / "run", *settings, f"resume_from={target}")
    assert "epoch_2 at step 8" in caplog.text


@pytest.mark.parametrize("typed", ["checkpoints/epoch_1", "checkpoints/epoch_1/training_state.pt"])
def test_a_run_that_was_moved_does_not_go_back_a_second_time(tmp_path, places, caplog, typed):
    settings = ("adapter=lora", *places, "save_every_epochs=1", "max_epochs=2")
    run_training(tmp_path / "run", *settings)
    run_training(tmp_path / "run", *settings, f"resume_from={tmp_path / 'run/checkpoints/epoch_1'}")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    before = sorted(moved.rglob("*"))

    caplog.clear()
    run_training(moved, *settings, f"resume_from={moved / typed}")
    assert "is finished at step 8" in caplog.text
    shutil.rmtree(moved / "checkpoints/epoch_1")  # as rotation would
    caplog.clear()
    run_training(moved, *settings, f"resume_from={moved / typed}")
    assert "is finished at step 8" in caplog.text
    assert sorted(moved.rglob("*")) == [path for path in before if "checkpoints/epoch_1" not in str(path)]


@pytest.mark.parametrize("change", ["max_epochs=2", "optim.lr=0.5"])
def test_a_refused_resume_from_moves_nothing(tmp_path, places, change):
    settings = ("adapter=lora", *places, "save_every_epochs=1")
    run_training(tmp_path / "run", *settings, "max_epochs=4")
    going_back = f"resume_from={tmp_path / 'run/checkpoints/epoch_3'}"
    with pytest.raises(UserError):
        run_training(tmp_path / "run", *settings, "max_epochs=4", going_back, change)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["epoch_1", "epoch_2", "epoch_3", "epoch_4"]


def test_resume_from_starts_another_run_where_this_one_stopped(tmp_path, places):
    settings = ("adapter=lora", *places, "save_every_epochs=1")
    run_training(tmp_path / "first", *settings, "max_epochs=2")
    run_training(tmp_path / "first", *settings, "max_epochs=4")
    start = tmp_path / "first/checkpoints/epoch_2"
    run_training(tmp_path / "second", *settings, "max_epochs=4", f"resume_from={start}")
    assert_same_weights(tmp_path / "first/final", tmp_path / "second/final")


def test_a_mistyped_resume_from_is_refused_and_that_of_another_run_is_used_once(tmp_path, places, caplog):
    settings = ("adapter=lora", *places, "save_every_epochs=1", "max_epochs=2")
    run_training(tmp_path / "first", *settings)
    second = shutil.copytree(tmp_path / "first", tmp_path / "second")
    for mistyped in ("checkpoints/epoch_7", "checkpoints", "final", "set_aside/epoch_1"):
        with pytest.raises(UserError, match=f"{mistyped} is not a checkpoint"):
            run_training(second, *settings, f"resume_from={second / mistyped}")

    start = f"resume_from={tmp_path / 'first/checkpoints/epoch_1'}"
    run_training(second, *settings, start)
    assert "first/checkpoints/epoch_1 at step 4" in caplog.text
    assert [path.name for path in (second / "checkpoints").iterdir()] == ["epoch_2"]
    (aside,) = (second / "set_aside").iterdir()
    assert sorted(path.name for path in aside.iterdir()) == ["epoch_1", "epoch_2"]
    caplog.clear()
    run_training(second, *settings, start)
    assert "is finished at step 8" in caplog.text


def test_gradient_checkpointing_changes_nothing(tmp_path, places):
    settings = ("adapter=lora", "adapter.dropout=0.1", *places, "max_epochs=1")
    run_training(tmp_path / "none", *settings)
    for kind in ("selective", "full"):
        run_training(tmp_path / kind, *settings, f"vram_profile.gradient_checkpointing={kind}")
        assert_same_weights(tmp_path / "none/final", tmp_path / kind / "final")


@pytest.mark.parametrize("adapter", ["lora", "lokr"])
def test_a_run_leaves_the_promised_folder(tmp_path, places, adapter):
    run = tmp_path / "run"
    run_training(
        run,
        f"adapter={adapter}",
        "adapter.rank=2",
        *places,
        "max_epochs=2",
        "save_every_epochs=1",
        "save_every_steps=3",
    )

    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert visible == {"final", "checkpoints", "runs", "run.json", "metrics.jsonl"}
    config = ["adapter_config.json"] if adapter == "lora" else []
    assert sorted(path.name for path in (run / "final").iterdir()) == ["README.md", *config, WEIGHTS[adapter]]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch_1", "epoch_2", "step_3", "step_6"]
    for checkpoint in (run / "checkpoints").iterdir():
        assert {WEIGHTS[adapter], "training_state.pt", "manifest.json"} <= {path.name for path in checkpoint.iterdir()}
    torch.load(run / "checkpoints/epoch_1/training_state.pt", weights_only=True)

    events = EventAccumulator(str(run / "runs"))
    events.Reload()
    assert {"train/loss", "train/lr", "train/grad_norm"} <= set(events.Tags()["scalars"])
    assert "train/timesteps" in events.Tags()["histograms"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        [event.step for event in events.Scalars("train/loss")] == [row["step"] for row in logged] == list(range(1, 9))
    )
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([row["loss"] for row in logged])

    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["step"] == 8
    assert record["config"]["adapter"]["rank"] == 2
    assert record["choices"]["adapter"] == adapter
    with safe_open(run / "final" / WEIGHTS[adapter], framework="pt") as file:
        about = json.loads(file.metadata()["sidestep"])
    assert about["model_variant"] == "base"
    assert (about["shift"], about["num_inference_steps"]) == (1.0, 50)
    assert about["config"]["optim"]["lr"] == 0.01


def test_no_file_of_an_adapter_names_a_folder_of_this_machine(tmp_path, places):
    run_training(tmp_path / "run", "adapter=lora", *places, "max_epochs=1")
    for path in (tmp_path / "run/final").iterdir():
        assert str(tmp_path.parent.parent).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("adapter", ["lora", "lokr"])
def test_every_checkpoint_plays_what_was_trained_at_that_step(tmp_path, places, checkpoint_dir, adapter):
    settings = (f"adapter={adapter}", "adapter.rank=2", "adapter.alpha=3", *places, "save_every_epochs=1")
    run_training(tmp_path / "run", *settings, "max_epochs=2")
    checkpoint = find_checkpoint(checkpoint_dir, train_config().model_variant)

    def output(load):
        transformer = checkpoint.load_transformer(device=torch.device("cpu"), dtype=torch.float32)
        load(transformer)
        transformer.eval()
        draw = torch.Generator().manual_seed(0)
        latents, condition = (torch.randn(1, n, 64, generator=draw) for n in (20, 6))
        context, t = torch.randn(1, 20, 128, generator=draw), torch.tensor([0.5])
        with torch.no_grad():
            return transformer(latents, t, t, condition, context, return_dict=False)[0]

    base = output(lambda transformer: None)
    for folder in sorted((tmp_path / "run/checkpoints").iterdir()):
        state = load_checkpoint(folder)
        trained = output(
            lambda transformer, state=state: (
                train_config(*settings).adapter.attach(transformer).load_state_dict(state.adapter)
            )
        )
        played = output(lambda transformer, folder=folder: attach_saved(transformer, folder))
        torch.testing.assert_close(played, trained, atol=1e-5, rtol=0)
        assert (played - base).abs().max() > 1e-3


def test_the_same_command_returns_a_finished_runs_result_without_training(tmp_path, places, caplog):
    settings = ("adapter=lora", *places, "max_epochs=1")
    first = run_training(tmp_path / "run", *settings)
    before = (tmp_path / "run/run.json").read_text()
    (tmp_path / "run/final/inspect.png").write_text("what others put there")
    assert run_training(tmp_path / "run", *settings) == first
    assert "is finished at step 4" in caplog.text
    assert (tmp_path / "run/final/inspect.png").exists()
    assert (tmp_path / "run/run.json").read_text() == before


@pytest.mark.parametrize("damage", ["deleted", "changed"])
def test_a_final_folder_that_was_damaged_is_made_again(tmp_path, places, damage):
    settings = ("adapter=lora", *places, "max_epochs=1")
    run_training(tmp_path / "run", *settings)
    path = tmp_path / "run/final/adapter_model.safetensors"
    whole = weights(path.parent)
    path.unlink() if damage == "deleted" else path.write_bytes(path.read_bytes()[:-1])
    (path.parent / "songs").mkdir()
    (path.parent / "songs/one.flac").write_text("what others put there")
    run_training(tmp_path / "run", *settings)
    assert (path.parent / "songs/one.flac").exists()
    assert "songs" not in json.loads((tmp_path / "run/run.json").read_text())["final"]
    torch.testing.assert_close(weights(path.parent), whole, rtol=0, atol=0)


def test_another_shift_is_written_into_a_finished_run(tmp_path, places):
    run_training(tmp_path / "run", *places, "max_epochs=1")
    kept = weights(tmp_path / "run/final")
    run_training(tmp_path / "run", *places, "max_epochs=1", "shift=2")
    assert "shift 2" in (tmp_path / "run/final/README.md").read_text()
    torch.testing.assert_close(weights(tmp_path / "run/final"), kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_gib": "much"},
        {"train_seconds": [1]},
        {"step": 10**400},
        {"smoothed_loss": "low"},
        {"validation": []},
        {"validation": {"best_loss": "low"}},
        {"went_back_to": 5},
        [],
    ],
    ids=str,
)
def test_a_record_with_values_of_other_kinds_is_passed_over_with_a_warning(tmp_path, caplog, wrong):
    right = asdict(RunRecord(tmp_path / "run.json", status="finished")) | {"path": ""}
    (tmp_path / "run.json").write_text(json.dumps(right))
    assert read_record(tmp_path / "run.json") == right
    (tmp_path / "run.json").write_text(json.dumps(right | wrong if isinstance(wrong, dict) else wrong))
    assert read_record(tmp_path / "run.json") == {}
    assert "cannot be understood" in caplog.text
    caplog.clear()
    point = _point(tmp_path, None, None, None)
    assert point.record == {}
    assert "passing over" in caplog.text


def test_lines_about_steps_that_are_no_number_are_dropped(tmp_path):
    lines = ['{"step": 1}', f'{{"step": 1{"0" * 400}}}', '{"step": 1e999}', "[" * 100_000, '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    drop_later_lines(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_lines_out_of_reach_are_not_taken_for_none(tmp_path):
    """As where metrics.jsonl is a link to a disk that is not mounted."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("gone/metrics.jsonl")
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        drop_later_lines(path, 2)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    drop_later_lines(path, 2)
    assert path.is_symlink()
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_damaged_record_of_a_run_does_not_keep_it_from_going_on(tmp_path, places, name):
    settings = ("adapter=lora", *places)
    run_training(tmp_path / "run", *settings, "max_epochs=1")
    with (tmp_path / "run" / name).open("ab") as file:
        file.write(b"\x00\xff\x00{half a li")
    run_training(tmp_path / "run", *settings, "max_epochs=2")
    run_training(tmp_path / "whole", *settings, "max_epochs=2")
    assert_same_weights(tmp_path / "whole/final", tmp_path / "run/final")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("content", ['{"status": "finis', "[]", None], ids=["cut short", "other", "a dead link"])
def test_a_run_of_which_neither_record_nor_checkpoints_can_be_read_is_not_begun_anew(tmp_path, places, content):
    path = tmp_path / "run/run.json"
    path.parent.mkdir()
    if content is None:
        path.symlink_to("gone")
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=r"run\.json cannot be read, and .*checkpoints holds no checkpoint to go by"):
        run_training(path.parent, *places, "max_epochs=1")
    assert {entry.name for entry in path.parent.iterdir()} <= {"run.json", ".lock"}


def test_steps_that_are_trained_again_since_their_checkpoints_are_gone_are_told(tmp_path, places, caplog):
    settings = (*places, "save_every_epochs=1", "max_epochs=2")
    run_training(tmp_path / "run", *settings)
    assert "trained again" not in caplog.text
    shutil.rmtree(tmp_path / "run/checkpoints/epoch_2")
    run_training(tmp_path / "run", *settings, "shift=2")
    assert "was saved at step 8, and no checkpoint of that is whole; the steps after 4 are trained again" in caplog.text


def test_checkpoints_come_when_due_though_a_step_ends_several_epochs(tmp_path, checkpoint_dir):
    data = write_dataset(tmp_path / "data", checkpoint_dir, lengths=[50, 50])
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={data}", "vram_profile.gradient_accumulation_steps=5")
    run_training(tmp_path / "run", *places, "max_epochs=22", "save_every_epochs=10")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["epoch_10", "epoch_20", "epoch_22"]


def test_a_run_killed_before_final_was_written_still_gets_it(tmp_path, places, caplog):
    settings = ("adapter=lora", *places, "max_epochs=1")
    run_training(tmp_path / "run", *settings)
    expected = weights(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/final")
    checkpoint = tmp_path / "run/checkpoints/epoch_1"  # as a kill leaves it, between taking it away and the new one
    checkpoint.rename(checkpoint.with_name(f".epoch_1.replaced-{_HOST}-{os.getpid()}"))
    run_training(tmp_path / "run", *settings)
    assert "epoch_1 at step 4" in caplog.text
    torch.testing.assert_close(weights(tmp_path / "run/final"), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optim.lr=0.02", r"optim\.lr=0\.01 \(now 0\.02\)"),
        ("adapter.rank=3", r"adapter\.rank=4 \(now 3\)"),
        ("seed=1", r"seed=0 \(now 1\)"),
        ("timesteps=uniform", r"timesteps=acestep \(now uniform\)"),
        ("vram_profile.gradient_accumulation_steps=2", r"micro_batches_per_step=1 \(now 2\)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, places, change, named):
    settings = ("adapter=lora", *places, "max_epochs=1")
    run_training(tmp_path / "run", *settings)
    kept = weights(tmp_path / "run/final")
    with pytest.raises(UserError, match=named):
        run_training(tmp_path / "run", *settings, change, "max_epochs=2")
    torch.testing.assert_close(weights(tmp_path / "run/final"), kept, rtol=0, atol=0)


def test_another_dataset_in_the_same_run_is_refused(tmp_path, places, checkpoint_dir):
    run_training(tmp_path / "run", *places, "max_epochs=1")
    other = write_dataset(tmp_path / "other", checkpoint_dir, lengths=[60, 60])
    with pytest.raises(
        UserError, match=r"was trained with other songs than dataset_dir .* holds now; put those files back"
    ):
        run_training(tmp_path / "run", places[0], f"dataset_dir={other}", "max_epochs=2")


def test_main_memory_that_runs_out_is_one_line(tmp_path, places, monkeypatch):
    def fill(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loop, "_train", fill)
    with pytest.raises(UserError, match=r"main memory ran out .* use a smaller adapter\.rank"):
        run_training(tmp_path / "run", *places)


def test_resume_never_does_not_touch_a_run_that_has_checkpoints(tmp_path, places):
    run_training(tmp_path / "run", *places, "max_epochs=1")
    with pytest.raises(UserError, match=r"resume=never, but .*epoch_1 exists"):
        run_training(tmp_path / "run", *places, "max_epochs=1", "resume=never")


def test_fewer_epochs_than_already_trained_are_refused(tmp_path, places):
    run_training(tmp_path / "run", *places, "max_epochs=2")
    with pytest.raises(UserError, match=r"at step 8, past the 4 steps of max_epochs=1"):
        run_training(tmp_path / "run", *places, "max_epochs=1")


@pytest.mark.parametrize("damage", ["cut short", "bit flipped", "file missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, places, caplog, damage):
    settings = ("adapter=lora", *places, "save_every_epochs=1", "max_epochs=3")
    run_training(tmp_path / "run", *settings)
    expected = weights(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/final")
    state = tmp_path / "run/checkpoints/epoch_3/training_state.pt"
    content = bytearray(state.read_bytes())
    if damage == "cut short":
        state.write_bytes(content[:1000])
    elif damage == "bit flipped":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    else:
        state.unlink()

    run_training(tmp_path / "run", *settings)

    assert "epoch_3" in caplog.text
    assert "epoch_2 at step 8" in caplog.text
    (aside,) = (tmp_path / "run/set_aside").iterdir()
    assert [path.name for path in aside.iterdir()] == ["epoch_3"]
    torch.testing.assert_close(weights(tmp_path / "run/final"), expected, rtol=0, atol=0)


def test_resume_from_a_folder_without_training_state_says_what_is_there(tmp_path, places):
    run_training(tmp_path / "run", *places, "max_epochs=1")
    with pytest.raises(UserError, match=r"final is not a checkpoint: no training_state\.pt .*\(it holds README\.md"):
        run_training(tmp_path / "other", *places, f"resume_from={tmp_path / 'run/final'}")


def test_a_dataset_made_for_another_model_is_refused(tmp_path, checkpoint_dir, dataset_dir):
    with pytest.raises(UserError, match=r"was made with the condition encoder of another checkpoint \(base\)"):
        run_training(
            tmp_path / "run", f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "model_variant=turbo"
        )


def test_a_stretched_schedule_is_told(tmp_path, places, caplog):
    settings = (*places, "schedule=cosine")
    run_training(tmp_path / "run", *settings, "max_epochs=1")
    run_training(tmp_path / "run", *settings, "max_epochs=2")
    assert "schedule=cosine is stretched from 4 steps to 8" in caplog.text


def test_bf16_keeps_the_adapter_in_fp32(tmp_path, places):
    run_training(tmp_path / "run", "adapter=lora", *places, "precision=bf16", "max_epochs=1")
    saved = load_checkpoint(tmp_path / "run/checkpoints/epoch_1")
    assert {tensor.dtype for tensor in saved.adapter.values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(tmp_path / "run/final").values()} == {torch.float32}


def test_one_runs_precision_and_preset_do_not_leak_into_the_next(tmp_path, places):
    run_training(tmp_path / "alone", "adapter=lokr", *places, "max_epochs=1")
    run_training(
        tmp_path / "before",
        "adapter=lokr",
        *places,
        "precision=bf16",
        "adapter.target_modules=[up_proj]",
        "max_epochs=1",
    )
    run_training(tmp_path / "after", "adapter=lokr", *places, "max_epochs=1")
    assert_same_weights(tmp_path / "alone/final", tmp_path / "after/final")


@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr", "loha", "oft"])
def test_a_saved_file_that_is_not_what_was_trained_fails_the_run(tmp_path, places, monkeypatch, adapter):
    """Half the strength in one module, as a wrong scale would be: the run must not end as if all were well."""
    from safetensors.torch import save_file

    from sidestep.training import run as run_module

    write_card = run_module.write_card

    def spoil(folder, *arguments):
        write_card(folder, *arguments)
        (path,) = folder.glob("*.safetensors")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        key = next(key for key in tensors if not key.endswith("alpha") and tensors[key].abs().max() > 0)
        tensors[key] = tensors[key] * 0.5
        save_file(tensors, path, metadata)

    monkeypatch.setattr(run_module, "write_card", spoil)
    with pytest.raises(UserError, match=r"does not (hold|give) what was trained"):
        run_training(tmp_path / "run", f"adapter={adapter}", *places, "precision=bf16", "max_epochs=1")
    assert not (tmp_path / "run/final").exists()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
