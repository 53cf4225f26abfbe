"""The benchmarks run, and measure what they say."""

import json

import pytest
import torch

from benchmarks import loader, preprocess, scaling, step, sweep, trainer

TINY = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8,
}  # fmt: skip


def test_a_benchmark_measures_every_variant_and_writes_it(tmp_path, monkeypatch, capsys):
    tiny = step.Case(name="tiny", dtype="float32", num_tokens=40, sizes=TINY)
    monkeypatch.setitem(step.CASES, "toy", [tiny])
    step.main(["--cases", "toy", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "new" / "step.json")])
    (case,) = json.loads((tmp_path / "new" / "step.json").read_text())["cases"]
    rows = {row["variant"]: row for row in case["rows"]}
    assert list(rows) == list(step.VARIANTS)
    assert rows["floor"]["to_floor"] == 1
    for family in ("LoRA", "LoKr"):
        ours, usual = rows[family], rows[f"{family}, usual"]
        assert rows["floor"]["kept_mib"] < ours["kept_mib"] < usual["kept_mib"]
        assert rows[f"{family}, checkpointed"]["kept_mib"] < 0.5 * ours["kept_mib"]
    assert f"| LoKr | {rows['LoKr']['to_floor']:.2f} |" in capsys.readouterr().out


def test_the_variants_of_a_family_are_the_same_model():
    case = step.Case(name="tiny", dtype="float32", num_tokens=40, sizes=TINY)
    weights = step.random_weights(case, torch.device("cpu"))
    steps = {
        name: step.MicroStep(case, *variant, weights, torch.device("cpu")) for name, variant in step.VARIANTS.items()
    }
    floor = steps["floor"].transformer
    expected = floor(**steps["floor"].inputs, return_dict=False)[0]
    trained = {}
    for name, variant in steps.items():
        output = variant.transformer(**variant.inputs, return_dict=False)[0]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)  # no adapter has learnt anything yet
        parameters = [parameter for parameter in variant.transformer.parameters() if parameter.requires_grad]
        trained[name] = sum(parameter.numel() for parameter in parameters)
    assert trained["floor"] == 0
    assert trained["LoRA"] == trained["LoRA, usual, checkpointed"] > 0
    assert trained["LoKr"] == trained["LoKr, usual, checkpointed"] > 0


def test_the_trainer_is_compared_with_the_bare_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "SMALL", {})
    monkeypatch.setattr(trainer, "ADAPTERS", ("lora",))
    out = tmp_path / "trainer.json"
    trainer.main(["--repeats=1", "--steps", "1", "3", "--seconds=2", "--device=cpu", f"--out={out}"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["adapter"] == "lora"
    assert row["ratios"] == [row["ratio"]]
    assert f"| lora | {row['bare_seconds']:.3f} | {row['ratio']:.3f} |" in capsys.readouterr().out


def test_the_loader_is_measured_on_songs_in_real_sizes(tmp_path, capsys):
    out = tmp_path / "loader.json"
    loader.main(["--songs", "2", "--examples", "4", "--listed", "50", "--out", str(out)])
    results = json.loads(out.read_text())
    assert [row["excerpt_seconds"] for row in results["reading"]] == [30, 60, 60, 240]
    assert results["opening"]["songs"] == 50
    assert results["work_ms"] > 0
    assert results["checking"]["cpu_seconds_per_gb"] > 0
    room = results["room"]
    assert room["instrumental"]["times_less"] > 4  # 85 of 769 tokens are there, and no context
    assert room["sung"]["times_less"] > 2
    assert room["sung"]["mb_per_minute"] < room["densely sung"]["mb_per_minute"]
    assert "MB per minute" in capsys.readouterr().out


def test_growth_with_length_batch_rank_and_the_start_of_a_run_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SMALL", TINY)
    monkeypatch.setattr(scaling, "SECONDS", (10, 160))
    monkeypatch.setattr(scaling, "BATCH_SIZES", (1, 2))
    monkeypatch.setattr(scaling, "RANKS", (4, 256))
    # the real one takes minutes on a busy machine
    monkeypatch.setattr(scaling, "start_up", lambda repeats: {"seconds": 1.0, "cpu_seconds": 1.0})
    monkeypatch.setattr(scaling, "loading", lambda sizes: {"float32": 1.0})
    out = tmp_path / "scaling.json"
    scaling.main(["--repeats=1", "--device=cpu", f"--out={out}"])
    result = json.loads(out.read_text())
    kept = {(row["thing"], row["value"]): row["kept_mib"] for row in result["steps"]}
    assert kept["seconds", 160] > 3 * kept["seconds", 10]
    assert kept["batch size", 2] > 1.8 * kept["batch size", 1]
    assert kept["rank", 256] > kept["rank", 4]
    assert result["checkpoint"]["mib"] > 0
    assert f"| seconds | 160 | {result['steps'][1]['seconds_per_step']:.3f} |" in capsys.readouterr().out


@pytest.mark.slow
def test_each_part_of_a_condition_is_measured():
    with torch.no_grad():
        row = preprocess.real_words(torch.device("cpu"), layers=1)
    assert min(row[key] for key in ("captions_one_by_one", "captions_together", "lyrics", "reference")) > 0
    assert row["largest_difference"] < 1e-4


def test_preprocessing_is_measured_again_with_other_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "SONG_SECONDS", 2.0)
    out = tmp_path / "preprocess.json"
    preprocess.main(["--songs=2", "--device=cpu", f"--out={out}"])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["what"], row["songs_changed"]) for row in rows] == [
        ("first time", 2), ("nothing changed", 0), ("captions changed", 2),
    ]  # fmt: skip
    assert rows[0]["seconds"] > 0


def test_the_tables_of_a_large_sweep_are_measured(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"status": "finished", "step": 3}')
    sweep.main(["--run", str(tmp_path), "--points", "3", "--composed", "1"])
    assert "3 points: collected in" in capsys.readouterr().out
