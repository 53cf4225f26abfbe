import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from sidestep.acestep.checkpoint import PARTS, find_checkpoint
from sidestep.acestep.toy import make_toy_checkpoint, make_toy_songs
from sidestep.acestep.weight_files import open_safetensors
from sidestep.errors import UserError
from tests.golden_condition import VARIANTS, variant_named

NAMES = ["turbo", "base", "sft", "xl_turbo", "xl_base", "xl_sft"]
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name in NAMES:
        make_toy_checkpoint(root, variant_named(name))
    return root


@pytest.fixture
def toy_copy(toys, tmp_path):
    """A checkpoint folder of the base toy that a test may damage."""
    for name in ("acestep-v15-base", "vae", "Qwen3-Embedding-0.6B"):
        shutil.copytree(toys / name, tmp_path / name)
    return tmp_path


def load_part(checkpoint, part):
    loaded = getattr(checkpoint, f"load_{part}")(**CPU)
    return loaded[1] if part == "text_encoder" else loaded


def save_in_diffusers_layout(checkpoint, folder, **options):
    for part in PARTS:
        load_part(checkpoint, part).save_pretrained(folder / part, **options)
    checkpoint.load_text_encoder(**CPU)[0].save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "AceStepPipeline"}', encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_composes_with_its_schema(name):
    with initialize_config_dir(version_base="1.3", config_dir=str(VARIANTS.parent)):
        config = compose(overrides=[f"+model_variant={name}"])
    assert OmegaConf.to_object(config.model_variant) == variant_named(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_a_toy_loads_and_the_transformer_runs(toys, name):
    checkpoint = find_checkpoint(toys, variant_named(name))
    tokenizer, text_encoder = checkpoint.load_text_encoder(**CPU)
    condition_encoder = checkpoint.load_condition_encoder(**CPU)
    transformer = checkpoint.load_transformer(**CPU)
    vae = checkpoint.load_vae(**CPU)

    ids = torch.tensor([tokenizer("bright pop").input_ids])
    assert ids[0, -1] == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    valid = torch.ones_like(ids, dtype=torch.bool)
    silence = checkpoint.silence()
    assert silence.shape == (15_000, 64)
    with torch.no_grad():
        text = text_encoder(ids).last_hidden_state
        lyrics = text_encoder.get_input_embeddings()(ids)
        reference = silence[None, :750]
        condition, _ = condition_encoder(text, valid, lyrics, valid, reference, torch.tensor([0]))
        assert condition.shape[2] == checkpoint.config.encoder_hidden_size == checkpoint.null_condition().shape[1]
        latents = vae.encode(torch.zeros(1, 2, 48_000)).latent_dist.mode().mT
        assert latents.shape == (1, 25, 64)
        context = torch.cat([silence[None, :25], torch.ones(1, 25, 64)], dim=2)
        t = torch.tensor([0.5])
        velocity = transformer(latents, t, t, condition, context, return_dict=False)[0]
    assert velocity.shape == latents.shape
    assert 0.3 < velocity.std() < 3
    for part in (transformer, condition_encoder, vae, text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(tensor.is_meta for tensor in part.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_part_has_the_dtype_asked_for(toys, dtype):
    checkpoint = find_checkpoint(toys, variant_named("base"))
    for part in PARTS:
        loaded = getattr(checkpoint, f"load_{part}")(device=torch.device("cpu"), dtype=dtype)
        model = loaded[1] if part == "text_encoder" else loaded
        assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}


@pytest.mark.parametrize("name", ["base", "xl_turbo"])
def test_both_layouts_hold_the_same_weights_and_fingerprints(toys, tmp_path, name):
    original = find_checkpoint(toys, variant_named(name))
    save_in_diffusers_layout(original, tmp_path / "model", max_shard_size="500KB")
    converted = find_checkpoint(tmp_path / "model", variant_named(name))

    assert converted.in_diffusers_layout
    assert not original.in_diffusers_layout
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 1
    for part in PARTS:
        expected, actual = load_part(original, part).state_dict(), load_part(converted, part).state_dict()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert converted.fingerprint(part) == original.fingerprint(part)
    assert torch.equal(converted.silence(), original.silence())
    assert torch.equal(converted.null_condition(), original.null_condition())


def test_the_config_survives_diffusers_layout(toys, tmp_path):
    original = find_checkpoint(toys, variant_named("xl_sft"))
    save_in_diffusers_layout(original, tmp_path / "acestep-v15-xl-sft-diffusers")
    assert find_checkpoint(tmp_path, variant_named("xl_sft")).config == original.config


def test_fingerprints_tell_variants_and_single_values_apart(toys, toy_copy):
    prints = {find_checkpoint(toys, variant_named(name)).fingerprint("transformer") for name in NAMES}
    assert len(prints) == len(NAMES)

    base = find_checkpoint(toy_copy, variant_named("base"))
    before = {part: base.fingerprint(part) for part in PARTS}
    weights = load_file(base.folder / "model.safetensors")
    weights["encoder.lyric_encoder.norm.weight"][3] += 1
    save_file(weights, base.folder / "model.safetensors")
    assert [part for part in PARTS if base.fingerprint(part) != before[part]] == ["condition_encoder"]


def test_only_xl_models_pool_a_learned_token_in_front_of_the_reference(toys):
    for name, is_used in (("base", False), ("xl_base", True)):
        timbre = find_checkpoint(toys, variant_named(name)).load_condition_encoder(**CPU).timbre_encoder
        reference = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            pooled = timbre(reference, torch.tensor([0]))[0]
            embedded = timbre.embed_tokens(reference)
            timbre.embed_tokens = torch.nn.Identity()
            assert torch.equal(timbre(embedded, torch.tensor([0]))[0], pooled)
        assert embedded.shape[1] == (31 if is_used else 30)
        assert torch.equal(embedded[:, :1], timbre.special_token) is is_used


def test_a_part_is_read_without_the_files_of_the_others(toy_copy):
    shutil.rmtree(toy_copy / "vae")
    shutil.rmtree(toy_copy / "Qwen3-Embedding-0.6B")
    (toy_copy / "acestep-v15-base" / "silence_latent.pt").unlink()
    find_checkpoint(toy_copy, variant_named("base")).load_transformer(**CPU)


def test_a_missing_vae_says_where_to_get_one(toy_copy):
    shutil.rmtree(toy_copy / "vae")
    with pytest.raises(UserError, match=r"/vae/ is missing; get it with python scripts/download_checkpoint\.py base "):
        find_checkpoint(toy_copy, variant_named("base")).load_vae(**CPU)


def test_the_models_own_folder_is_accepted_as_checkpoint_dir(toys):
    checkpoint = find_checkpoint(toys / "acestep-v15-base", variant_named("base"))
    assert checkpoint.root == toys
    checkpoint.load_vae(**CPU)


def test_silence_beside_the_model_folders_is_found(toy_copy):
    shutil.move(toy_copy / "acestep-v15-base" / "silence_latent.pt", toy_copy)
    assert find_checkpoint(toy_copy, variant_named("base")).silence().shape == (15_000, 64)


@pytest.mark.parametrize(
    "silence",
    [
        torch.empty(1, 64, 15_000, device="meta"),
        torch.zeros(1, 64, 800).to_sparse(),
        torch.zeros(1, 1, 1).expand(1, 64, 2**36),
    ],
)
def test_silence_that_is_no_plain_tensor_is_refused(toy_copy, silence):
    torch.save(silence, toy_copy / "acestep-v15-base" / "silence_latent.pt")
    with pytest.raises(UserError, match=r"silence_latent\.pt holds no tensor of shape"):
        find_checkpoint(toy_copy, variant_named("base")).silence()


def test_silence_that_was_saved_for_training_is_only_read(toy_copy):
    torch.save(torch.zeros(1, 64, 15_000, requires_grad=True), toy_copy / "acestep-v15-base" / "silence_latent.pt")
    assert not find_checkpoint(toy_copy, variant_named("base")).silence().requires_grad


def test_a_missing_checkpoint_says_where_to_get_one(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path, variant_named("base"))
    assert str(error.value) == (
        f"no acestep-v15-base/ in {tmp_path} (it holds vae); get it with python scripts/download_checkpoint.py base "
        f"--checkpoint-dir {tmp_path}, or try experiment=demo, which needs no download"
    )


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        ("turbo", "base", r"is a turbo model \(is_turbo=true, .*not base; use model_variant=turbo or another"),
        ("xl_base", "sft", r"is an XL base or sft model .*hidden_size=96.*not sft; use model_variant=xl_base or"),
        ("base", "xl_turbo", r"is a base or sft model .*not xl_turbo; use model_variant=base or"),
    ],
)
def test_another_variants_model_is_refused(toys, held, asked, message):
    with pytest.raises(UserError, match=message):
        find_checkpoint(toys / variant_named(held).folder, variant_named(asked))


