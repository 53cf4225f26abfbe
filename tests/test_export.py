"""Exported files do in every player what the adapter did in training, or as near as the report says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.keymap import to_diffusers
from sidestep.adapters.convert import factorize, stand_in, svd_of
from sidestep.adapters.files import apply_adapters, read_adapter
from sidestep.errors import UserError
from sidestep.exporting.export import export
from sidestep.exporting.measure import _output
from sidestep.exporting.merged import write_merged
from tests.factories import ADAPTERS, export_config, train_config, write_adapter
from tests.golden import GOLDEN, golden_case, golden_transformer
from tests.players import play_with_comfyui, play_with_diffusers, play_with_peft
from tests.test_checkpoint import save_in_diffusers_layout

PLAYERS = {"lora": play_with_peft, "diffusers": play_with_diffusers, "comfyui": play_with_comfyui}
CPU = torch.device("cpu")


@pytest.fixture
def toy(checkpoint_dir):
    """The toy base checkpoint."""
    return find_checkpoint(checkpoint_dir, train_config("model_variant=base").model_variant)


def run_export(source: Path, checkpoint_dir: Path, tmp_path: Path, *typed: str) -> Path:
    return export(
        export_config(
            f"adapter_dir={source}", f"checkpoint_dir={checkpoint_dir}", f"output_dir={tmp_path / 'exported'}", *typed
        )
    )


def output(checkpoint, change=None):
    """The transformer's output for a fixed input, after ``change`` did something to the transformer."""
    transformer = checkpoint.load_transformer(device=CPU, dtype=torch.float32)
    if change is not None:
        change(transformer)
    return _output(transformer, checkpoint.config.encoder_hidden_size, checkpoint.silence())


def played(checkpoint, source, scale=1.0):
    return output(checkpoint, lambda transformer: apply_adapters(transformer, [(source, scale)]))


def record(path: Path) -> dict:
    folder = path if path.is_dir() else path.parent
    return json.loads((folder / "export.json").read_text(encoding="utf-8"))


# players


@pytest.mark.parametrize("format", PLAYERS)
@pytest.mark.parametrize("family", ADAPTERS)
def test_every_family_plays_the_same_in_every_player(adapters, toy, tmp_path, family, format):
    # a rank as large as the layer loses nothing but float32 rounding, so the output must be the adapter's own
    whole = [] if family.startswith("lora") else ["rank=64"]
    if format == "comfyui" and family in ("lokr", "lokr-full", "lokr-both", "loha"):
        whole = []
    result = run_export(
        adapters[family], toy.root, tmp_path, f"format={format}", "scale=0.5", "measure_output=false", *whole
    )
    expected = played(toy, adapters[family], 0.5)
    found = output(toy, lambda transformer: PLAYERS[format](transformer, result))
    effect = (expected - output(toy)).norm()
    assert effect > 0.05 * expected.norm()
    assert (found - expected).norm() < 1e-5 * effect + 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "player"),
    [
        ("lora-ranks", play_with_peft),
        ("lora-ranks", play_with_diffusers),
        ("lora-ranks", play_with_comfyui),
        ("dora", play_with_peft),
        ("dora", play_with_diffusers),
        ("lokr", play_with_comfyui),
        ("lokr-full", play_with_comfyui),
        ("lokr-both", play_with_comfyui),
        ("loha", play_with_comfyui),
        ("oft", play_with_peft),
    ],
)
def test_the_players_that_the_documentation_names_read_the_files_of_a_run(adapters, toy, family, player):
    (weights,) = adapters[family].glob("*.safetensors")
    place = weights if player is play_with_comfyui else adapters[family]
    found = output(toy, lambda transformer: player(transformer, place))
    torch.testing.assert_close(found, played(toy, adapters[family]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", PLAYERS)
@pytest.mark.parametrize("name", ["lora", "lokr_d2a4"])
def test_an_adapter_of_ace_steps_gives_ace_steps_output_in_every_player(tmp_path, name, format):
    rank = ["rank=64"] if name == "lokr_d2a4" and format != "comfyui" else []
    result = run_export(GOLDEN / "adapters" / name, tmp_path, tmp_path, f"format={format}", *rank)
    transformer, (inputs, _) = golden_transformer(), golden_case()
    PLAYERS[format](transformer, result)
    expected = load_file(GOLDEN / "adapters/outputs.safetensors")[f"{name}.out"]
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs).sample, expected, rtol=0, atol=1e-5)


