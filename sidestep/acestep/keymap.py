"""Names of weights: ACE-Step's own, and those of the diffusers classes that hold them here.

ACE-Step keeps the whole model in one file, as ``decoder.``, ``encoder.``, ``tokenizer.``, ``detokenizer.`` and
``null_condition_emb``. Diffusers splits it into classes and renames the attention projections. Adapters are
saved under the original names, without the ``decoder.`` in front, because that is what every player reads.
The rules were checked by loading strictly and comparing outputs with the original code's.
"""

from __future__ import annotations

_ATTENTION = (
    (".q_proj.", ".to_q."),
    (".k_proj.", ".to_k."),
    (".v_proj.", ".to_v."),
    (".o_proj.", ".to_out.0."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
)
_TRANSFORMER = (("proj_in.1.", "proj_in_conv."), ("proj_out.1.", "proj_out_conv."))

PARTS = {
    "decoder.": "transformer",
    "encoder.": "condition_encoder",
    "null_condition_emb": "condition_encoder",
    "tokenizer.": "audio_tokenizer",
    "detokenizer.": "audio_token_detokenizer",
}
"""Prefix of an original key -> the diffusers component that holds it."""


def split_key(original: str) -> tuple[str, str] | None:
    """Name the component an original key belongs to and its name there, or None for a key that is not ACE-Step's.

    >>> split_key("decoder.layers.0.self_attn.q_proj.weight")
    ('transformer', 'layers.0.self_attn.to_q.weight')
    """
    for prefix, part in PARTS.items():
        if original.startswith(prefix):
            inner = original if prefix == "null_condition_emb" else original.removeprefix(prefix)
            return part, to_diffusers(inner)
    return None


def to_diffusers(original: str) -> str:
    """Rename a weight or module path inside a component: ``layers.0.self_attn.q_proj`` -> ``...to_q``."""
    return _rename(original, _ATTENTION + _TRANSFORMER)


def to_original(name: str) -> str:
    """Rename a weight or module path of a diffusers component: ``layers.0.self_attn.to_q`` -> ``...q_proj``."""
    return _rename(name, tuple((new, old) for old, new in _ATTENTION + _TRANSFORMER))


def original_key(part: str, name: str) -> str:
    """Name a weight of a diffusers component as the original checkpoint file does."""
    if name == "null_condition_emb":
        return name
    prefix = next(prefix for prefix, owner in PARTS.items() if owner == part)
    return prefix + to_original(name)


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    dotted = f".{name}."  # so that a module path, which ends without a dot, is renamed like a weight's
    for old, new in pairs:
        if old.startswith("."):
            dotted = dotted.replace(old, new)
        elif dotted.startswith("." + old):
            dotted = "." + new + dotted[1 + len(old) :]
    return dotted[1:-1]
