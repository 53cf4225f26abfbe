"""What is typed on the command line: accepted, or answered in one line."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from sidestep.captioner import OpenAIConfig
from sidestep.cli import quick_imports, read_arguments, run_command
from sidestep.config.data import SongsConfig
from sidestep.config.gate import compose_or_explain, conf_dir, launches_sweep, read_profiles
from sidestep.config.help import EXAMPLES, IMPORTANT, field_docs, help_page
from sidestep.config.naming import run_name
from sidestep.config.settings import (
    AnalyzeConfig,
    ExportConfig,
    GenerateConfig,
    GradientCheckpointing,
    InspectConfig,
    PreprocessConfig,
    ReportConfig,
    TrainConfig,
    VramConfig,
)
from sidestep.doctor import examine_sweep
from sidestep.errors import UserError
from sidestep.training.schedules import Constant, Cosine, Linear
from tests.factories import preprocess_config, train_config

GROUPS = ["model_variant", "adapter", "optim", "schedule", "timesteps", "objective", "vram_profile", "tracking"]
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]

MISTAKES = {
    "adapter=lorra": "adapter=lorra is not an option; did you mean lora?; the options are",
    "adapter.rnk=8": "adapter.rnk is not a setting; did you mean adapter.rank?",
    "+adapter.rnk=8": "adapter.rnk is not a setting; did you mean adapter.rank?",
    "++adapter.rnk=8": "adapter.rnk is not a setting; did you mean adapter.rank?",
    "adapter.factor=8": "adapter.factor is a setting of adapter=lokr only",
    "+adapter.factor=8": "adapter.factor is a setting of adapter=lokr only",
    "timesteps=turbo timesteps.mean=1": "is a setting of timesteps=acestep and timesteps=logit_normal only",
    "adaptr=lora": "adaptr is not a setting; did you mean adapter?",
    "adaptr.rank=8": "adaptr.rank is not a setting; did you mean adapter.rank?",
    "max_epoch=3": "max_epoch is not a setting; did you mean max_epochs?",
    "+max_epoch=3": "max_epoch is not a setting; did you mean max_epochs?",
    "+nothing_like_it=3": "nothing_like_it is not a setting; --cfg job in its place shows all of them",
    "adapter.rank=abc": "adapter.rank=abc: Value 'abc' of type 'str' could not be converted to Integer",
    "adapter.rank=1.5": "adapter.rank=1.5: Value '1.5' of type 'float' could not be converted to Integer",
    "max_steps=true": "max_steps=true: Value 'True' of type 'bool' could not be converted to Integer",
    "precision=fp17": "precision=fp17: Invalid value 'fp17', expected one of [auto, fp32, bf16, fp16]",
    "adapter.rank=0": "adapter.rank=0 must be at least 1",
    "adapter.alpha=-1": "adapter.alpha=-1.0 must be above 0",
    "adapter.dropout=1": "adapter.dropout=1.0",
    "adapter.target_modules=[]": "adapter.target_modules is empty",
    "optim.lr=0": "optim.lr=0.0 must be above 0",
    "optim.lr=${nope}": "Interpolation key 'nope' not found",
    "optim.lr=nan": "optim.lr=nan must be a finite number",
    "optim.betas=[0.9]": "optim.betas=[0.9] must be two numbers",
    "schedule.warmup_steps=-1": "schedule.warmup_steps=-1 must not be negative",
    "timesteps.std=0": "timesteps.std=0.0 must be above 0",
    "vram_profile.batch_size=0": "vram_profile.batch_size=0 must be at least 1",
    "shift=1e-9": "shift=1e-09 must be at least 0.001",
    "max_epochs=0": "max_epochs=0 must be at least 1",
    "max_epochs=null": "max_epochs and max_steps are both null",
    "max_seconds=0.05": "max_seconds=0.05 must be at least 0.08 seconds",
    "vram_profile.max_seconds=-3": "vram_profile.max_seconds=-3.0 must be at least 0.08 seconds",
    "adapter.alpha=1e308": "adapter.alpha=1e+308 is too large; it may be 10000 at most",
    f"adapter.rank={10**20}": f"adapter.rank={10**20} is too large",
    f"schedule.warmup_steps={10**20}": f"schedule.warmup_steps={10**20} is too large",
    f"vram_profile.batch_size={10**20}": f"vram_profile.batch_size={10**20} is too large",
    "adapter.rank=400000000": "adapter.rank=400000000 is too large; it may be 100000 at most",
    "vram_profile.batch_size=2000000": "vram_profile.batch_size=2000000 is too large; it may be 100000 at most",
    "max_seconds=1e308": "max_seconds=1e+308 is too large; it may be 1e+06 at most",
    "adapter.alpha=inf": "adapter.alpha=inf must be a finite number",
    "optim.betas=[0.9,nan]": "optim.betas.1=nan must be a finite number",
    "optim.weight_decay=-1": "optim.weight_decay=-1.0 must not be negative",
    "validation.scales=[1e308,-1e39]": "validation.scales.0=1e+308 is too large; it may be 10000 at most",
    "~optim": "~optim deletes optim, and no setting can be left out; type optim=...",
    "~data": "~data deletes data, and no setting",
    "keep_every=5": "keep_every=5 has no effect without keep_last",
    "adapter=null": "adapter=null chooses nothing; the options are",
    "condition_dropout=1": "condition_dropout=1.0 must be at least 0 and below 1",
    "seed=-1": "seed=-1 must not be negative",
    "device=cpu precision=fp16": "precision=fp16 needs a GPU",
    "resume=never resume_from=x": "resume=never contradicts resume_from=x",
    "name=a/b": "name='a/b' must be a plain folder name",
    "name=..": "name='..' must be a plain folder name",
    "name=": "name is empty",
    "dataset_dir=": "dataset_dir is empty",
    "dataset_dir=a,b": "dataset_dir=a,b is several values; add -m to sweep over them",
    "dataset_dir=a=b": "cannot read dataset_dir=a=b",
    "experiment=nope": "experiment=nope is not an option",
    f"experiment={'x' * 300}": "is not an option",
    f"local={'x' * 300}": f"local={'x' * 300}: no ",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_by_name(typed):
    with pytest.raises(UserError) as raised:
        train_config(*typed.split())
    assert MISTAKES[typed] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("audio_dr=songs", "audio_dr is not a setting; did you mean audio_dir?"),
        ("audio_dir=a dataset_dir=b genre_ratio=101", "genre_ratio=101 is a percentage, from 0 to 100"),
        ("audio_dir=a dataset_dir=b tile_seconds=nan", "tile_seconds=nan must be a finite number"),
        ("audio_dir=a dataset_dir=b tile_seconds=inf", "tile_seconds=inf must be a finite number"),
        ("audio_dir=a dataset_dir=b max_song_seconds=0.00001", "max_song_seconds=1e-05 must be at least 0.08"),
        ("audio_dir=a dataset_dir=b tag_position=before", "expected one of [prepend, append, replace]"),
        ("audio_dir=a dataset_dir=b tile_seconds=3", "tile_seconds=3.0 must be at least 5"),
        ("dataset_dir=b", "audio_dir must be set, for example audio_dir=songs"),
    ],
)
def test_a_mistake_of_preprocessing_is_answered_by_name(typed, answer):
    with pytest.raises(UserError, match=r".") as raised:
        preprocess_config(*typed.split())
    assert answer in str(raised.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (b"seed: 1\nseed: 2\n", "mine.yaml line 3: found duplicate key seed"),
        (b"seed: 1\n\tname: x\n", "mine.yaml line 3: found character '\\t' that cannot start any token"),
        (b"seed: [\n", "mine.yaml line 3: expected the node content"),
        (b"seed: !!python/object/apply:os.getpid []\n", "mine.yaml line 2: could not determine a constructor"),
        (b"seed: 1\nname: caf\xe9\n", "mine.yaml line 3: it is not UTF-8"),
        (b"seed: &seed [*seed]\n", "mine.yaml: it is nested too deeply, or holds itself"),
        (b"seed: " + b"9" * 5000, "mine.yaml: Exceeds the limit"),
        (b"null: 3\n", "a key or a value in a YAML file, or one that was typed, cannot be read (KeyValidationError)"),
        (b"defaults: lokr\n", "mine.yaml: defaults must be a list of lines such as - override /adapter: lokr"),
        (b"defaults: [mine]\n", "mine.yaml: defaults names the file itself, perhaps by way of another"),
        (b"defaults:\n- override adapter: lokr\n", "mine.yaml: a slash is missing; write override /adapter"),
    ],
)
def test_a_mistake_in_a_yaml_file_of_ones_own_names_the_file_and_the_line(tmp_path, text, answer):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n" + text)
    typed = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    assert not launches_sweep("train", typed)
    with pytest.raises(UserError) as raised:
        compose_or_explain("train", typed)
    assert answer in str(raised.value)


@pytest.mark.usefixtures("own_process")
def test_showing_the_settings_of_a_yaml_file_that_cannot_be_read_names_it(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\nname: caf\xe9\n")
    typed = ["--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job"]
    monkeypatch.setattr(sys, "argv", ["train", *typed])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as raised:
        run_command("train", TrainConfig, print)
    assert raised.value.code == f"{tmp_path}/experiment/mine.yaml line 2: it is not UTF-8; save it as UTF-8"


@pytest.mark.usefixtures("own_process")
def test_showing_the_settings_answers_a_mistake_in_ones_defaults_in_one_line(own_defaults, monkeypatch):
    folder = own_defaults("report", "# @package _global_\ndefaults: lokr\n")
    monkeypatch.setattr(sys, "argv", ["report", "--config-dir", str(folder), "--cfg", "job"])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit, match=r"report\.yaml: defaults must be a list"):
        run_command("report", ReportConfig, print)


@pytest.fixture
def own_defaults(tmp_path):
    """Write ``local/<name>.yaml`` in a folder for ``--config-dir``."""

    def write(name: str, text: str) -> Path:
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def test_each_command_has_a_file_of_ones_own_defaults_which_no_other_reads(own_defaults):
    folder = own_defaults("train", "# @package _global_\ndefaults:\n- override /adapter: lokr\nmax_epochs: 3\n")
    typed = [f"hydra.searchpath=[file://{folder}]"]
    for command in ("train", "doctor"):
        config = compose_or_explain(command, typed)
        assert (config.max_epochs, config.adapter.factor) == (3, 8)
    assert compose_or_explain("train", [*typed, "max_epochs=4"]).max_epochs == 4
    assert "max_epochs" not in compose_or_explain("report", typed)
    assert compose_or_explain("preprocess", typed).language == "unknown"


@pytest.mark.parametrize("command", ["report", "doctor"])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("max_epochs: 3\n", ".yaml must begin with the line # @package _global_"),
        ("# mine\n# @package _global_\nmax_epochs: 3\n", ".yaml must begin with the line # @package _global_"),
        ("defaults:\n- override /adapter: lokr\n", ".yaml must begin with the line # @package _global_"),
        (
            "# @package _global_\ndefaults:\n- override /adaptor: lokr\n",
            ".yaml: override /adaptor names no group of this command; did you mean adapter?",
        ),
        ("# @package _global_\ndefaults: {adapter: lokr}\n", ".yaml: defaults must be a list of lines such as"),
        ("# @package _global_\ndefaults: [3]\n", ".yaml: defaults must be a list of lines such as"),
    ],
)
def test_a_mistake_in_ones_own_defaults_names_the_file(own_defaults, command, text, answer):
    name = "train" if command == "doctor" else command
    folder = own_defaults(name, text)
    typed = [f"hydra.searchpath=[file://{folder}]"]
    assert not launches_sweep(command, typed)
    with pytest.raises(UserError) as raised:
        compose_or_explain(command, typed)
    assert str(raised.value).startswith(f"{folder}/local/{name}{answer}")
    assert "\n" not in str(raised.value)


def test_a_mistake_in_ones_own_defaults_is_said_once_for_a_whole_sweep(own_defaults):
    folder = own_defaults("train", "# @package _global_\ndefaults: lokr\n")
    with pytest.raises(UserError, match=r"train\.yaml: defaults must be a list of lines"):
        examine_sweep([f"hydra.searchpath=[file://{folder}]", "dataset_dir=x", "seed=1,2"])


def test_a_mistyped_setting_beside_a_damaged_file_of_ones_own_is_one_line(own_defaults):
    folder = own_defaults("train", "# @package _global_\ndefaults: [nope]\n")
    with pytest.raises(UserError, match=r"adaptr is not a setting|local/nope"):
        compose_or_explain("train", [f"hydra.searchpath=[file://{folder}]", "adaptr=lora"])


def test_a_missing_dataset_names_the_command_that_makes_one():
    with pytest.raises(UserError, match=r"dataset_dir must be set, .*python -m sidestep\.preprocess"):
        train_config("dataset_dir=???")


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_to_a_class_of_its_own_group(group, name):
    config = train_config(f"{group}={name}")
    declared = TrainConfig.__dataclass_fields__[group].type
    assert str(declared) in [cls.__name__ for cls in type(getattr(config, group)).__mro__]


def test_reading_settings_does_not_import_torch():
    code = "import sys, sidestep.cli, sidestep.config.settings; sys.exit(bool({'torch', 'peft'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_are_not_searched_for_garbage_then_or_later_but_all_else_is(monkeypatch):
    made = []
    with monkeypatch.context() as first:
        first.delitem(sys.modules, "torch")
        with quick_imports():
            assert not gc.isenabled()
            made.append([])
    assert gc.isenabled()
    assert not any(found is made for found in gc.get_objects())
    with quick_imports():  # as in the second point of a sweep, which leaves garbage of the first
        assert gc.isenabled()
        made = [made]
    assert any(found is made for found in gc.get_objects())


@pytest.mark.parametrize("typed", ["adapter=lorra", "+adapter.rnk=8", "adapter.rank=0 dataset_dir=x", "--nonsense"])
def test_the_command_answers_a_mistake_in_one_line_at_once_and_writes_nothing(tmp_path, typed):
    started = time.monotonic()
    command = [sys.executable, "-m", "sidestep.train", *typed.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 5  # 0.4 s on an idle machine; the tests share two cores
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_log_file_that_cannot_be_opened_is_named_in_one_line(tmp_path):
    log_file = tmp_path / "outputs/generated/logs/generate.log"
    log_file.mkdir(parents=True)  # a folder, which nobody may write to as a file
    command = [sys.executable, "-m", "sidestep.generate", "adapter_dir=x", "prompt=x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"{log_file}: Is a directory; mend that and type the same command again\n"


def test_the_default_learning_rate_is_the_adapters_own():
    defaults = [train_config(f"adapter={name}", "optim.lr=${adapter.default_lr}") for name in ("lora", "lokr")]
    assert [config.optim.lr for config in defaults] == [config.adapter.default_lr for config in defaults]
    assert defaults[0].optim.lr != defaults[1].optim.lr


def test_turbo_and_base_are_written_with_their_own_shift_and_steps():
    turbo, base = train_config("model_variant=turbo"), train_config("model_variant=base")
    assert (turbo.shift, turbo.num_inference_steps, turbo.condition_dropout) == (3.0, 8, 0.0)
    assert (base.shift, base.num_inference_steps, base.condition_dropout) == (1.0, 50, 0.15)


@pytest.mark.parametrize(("gib", "seconds"), [(4, 60), (7.6, 120), (11.9, 240), (16, 300), (23.6, 300), (80, 300)])
def test_the_automatic_profile_is_the_largest_that_fits(gib, seconds):
    memory = VramConfig().resolve(read_profiles(), gib)
    assert memory.max_seconds == seconds
    assert memory.gradient_checkpointing is GradientCheckpointing.auto


def test_a_typed_value_wins_over_the_automatic_profile():
    assert VramConfig(batch_size=3).resolve(read_profiles(), 8.0).batch_size == 3


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ([], "lora-turbo"),
        (["adapter=lokr", "model_variant=base", "dataset_dir=x"], "lora-turbo"),
        (["optim.lr=0.0003", "adapter.rank=32"], "lora-turbo-rank32-lr0.0003"),
        (["timesteps=uniform", "seed=3"], "lora-turbo-seed3-uniform"),
        (["experiment=jazz"], "lora-turbo-jazz"),
        (["experiment=first"], "lora-turbo"),
        (["seed=20240101"], "lora-turbo-seed20240101"),
        (["optim.lr=1.234561e-5", "seed=0"], "lora-turbo-lr1.234561e-05-seed0"),
        (["optim.lr=1e+20"], "lora-turbo-lr1e20"),
        (["timesteps=first"], "lora-turbo-first"),
        (["max_steps=6", "dataset_dir=data/a"], "lora-turbo"),
        (["max_steps=6", "dataset_dir=data/a", "swept=[dataset_dir]"], "lora-turbo-dataset_dirdata-a"),
        (["adapter.target_modules=[q_proj,v_proj]"], "lora-turbo-target_modules-q_proj-v_proj"),
    ],
)
def test_a_run_is_named_after_what_was_typed_for_it(typed, name):
    assert run_name("lora", "turbo", typed, "first") == name


def test_of_a_setting_that_is_typed_twice_the_last_names_the_run():
    assert run_name("lora", "base", ["optim.lr=1e-4", "seed=1", "optim.lr=3e-4"], "x") == "lora-base-lr0.0003-seed1"


def test_a_folder_is_the_same_with_a_slash_behind_it():
    names = {run_name("lora", "base", ["swept=[dataset_dir]", f"dataset_dir={a}"], "x") for a in ("a", "a/", "./a")}
    assert names == {"lora-base-a"}


def test_run_names_ignore_order_and_spelling_and_stay_short():
    names = {
        run_name("lora", "base", overrides, "x")
        for overrides in (["optim.lr=1e-4", "seed=1"], ["seed=1", "+optim.lr=0.0001"], ["seed=1", "optim.lr=0.00010"])
    }
    assert names == {"lora-base-lr0.0001-seed1"} or names == {"lora-base-seed1-lr0.0001"}
    modules = f"adapter.target_modules=[{','.join(f'layers.{i}.mlp.up_proj' for i in range(24))}]"
    long = run_name("lora", "base", [modules], "x")
    assert len(long) <= 64
    assert long != run_name("lora", "base", [modules.replace("up", "down")], "x")


@pytest.mark.parametrize(
    "value",
    ["[q_proj, v_proj]", "['a b',c]", "[0.90,1e-4,'x']", "{q_proj: 8, v_proj:4}", "a b", "'a b'", "[]", "[null, True]"],
)
def test_a_value_names_the_same_run_when_typed_alone_and_in_a_sweep(value):
    """A sweep hands on what Hydra makes of a value: without spaces, numbers and quotes in its own way."""
    key = "adapter.target_modules"
    swept = OverridesParser.create().parse_override(f"{key}=choice({value},other)")
    in_a_sweep = next(iter(swept.sweep_string_iterator()))
    alone = OverridesParser.create().parse_override(f"{key}={value}").get_value_element_as_str()
    names = {run_name("lora", "base", [f"{key}={spelling}"], "x") for spelling in (value, in_a_sweep, alone)}
    assert len(names) == 1


def test_lists_and_mappings_that_differ_name_different_runs():
    values = ["[a,b]", "['a,b']", "[[a],b]", "[a,[b]]", "{a:b}", "[a]", "['']", "[]"]
    assert len({run_name("lora", "base", [f"adapter.target_modules={value}"], "x") for value in values}) == len(values)
    one, same = ("adapter.rank_pattern={q:1,v:2}", "adapter.rank_pattern={v: 2, q: 1}")
    assert run_name("lora", "base", [one], "x") == run_name("lora", "base", [same], "x")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (Linear(warmup_steps=2, final_factor=0.0), [0.5, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0]),
        (Cosine(warmup_steps=0, final_factor=0.0), [1, 0.9505, 0.8117, 0.6113, 0.3887, 0.1883, 0.0495, 0]),
    ],
)
def test_schedules_have_the_documented_shape(schedule, expected):
    assert [schedule.factor(step, 8) for step in range(8)] == pytest.approx(expected, abs=1e-4)


COMMANDS = {
    "train": TrainConfig,
    "preprocess": PreprocessConfig,
    "songs": SongsConfig,
    "analyze": AnalyzeConfig,
    "export": ExportConfig,
    "inspect": InspectConfig,
    "generate": GenerateConfig,
    "doctor": TrainConfig,
    "report": ReportConfig,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_group_with_its_options_and_documents_what_matters(command):
    page = help_page(command, COMMANDS[command])
    defaults = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text(encoding="utf-8"))["defaults"]
    groups = {key: value for entry in defaults if isinstance(entry, dict) for key, value in entry.items()}
    for group in groups:
        if (conf_dir() / group).is_dir():
            assert f"\n  {group}\n" in page
            for path in (conf_dir() / group).glob("*.yaml"):
                assert f" {path.stem} " in page
    assert page.count(f"\n  python -m sidestep.{command} ") == 1 + len(EXAMPLES[command])
    lines = page.splitlines()
    settings = lines.index("Settings that matter")
    described = [
        lines[i + 1].strip()
        for i in range(settings, lines.index("Examples"))
        if lines[i].startswith("  ") and not lines[i].startswith("   ")
    ]
    assert len(described) == len(IMPORTANT.get(command, IMPORTANT["train"]))
    assert all(described)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "cls",
    [
        TrainConfig,
        PreprocessConfig,
        SongsConfig,
        OpenAIConfig,
        *[type(getattr(train_config(f"{g}={n}"), g)) for g, n in OPTIONS],
    ],
)
def test_every_setting_is_explained(cls):
    assert field_docs(cls).keys() >= cls.__dataclass_fields__.keys()


def test_conf_has_no_unused_folder():
    used = {*GROUPS, "captioner", "experiment", "sweep", "cluster", "hydra", "local"}
    assert {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()} <= used


def test_an_option_may_stand_between_settings(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "name=s", "-m", "adapter=lora,lokr", "--config-dir", "here", "seed=1"])
    typed, unknown = read_arguments()
    assert (typed.multirun, typed.config_dir, unknown) == (True, "here", [])
    assert sys.argv == ["train", "-m", "--config-dir", "here", "name=s", "adapter=lora,lokr", "seed=1"]
    assert get_args_parser().parse_args().overrides == typed.overrides  # as Hydra reads it