def test_a_lora_folder_needs_no_export_and_export_changes_nothing_in_it(adapters, toy, tmp_path):
    result = run_export(adapters["lora-ranks"], toy.root, tmp_path, "format=lora")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapters["lora-ranks"], result))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for player in (play_with_peft, play_with_diffusers):
        found = output(toy, lambda transformer, player=player: player(transformer, result))
        torch.testing.assert_close(found, played(toy, adapters["lora-ranks"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["[v_proj]", "[mlp.up_proj,mlp.down_proj]"])
def test_diffusers_reads_a_lora_without_q_proj_only_after_the_export(checkpoint_dir, toy, tmp_path, targets):
    source = write_adapter(
        tmp_path / "final", checkpoint_dir, "adapter=lora", "adapter.rank=4", f"adapter.target_modules={targets}"
    )
    result = run_export(source, checkpoint_dir, tmp_path, "format=diffusers")
    found = output(toy, lambda transformer: play_with_diffusers(transformer, result))
    torch.testing.assert_close(found, played(toy, source), rtol=0, atol=1e-5)
    assert (found - output(toy)).norm() > 0.01 * found.norm()


def test_layers_outside_of_the_blocks_are_converted_too(toy, tmp_path, caplog):
    # ACE-Step's own trainer wraps every layer, also the convolution at the input
    settings = {"linear_dim": 4, "linear_alpha": 4, "factor": 4, "decompose_both": False}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "lycoris_proj_in_1.lokr_w1": torch.randn(4, 4, generator=generator) / 10,
        "lycoris_proj_in_1.lokr_w2": torch.randn(16, 48, 2, generator=generator) / 10,
        "lycoris_proj_in_1.alpha": torch.tensor(4.0),
        "lycoris_condition_embedder.lokr_w1": torch.randn(4, 4, generator=generator) / 10,
        "lycoris_condition_embedder.lokr_w2": torch.randn(16, 16, generator=generator) / 10,
        "lycoris_condition_embedder.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "lokr_weights.safetensors", {"lokr_config": json.dumps(settings)})
    caplog.set_level("INFO", "sidestep")
    expected = played(toy, tmp_path / "lokr_weights.safetensors")
    for format, rank in (("lora", ["rank=64"]), ("diffusers", ["rank=64"]), ("comfyui", [])):
        result = run_export(
            tmp_path / "lokr_weights.safetensors", toy.root, tmp_path, f"format={format}", *rank, "model_variant=base"
        )
        found = output(toy, lambda transformer, result=result, play=PLAYERS[format]: play(transformer, result))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert "ACE-Step and ComfyUI read this folder at strength 1; for diffusers use format=diffusers" in caplog.text


@pytest.mark.parametrize("format", PLAYERS)
@pytest.mark.parametrize("family", ["lora-ranks", "lokr", "loha"])
def test_what_was_exported_is_read_again_as_the_adapter_it_is(adapters, toy, tmp_path, family, format):
    rank = ["rank=16"] if family != "lora-ranks" and format != "comfyui" else []
    run_export(adapters[family], toy.root, tmp_path, f"format={format}", "scale=0.5", "measure_output=false", *rank)
    expected = played(toy, adapters[family], 0.5)
    if not rank:
        torch.testing.assert_close(played(toy, tmp_path / "exported"), expected, rtol=0, atol=2e-5)
    again = run_export(tmp_path / "exported", toy.root, tmp_path, "format=lora", f"output_dir={tmp_path / 'again'}")
    torch.testing.assert_close(played(toy, again), played(toy, tmp_path / "exported"), rtol=0, atol=0.02)


# conversion


def test_a_conversion_keeps_the_error_asked_for_with_the_smallest_ranks(adapters, toy, tmp_path):
    result = run_export(adapters["lokr"], toy.root, tmp_path, "format=lora", "max_error=0.2")
    source, report = read_adapter(adapters["lokr"]), record(result)
    tensors = load_file(result / "adapter_model.safetensors")
    ranks = set()
    for path, layer in report["layers"].items():
        b, a = (tensors[f"base_model.model.{path}.lora_{name}.weight"] for name in "BA")
        change = source.change(path, torch.zeros(b.shape[0], a.shape[1]))
        assert ((change - b @ a).norm() / change.norm()).item() == pytest.approx(layer["error"], abs=1e-5)
        assert layer["error"] <= 0.2
        assert len(a) == layer["rank"]
        assert len(a) == 1 or low_rank(change, len(a) - 1).error > 0.2
        ranks.add(len(a))
    assert len(ranks) > 1, "this test is to show that layers of different ranks load"

    exact, base = played(toy, adapters["lokr"]), output(toy)
    for player in (play_with_peft, play_with_diffusers):
        found = output(toy, lambda transformer, player=player: player(transformer, result))
        error = ((found - exact).norm() / (exact - base).norm()).item()
        assert error == pytest.approx(report["output_error"], rel=1e-3)
    assert 0.001 < report["output_error"] < 0.5


def test_a_lora_is_written_at_a_smaller_rank_when_asked(adapters, toy, tmp_path):
    result = run_export(adapters["lora"], toy.root, tmp_path, "format=lora", "rank=3")
    assert read_adapter(result).config.rank == 3
    assert all(0 < layer["error"] < 0.9 for layer in record(result)["layers"].values())


def low_rank(change, rank=None, max_error=0.5):
    return factorize(torch.linalg.svd(change, full_matrices=False), change.shape, rank=rank, max_error=max_error)


def test_the_best_product_of_a_rank_is_found():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(30, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    assert low_rank(low, max_error=1e-4).rank == 3
    assert low_rank(low, rank=8).error < 1e-6
    full = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    assert low_rank(full, rank=1).error == pytest.approx((5 / 21) ** 0.5)
    assert low_rank(full, max_error=0.49).rank == 1
    assert low_rank(torch.zeros(4, 5), max_error=0.1).error == 0
    assert low_rank(full, rank=1_000_000).rank == 3


@pytest.mark.parametrize("family", ["lora", "lokr", "lokr-full", "lokr-both", "loha"])
def test_the_change_is_decomposed_by_way_of_its_small_factors(adapters, monkeypatch, family):
    saved = read_adapter(adapters[family])
    path = "layers.0.mlp.up_proj" if "layers.0.mlp.up_proj" in saved.paths else "layers.0.self_attn.q_proj"
    weight, seen, svd = stand_in(saved, path), [], torch.linalg.svd
    expected = svd(saved.change(path, weight, -0.5), full_matrices=False)
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **how: seen.append(matrix.shape) or svd(matrix, **how))
    u, s, vh = svd_of(saved, path, weight, -0.5)
    assert all(max(shape) <= 32 for shape in seen)  # of a 64x64 weight
    torch.testing.assert_close(u @ s.diag() @ vh, saved.change(path, weight, -0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(s, expected.S[: len(s)], rtol=1e-4, atol=1e-5)
    assert torch.equal(s, s.sort(descending=True).values)


def test_a_rank_beyond_that_of_a_lora_adds_nothing_to_it(adapters, toy, tmp_path):
    result = run_export(adapters["lora"], toy.root, tmp_path, "format=lora", "rank=100000", "measure_output=false")
    assert read_adapter(result).config.rank == 4


def test_a_conversion_larger_than_the_layer_is_pointed_out(adapters, toy, tmp_path, caplog):
    run_export(adapters["dora"], toy.root, tmp_path, "format=lora", "max_error=1e-6", "measure_output=false")
    assert "the LoRA is larger than the layer itself" in caplog.text
    assert record(tmp_path / "exported")["output_error"] is None


def test_a_conversion_works_without_the_checkpoint_and_says_what_is_not_measured(adapters, tmp_path, caplog):
    caplog.set_level("INFO", "sidestep")
    result = run_export(adapters["lokr"], tmp_path / "nowhere", tmp_path, "format=lora", "max_error=0.2")
    assert record(result)["output_error"] is None
    assert "the error in the model's output is not measured: no acestep-v15-base/" in caplog.text
    with pytest.raises(UserError, match="no acestep-v15-base/"):
        run_export(adapters["dora"], tmp_path / "nowhere", tmp_path, "format=lora", f"output_dir={tmp_path / 'dora'}")


def test_the_output_says_where_it_came_from_and_names_no_place(adapters, toy, tmp_path, caplog):
    caplog.set_level("INFO", "sidestep")
    for format in ("lora", "diffusers", "comfyui"):
        result = run_export(adapters["oft"], toy.root, tmp_path, f"format={format}", "scale=0.5", "rank=8")
        (path,) = [result] if result.is_file() else result.glob("*.safetensors")
        with safe_open(path, "pt") as file:
            header = file.metadata()
        done = json.loads(header["sidestep_export"])
        assert json.loads(header["sidestep"])["step"] == 12
        assert (done["family"], done["format"], done["scale"]) == ("oft", format, 0.5)
        assert 0 < done["worst_error"] < 1
        for written in (tmp_path / "exported").iterdir():
            assert str(tmp_path).encode() not in written.read_bytes()
    assert "self_attn.q_proj" in caplog.text
    assert "In the model's output" in caplog.text


# the whole checkpoint


@pytest.mark.parametrize("family", ADAPTERS)
def test_a_merged_checkpoint_is_the_model_with_the_adapter(adapters, toy, tmp_path, family):
    result = run_export(adapters[family], toy.root, tmp_path, "format=merged", "scale=0.5")
    merged = find_checkpoint(result, toy.variant)
    saved = read_adapter(adapters[family])
    before, after = (c.load_transformer(device=CPU, dtype=torch.float32).state_dict() for c in (toy, merged))
    changed = {f"{to_diffusers(path)}.weight": path for path in saved.paths}
    for name, weight in before.items():
        expected = saved.merged_weight(changed[name], weight, 0.5).bfloat16().float() if name in changed else weight
        assert torch.equal(after[name], expected), name

    # each weight is off by at most one part in 256 of itself, as the base model's own are; the adapter does far more
    expected, base = played(toy, adapters[family], 0.5), output(toy)
    assert (output(merged) - expected).norm() < 0.05 * (expected - base).norm()


def test_a_merged_checkpoint_has_the_layout_of_its_source(adapters, toy, tmp_path):
    shutil.copytree(toy.root, tmp_path / "models")
    toy = find_checkpoint(tmp_path / "models", toy.variant)
    (toy.folder / "configuration_acestep_v15.py").write_text("# code", encoding="utf-8")
    result = run_export(adapters["lora"], toy.root, tmp_path, "format=merged")
    merged = find_checkpoint(result, toy.variant)
    for folder in ("acestep-v15-base", "vae", "Qwen3-Embedding-0.6B"):
        names = {path.name for path in (toy.root / folder).iterdir()}
        assert {path.name for path in (result / folder).iterdir()} == names
        for name in names - {"model.safetensors"} if folder == "acestep-v15-base" else names:
            assert (result / folder / name).read_bytes() == (toy.root / folder / name).read_bytes()
    headers = []
    for checkpoint in (toy, merged):
        with safe_open(checkpoint.folder / "model.safetensors", "pt") as file:
            keys = list(file.keys())
            types = {key: (file.get_tensor(key).dtype, file.get_tensor(key).shape) for key in keys}
            headers.append((file.metadata(), types))
    assert headers[0][1] == headers[1][1]
    assert headers[1][0]["format"] == "pt"
    assert json.loads(headers[1][0]["sidestep_export"])["format"] == "merged"
    for part in ("condition_encoder", "vae", "text_encoder"):
        assert merged.fingerprint(part) == toy.fingerprint(part)
    assert merged.fingerprint("transformer") != toy.fingerprint("transformer")


def test_a_checkpoint_in_shards_is_merged_shard_by_shard(checkpoint_dir, tmp_path):
    from sidestep.acestep.toy import make_toy_checkpoint

    variant = train_config("model_variant=xl_base").model_variant
    make_toy_checkpoint(tmp_path / "models", variant)
    source = write_adapter(tmp_path / "final", tmp_path / "models", "adapter=lokr", "adapter.rank=2", variant="xl_base")
    result = run_export(source, tmp_path / "models", tmp_path, "format=merged")
    toy, merged = (find_checkpoint(root, variant) for root in (tmp_path / "models", result))
    shards = sorted(path.name for path in toy.folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(path.name for path in merged.folder.glob("*.safetensors")) == shards
    expected, base = played(toy, source), output(toy)
    assert (output(merged) - expected).norm() < 0.05 * (expected - base).norm()


def test_a_checkpoint_in_diffusers_layout_stays_in_it(adapters, toy, tmp_path):
    save_in_diffusers_layout(toy, tmp_path / "model")
    result = run_export(adapters["lora"], tmp_path / "model", tmp_path, "format=merged")
    merged = find_checkpoint(result, toy.variant)
    assert merged.in_diffusers_layout
    # this copy is float32
    torch.testing.assert_close(output(merged), played(toy, adapters["lora"]), rtol=0, atol=1e-5)


def anonymous_megabytes() -> float:
    """Memory of this process that no file backs: what was read by mapping a file is not counted."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


@contextmanager
def growth_watched() -> Iterator[list[float]]:
    """Measure memory all the time in a thread; the list then holds by how many megabytes it was above the start."""
    start, growth, done = anonymous_megabytes(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            growth.append(anonymous_megabytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield growth
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell the kinds of memory apart")
def test_merging_holds_one_tensor_at_a_time(toy, tmp_path):
    source = tmp_path / "models" / toy.folder.name / "model.safetensors"
    shutil.copytree(toy.folder, source.parent)
    keys = [f"decoder.layers.{i}.self_attn.q_proj.weight" for i in range(48)]
    save_file({key: torch.ones(1024, 2048, dtype=torch.bfloat16) for key in keys}, source, {"format": "pt"})
    assert source.stat().st_size > 190e6
    checkpoint = find_checkpoint(tmp_path / "models", toy.variant)
    (tmp_path / "out").mkdir()
    with growth_watched() as growth:
        changed = {(source, key): lambda weight, dtype: (2 * weight).to(dtype) for key in keys}
        write_merged(checkpoint, tmp_path / "out", changed, {})
    assert len(growth) > 20
    assert max(growth) < 60  # a tensor has 4 MB, 8 MB in float32, and there are some copies of it
    with safe_open(tmp_path / "out" / toy.folder.name / "model.safetensors", "pt") as file:
        assert all(bool((file.get_tensor(key) == 2).all()) for key in (keys[0], keys[-1]))


# what is refused


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("format=merged", "rank=4"), "rank=4 has no effect on format=merged"),
        (("format=lora", "scale=0"), "scale=0 would write an adapter that does nothing"),
        (("format=lora", "scale=nan"), "scale=nan must be a"),
        (("format=lora", "max_error=0"), "max_error=0.0 must be above 0"),
        (("format=lora", "rank=0"), "rank=0 must be at least 1"),
        (("format=gguf",), "format=gguf: Invalid value 'gguf', expected one of"),
        ((), "format must be set"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(typed, message):
    with pytest.raises(UserError, match=message) as caught:
        export_config("adapter_dir=final", *typed)
    assert "\n" not in str(caught.value)


def test_a_folder_with_other_things_in_it_is_not_written_over(adapters, toy, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/song.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"is not an exported adapter \(it holds song\.txt\); choose another"):
        run_export(adapters["lora"], toy.root, tmp_path, "format=lora")
    with pytest.raises(UserError, match="holds adapter_dir="):
        run_export(adapters["lora"], toy.root, tmp_path, "format=lora", f"output_dir={adapters['lora']}")
    with pytest.raises(UserError, match="lies in the base model's own folder"):
        run_export(adapters["lora"], toy.root, tmp_path, "format=merged", f"output_dir={toy.folder / 'merged'}")
    with pytest.raises(UserError, match="holds checkpoint_dir="):
        run_export(adapters["lora"], toy.root, tmp_path, "format=merged", f"output_dir={toy.root}")
    run_export(adapters["lora"], toy.root, tmp_path, "format=lora", f"output_dir={tmp_path / 'again'}")
    run_export(adapters["lora"], toy.root, tmp_path, "format=diffusers", f"output_dir={tmp_path / 'again'}")
    assert not (tmp_path / "again/adapter_config.json").exists()


def test_an_export_is_written_over_an_earlier_one_of_the_same_adapter_alone(adapters, toy, tmp_path):
    result = run_export(adapters["lokr"], toy.root, tmp_path, "format=comfyui")
    with pytest.raises(UserError, match=r"exported holds the export of another adapter \(it holds .*; choose another"):
        run_export(adapters["loha"], toy.root, tmp_path, "format=comfyui")
    downloaded = tmp_path / "exported/downloaded.safetensors"
    downloaded.write_bytes(b"another's")
    with pytest.raises(UserError, match=r"holds downloaded\.safetensors, which export did not write; move it"):
        run_export(adapters["lokr"], toy.root, tmp_path, "format=comfyui")
    assert sorted(entry.name for entry in result.parent.iterdir()) == [
        "downloaded.safetensors",
        "export.json",
        result.name,
    ]
    downloaded.unlink()
    assert run_export(adapters["lokr"], toy.root, tmp_path, "format=comfyui") == result
    for damaged in ("{", "[1]", '{"origin": 5, "files": [[]]}'):
        (tmp_path / "exported/export.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match="is not an exported adapter"):
            run_export(adapters["lokr"], toy.root, tmp_path, "format=comfyui")


def test_an_export_beside_its_adapter_is_written_again_where_both_were_moved(adapters, toy, tmp_path):
    shutil.copytree(adapters["lokr"], tmp_path / "run/final")
    typed = ("format=comfyui", "output_dir=null")
    run_export(tmp_path / "run/final", toy.root, tmp_path, *typed)
    (tmp_path / "run").rename(tmp_path / "moved")
    result = run_export(tmp_path / "moved/final", toy.root, tmp_path, *typed)
    assert sorted(path.name for path in result.parent.iterdir()) == ["export.json", "moved-final.safetensors"]


def test_what_is_put_into_the_folder_while_an_export_runs_is_not_lost(adapters, toy, tmp_path, monkeypatch):
    run_export(adapters["lokr"], toy.root, tmp_path, "format=comfyui")

    def write(path, *_):
        (tmp_path / "exported/new.safetensors").write_bytes(b"another's")
        return path

    monkeypatch.setattr("sidestep.exporting.export.write_comfyui_lycoris", write)
    with pytest.raises(UserError, match=r"holds new\.safetensors, which export did not write"):
        run_export(adapters["lokr"], toy.root, tmp_path, "format=comfyui")
    assert (tmp_path / "exported/new.safetensors").exists()


def test_a_place_that_cannot_be_written_gives_one_line(adapters, toy, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write .*type output_dir=") as caught:
        run_export(adapters["lora"], toy.root, tmp_path, "format=lora", f"output_dir={tmp_path / 'file/out'}")
    assert "\n" not in str(caught.value)


def test_an_export_that_fails_leaves_nothing_behind(adapters, toy, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(toy.root, models)
    path = models / "acestep-v15-base/model.safetensors"
    weights = load_file(path)
    weights["decoder.layers.2.cross_attn.v_proj.weight"] = torch.ones(16, 64, dtype=torch.bfloat16)
    save_file(weights, path)
    with pytest.raises(UserError, match=r"has layers\.2\.cross_attn\.v_proj of size 32x64 where 16x64 is needed"):
        run_export(adapters["lora"], models, tmp_path, "format=merged")
    assert {entry.name for entry in tmp_path.iterdir()} == {"models"}


def test_an_adapter_that_does_nothing_is_refused(checkpoint_dir, toy, tmp_path):
    source = write_adapter(tmp_path / "final", checkpoint_dir, "adapter=lora", "adapter.rank=2")
    path = source / "adapter_model.safetensors"
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(path).items()}, path)
    for format in ("lora", "merged"):
        with pytest.raises(UserError, match="changes no weight, so there is nothing to write"):
            run_export(source, checkpoint_dir, tmp_path, f"format={format}", "model_variant=base")


def test_an_adapter_that_names_no_model_needs_one_typed(adapters, toy, tmp_path):
    source = tmp_path / "final"
    shutil.copytree(adapters["lora"], source)
    path = source / "adapter_model.safetensors"
    save_file(load_file(path), path)
    with pytest.raises(UserError, match=r"does not say which model it was trained on; type model_variant="):
        run_export(source, toy.root, tmp_path, "format=merged")
    run_export(source, toy.root, tmp_path, "format=merged", "model_variant=base")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda key, tensor: tensor[:, :2] if "lora_B" in key else tensor, "do not fit together"),
        (lambda key, tensor: tensor * 1e25, "so large that at strength 1 they are not finite"),
        (lambda key, tensor: torch.cat([tensor, tensor]) if "lora_B" in key else tensor, "is needed; it belongs to"),
    ],
    ids=["inner sizes", "overflow", "another model"],
)
@pytest.mark.parametrize("format", ["lora", "comfyui", "merged"])
def test_a_lora_that_would_not_play_is_not_written(adapters, toy, tmp_path, spoil, message, format):
    source = tmp_path / "final"
    shutil.copytree(adapters["lora"], source)
    path = source / "adapter_model.safetensors"
    save_file({key: spoil(key, tensor).contiguous() for key, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=message):
        run_export(source, toy.root, tmp_path, f"format={format}", "model_variant=base")
    assert not (tmp_path / "exported").exists()


def test_a_strength_beyond_the_numbers_of_the_file_is_refused(adapters, toy, tmp_path):
    with pytest.raises(UserError, match=r"scale=1e\+39 is too large; it may be 10000 at most"):
        run_export(adapters["lokr"], toy.root, tmp_path, "format=merged", "scale=1e39")
    assert not (tmp_path / "exported").exists()


def test_a_measurement_that_fails_does_not_throw_the_conversion_away(adapters, toy, tmp_path, monkeypatch, caplog):
    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(toy), "load_transformer", no_memory)
    result = run_export(adapters["lokr"], toy.root, tmp_path, "format=lora", "rank=2")
    assert read_adapter(result).config.rank == 2
    assert record(result)["output_error"] is None
    assert "the error in the model's output is not measured: the model cannot be run on cpu: CUDA out of" in caplog.text


def test_a_merged_checkpoint_holds_what_its_source_only_links_to(adapters, toy, tmp_path):
    save_in_diffusers_layout(toy, tmp_path / "model")
    for name in ("transformer", "vae"):
        (tmp_path / "model" / name).rename(tmp_path / name)
        (tmp_path / "model" / name).symlink_to(tmp_path / name)
    result = run_export(adapters["lora"], tmp_path / "model", tmp_path, "format=merged")
    assert {path.name for path in result.iterdir()} == {path.name for path in (tmp_path / "model").iterdir()} | {
        "export.json"
    }
    torch.testing.assert_close(
        output(find_checkpoint(result, toy.variant)), played(toy, adapters["lora"]), rtol=0, atol=1e-5
    )


def test_an_adapter_of_another_checkpoint_is_pointed_out(adapters, checkpoint_dir, tmp_path, caplog):
    run_export(adapters["lora"], checkpoint_dir, tmp_path, "format=merged", "model_variant=turbo")
    assert "was trained on another model (base) than the one in" in caplog.text


def test_an_adapter_for_a_model_of_another_size_is_refused(adapters, tmp_path):
    from sidestep.acestep.toy import make_toy_checkpoint

    make_toy_checkpoint(tmp_path / "models", train_config("model_variant=xl_base").model_variant)
    for family in ADAPTERS:
        with pytest.raises(UserError, match=r"where \d+x\d+ is needed|do not fit together|another model_variant"):
            run_export(adapters[family], tmp_path / "models", tmp_path, "format=merged", "model_variant=xl_base")


@pytest.mark.parametrize("damage", ["empty", "cut", "html", "foreign", "nan"])
def test_a_file_that_is_no_adapter_gives_one_line(adapters, toy, tmp_path, damage):
    source = tmp_path / "final"
    shutil.copytree(adapters["lokr"], source)
    path = source / "lokr_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    if damage == "nan":
        save_file({key: tensor * float("nan") for key, tensor in tensors.items()}, path, header)
    elif damage == "foreign":
        save_file({"model.embed.weight": torch.ones(2, 2)}, path)
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-64], "html": b"<html>Not found</html>"}[damage])
    with pytest.raises(UserError, match=str(path)) as caught:
        run_export(source, toy.root, tmp_path, "format=comfyui")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_the_command_prints_what_to_point_a_player_at(adapters, checkpoint_dir, tmp_path):
    shutil.copytree(adapters["lokr"], tmp_path / "run/final")
    command = [sys.executable, "-m", "sidestep.export", "adapter_dir=run/final", f"checkpoint_dir={checkpoint_dir}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    start = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = start([*command, "format=comfyui"])
    assert (done.returncode, done.stdout.strip()) == (0, "run/final-comfyui/run-final.safetensors"), done.stderr
    assert (tmp_path / done.stdout.strip()).is_file()
    assert "put this file into ComfyUI's models/loras" in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"], "no folders of Hydra's"

    failed = start([*command, "format=lora", "model_variant=sft"])
    assert failed.returncode == 0, "the adapter does not depend on the weights"
    failed = start([*command, "format=merged", "model_variant=sft"])
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "no acestep-v15-sft/ in" in failed.stderr
