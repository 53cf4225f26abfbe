"""What ACE-Step's ``config.json`` says about a model, checked."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from sidestep.acestep.weight_files import largest_size, read_json
from sidestep.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants from an ACE-Step ``config.json``; a field without a default must be in the file."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    in_channels: int
    audio_acoustic_hidden_dim: int
    patch_size: int
    rope_theta: float
    rms_norm_eps: float
    sliding_window: int
    text_hidden_dim: int
    timbre_hidden_dim: int
    num_lyric_encoder_hidden_layers: int
    num_timbre_encoder_hidden_layers: int
    encoder_hidden_size: int
    """Width of the condition, D."""
    encoder_intermediate_size: int
    encoder_num_attention_heads: int
    encoder_num_key_value_heads: int
    # What follows has the defaults of ACE-Step's own config class, because published files leave some of it out.
    attention_bias: bool = False
    attention_dropout: float = 0.0
    layer_types: list[str] | None = None
    is_turbo: bool = False
    model_version: str | None = None
    timestep_mu: float = -0.4
    timestep_sigma: float = 1.0

    @property
    def is_xl(self) -> bool:
        """Whether the transformer is wider than the condition it reads."""
        return self.encoder_hidden_size != self.hidden_size

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        """Read ACE-Step's ``config.json``.

        Raises:
            UserError: if the file cannot be read, or a key is missing or has the wrong type.
        """
        return cls.from_values(read_json(path), path)

    @classmethod
    def from_diffusers(cls, folder: Path) -> ModelConfig:
        """Read the two configs that hold the same values in diffusers' layout.

        Raises:
            UserError: as ``from_json``.
        """
        encoder = read_json(folder / "condition_encoder" / "config.json")
        values = {name: encoder[name] for name in encoder if name in _ENCODER_ONLY}
        values |= {f"encoder_{name}": encoder[name] for name in _ENCODER_WIDTHS if name in encoder}
        return cls.from_values(read_json(folder / "transformer" / "config.json") | values, folder)

    @classmethod
    def from_values(cls, values: dict[str, Any], path: Path) -> ModelConfig:
        """Check ``values``, which were read from ``path``, and keep the known ones.

        Raises:
            UserError: as ``from_json``.
        """
        plain = {f"encoder_{name}": values[name] for name in _ENCODER_WIDTHS if name in values}
        values = plain | {name: value for name, value in values.items() if value is not None}
        values["is_turbo"] = values.get("is_turbo", False) or values.get("model_version") == "turbo"
        types_by_name = typing.get_type_hints(cls)
        known = {}
        for field in fields(cls):
            if field.name in values:
                known[field.name] = _checked(field.name, values[field.name], types_by_name[field.name], path)
            elif field.default is MISSING:
                raise UserError(f"{path}: the config has no {field.name}; is it an ACE-Step 1.5 model's?")
        config = cls(**known)
        # Diffusers gives the timbre encoder no way to be told otherwise.
        if config.layer_types not in (None, _alternating(config.num_hidden_layers)):
            raise UserError(f"{path}: layer_types must alternate sliding_attention, full_attention")
        return config

    def transformer_arguments(self) -> dict[str, Any]:
        """Give the arguments of ``AceStepTransformer1DModel``."""
        return {name: getattr(self, name) for name in _TRANSFORMER_ARGUMENTS}

    def condition_encoder_arguments(self) -> dict[str, Any]:
        """Give the arguments of ``AceStepConditionEncoder``, whose widths are the encoder's own."""
        shared = {name: getattr(self, name) for name in _SHARED_ARGUMENTS | _ENCODER_ONLY}
        return shared | {name: getattr(self, f"encoder_{name}") for name in _ENCODER_WIDTHS}


_ENCODER_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_ENCODER_ONLY = {
    "text_hidden_dim",
    "timbre_hidden_dim",
    "num_lyric_encoder_hidden_layers",
    "num_timbre_encoder_hidden_layers",
}
_SHARED_ARGUMENTS = {
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "sliding_window",
    "attention_bias",
    "attention_dropout",
}
_TRANSFORMER_ARGUMENTS = {
    *_ENCODER_WIDTHS,
    *_SHARED_ARGUMENTS,
    "num_hidden_layers",
    "in_channels",
    "audio_acoustic_hidden_dim",
    "patch_size",
    "layer_types",
    "encoder_hidden_size",
    "is_turbo",
    "model_version",
}


def _alternating(num_layers: int) -> list[str]:
    return [("sliding_attention", "full_attention")[i % 2] for i in range(num_layers)]


def _checked(name: str, value: Any, wanted: Any, path: Path) -> Any:
    """Return ``value`` if it has the type of the field ``name``, with whole numbers accepted as floats."""
    if wanted is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(value) not in [typing.get_origin(option) or option for option in options]:
        kind = getattr(wanted, "__name__", str(wanted))
        raise UserError(f"{path}: {name} must be {kind}, found {value!r:.60}")
    most = largest_size(name)
    if type(value) is int and not 1 <= value <= most:
        raise UserError(f"{path}: {name} must be from 1 to {most}, found {value!r:.60}")
    if type(value) is float and not abs(value) <= 1e12:
        raise UserError(f"{path}: {name} must be from -1e12 to 1e12, found {value!r}")
    return value
