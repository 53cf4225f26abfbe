"""The benchmarks run, and measure what they say."""

import json

import torch

from benchmarks import loader, step, trainer

TINY = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8,
}  # fmt: skip


def test_a_benchmark_measures_every_variant_and_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "TOY", step.Case(name="tiny", dtype="float32", num_tokens=40, sizes=TINY))
    step.main(["--toy", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "new" / "step.json")])
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
    torch.manual_seed(0)
    weights = step.AceStepTransformer1DModel(**TINY).state_dict()
    steps = {name: step.MicroStep(case, name, weights, torch.device("cpu")) for name in step.VARIANTS}
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
    room = results["room"]
    assert room["instrumental"]["times_less"] > 4  # 85 of 769 tokens are there, and no context
    assert room["sung"]["times_less"] > 2
    assert room["sung"]["mb_per_minute"] < room["densely sung"]["mb_per_minute"]
    assert "MB per minute" in capsys.readouterr().out
