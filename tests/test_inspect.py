"""What an adapter is, from its files alone and beside the base model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.adapters.files import read_adapter
from sidestep.errors import UserError
from sidestep.exporting.base_weights import BaseWeights
from sidestep.inspecting.inspect import inspect_adapter
from sidestep.inspecting.plot import check_picture, draw_heatmap
from sidestep.inspecting.summary import LayerChange, facts, heatmap, measure_changes
from tests.factories import ADAPTERS, inspect_config, train_config
from tests.golden import GOLDEN


@pytest.fixture
def base(checkpoint_dir) -> BaseWeights:
    return BaseWeights(find_checkpoint(checkpoint_dir, train_config("model_variant=base").model_variant))


def inspected(caplog, folder: Path, *typed: str) -> str:
    caplog.clear()
    caplog.set_level("INFO", "sidestep")
    inspect_adapter(inspect_config(f"adapter_dir={folder}", *typed))
    return caplog.text


@pytest.mark.parametrize("family", ADAPTERS)
def test_the_sizes_are_those_of_the_weight_changes(adapters, base, family):
    saved = read_adapter(adapters[family])
    changes = measure_changes(saved, base)
    assert list(changes) == saved.paths
    for path, change in changes.items():
        weight = base.read(path)
        moved = saved.merged_weight(path, weight) - weight
        assert change.norm == pytest.approx(moved.norm().item(), rel=1e-4)
        assert change.relative == pytest.approx((moved.norm() / weight.norm()).item(), rel=1e-4)
    alone = measure_changes(saved, None)
    if family in ("dora", "oft", "lokr-decomposed"):
        assert alone == {}
    else:
        assert {path: change.norm for path, change in alone.items()} == pytest.approx(
            {path: change.norm for path, change in changes.items()}, rel=1e-4
        )


def test_the_facts_of_a_trained_adapter_are_all_there(adapters):
    rows = dict(facts(read_adapter(adapters["lokr"])))
    path = adapters["lokr"] / "lokr_weights.safetensors"
    count = sum(t.numel() for key, t in load_file(path).items() if not key.endswith("alpha"))
    assert rows["family"] == "lokr"
    assert rows["rank"] == "3"
    assert rows["effective scale"] == "2"
    assert rows["parameters"] == f"{count:,}"
    assert rows["size on disk"] == f"{path.stat().st_size / 1e6:,.2f} MB"
    assert rows["model variant"].startswith("base (checkpoint ")
    assert rows["trained for"] == "12 steps, 3.0 epochs"
    assert rows["trigger words"] == "mystyle"
    assert rows["sample with"] == "shift 1.0, 50 steps, guidance 7.0"
    assert rows["dataset"] == "0123456789abcdef"


@pytest.mark.parametrize(
    ("family", "rank", "scale"),
    [
        ("lora", "4", "1"),  # saved with its scale in the weights
        ("lora-ranks", "4 (24 of 32), 2 (8 of 32)", "1"),
        ("lokr-full", "full", "1"),
        ("lokr-both", "1", "2"),
        ("loha", "4", "2"),
        ("oft", "none", "1"),
    ],
)
def test_ranks_and_scales_are_read_from_the_weights(adapters, family, rank, scale):
    rows = dict(facts(read_adapter(adapters[family])))
    assert (rows["rank"], rows["effective scale"]) == (rank, scale)


@pytest.mark.parametrize(("name", "scale"), [("lora", "2"), ("lokr_d2a4", "2")])
def test_an_adapter_of_ace_steps_is_read_too(tmp_path, caplog, name, scale):
    text = inspected(caplog, GOLDEN / "adapters" / name, f"plot={tmp_path / 'a.png'}", f"checkpoint_dir={tmp_path}")
    assert f"effective scale  {scale}" in text
    assert "unknown: the header has no entry of sidestep's" in text
    assert "does not say which model it was trained on" in text
    assert "norm of the change" in text
    assert (tmp_path / "a.png").is_file()


def test_a_picture_is_drawn_over_its_own_kind_only(tmp_path):
    table = heatmap({"layers.2.self_attn.q_proj": LayerChange(norm=1.0, relative=0.25)})
    check_picture(tmp_path / "a.png", "plot")
    draw_heatmap(table, "an adapter", tmp_path / "a.png")
    check_picture(tmp_path / "a.png", "plot")
    (tmp_path / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"mine\.png would be written over .*; type plot=<another file>"):
        check_picture(tmp_path / "mine.png", "plot")


def test_the_table_has_blocks_down_and_kinds_across_in_the_order_of_the_block(adapters, base):
    lines = heatmap(measure_changes(read_adapter(adapters["lora"]), base)).lines()
    assert " ".join(lines[0].split()) == "block self q self k self v self o cross q cross k cross v cross o"
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2", "3"]
    assert len({len(line) for line in lines}) == 1


def test_a_table_with_holes_and_layers_outside_of_the_blocks_is_shown(tmp_path):
    sizes = {"layers.10.mlp.up_proj": 0.5, "layers.2.self_attn.q_proj": 0.25, "condition_embedder": 0.1}
    table = heatmap({path: LayerChange(norm=1.0, relative=value) for path, value in sizes.items()})
    assert [line.split() for line in table.lines()] == [
        ["block", "self", "q", "mlp", "up"],
        ["2", "25.00", "-"],
        ["10", "-", "50.00"],
        ["condition_embedder", "10.00"],
    ]
    draw_heatmap(table, "a title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_the_picture_is_darker_where_the_change_is_larger(tmp_path):
    sizes = {f"layers.{i}.self_attn.{kind}_proj": 0.01 + 0.09 * (i == 3) for i in range(6) for kind in "qkvo"}
    table = heatmap({path: LayerChange(norm=1.0, relative=value) for path, value in sizes.items()})
    draw_heatmap(table, "a title", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        gray = torch.tensor(list(picture.convert("L").get_flattened_data())).reshape(picture.height, picture.width)
    column = gray[:, picture.width // 3].float()  # through the cells of one column
    dark = (column < 90).nonzero().flatten()
    assert len(dark) > 10
    assert dark.min() > 0.45 * picture.height, "block 3 of 0 to 5 lies below the middle"
    assert dark.max() < 0.85 * picture.height


def test_without_the_base_model_a_line_says_what_is_missing(adapters, tmp_path, caplog):
    text = inspected(caplog, adapters["dora"], f"checkpoint_dir={tmp_path}")
    assert "not compared with the base model: no acestep-v15-base/" in text
    assert "the change of a dora depends on the base model's weights, so no sizes are shown" in text
    assert not (adapters["dora"] / "inspect.png").exists()


def test_the_command_prints_the_picture_and_leaves_nothing_else(adapters, checkpoint_dir, tmp_path):
    shutil.copytree(adapters["oft"], tmp_path / "run/final")
    command = [sys.executable, "-m", "sidestep.inspect", "adapter_dir=run/final", f"checkpoint_dir={checkpoint_dir}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "run/final/inspect.png\n"), done.stderr
    assert "change in % of the base weight's norm" in done.stderr
    assert "Warning" not in done.stderr
    added = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} - {
        f"run/final/{path.name}" for path in adapters["oft"].iterdir()
    }
    assert added == {"run", "run/final", "run/final/inspect.png"}


def test_an_adapter_of_another_size_is_refused(adapters, tmp_path, caplog):
    from sidestep.acestep.toy import make_toy_checkpoint

    make_toy_checkpoint(tmp_path, train_config("model_variant=xl_base").model_variant)
    with pytest.raises(UserError, match="it belongs to another model_variant"):
        inspected(caplog, adapters["lora"], f"checkpoint_dir={tmp_path}", "model_variant=xl_base")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "is not a whole safetensors file"),
        ("cut", "is not a whole safetensors file"),
        ("foreign", "is no adapter"),
        ("nan", "holds NaN or infinity in "),
        ("header", "header entry sidestep that is not a JSON object"),
        ("plot", "cannot write .*; type plot=<another file>"),
    ],
)
def test_what_cannot_be_inspected_gives_one_line(adapters, tmp_path, caplog, damage, message):
    source, typed = tmp_path / "final", []
    if damage != "missing":
        shutil.copytree(adapters["lokr"], source)
        path = source / "lokr_weights.safetensors"
        tensors, header = load_file(path), {"lokr_config": read_adapter(path).metadata["lokr_config"]}
        if damage in ("empty", "cut"):
            path.write_bytes(path.read_bytes()[:-64] if damage == "cut" else b"")
        elif damage == "foreign":
            save_file({"model.embed.weight": torch.ones(2, 2)}, path)
        elif damage == "nan":
            save_file({key: tensor * float("nan") for key, tensor in tensors.items()}, path, header)
        elif damage == "header":
            save_file(tensors, path, header | {"sidestep": json.dumps([1])})
        else:
            (tmp_path / "file").write_text("", encoding="utf-8")
            typed = [f"plot={tmp_path / 'file/plot.png'}"]
    with pytest.raises(UserError, match=message) as caught:
        inspected(caplog, source, f"checkpoint_dir={tmp_path}", *typed)
    assert "\n" not in str(caught.value)
