"""Find, check and load an ACE-Step 1.5 model that lies on disk.

Two layouts hold the same weights. ACE-Step's own:

    <root>/acestep-v15-base/       config.json, model.safetensors (or an index and shards), silence_latent.pt
    <root>/vae/                    config.json, diffusion_pytorch_model.safetensors
    <root>/Qwen3-Embedding-0.6B/   the text encoder and its tokenizer

and diffusers', one folder with model_index.json, transformer/, condition_encoder/, vae/, text_encoder/ and tokenizer/.
Both are read by one path in which only names differ: the diffusers class is built without memory, then filled
tensor by tensor, so that a model is never held twice and the parts not asked for are never read. No code
that lies in a checkpoint folder is run.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sidestep.acestep.conditioning import REFERENCE_FRAMES
from sidestep.acestep.kept import KeptWeights
from sidestep.acestep.keymap import original_key, split_key
from sidestep.acestep.model_config import ModelConfig
from sidestep.acestep.quantization import quantize_linears
from sidestep.acestep.variants import VariantConfig
from sidestep.acestep.weight_files import (
    building_from,
    check_sizes,
    load_tensor,
    locate_tensors,
    open_safetensors,
    read_json,
    sample_values,
)
from sidestep.devices import place, tensors_of
from sidestep.errors import UserError
from sidestep.files import describe

if TYPE_CHECKING:
    from diffusers import AceStepTransformer1DModel, AutoencoderOobleck
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
    from transformers import PreTrainedTokenizerFast, Qwen3Model

PARTS = ("transformer", "condition_encoder", "vae", "text_encoder")
VAE_FOLDER = "vae"
TEXT_ENCODER_FOLDER = "Qwen3-Embedding-0.6B"
_QWEN_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_HOP, _SAMPLE_RATE = 1920, 48_000  # samples per latent frame and per second: 25 frames per second


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One ACE-Step model on disk, in ACE-Step's own layout or in diffusers'."""

    variant: VariantConfig
    root: Path
    """Folder of everything: it holds vae/ and the text encoder beside the model's own folder."""
    folder: Path
    """The model's own folder; in diffusers' layout the same as ``root``."""
    config: ModelConfig
    in_diffusers_layout: bool

    def load_transformer(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str = "none",
        kept: KeptWeights | None = None,
        waiting_share: float = 0.0,
    ) -> AceStepTransformer1DModel:
        """Load the DiT, frozen and in eval mode.

        Args:
            device: where to.
            dtype: of the weights, and of what is computed.
            quantization: how the linear layers of its blocks are stored: none, int8 or nf4.
            kept: where its weights may be already, and otherwise stay for the next who asks; not those quantised.
            waiting_share: share of its blocks, the first ones, whose weights never reach the device, but main memory.

        Raises:
            UserError: if a file is missing or damaged, or its weights do not fit the model.
        """
        from diffusers import AceStepTransformer1DModel

        from sidestep.acestep.frozen import streamline

        with building_from(self._part_folder("transformer") / "config.json"), torch.device("meta"):
            transformer = AceStepTransformer1DModel(**self.config.transformer_arguments())
        streamline(transformer)
        num_waiting = round(waiting_share * self.config.num_hidden_layers)
        if quantization == "none":
            waiting = tuple(f"layers.{number}." for number in range(num_waiting))
            self._fill("transformer", transformer, device, dtype, kept, waiting)
            return transformer
        if kept is not None:
            kept.drop()
        self._fill("transformer", transformer, torch.device("cpu"), dtype)  # mapped, so that memory holds one at a time
        for number, layer in enumerate(transformer.layers):
            quantize_linears(layer, quantization, device)  # those that wait too, so that they are the same numbers
            if number < num_waiting:
                layer.to("cpu")
        place(transformer, device, waiting=tensors_of(transformer.layers[:num_waiting]))
        return transformer

    def load_condition_encoder(self, *, device: torch.device, dtype: torch.dtype) -> AceStepConditionEncoder:
        """Load the encoder of text, lyrics and timbre, with the silence latent its pipeline expects.

        Raises:
            UserError: as ``load_transformer``.
        """
        from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

        with building_from(self._part_folder("condition_encoder") / "config.json"), torch.device("meta"):
            encoder = AceStepConditionEncoder(**self.config.condition_encoder_arguments())
        self._fill("condition_encoder", encoder, device, dtype)
        encoder.silence_latent = self.silence()[None].to(device, dtype)
        if self.config.is_xl:
            _prepend_special_token(encoder.timbre_encoder)
        return encoder

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> AutoencoderOobleck:
        """Load the autoencoder between 48 kHz stereo audio (B, 2, S) and latents (B, 64, S / 1920).

        Raises:
            UserError: as ``load_transformer``.
        """
        config_path = self._part_folder("vae") / "config.json"
        vae = build_vae(read_json(config_path), config_path)
        self._fill("vae", vae, device, dtype)
        return vae

    def load_text_encoder(
        self, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[PreTrainedTokenizerFast, Qwen3Model]:
        """Load the Qwen3 tokenizer and model that read captions and lyrics.

        Raises:
            UserError: as ``load_transformer``.
        """
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        tokenizer_path = self._part_folder("tokenizer") / "tokenizer.json"
        read_json(tokenizer_path)  # transformers would look for a missing or broken file elsewhere
        with building_from(tokenizer_path):
            # Not AutoTokenizer: tokenizer.json is taken as it is, and it appends <|endoftext|>.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path.parent, local_files_only=True)
        config_path = self._part_folder("text_encoder") / "config.json"
        check_sizes(read_json(config_path), _QWEN_SIZES, config_path)
        with building_from(config_path):
            config = Qwen3Config.from_pretrained(config_path.parent, local_files_only=True)
            with torch.device("meta"):
                text_encoder = Qwen3Model(config)
            rotary = Qwen3RotaryEmbedding(config)
        self._fill("text_encoder", text_encoder, device, dtype)
        text_encoder.rotary_emb = rotary.to(device)  # computed, so in no file
        if config.hidden_size != self.config.text_hidden_dim:
            raise UserError(
                f"{config_path.parent} has width {config.hidden_size}, but {self.folder} "
                f"reads text of width {self.config.text_hidden_dim}; they are from different models"
            )
        return tokenizer, text_encoder

    def silence(self) -> Tensor:
        """Read the VAE's encoding of silence, (frames, 64), float32, time first.

        Raises:
            UserError: if it is missing, damaged or of another shape.
        """
        channels = self.config.timbre_hidden_dim
        if self.in_diffusers_layout:
            path = self.folder / "condition_encoder"
            files = locate_tensors(path, "diffusion_pytorch_model")
            if "silence_latent" not in files:
                raise UserError(f"{path} lacks the tensor silence_latent; convert or download it again")
            with open_safetensors(files["silence_latent"]) as file:
                silence = file.get_tensor("silence_latent")
        else:
            path = next(
                (at / "silence_latent.pt" for at in (self.folder, self.root) if (at / "silence_latent.pt").is_file()),
                self.folder / "silence_latent.pt",
            )
            silence = load_tensor(path).mT  # the file is channels first
        if silence.ndim != 3 or silence.shape[0] != 1 or silence.shape[2] != channels:
            raise UserError(
                f"{path}: the silence latent has shape {tuple(silence.shape)} (batch, frames, channels), "
                f"expected (1, frames, {channels}); download it again"
            )
        if silence.shape[1] < REFERENCE_FRAMES:
            raise UserError(
                f"{path}: the silence latent has {silence.shape[1]} frames, "
                f"expected at least {REFERENCE_FRAMES}; download it again"
            )
        return silence[0].float().contiguous()

    def null_condition(self) -> Tensor:
        """Read the learned empty condition, (1, D), float32, without loading the encoder around it.

        Raises:
            UserError: if it is missing or its file is damaged.
        """
        weights = self.locate_weights("condition_encoder")
        if "null_condition_emb" not in weights:
            raise UserError(f"{self._part_folder('condition_encoder')} lacks the weight null_condition_emb")
        path, key = weights["null_condition_emb"]
        with open_safetensors(path) as file:
            return file.get_tensor(key).float().reshape(1, -1)

    def fingerprint(self, part: str) -> str:
        """Identify the weights of one part by 16 hex digits.

        It covers every name and shape and a sample of each tensor's values, so gigabytes take under a second.
        Names are ACE-Step's and values are rounded to bfloat16: the same weights have the same fingerprint in
        either layout, in any number of shards, and in the float32 and bfloat16 files that are published.

        Args:
            part: one of ``PARTS``.

        Raises:
            UserError: if a file is missing or damaged.
        """
        digest = hashlib.sha256()
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name, (path, key) in sorted(
                (self._name_in_file(part, n), at) for n, at in self.locate_weights(part).items()
            ):
                if path not in files:
                    files[path] = stack.enter_context(open_safetensors(path))
                tensor = files[path].get_tensor(key)  # memory-mapped: only the sampled pages are read
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
                digest.update(sample_values(tensor).to(torch.bfloat16).float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _part_folder(self, part: str) -> Path:
        shared = {"vae": VAE_FOLDER, "text_encoder": TEXT_ENCODER_FOLDER, "tokenizer": TEXT_ENCODER_FOLDER}
        if self.in_diffusers_layout:
            folder = self.folder / part
        else:
            folder = self.root / shared[part] if part in shared else self.folder
        if not folder.is_dir():
            raise UserError(f"{folder}/ is missing; get it with {_download(self.variant, self.root)}")
        return folder

    def locate_weights(self, part: str) -> dict[str, tuple[Path, str]]:
        """Map each weight's name inside the part, in diffusers' spelling, to its file and its key there.

        Raises:
            UserError: if a file is missing or damaged.
        """
        folder = self._part_folder(part)
        if part == "text_encoder":  # saved from the bare model or from one with a language-model head around it
            files = locate_tensors(folder, "model")
            return {k.removeprefix("model."): (at, k) for k, at in files.items() if not k.startswith("lm_head.")}
        if part == "vae":
            return {key: (at, key) for key, at in locate_tensors(folder, "diffusion_pytorch_model").items()}
        if self.in_diffusers_layout:
            files = locate_tensors(folder, "diffusion_pytorch_model")
            return {key: (at, key) for key, at in files.items() if key != "silence_latent"}
        weights = {}
        for key, at in locate_tensors(folder, "model").items():
            split = split_key(key)
            if split is None:
                raise UserError(f"{at} holds {key}, which is no part of an ACE-Step 1.5 model")
            if split[0] == part:
                weights[split[1]] = (at, key)
        return weights

    def _name_in_file(self, part: str, name: str) -> str:
        """Name a weight as ACE-Step's own files do."""
        return original_key(part, name) if part in ("transformer", "condition_encoder") else name

    def _fill(
        self,
        part: str,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        kept: KeptWeights | None = None,
        waiting: tuple[str, ...] = (),
    ) -> None:
        """Give a model built on the meta device its weights, those named ``waiting``... in main memory."""
        if kept is None:
            weights = self._read(part, model, device, dtype, waiting)
        else:
            key = (self.folder, part, self.fingerprint(part), device, dtype, waiting)
            weights = kept.get(key, lambda: self._read(part, model, device, dtype, waiting))
        model.load_state_dict(weights, strict=False, assign=True)  # every name was checked in reading
        model.requires_grad_(False).eval()

    def _read(
        self, part: str, model: nn.Module, device: torch.device, dtype: torch.dtype, waiting: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Read the weights that a model built on the meta device wants, one tensor at a time."""
        weights = self.locate_weights(part)
        wanted = model.state_dict()
        wanted.pop("silence_latent", None)  # comes from a file of its own
        for name, (path, key) in weights.items():
            if name not in wanted:
                raise UserError(f"{path} holds {key}, which {type(model).__name__} has no place for")
        for name in wanted:
            if name not in weights:
                key = name if self.in_diffusers_layout else self._name_in_file(part, name)
                raise UserError(f"{self._part_folder(part)} lacks the weight {key}; download it again")
        filled = {}
        sources = {
            name: (path, "cpu" if name.startswith(waiting) else str(device)) for name, (path, _) in weights.items()
        }
        for source in sorted(set(sources.values())):
            path = source[0]
            with open_safetensors(*source) as file:
                for name, (_, key) in weights.items():
                    if sources[name] == source:
                        tensor = file.get_tensor(key)
                        if tensor.shape != wanted[name].shape:
                            raise UserError(
                                f"{path}: {key} has shape {tuple(tensor.shape)}, "
                                f"but the config asks for {tuple(wanted[name].shape)}"
                            )
                        filled[name] = tensor.to(dtype)
        return filled


def find_checkpoint(checkpoint_dir: Path, variant: VariantConfig) -> Checkpoint:
    """Find the model of ``variant`` and check that it is that variant.

    Args:
        checkpoint_dir: the root, the model's own folder, or a folder in diffusers' layout.
        variant: the model asked for.

    Raises:
        UserError: if it is not there, or is another variant's.
    """
    own_folder = checkpoint_dir / variant.folder
    for folder in (own_folder, own_folder.with_name(f"{variant.folder}-diffusers"), checkpoint_dir):
        if in_diffusers_layout := (folder / "model_index.json").is_file():
            root, config = folder, ModelConfig.from_diffusers(folder)
        elif (folder / "config.json").is_file() and any(folder.glob("model*.safetensors*")):
            root = checkpoint_dir if folder == own_folder else folder.absolute().parent
            config = ModelConfig.from_json(folder / "config.json")
        else:
            continue
        _check_variant(config, variant, folder)
        return Checkpoint(
            variant=variant, root=root, folder=folder, config=config, in_diffusers_layout=in_diffusers_layout
        )
    looked_in = own_folder if own_folder.is_dir() else checkpoint_dir
    wanted = "config.json with model.safetensors" if own_folder.is_dir() else f"{variant.folder}/"
    raise UserError(
        f"no {wanted} in {looked_in} ({describe(looked_in)}); get it with {_download(variant, checkpoint_dir)}, "
        "or try experiment=demo, which needs no download"
    )


def build_vae(config: dict[str, Any], path: Path) -> AutoencoderOobleck:
    """Build the autoencoder on the meta device from the config read from ``path``.

    Raises:
        UserError: if a setting is missing or no size, or the frame rate is not the one ACE-Step reads.
    """
    from diffusers import AutoencoderOobleck

    names = [name for name in inspect.signature(AutoencoderOobleck.__init__).parameters if name != "self"]
    check_sizes(config, names, path)
    with building_from(path), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers uses the older weight_norm, which torch notes
        vae = AutoencoderOobleck(**{name: config[name] for name in names})
        # Diffusers makes the encoder's output as wide as its first layer, which is the mean and scale of each latent
        # channel only in the published VAE; the toy's layers are narrower.
        mean_and_scale = 2 * config["decoder_input_channels"]
        if vae.encoder.conv2.out_channels != mean_and_scale:
            inputs = vae.encoder.conv2.in_channels
            vae.encoder.conv2 = nn.utils.weight_norm(nn.Conv1d(inputs, mean_and_scale, kernel_size=3, padding=1))
    if (vae.hop_length, vae.sampling_rate) != (_HOP, _SAMPLE_RATE):
        raise UserError(
            f"{path}: {vae.hop_length} samples per frame at {vae.sampling_rate} Hz, expected {_HOP} at {_SAMPLE_RATE}"
        )
    return vae


def _check_variant(config: ModelConfig, variant: VariantConfig, folder: Path) -> None:
    if (config.is_turbo, config.is_xl) == (variant.is_turbo, variant.is_xl):
        return
    kind = ("an XL " if config.is_xl else "a ") + ("turbo" if config.is_turbo else "base or sft")
    suitable = ("xl_" if config.is_xl else "") + ("turbo" if config.is_turbo else "base")
    raise UserError(
        f"{folder} is {kind} model (is_turbo={str(config.is_turbo).lower()}, hidden_size={config.hidden_size} in "
        f"config.json), not {variant.name}; use model_variant={suitable} or another checkpoint_dir"
    )


def _download(variant: VariantConfig, checkpoint_dir: Path) -> str:
    return f"python scripts/download_checkpoint.py {variant.name} --checkpoint-dir {checkpoint_dir}"


def _prepend_special_token(timbre_encoder: Any) -> None:
    """Put the learned token in front of the reference frames, where the XL models pool it.

    ACE-Step's XL code does this and its smaller models do not; diffusers never does.
    """

    def prepend(embed_tokens: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        token = timbre_encoder.special_token.to(embedded.dtype).expand(len(embedded), 1, -1)
        return torch.cat([token, embedded], dim=1)

    timbre_encoder.embed_tokens.register_forward_hook(prepend)
