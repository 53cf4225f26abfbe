"""What can happen to files and folders under a run: taken away, forbidden, changed, damaged."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import stat
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.types import RunMode
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep import cli
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.weight_files import read_json
from sidestep.adapters.files import read_adapter
from sidestep.data.dataset import open_songs
from sidestep.data.manifest import DatasetInfo
from sidestep.data.manifest import read_manifest as read_dataset
from sidestep.errors import UserError
from sidestep.files import _HOST, LogFile, alone_in, naming, remove_abandoned, replacing_folder, write_tensors
from sidestep.inference.generation import read_request
from sidestep.reporting.page import write_page
from sidestep.training.ema import WeightMean
from sidestep.training.run import Run
from sidestep.training.signals import Interrupted, StopSignals
from sidestep.training.state import (
    TrainingState,
    _hash,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    remove_old_checkpoints,
    save_checkpoint,
    write_manifest,
)
from tests.audio_files import write
from tests.factories import generate_config, run_training, train_config
from tests.processes import Command, at_call, obey_permissions
from tests.test_reliability import TRAIN, final_weights, run_of

STEP = "sidestep.training.forward.Forward.__call__"
LONG = ["max_epochs=null", "max_steps=12", "save_every_steps=2"]


@pytest.fixture
def work(tmp_path: Path, checkpoint_dir: Path, dataset_dir: Path) -> Path:
    """A working folder with a dataset and a song of its own, and a link to the toy model."""
    shutil.copytree(dataset_dir, tmp_path / "work/data")
    shutil.copytree(checkpoint_dir, tmp_path / "work/checkpoints")
    generator = torch.Generator().manual_seed(0)
    for name in ("good", "bad"):
        write(tmp_path / f"work/songs/{name}.wav", torch.rand(24_000, 2, generator=generator).numpy() - 0.5, 48_000)
    return tmp_path / "work"


def finish(work: Path, *settings: str) -> dict[str, torch.Tensor]:
    process = Command(work, *TRAIN, "dataset_dir=data", *settings)
    assert process.wait() == 0, process.said
    return final_weights(run_of(work))


# files that go away or change while a run trains


def test_a_file_that_vanishes_under_a_run_is_named_and_the_run_goes_on_once_it_is_back(work, tmp_path):
    file = "data/latents/song1.safetensors"
    vanish = partial(at_call, STEP, 5, partial(os.rename, file, "elsewhere"))
    failed = Command(work, *TRAIN, "dataset_dir=data", *LONG, first=vanish)
    assert failed.wait() == 1, failed.said
    assert "Traceback" not in failed.said
    assert file in failed.said.splitlines()[-1]
    (newest, state) = newest_checkpoint(run_of(work)) or pytest.fail("no checkpoint is whole")
    assert newest.name == f"step_{state.step}"

    missing = Command(work, *TRAIN, "dataset_dir=data", *LONG)
    assert missing.wait() == 1
    assert f"{file} of song1.wav is missing" in missing.said.splitlines()[-1]
    (work / "elsewhere").rename(work / file)
    weights = finish(work, *LONG)
    shutil.rmtree(work / "outputs")
    torch.testing.assert_close(weights, finish(work, *LONG), rtol=0, atol=0)


def test_a_dataset_that_changes_under_a_run_does_not_change_the_run_and_is_refused_afterwards(work):
    songs = work / "data/songs.jsonl"
    shutil.copy(songs, work / "before.jsonl")
    (work / "fewer.jsonl").write_text("".join(songs.read_text().splitlines(keepends=True)[1:]))

    change = partial(at_call, STEP, 5, partial(os.replace, "fewer.jsonl", "data/songs.jsonl"))
    changed = Command(work, *TRAIN, "dataset_dir=data", *LONG, first=change)
    assert changed.wait() == 0, changed.said
    weights = final_weights(run_of(work))

    refused = Command(work, *TRAIN, "dataset_dir=data", *LONG)
    assert refused.wait() == 1
    assert "was trained with other songs than dataset_dir" in refused.said.splitlines()[-1]
    (work / "before.jsonl").replace(songs)
    torch.testing.assert_close(finish(work, *LONG), weights, rtol=0, atol=0)  # is finished, so it returns at once
    shutil.rmtree(work / "outputs")
    torch.testing.assert_close(finish(work, *LONG), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("latents/song3", "latents", float("nan")), ("conditions/song3", "caption", float("inf"))],
)
def test_one_value_that_is_not_finite_is_found_and_named_before_training(work, file, key, value):
    """In the last frame of the last song, where the first excerpts do not come."""
    path = work / f"data/{file}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors[key][-1, -1] = value
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{file}.safetensors of song3.wav holds NaN or infinity"):
        run_training(work / "run", f"dataset_dir={work}/data", f"checkpoint_dir={work}/checkpoints", "max_epochs=1")
    assert list((work / "run").rglob("*.json*")) == []


# what may not be read or written

TYPED = {
    "train": [*TRAIN, "dataset_dir=data", "max_epochs=1"],
    "preprocess": ["preprocess", "audio_dir=songs", "dataset_dir=new", "model_variant=base", "device=cpu"],
    "inspect": ["inspect", "adapter_dir=adapter", "plot=shut/x.png"],
    "export": ["export", "adapter_dir=adapter", "format=comfyui", "output_dir=shut/exported"],
    "generate": ["generate", "adapter_dir=adapter", "prompt=x", "seconds=1", "output_dir=shut/music", "device=cpu"],
}


FORBIDDEN = [
    ("train", "outputs/kill", 0o555),
    ("train", "data/latents/song2.safetensors", 0o000),
    ("preprocess", "songs/bad.wav", 0o000),
    ("export", "shut", 0o555),
    ("generate", "adapter/adapter_model.safetensors", 0o000),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("train", "data", 0o000),
            ("train", "data/songs.jsonl", 0o000),
            ("train", "checkpoints/acestep-v15-base", 0o000),
            ("train", "checkpoints/acestep-v15-base/model.safetensors", 0o000),
            ("train", "checkpoints/acestep-v15-base/silence_latent.pt", 0o000),
            ("preprocess", "songs", 0o000),
            ("preprocess", "new", 0o555),
            ("preprocess", "checkpoints/vae/config.json", 0o000),
            ("inspect", "shut", 0o555),
            ("inspect", "adapter", 0o000),
            ("inspect", "adapter/adapter_config.json", 0o000),
            ("export", "adapter/adapter_model.safetensors", 0o000),
            ("generate", "shut", 0o555),
        )
    ),
]


@pytest.mark.parametrize(("command", "path", "mode"), FORBIDDEN)
def test_what_may_not_be_read_or_written_is_named_in_one_line(work, adapters, command, path, mode):
    shutil.copytree(adapters["lora"], work / "adapter")
    for folder in ("outputs/kill", "new", "shut"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    before = stat.S_IMODE((work / path).stat().st_mode)
    (work / path).chmod(mode)
    try:
        process = Command(work, *TYPED[command], first=obey_permissions)
        code = process.wait()
    finally:
        (work / path).chmod(before)
    assert code == 1, process.said
    assert "Traceback" not in process.said
    assert any(path in line and "ermi" in line for line in process.said.splitlines()), process.said  # permission


def test_a_run_whose_checkpoints_may_not_be_written_keeps_the_last_one(work):
    """The folder is shut in the middle of the run."""
    shut = partial(at_call, STEP, 6, partial(_shut, "outputs/kill"))
    failed = Command(work, *TRAIN, "dataset_dir=data", *LONG, first=partial(_both, obey_permissions, shut))
    assert failed.wait() == 1, failed.said
    assert "Traceback" not in failed.said
    assert "checkpoints/step_4 cannot be written (Permission denied)" in failed.said.splitlines()[-1]
    checkpoints = run_of(work) / "checkpoints"
    checkpoints.chmod(0o755)
    assert load_checkpoint(checkpoints / "step_2").step == 2
    weights = finish(work, *LONG)
    shutil.rmtree(work / "outputs")
    torch.testing.assert_close(weights, finish(work, *LONG), rtol=0, atol=0)


def _shut(folder: str) -> None:
    for checkpoints in Path(folder).glob("*/checkpoints"):
        checkpoints.chmod(0o555)


def _both(first: partial[None], second: partial[None]) -> None:
    first()
    second()


# damaged checkpoints


@pytest.mark.parametrize("num_flips", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_checkpoint_with_a_flipped_bit_is_named_and_the_one_before_it_taken(
    tmp_path, checkpoint_dir, dataset_dir, caplog, num_flips
):
    run_training(
        tmp_path, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "max_epochs=2",
        "save_every_epochs=1", "adapter.rank=1",
    )  # fmt: skip
    newest = tmp_path / "checkpoints/epoch_2"
    files = sorted(newest.iterdir())
    manifest = read_manifest(newest)
    chance = random.Random(0)
    for _ in range(num_flips):
        path = chance.choice(files)
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sidestep"):
            found = newest_checkpoint(tmp_path)
        assert found is not None
        if found[0].name == "epoch_2":  # a blank in the manifest
            assert path.name == "manifest.json"
            assert read_manifest(newest) == manifest
        else:
            assert found[0].name == "epoch_1"
            assert str(newest) in caplog.text
            assert path.name in caplog.text
        path.write_bytes(whole)


def write_checkpoints(run: Path, **steps: int) -> Path:
    """Folders with nothing but a right manifest."""
    for name, step in steps.items():
        (run / "checkpoints" / name).mkdir(parents=True)
        write_manifest(run / "checkpoints" / name, step)
    return run / "checkpoints"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rotation_keeps_what_was_just_saved_and_leaves_later_steps_and_other_names_alone(tmp_path):
    checkpoints = write_checkpoints(tmp_path, epoch_10=40, step_45=45, epoch_16=64, epoch_5_copy1=20, mine_5=20)
    remove_old_checkpoints(tmp_path, 45, keep_last=1, keep_every=None)
    assert names_in(checkpoints) == ["epoch_16", "epoch_5_copy1", "mine_5", "step_45"]


def test_a_checkpoint_that_cannot_be_removed_is_named_and_stops_nothing(tmp_path, monkeypatch, caplog):
    checkpoints = write_checkpoints(tmp_path, epoch_1=4, epoch_2=8)

    def fail(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", fail)
    remove_old_checkpoints(tmp_path, 8, keep_last=1, keep_every=None)
    (left,) = checkpoints.glob(".epoch_1.doomed-*")
    assert f"epoch_1 cannot be removed (Operation not permitted); delete {left} by hand" in caplog.text
    assert (checkpoints / "epoch_2").is_dir()


def test_pipes_in_the_folder_of_a_run_are_named_instead_of_waited_for(tmp_path):
    write_checkpoints(tmp_path, epoch_1=4)
    (tmp_path / "checkpoints/epoch_1/manifest.json").unlink()
    os.mkfifo(tmp_path / "checkpoints/epoch_1/manifest.json")
    with pytest.raises(UserError, match=r"epoch_1/manifest\.json is a pipe, not a file"):
        read_manifest(tmp_path / "checkpoints/epoch_1")
    os.mkfifo(tmp_path / "final")
    with pytest.raises(UserError, match=r"final is no folder, and one is to be written there"):
        save_checkpoint(tmp_path / "final", None, None)
    os.mkfifo(tmp_path / "train.log")
    with pytest.raises(OSError, match=r"it is a pipe, not a file: .*train\.log"):
        LogFile(str(tmp_path / "train.log"), encoding="utf-8")
    os.mkfifo(tmp_path / ".owner")
    with pytest.raises(OSError, match=r"it is a pipe, not a file: .*\.owner"), alone_in(tmp_path):
        pass


def test_pipes_among_the_files_of_a_dataset_a_model_and_a_sweep_are_named_too(tmp_path, caplog):
    info = DatasetInfo(model_variant="base", condition_width=64, fingerprints={}, settings={"custom_tags": []})
    (tmp_path / "dataset_info.json").write_text(json.dumps(vars(info)))
    os.mkfifo(tmp_path / "songs.jsonl")
    with pytest.raises(UserError, match=r"songs\.jsonl cannot be read: .*it is a pipe"):
        read_dataset(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*songs\.jsonl: .*it is a pipe"):
        read_json(tmp_path / "songs.jsonl")
    with pytest.raises(UserError, match=r"prompt=@.*songs\.jsonl cannot be read as UTF-8 text: .*it is a pipe"):
        read_request(generate_config(f"prompt=@{tmp_path / 'songs.jsonl'}"))
    (tmp_path / "one").mkdir()
    for name in ("plan.json", "one/run.json", "one/point.json", "one/metrics.jsonl", "one/validation.jsonl"):
        os.mkfifo(tmp_path / name)
    with caplog.at_level(logging.WARNING, "sidestep"):
        write_page(tmp_path, inline_mb=1)
    for name in ("plan.json", "one/run.json", "one/point.json", "one/metrics.jsonl", "one/validation.jsonl"):
        assert f"passing over {tmp_path / name}, which cannot be read: " in caplog.text


def test_what_stands_in_the_place_of_a_file_is_said(tmp_path):
    with pytest.raises(UserError, match=r"/dev/null is neither a file nor a folder; give the folder of an adapter"):
        read_adapter(Path("/dev/null"))
    (tmp_path / "final").symlink_to("/not/mounted")
    with pytest.raises(UserError, match=r"final is a link to /not/mounted, which is not there; give the folder"):
        read_adapter(tmp_path / "final")
    (tmp_path / "dataset_info.json").symlink_to("/not/mounted")
    with pytest.raises(
        UserError, match=r"dataset_info\.json cannot be read: it is a link to /not/mounted, which is not"
    ):
        open_songs(tmp_path)
    (tmp_path / "dataset_info.json").unlink()
    (tmp_path / "dataset_info.json").mkdir()
    with pytest.raises(UserError, match=r"dataset_info\.json cannot be read: .*Is a directory"):
        open_songs(tmp_path)


def test_what_keeps_a_file_of_a_dataset_from_being_read_decides_what_is_advised(work, monkeypatch):
    songs = open_songs(work / "data")
    file = work / "data/latents/song1.safetensors"
    file.rename(work / "elsewhere")
    with pytest.raises(UserError, match=r"song1\.safetensors of song1\.wav is missing; put it back, or run"):
        songs.latents(1, 0, 2)
    (work / "elsewhere").rename(file)

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\); mend that and type the same"):
        songs.latents(1, 0, 2)


def test_a_terminal_that_closes_asks_for_a_stop_and_one_that_nohup_was_told_to_survive_does_not():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    write_checkpoints(tmp_path, epoch_1=4, epoch_2=8)
    (tmp_path / "checkpoints/epoch_1/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"\(epoch_1, epoch_2 are damaged\); move .* away to begin"):
        newest_checkpoint(tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_checkpoints_are_gone_or_out_of_reach_does_not_begin_anew(tmp_path, checkpoint_dir, dataset_dir):
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "adapter.rank=1")
    run = tmp_path / "run"
    run_training(run, *places, "max_epochs=1")
    checkpoints = (run / "checkpoints").rename(tmp_path / "elsewhere")
    before = {name: content for name, content in tree(run).items() if not name.startswith(".")}

    gone = r"run/checkpoints holds no checkpoint, and by run\.json the run was saved at step 4; bring them back"
    for changed in ("max_epochs=2", "shift=2"):
        with pytest.raises(UserError, match=gone):
            run_training(run, *places, "max_epochs=1", changed)
    (run / "checkpoints").symlink_to("/not/mounted")
    with pytest.raises(UserError, match=r"run/checkpoints is a link to /not/mounted, which is not there"):
        run_training(run, *places, "max_epochs=2")
    (run / "checkpoints").unlink()
    os.mkfifo(run / "checkpoints")
    with pytest.raises(UserError, match=r"run/checkpoints is no folder"):
        run_training(run, *places, "max_epochs=2")
    (run / "checkpoints").unlink()
    assert {name: content for name, content in tree(run).items() if not name.startswith(".")} == before

    (run / "checkpoints").symlink_to(checkpoints)
    run_training(run, *places, "max_epochs=2")
    assert read_manifest(checkpoints / "epoch_2")["step"] == 8


def test_a_damaged_checkpoint_on_another_disk_is_set_aside_there(tmp_path, checkpoint_dir, dataset_dir, monkeypatch):
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "adapter.rank=1", "save_every_epochs=1")
    disk, run, replace = tmp_path / "disk", tmp_path / "run", os.replace
    for folder in (disk, run):
        folder.mkdir()
    (run / "checkpoints").symlink_to(disk)

    def replace_on_one_disk(old, new):
        if Path(old).resolve().is_relative_to(disk) != Path(new).resolve().is_relative_to(disk):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(old))
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_on_one_disk)
    run_training(run, *places, "max_epochs=2")
    (disk / "epoch_2/training_state.pt").write_bytes(b"damaged")
    run_training(run, *places, "max_epochs=3")
    assert read_manifest(disk / "epoch_3")["step"] == 12
    (aside,) = (disk / "set_aside").glob("*/epoch_2")
    assert (aside / "training_state.pt").read_bytes() == b"damaged"


def test_a_run_taken_to_another_runs_checkpoint_goes_there_again_until_it_saves_its_own(
    tmp_path, checkpoint_dir, dataset_dir
):
    """It was killed before its first checkpoint; later its checkpoints are lost, and it must not go back."""
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "adapter.rank=1")
    run_training(tmp_path / "first", *places, "max_epochs=1")
    taken = (*places, f"resume_from={tmp_path / 'first/checkpoints/epoch_1'}")
    run_training(tmp_path / "run", *taken, "max_epochs=2")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match="saved at step 8"):
        run_training(tmp_path / "run", *taken, "max_epochs=3")

    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | {"step": 4, "status": "running"}))
    run_training(tmp_path / "run", *taken, "max_epochs=3")
    assert names_in(tmp_path / "run/checkpoints") == ["epoch_3"]


def test_a_disk_that_fails_to_read_is_not_a_damaged_checkpoint(tmp_path, monkeypatch):
    write_checkpoints(tmp_path, epoch_1=4)

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Input/output error"):
        newest_checkpoint(tmp_path)


def test_a_signal_right_after_a_save_does_not_save_the_same_step_again(
    tmp_path, checkpoint_dir, dataset_dir, monkeypatch
):
    saved, save = [], Run.save_checkpoint

    def save_and_stop(run, step, *arguments, **options):
        saved.append(step)
        save(run, step, *arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save_checkpoint", save_and_stop)
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}")
    with pytest.raises(Interrupted):
        run_training(tmp_path, *places, "max_epochs=5", "save_every_steps=1")
    assert saved == [1]


@pytest.mark.parametrize("within", [nullcontext, StopSignals])
def test_ctrl_c_is_no_fault_though_a_library_makes_an_error_of_it(monkeypatch, caplog, within):
    """As PyTorch does while it reads numbers; inside of the loop the second one ends a run."""

    def interrupted(settings):
        with within():
            if within is StopSignals:
                signal.raise_signal(signal.SIGINT)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape of an object") from None

    job = SimpleNamespace(mode=RunMode.RUN, runtime=SimpleNamespace(output_dir="outputs"))
    monkeypatch.setattr(cli, "HydraConfig", SimpleNamespace(get=lambda: job))
    monkeypatch.setattr(cli, "to_dataclass", lambda config, root: config)
    with pytest.raises(KeyboardInterrupt):
        cli._job(object, interrupted)(None)
    assert "fault" not in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_weights_that_are_not_finite_are_not_saved_and_rotate_nothing_away(tmp_path, checkpoint_dir, dataset_dir):
    places = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}")
    with pytest.raises(UserError, match=r"weights are not finite at step 1 \(first .*use a lower optim\.lr"):
        run_training(tmp_path / "run", *places, "optim.weight_decay=1e308", "optim.lr=1e308", "save_every_steps=1")
    assert not (tmp_path / "run/checkpoints").exists()


def test_only_what_was_replaced_comes_back_after_a_kill_not_what_was_being_deleted(tmp_path):
    ended = f"{_HOST}-{os.getpid()}"
    for name in (f".best.replaced-{ended}", f".epoch_1.doomed-{ended}", f".voice-old.partial-{ended}"):
        (tmp_path / name).mkdir()
    for odd in (f".x.partial-{_HOST}-y", f".x.partial-{_HOST}-"):
        (tmp_path / odd).mkdir()
    remove_abandoned(tmp_path)
    assert names_in(tmp_path) == [f".x.partial-{_HOST}-", f".x.partial-{_HOST}-y", "best"]


def test_whoever_has_a_folder_for_itself_puts_right_what_a_kill_on_another_machine_left(tmp_path):
    for name in (".epoch_2.replaced-othernode-7", ".epoch_3.partial-othernode-7"):
        (tmp_path / name).mkdir()
    remove_abandoned(tmp_path)
    assert len(names_in(tmp_path)) == 2
    remove_abandoned(tmp_path, alone=True)
    assert names_in(tmp_path) == ["epoch_2"]


def test_what_a_killed_process_left_is_put_right_though_another_has_its_number_now(tmp_path):
    """As in a container, where numbers are few, or after a restart of the machine."""
    (tmp_path / f".best.replaced-{_HOST}-{os.getppid()}").mkdir()
    (tmp_path / f".final.partial-{_HOST}-{os.getppid()}").mkdir()
    remove_abandoned(tmp_path)
    assert len(names_in(tmp_path)) == 2
    remove_abandoned(tmp_path, alone=True)
    assert names_in(tmp_path) == ["best"]


@pytest.mark.parametrize(
    "content",
    [
        {"step": "4", "files": {}},
        {"step": 4, "files": []},
        {"step": 4, "files": {"../x": {"bytes": 1, "sha256": ""}}},
        {"step": 4, "files": {"x": 5}},
        {"step": 4, "files": {"x": {"bytes": 1}}},
        {},
    ],
)
def test_a_manifest_whose_hash_is_right_and_whose_shape_is_not_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"sha256": _hash(content)}))
    with pytest.raises(UserError, match=r"manifest\.json is not the list of files of a checkpoint"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("read_bytes", OSError(errno.EIO, "Input/output error")),
        ("load", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ],
)
def test_a_disk_or_a_memory_that_fails_does_not_make_a_checkpoint_damaged(tmp_path, monkeypatch, name, error):
    folder = tmp_path / "checkpoints/step_4"
    folder.mkdir(parents=True)
    torch.save({}, folder / "training_state.pt")
    write_manifest(folder, 4)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Path if name == "read_bytes" else torch, name, fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": "4"}, "step is '4'"),
        ({"step": True}, "step is True"),
        ({"adapter": {"x": 5}}, "adapter is {'x': 5}"),
        ({"settings": None}, "settings is None"),
        ({"extra": 1}, "'extra' is not known"),
    ],
)
def test_a_training_state_with_a_value_of_another_kind_is_refused_by_key(tmp_path, values, message):
    state = TrainingState(
        step=4, num_steps=8, smoothed_loss=1, adapter={"x": torch.ones(1)}, optimizer={}, scaler={}, settings={}
    )
    right = {"format": 1, **vars(state)}
    torch.save(right, tmp_path / "training_state.pt")
    write_manifest(tmp_path, 4)
    assert load_checkpoint(tmp_path).step == 4
    torch.save(right | values, tmp_path / "training_state.pt")
    write_manifest(tmp_path, 4)
    with pytest.raises(UserError, match=rf"training_state\.pt was written by another version of sidestep: {message}"):
        load_checkpoint(tmp_path)


def test_a_signal_while_the_last_checkpoint_is_written_ends_a_finished_run_and_the_sweep_around_it(
    tmp_path, checkpoint_dir, dataset_dir, monkeypatch
):
    save = Run.save_checkpoint

    def save_and_stop(*arguments, **options):
        save(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save_checkpoint", save_and_stop)
    typed = (f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "max_epochs=1")
    with pytest.raises(Interrupted):
        run_training(tmp_path / "run", *typed)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
    assert isinstance(run_training(tmp_path / "run", *typed), float)


def test_a_step_that_changes_nothing_leaves_the_running_mean_alone(checkpoint_dir):
    config = train_config()
    checkpoint = find_checkpoint(checkpoint_dir, config.model_variant)
    adapter = config.adapter.attach(checkpoint.load_transformer(device=torch.device("cpu"), dtype=torch.float32))
    mean = WeightMean(adapter, 0.5, {})
    for parameter in adapter.parameters():
        parameter.data += 1
    before = {key: tensor.clone() for key, tensor in mean.state().items()}
    mean.update(100, torch.tensor(False))
    torch.testing.assert_close(mean.state(), before, rtol=0, atol=0)
    mean.update(100, torch.tensor(True))
    torch.testing.assert_close(mean.state(), {key: tensor + 0.5 for key, tensor in before.items()})


def test_what_is_wrong_with_a_new_folder_is_said_of_its_own_name(tmp_path):
    with (
        pytest.raises(UserError, match=r"^bad thing in .*/final/x, please$"),
        replacing_folder(tmp_path / "final") as new,
    ):
        raise UserError(f"bad thing in {new / 'x'}, please")
    assert list(tmp_path.iterdir()) == []


# how files are written


def test_equal_adapters_are_equal_files(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(1, dtype=torch.bfloat16)}
    metadata = {f"key {n}": f'{{"é\u2028": "\\n\x01", "n": {n}}}' for n in range(20)}
    for name in ("one", "two"):
        write_tensors(tmp_path / name, tensors, metadata)
        tensors, metadata = (dict(reversed(values.items())) for values in (tensors, metadata))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == metadata
    torch.testing.assert_close(load_file(tmp_path / "one"), tensors, rtol=0, atol=0)


def test_an_error_of_writing_names_the_file_that_was_to_be_written(tmp_path):
    def fill_the_disk() -> None:
        with naming(tmp_path / "file"), Path("/dev/full").open("w") as full:
            full.write("x")

    def write_nowhere() -> None:
        with replacing_folder(tmp_path / "folder") as partial_folder:
            (partial_folder / "a/b").write_text("")

    for write_badly, name in ((fill_the_disk, "file"), (write_nowhere, "folder")):
        with pytest.raises(OSError, match="No s") as raised:
            write_badly()
        assert raised.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_message_is_one_line_whatever_it_quotes():
    assert str(UserError("a\nb\x1b[2J\udce9\u2028é")) == r"a\nb\x1b[2J\udce9\u2028é"
    assert json.loads(json.dumps(str(UserError("é"))))