def edit_weights(change, path="acestep-v15-base/model.safetensors"):
    def damage(root: Path) -> None:
        weights = load_file(root / path)
        change(weights)
        save_file(weights, root / path, metadata={"format": "pt"})

    return damage


def edit_config(change, path="acestep-v15-base/config.json"):
    def damage(root: Path) -> None:
        values = json.loads((root / path).read_text(encoding="utf-8"))
        change(values)
        (root / path).write_text(json.dumps(values), encoding="utf-8")

    return damage


def overwrite(path, content):
    def damage(root: Path) -> None:
        (root / path).write_bytes(content((root / path).read_bytes()) if callable(content) else content)

    return damage


def remove(path):
    return lambda root: (root / path).unlink()


def split(change):
    """Put the weights into one shard with an index of them, and ``change`` either."""

    def damage(root: Path) -> None:
        folder, shard = root / "acestep-v15-base", "model-00001-of-00001.safetensors"
        weights = load_file(folder / "model.safetensors")
        weight_map = dict.fromkeys(weights, shard)
        change(weight_map, weights)
        (folder / "model.safetensors").unlink()
        if weights:
            save_file(weights, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")

    return damage


MODEL, CONFIG, SILENCE = (
    f"acestep-v15-base/{name}" for name in ("model.safetensors", "config.json", "silence_latent.pt")
)
VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "Qwen3-Embedding-0.6B"
HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"


@pytest.mark.parametrize(
    ("damage", "part", "message"),
    [
        (edit_weights(lambda w: w.pop("decoder.layers.1.self_attn.q_proj.weight")), "transformer",
         r"acestep-v15-base lacks the weight decoder\.layers\.1\.self_attn\.q_proj\.weight"),
        (edit_weights(lambda w: w.pop("null_condition_emb")), "condition_encoder",
         "acestep-v15-base lacks the weight null_condition_emb"),
        (edit_weights(lambda w: w.update({"decoder.extra.weight": torch.ones(1)})), "transformer",
         r"model\.safetensors holds decoder\.extra\.weight, which AceStepTransformer1DModel has no place for"),
        (edit_weights(lambda w: w.update({"lora.weight": torch.ones(1)})), "transformer",
         r"model\.safetensors holds lora\.weight, which is no part of an ACE-Step 1\.5 model"),
        (edit_weights(lambda w: w.update({"decoder.norm_out.weight": torch.ones(7)})), "transformer",
         r"decoder\.norm_out\.weight has shape \(7,\), but the config asks for \(64,\)"),
        (overwrite(MODEL, lambda whole: whole[: len(whole) // 2]), "transformer", r"model\.safetensors is damaged"),
        (overwrite(MODEL, HTML), "transformer", r"model\.safetensors is damaged or not a safetensors file"),
        (overwrite(MODEL, b"\xff" * 7 + b"\x7f{}"), "transformer", r"model\.safetensors is damaged"),
        (overwrite(MODEL, b""), "condition_encoder", r"model\.safetensors is damaged"),
        (split(lambda weight_map, weights: weights.clear()), "transformer",
         r"model-00001-of-00001\.safetensors is missing, but model\.safetensors\.index\.json names it"),
        (remove(SILENCE), "condition_encoder", r"silence_latent\.pt is missing"),
        (overwrite(SILENCE, HTML), "condition_encoder", r"silence_latent\.pt is damaged or not a tensor file"),
        (lambda root: torch.save(torch.zeros(1, 15_000, 64), root / SILENCE), "condition_encoder",
         r"silence_latent\.pt: the silence latent has shape"),
        (remove("vae/config.json"), "vae", r"vae/config\.json is missing"),
        (edit_config(lambda c: c.pop("sampling_rate"), "vae/config.json"), "vae",
         r"vae/config\.json has no sampling_rate"),
        (edit_config(lambda c: c.update(sampling_rate=44_100), "vae/config.json"), "vae",
         "1920 samples per frame at 44100 Hz, expected 1920 at"),
        (overwrite(VAE, HTML), "vae", r"diffusion_pytorch_model\.safetensors is damaged"),
        (remove(f"{TEXT}/tokenizer.json"), "text_encoder", r"tokenizer\.json is missing"),
        (remove(f"{TEXT}/model.safetensors"), "text_encoder", r"0\.6B/model\.safetensors is missing"),
        (overwrite(f"{TEXT}/model.safetensors", HTML), "text_encoder", r"0\.6B/model\.safetensors is damaged"),
        (edit_weights(lambda w: w.pop("layers.1.mlp.up_proj.weight"), f"{TEXT}/model.safetensors"), "text_encoder",
         r"0\.6B lacks the weight layers\.1\.mlp\.up_proj\.weight"),
        (edit_config(lambda c: c.update(hidden_size=32), f"{TEXT}/config.json"), "text_encoder",
         r"0\.6B/model\.safetensors: [\w.]+ has shape \(\d+(, \d+)?,?\), but the config asks for"),
        (edit_config(lambda c: c.update(text_hidden_dim=48)), "text_encoder",
         r"0\.6B has width 64, but .*acestep-v15-base reads text of width 48"),
        (overwrite(f"{TEXT}/tokenizer.json", b"{}"), "text_encoder", r"tokenizer\.json is damaged or another model's"),
        (edit_config(lambda c: c.update(model="x"), f"{TEXT}/tokenizer.json"), "text_encoder",
         r"tokenizer\.json is damaged or another model's"),
        (overwrite(f"{TEXT}/config.json", b"{}"), "text_encoder", r"0\.6B/config\.json has no vocab_size"),
        (edit_config(lambda c: c.update(num_key_value_heads=0), f"{TEXT}/config.json"), "text_encoder",
         r"0\.6B/config\.json: num_key_value_heads must be from 1 to \d+, found 0"),
        (edit_config(lambda c: c.update(hidden_act="zz"), f"{TEXT}/config.json"), "text_encoder",
         r"0\.6B/config\.json is damaged or another model's"),
        (edit_config(lambda c: c.update(downsampling_ratios="abc"), "vae/config.json"), "vae",
         r"vae/config\.json: downsampling_ratios must be from 1 to \d+, found 'abc'"),
        (edit_config(lambda c: c.update(channel_multiples=[1]), "vae/config.json"), "vae",
         r"vae/config\.json is damaged or another model's"),
        (lambda root: torch.save(torch.zeros(1, 64, 0), root / SILENCE), "condition_encoder",
         r"silence_latent\.pt: the silence latent has 0 frames, expected at least 750"),
        (overwrite(SILENCE, b"."), "condition_encoder", r"silence_latent\.pt is damaged or not a tensor file"),
        (lambda root: torch.save(torch.zeros(1, 64, 10), root / SILENCE), "condition_encoder",
         r"silence_latent\.pt: the silence latent has 10 frames, expected at least 750"),
        (split(lambda weight_map, weights: weight_map.pop("decoder.norm_out.weight")), "transformer",
         r"model-00001-of-00001\.safetensors holds decoder\.norm_out\.weight, which model\.safetensors\.index\.json"),
        (split(lambda weight_map, weights: weights.pop("decoder.norm_out.weight")), "transformer",
         r"model-00001-of-00001\.safetensors lacks decoder\.norm_out\.weight, which model\.safetensors\.index\.json"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(toy_copy, damage, part, message):
    damage(toy_copy)
    checkpoint = find_checkpoint(toy_copy, variant_named("base"))
    with pytest.raises(UserError, match=message) as error:
        load_part(checkpoint, part)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_config(lambda c: c.pop("head_dim")), r"config\.json: the config has no head_dim"),
        (edit_config(lambda c: c.update(num_hidden_layers="4")), r"num_hidden_layers must be int, found '4'"),
        (
            edit_config(lambda c: c.update(intermediate_size=10**30)),
            r"intermediate_size must be from 1 to \d+, found 10{30}",
        ),
        (edit_config(lambda c: c.update(head_dim=0)), r"config\.json: head_dim must be from 1 to \d+, found 0"),
        (overwrite(CONFIG, b"[" * 100_000), r"config\.json is damaged or not JSON"),
        (edit_config(lambda c: c.update(layer_types=["full_attention"] * 4)), "layer_types must alternate"),
        (overwrite(CONFIG, b"{"), r"config\.json is damaged or not JSON"),
        (overwrite(CONFIG, b"[]"), r"config\.json holds a list, expected a JSON object"),
        (
            remove(MODEL),
            r"no config\.json with model\.safetensors in .*acestep-v15-base \(it holds config\.json, silence",
        ),
    ],
)
def test_a_damaged_config_is_one_line_that_names_the_key(toy_copy, damage, message):
    damage(toy_copy)
    with pytest.raises(UserError, match=message) as error:
        find_checkpoint(toy_copy, variant_named("base"))
    assert "\n" not in str(error.value)


def test_a_key_that_is_not_in_the_file_is_named(toys):
    with (
        pytest.raises(UserError, match=r"model\.safetensors is damaged .*nope"),
        open_safetensors(toys / MODEL) as file,
    ):
        file.get_tensor("nope")


def test_a_toy_never_replaces_a_real_model(toy_copy):
    edit_config(lambda values: values.pop("toy"))(toy_copy)
    with pytest.raises(UserError, match="holds a model that is not a toy"):
        make_toy_checkpoint(toy_copy, variant_named("base"))


def test_an_interrupted_toy_leaves_no_half_written_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep.acestep.toy._random_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_toy_checkpoint(tmp_path, variant_named("base"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Qwen3-Embedding-0.6B", "vae"]
    monkeypatch.undo()
    make_toy_checkpoint(tmp_path, variant_named("base"))
    find_checkpoint(tmp_path, variant_named("base")).load_transformer(**CPU)


def test_toy_songs_are_audible_repeatable_and_encode_to_unit_latents(toys, tmp_path):
    make_toy_songs(tmp_path / "songs", seconds=3)
    make_toy_songs(tmp_path / "again", seconds=3)
    songs = sorted(path for path in (tmp_path / "songs").iterdir() if path.suffix in (".wav", ".flac"))
    assert [path.suffix for path in songs] == [".wav", ".flac", ".wav", ".flac"]
    vae = find_checkpoint(toys, variant_named("base")).load_vae(**CPU)
    for path in songs:
        audio, rate = soundfile.read(path, dtype="float32")
        again, _ = soundfile.read(tmp_path / "again" / path.name, dtype="float32")
        assert (audio == again).all()
        assert (rate, audio.shape) == (48_000, (144_000, 2))
        assert 0.03 < audio.std() < 0.5
        assert abs(audio[:, 0] - audio[:, 1]).max() > 0.05
        assert {"bpm", "keyscale", "timesignature", "language"} == json.loads(
            path.with_suffix(".json").read_text(encoding="utf-8")
        ).keys()
        assert path.with_suffix(".caption.txt").read_text(encoding="utf-8")
        assert path.with_suffix(".lyrics.txt").read_text(encoding="utf-8")
        with torch.no_grad():
            latents = vae.encode(torch.from_numpy(audio.T)[None]).latent_dist.mode()
            decoded = vae.decode(latents).sample
        assert latents.shape == (1, 64, 75)
        assert 0.5 < latents.std() < 1.5
        assert 0.02 < decoded.std() < 0.5


def test_songs_that_are_there_are_kept(tmp_path):
    (tmp_path / "mine.wav").touch()
    make_toy_songs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.wav"]


def test_importing_the_checkpoint_module_does_not_import_diffusers():
    code = "import sys, sidestep.acestep.checkpoint; sys.exit(bool({'diffusers', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
