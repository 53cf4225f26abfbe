"""A tiny random ACE-Step in the real files, and a few synthesised songs: all that a demo or a test needs.

The toy has the layout, key names, config fields, frame rate and latent channels of the published models, and is
loaded by the same code. Its weights are random but scaled: latents of music have a standard deviation of 1, decoded
audio can be heard, and the transformer's output is of the size of a velocity, so that training lowers the loss.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from sidestep.acestep.checkpoint import TEXT_ENCODER_FOLDER, VAE_FOLDER, Checkpoint, build_vae
from sidestep.acestep.keymap import original_key
from sidestep.acestep.model_config import ModelConfig
from sidestep.acestep.variants import VariantConfig
from sidestep.acestep.weight_files import read_json
from sidestep.errors import UserError
from sidestep.files import replacing_folder, write_text

if TYPE_CHECKING:
    from diffusers import AutoencoderOobleck
    from tokenizers import Tokenizer

SAMPLE_RATE = 48_000
SILENCE_FRAMES = 15_000  # as in the published silence_latent.pt: ten minutes
_TEXT_WIDTH = 64

_SIZES = {
    "audio_acoustic_hidden_dim": 64,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "data_proportion": 0.5,
    "dtype": "bfloat16",
    "fsq_dim": 64,
    "fsq_input_levels": [4, 3, 3],
    "fsq_input_num_quantizers": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "in_channels": 192,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 32768,
    "model_type": "acestep",
    "num_attention_heads": 4,
    "num_attention_pooler_hidden_layers": 1,
    "num_audio_decoder_hidden_layers": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 1,
    "patch_size": 2,
    "pool_window_size": 5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": 16,
    "text_hidden_dim": _TEXT_WIDTH,
    "timbre_fix_frame": 750,
    "timbre_hidden_dim": 64,
    "timestep_mu": -0.4,
    "timestep_sigma": 1.0,
    "use_cache": True,
    "use_sliding_window": True,
    "vocab_size": 64003,
}
_XL_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 8,  # so that queries are wider than the model, as in the published XL
    "encoder_hidden_size": 64,
    "encoder_intermediate_size": 128,
    "encoder_num_attention_heads": 4,
    "encoder_num_key_value_heads": 2,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderOobleck",
    "encoder_hidden_size": 4,
    "downsampling_ratios": [2, 4, 4, 6, 10],
    "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 4,
    "decoder_input_channels": 64,
    "audio_channels": 2,
    "sampling_rate": SAMPLE_RATE,
}


def make_toy_checkpoint(
    root: Path, variant: VariantConfig, *, seed: int = 0, sizes: Mapping[str, Any] | None = None
) -> None:
    """Write a tiny random model of ``variant`` in ACE-Step's own layout.

    The VAE and the text encoder are made once and shared by later variants; what is already there is kept. Each
    folder appears only when complete.

    Args:
        root: where the folders go, the later ``checkpoint_dir``.
        variant: which model to imitate.
        seed: of the random weights.
        sizes: what is to be other than in the toy, by its name in config.json; for benchmarks.

    Raises:
        UserError: if a model that is not a toy is in the way.
    """
    _make_vae(root / VAE_FOLDER, seed)
    _make_text_encoder(root / TEXT_ENCODER_FOLDER, seed)
    folder = root / variant.folder
    if folder.is_dir():
        if read_json(folder / "config.json").get("toy") is not True:
            raise UserError(f"{folder} holds a model that is not a toy; choose another checkpoint_dir for the toy")
        return
    kind = variant.name.removeprefix("xl_")
    values = _SIZES | (_XL_SIZES if variant.is_xl else {})
    values |= {"is_turbo": variant.is_turbo, "model_version": kind, "toy": True, **(sizes or {})}
    with replacing_folder(folder) as partial:
        config_path = partial / "config.json"
        write_text(config_path, json.dumps(values, indent=2))
        config = ModelConfig.from_json(config_path)
        toy = Checkpoint(variant=variant, root=root, folder=partial, config=config, in_diffusers_layout=False)
        torch.save(_encode_silence(toy), partial / "silence_latent.pt")
        weights = _random_model(config, values, seed)
        if variant.is_xl:
            _save_in_shards(weights, partial)
        else:
            save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})


def make_toy_songs(folder: Path, *, count: int = 4, seconds: float = 8.0, seed: int = 0) -> None:
    """Synthesise short stereo songs, each with chords, a melody and a beat in its own key and tempo.

    Beside each song lie its caption, its lyrics and a JSON file of its tempo, key, meter and language. A folder
    that already holds anything is kept as it is. The same arguments give the same samples.

    Args:
        folder: where the songs go; it appears only when all are written.
        count: how many.
        seconds: length of each.
        seed: of the melodies.
    """
    import soundfile

    if folder.is_dir() and any(folder.iterdir()):
        return
    with replacing_folder(folder) as partial:
        for index in range(count):
            song = _SONGS[index % len(_SONGS)]
            audio = _synthesise(song, seconds, np.random.default_rng([seed, index]))
            stem = f"{index + 1:02d}-{song['title']}"
            soundfile.write(partial / f"{stem}.{('wav', 'flac')[index % 2]}", audio, SAMPLE_RATE, subtype="PCM_16")
            write_text(partial / f"{stem}.caption.txt", song["caption"])
            write_text(partial / f"{stem}.lyrics.txt", song["lyrics"])
            about = {key: song[key] for key in ("bpm", "keyscale", "timesignature", "language")}
            write_text(partial / f"{stem}.json", json.dumps(about, indent=2))


def _random_model(config: ModelConfig, values: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Make the weights of all five parts under ACE-Step's names, in bfloat16."""
    from diffusers import AceStepTransformer1DModel
    from diffusers.pipelines.ace_step.modeling_ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )

    encoder_sizes = config.condition_encoder_arguments()
    pooler_sizes = {
        name: encoder_sizes.get(name, values.get(name))
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "audio_acoustic_hidden_dim",
            "pool_window_size",
            "num_attention_pooler_hidden_layers",
        )
    }
    fsq_sizes = {name: values[name] for name in ("fsq_dim", "fsq_input_levels", "fsq_input_num_quantizers")}
    with torch.device("meta"):
        parts = {
            "transformer": AceStepTransformer1DModel(**config.transformer_arguments()),
            "condition_encoder": AceStepConditionEncoder(**encoder_sizes),
            "audio_tokenizer": AceStepAudioTokenizer(**pooler_sizes, **fsq_sizes),
            "audio_token_detokenizer": AceStepAudioTokenDetokenizer(**pooler_sizes),
        }
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {config.model_version}".encode()))
    return {
        original_key(part, name): _random_weight(name, parameter.shape, generator)
        for part, model in parts.items()
        for name, parameter in model.named_parameters()
    }


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw a weight that keeps the size of what passes through it."""
    if name.endswith("bias"):
        weight = torch.zeros(shape)
    elif "norm" in name:
        weight = torch.ones(shape)
    else:
        weight = torch.randn(shape, generator=generator)
        if "scale_shift_table" in name:
            weight /= math.sqrt(shape[-1])
        elif not name.endswith(("special_token", "special_tokens", "null_condition_emb")):
            # A transposed convolution lists its inputs first.
            weight /= math.sqrt(shape[0] if name.startswith("proj_out_conv") else math.prod(shape[1:]))
    return weight.to(torch.bfloat16)


def _save_in_shards(weights: dict[str, Tensor], folder: Path) -> None:
    """Write the weights as the published XL models are: two files and an index."""
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total_size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


def _make_vae(folder: Path, seed: int) -> None:
    if folder.is_dir():
        return
    vae = build_vae(_VAE, folder / "config.json").to_empty(device="cpu").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, conv in vae.named_modules():
        if not isinstance(conv, nn.Conv1d | nn.ConvTranspose1d):
            continue
        inputs_per_output = conv.in_channels * conv.kernel_size[0]
        if isinstance(conv, nn.ConvTranspose1d):
            inputs_per_output //= conv.stride[0]
        size = 0.3 if "res_unit" in name else 1.0  # a residual branch adds a little to what passes by
        parameters = dict(conv.named_parameters())
        direction = parameters["weight_v"].normal_(generator=generator)
        norms = direction.flatten(1).norm(dim=1).view_as(parameters["weight_g"])
        parameters["weight_g"].copy_(norms * size / math.sqrt(inputs_per_output))
    for name, parameter in vae.named_parameters():
        if name.endswith(("bias", "alpha", "beta")):
            parameter.zero_()
    _calibrate(vae)
    with replacing_folder(folder) as partial:
        write_text(partial / "config.json", json.dumps(_VAE, indent=2))
        weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in vae.state_dict().items()}
        save_file(weights, partial / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _calibrate(vae: AutoencoderOobleck) -> None:
    """Scale the last layers so that latents of music are of unit variance and those latents decode to audible sound."""
    rng = np.random.default_rng(0)
    songs = [torch.from_numpy(_synthesise(song, 4.0, rng).T.astype(np.float32)) for song in _SONGS]
    last, channels = vae.encoder.conv2, _VAE["decoder_input_channels"]
    features = vae.encoder(torch.stack(songs))[:, :channels]
    std, mean = torch.std_mean(features, dim=(0, 2))
    last.weight_g[:channels, 0, 0] /= std
    last.bias[:channels] = -mean / std
    last.weight_g[channels:] *= 0.1
    last.bias[channels:] = -3.0  # before a softplus: sampled latents stay within about 0.05 of their mean
    audio = vae.decode(torch.randn(1, channels, 50, generator=torch.Generator().manual_seed(0))).sample
    vae.decoder.conv2.weight_g *= 0.1 / audio.std()


def _encode_silence(checkpoint: Checkpoint) -> Tensor:
    """Encode silence, (1, 64, frames) in bfloat16, channels first as in the published file."""
    vae = checkpoint.load_vae(device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 2, 100 * vae.hop_length)).latent_dist.mode()
    return latents[:, :, 50:51].repeat(1, 1, SILENCE_FRAMES).to(torch.bfloat16)  # away from the edges


def _make_text_encoder(folder: Path, seed: int) -> None:
    if folder.is_dir():
        return
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=131072
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3Model(config).to(torch.bfloat16)
    with replacing_folder(folder) as partial:
        config.save_pretrained(partial)
        save_file(model.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(partial)


def _train_tokenizer() -> Tokenizer:
    """Make a byte-level tokenizer that ends every text in <|endoftext|>, as Qwen3-Embedding's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for song in _SONGS for text in (song["caption"], song["lyrics"], song["keyscale"])]
    tokenizer.train_from_iterator([*texts, *_PROMPT_WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    return tokenizer


_PROMPT_WORDS = 2 * [  # twice, because only pairs of letters seen twice become tokens
    "# Instruction\nFill the audio semantic mask based on the given conditions:\n\n# Caption\n\n\n# Metas\n",
    "- bpm: \n- timesignature: \n- keyscale: \n- duration:  seconds\n# Languages\n\n\n# Lyric\n[Instrumental]",
]

_MAJOR, _MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)  # semitones above the tonic
_SONGS: list[dict[str, Any]] = [
    {
        "title": "paper-boats",
        "caption": "bright acoustic pop in C major, soft keys, a plucked melody and a steady beat",
        "lyrics": "[Verse]\nPaper boats on summer rain\nCarry all my words away\n\n[Chorus]\nFloat along, float along",
        "bpm": 100,
        "keyscale": "C major",
        "timesignature": "4",
        "language": "en",
        "tonic": 60,
        "scale": _MAJOR,
        "chords": (0, 4, 5, 3),
    },
    {
        "title": "night-train",
        "caption": "driving electronic track in A minor, dark pads, a fast lead and a hard kick",
        "lyrics": "[Instrumental]",
        "bpm": 128,
        "keyscale": "A minor",
        "timesignature": "4",
        "language": "unknown",
        "tonic": 57,
        "scale": _MINOR,
        "chords": (0, 5, 2, 6),
    },
    {
        "title": "old-mill",
        "caption": "gentle folk waltz in G major, warm chords and a singing melody",
        "lyrics": "[Verse]\nDas alte Rad, es dreht sich sacht\nDer Bach erzaehlt die ganze Nacht",
        "bpm": 90,
        "keyscale": "G major",
        "timesignature": "3",
        "language": "de",
        "tonic": 55,
        "scale": _MAJOR,
        "chords": (0, 3, 4, 0),
    },
    {
        "title": "low-tide",
        "caption": "slow ambient piece in E minor, wide chords, sparse bells and a distant pulse",
        "lyrics": "[Instrumental]",
        "bpm": 72,
        "keyscale": "E minor",
        "timesignature": "4",
        "language": "unknown",
        "tonic": 52,
        "scale": _MINOR,
        "chords": (0, 3, 5, 4),
    },
]


def _synthesise(song: dict[str, Any], seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Play a song for some seconds, (samples, 2), with peaks at 0.7."""
    num_samples = round(seconds * SAMPLE_RATE)
    left, right = np.zeros(num_samples), np.zeros(num_samples)
    beat = 60 / song["bpm"]
    beats_per_bar = int(song["timesignature"])
    for number in range(math.ceil(seconds / beat)):
        start = number * beat
        root = song["chords"][number // beats_per_bar % len(song["chords"])]
        if number % beats_per_bar == 0:
            for degree in (root, root + 2, root + 4):
                chord = 0.12 * _note(_pitch(song, degree), beats_per_bar * beat, attack=0.05, harmonics=4)
                _add(left, 1.2 * chord, start)
                _add(right, 0.8 * chord, start)
            _add(left, bass := 0.25 * _note(_pitch(song, root) / 2, beat, attack=0.01, harmonics=2), start)
            _add(right, bass, start)
        for half in range(int(rng.integers(1, 3))):  # one or two notes of the melody to a beat
            degree = root + 7 + int(rng.choice([-1, 0, 1, 2, 4]))
            melody = 0.22 * _note(_pitch(song, degree), beat / 2, attack=0.005, harmonics=3)
            _add(left, 0.7 * melody, start + half * beat / 2)
            _add(right, 1.3 * melody, start + half * beat / 2)
        drum = _kick() if number % 2 == 0 else _hat(rng)
        _add(left, drum, start)
        _add(right, drum, start)
    audio = np.stack([left, right], axis=1)
    return 0.7 * audio / np.abs(audio).max()


def _pitch(song: dict[str, Any], degree: int) -> float:
    """Frequency in Hz of a degree of the song's scale, 0 being the tonic."""
    octave, step = divmod(degree, 7)
    return 440 * 2 ** ((song["tonic"] + 12 * octave + song["scale"][step] - 69) / 12)


def _note(frequency: float, seconds: float, *, attack: float, harmonics: int) -> NDArray[np.float64]:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = sum(np.sin(2 * np.pi * frequency * n * time) / n**1.5 for n in range(1, harmonics + 1))
    return tone * np.minimum(time / attack, 1) * np.exp(-2 * time / seconds) * np.minimum((seconds - time) / 0.01, 1)


def _kick() -> NDArray[np.float64]:
    time = np.arange(SAMPLE_RATE // 5) / SAMPLE_RATE
    return 0.5 * np.sin(2 * np.pi * (50 * time + 4 * (1 - np.exp(-30 * time)))) * np.exp(-18 * time)


def _hat(rng: np.random.Generator) -> NDArray[np.float64]:
    time = np.arange(SAMPLE_RATE // 20) / SAMPLE_RATE
    return 0.12 * np.diff(rng.standard_normal(len(time) + 1)) * np.exp(-80 * time)


def _add(track: NDArray[np.float64], sound: NDArray[np.float64], start: float) -> None:
    """Mix a sound into a track from ``start`` seconds on; what reaches past the end is cut."""
    first = round(start * SAMPLE_RATE)
    track[first : first + len(sound)] += sound[: max(0, len(track) - first)]
