"""Adapters on disk: PEFT folders and LyCORIS files, as sidestep, ACE-Step and Side-Step write them.

Whatever the family, reading gives the weights of each module under ACE-Step's own name with the scale multiplied in,
and playing adds the change that the family's formula makes of them.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidestep.acestep.keymap import to_diffusers, to_original
from sidestep.adapters import loha, lokr, lora, oft
from sidestep.adapters.base import AdapterConfig, SavedAdapter, by_kind, ends_with, refuse_second, size
from sidestep.adapters.lycoris import file_name
from sidestep.errors import UserError
from sidestep.files import describe, ensure_readable, refuse_pipe, sha256_of
from sidestep.records import parse_json

if TYPE_CHECKING:
    from sidestep.acestep.checkpoint import Checkpoint

log = logging.getLogger(__name__)

WEIGHTS_FILES = (lora.WEIGHTS_FILE, lora.DIFFUSERS_FILE, lokr.WEIGHTS_FILE, loha.WEIGHTS_FILE)

EXPORT_RECORD = "export.json"
"""What an exported folder says about itself. Its weights file may have any name."""

MOST = 2**31
"""Largest number that a file may give for a rank, an alpha and the like."""

Modules = dict[str, dict[str, Tensor]]


class AppliedAdapters:
    """Saved adapters on a transformer, for use and not for training. Its weights are not touched.

    Args:
        transformer: an ``AceStepTransformer1DModel`` without an adapter; the changed layers get a child ``applied``.
        changes: diffusers path -> what adds the change there.
    """

    def __init__(self, transformer: nn.Module, changes: Mapping[str, AddedChange]) -> None:
        self.paths = [to_original(path) for path in changes]
        self.layers = [transformer.get_submodule(path) for path in changes]
        self.hooks = []
        for layer, added in zip(self.layers, changes.values(), strict=True):
            layer.add_module("applied", added)  # a child, so that the change goes wherever its layer is moved
            self.hooks.append(layer.register_forward_hook(added))

    def detach(self) -> None:
        """Take the adapters off. The transformer is the base model again."""
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            hook.remove()
            del layer.applied


class AddedChange(nn.Module):
    """A forward hook that adds the sum of some changes to the weight of a linear layer or a Conv1d.

    The sum is multiplied on its own, in the weight's dtype: added into a bfloat16 weight, most of a small change would
    be rounded away.

    Args:
        weight: the layer's.
        parts: each adapter, the layer's original path in it, and the strength.
        keep: compute the sum once and hold it, which takes as much memory as the weight; or anew in each pass.
    """

    def __init__(self, weight: Tensor, parts: Sequence[tuple[SavedAdapter, str, float]], *, keep: bool) -> None:
        super().__init__()
        self.parts = parts
        self.kept: Tensor | None
        self.register_buffer("kept", self.compute(weight) if keep else None, persistent=False)

    def compute(self, weight: Tensor) -> Tensor:
        """Add up the changes of a weight, in its dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            (first, *others) = (saved.change(path, weight, scale) for saved, path, scale in self.parts)
            return sum(others, first).to(weight.dtype)

    def forward(self, base: nn.Linear | nn.Conv1d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        change = self.compute(base.weight) if self.kept is None else self.kept
        if isinstance(base, nn.Conv1d):
            return output + nn.functional.conv1d(x, change, None, base.stride, base.padding, base.dilation, base.groups)
        return output + nn.functional.linear(x, change)


def attach_saved(transformer: nn.Module, path: Path, scale: float = 1.0, *, keep: bool = True) -> AppliedAdapters:
    """Put one saved adapter on a transformer; see :func:`apply_adapters`."""
    return apply_adapters(transformer, [(path, scale)], keep=keep)


def apply_adapters(
    transformer: nn.Module, adapters: Iterable[tuple[SavedAdapter | Path, float]], *, keep: bool = True
) -> AppliedAdapters:
    """Put saved adapters on a transformer, for use and not for training.

    Args:
        transformer: an ``AceStepTransformer1DModel`` without an adapter.
        adapters: each as it was read, or its folder or weights file, and its strength: 0 is exactly the base model, 1
            the adapter as it was trained. The changes of several are added.
        keep: hold the changes, which cost as much memory as the changed weights once more and as much time, the same
            for every family and number of adapters; or compute each wherever it is used, which needs the memory of
            one layer and is for a pass or two.

    Raises:
        UserError: if a file cannot be read, or any tensor in it does not fit this transformer.
    """
    refuse_second(transformer)
    parts: dict[str, list[tuple[SavedAdapter, str, float]]] = {}
    for source, scale in adapters:
        saved = read_adapter(source) if isinstance(source, Path) else source
        for original_path in saved.paths:
            saved.change(original_path, saved.weight_in(transformer, original_path).to("meta"))
            if scale != 0:
                parts.setdefault(to_diffusers(original_path), []).append((saved, original_path, scale))
    transformer.requires_grad_(False)
    return AppliedAdapters(
        transformer,
        {
            name: AddedChange(transformer.get_submodule(name).weight, of_layer, keep=keep)  # type: ignore[arg-type]
            for name, of_layer in parts.items()
        },
    )


def read_adapter(path: Path) -> SavedAdapter:
    """Read a LoRA, DoRA or OFT folder, a LoKr or LoHa file, or what ``sidestep.export`` made of one.

    Args:
        path: the weights file, the folder it lies in, or the folder above an ``adapter`` folder, as ACE-Step's
            trainer makes them.

    Raises:
        UserError: if nothing is there, the file is damaged, or it uses what sidestep cannot reproduce.
    """
    weights = find_weights(path)
    tensors, metadata = _read_tensors(weights)
    if "lokr_config" in metadata:
        return _read_lokr(weights, tensors, metadata)
    if any(".hada_" in key for key in tensors):
        return _read_loha(weights, tensors, metadata)
    if "sidestep_export" in metadata and not any(key.startswith(lora.KEY_PREFIX) for key in tensors):
        return _read_exported_lora(weights, tensors, metadata)
    if weights.with_name(lora.CONFIG_FILE).is_file():
        return _read_peft(weights, tensors, metadata)
    if weights.name == lora.WEIGHTS_FILE:
        raise UserError(f"{weights} has no {lora.CONFIG_FILE} beside it, so its alpha is unknown; copy that file too")
    raise UserError(
        f"{weights} is no adapter: it has neither lokr_config in its header nor {lora.CONFIG_FILE} beside it"
    )


_ABOUT: dict[str, type] = {"model_variant": str, "custom_tags": list, "versions": dict}


def trained_on(saved: SavedAdapter) -> dict[str, Any]:
    """What sidestep wrote into the adapter when it was trained; empty for another program's adapter.

    Raises:
        UserError: if it is damaged.
    """
    try:
        about = parse_json(saved.metadata.get("sidestep", "{}"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise UserError(
            f"{saved.path} has a header entry sidestep that is not a JSON object: it is damaged; copy it again"
        )
    for key, kind in _ABOUT.items():
        if key in about and not isinstance(about[key], kind):
            raise UserError(
                f"{saved.path}: its header has {key}={about[key]!r:.60}, which makes no sense; copy it again"
            )
    return about


def saved_step(folder: Path) -> int | None:
    """The step at which a run saved the adapter in a folder, read from its header; None if nothing says so."""
    try:
        with safe_open(find_weights(folder), "pt") as file:
            step = parse_json((file.metadata() or {}).get("sidestep", "{}")).get("step")
    except (UserError, SafetensorError, OSError, ValueError, AttributeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def warn_of_another_model(saved: SavedAdapter, checkpoint: Checkpoint) -> None:
    """Warn if an adapter says that it was trained on another model than this, such as one it is merged into already."""
    about = trained_on(saved)
    if "checkpoint" in about and about["checkpoint"] != checkpoint.fingerprint("transformer"):
        log.warning(
            "%s was trained on another model (%s) than the one in %s; what it does there may differ",
            saved.path,
            about.get("model_variant"),
            checkpoint.folder,
        )


def find_weights(path: Path) -> Path:
    """Find the weights file that ``path`` means.

    Raises:
        UserError: if there is none, or more than one.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        there = describe(path).removeprefix("it ")
        raise UserError(f"{path} {there}; give the folder of an adapter or its .safetensors file")
    for folder in (path, path / "adapter"):
        found = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
        if not found and (folder / EXPORT_RECORD).is_file():
            found = sorted(folder.glob("*.safetensors"))
        if len(found) > 1:
            raise UserError(f"{folder} holds two adapters, {found[0].name} and {found[1].name}; name the file you mean")
        if found:
            return found[0]
    raise UserError(f"{path} holds no adapter: none of {', '.join(WEIGHTS_FILES)} is there")


def fingerprint_adapter(path: Path) -> str:
    """Hash what decides an adapter's weights, wherever it lies; 64 hex digits.

    Raises:
        UserError: if there is no adapter.
    """
    weights = find_weights(path)
    config = weights.with_name(lora.CONFIG_FILE)
    digests = [sha256_of(file) for file in (weights, config) if file.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    ensure_readable(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file; copy or download it again ({error})"
        ) from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds NaN or infinity in {key}; use an earlier checkpoint")
    return tensors, metadata


def _saved(
    path: Path, config: AdapterConfig, modules: Modules, scales: dict[str, float], metadata: dict[str, str]
) -> SavedAdapter:
    """Check that each module has the weights of its family, and multiply the scales in.

    Raises:
        UserError: if one is missing, there is one too many, or a scale makes them too large for float32.
    """
    for original_path, leaves in modules.items():
        wanted = min(config.leaf_sets, key=lambda names: len(names ^ leaves.keys()))
        for leaf in sorted(wanted ^ leaves.keys()):
            has = "has no" if leaf in wanted else "also has"
            raise UserError(f"{path} {has} {original_path}.{leaf}, so it is no whole {config.family} adapter")
    saved = SavedAdapter(path=path, config=config, modules=modules, scales=scales, metadata=metadata)
    for original_path, scale in scales.items():
        modules[original_path] = saved.scaled(original_path, scale)
    return saved


_LAYER = re.compile(
    r"layers\.\d{1,4}\.((self|cross)_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    # outside of the blocks, which ACE-Step's and Side-Step's trainers wrap too
    r"|proj_in\.1|proj_out\.1|condition_embedder|time_embed(_r)?\.(linear_1|linear_2|time_proj)"
)
_LENGTHS = "lora_magnitude_vector"


def _put(modules: Modules, path: Path, key: str, name: str | None, leaf: str, tensor: Tensor) -> None:
    """Put a tensor of a file where it belongs.

    Raises:
        UserError: if it belongs nowhere, its place is taken, or it has not the dimensions of such a tensor.
    """
    if name is None or not _LAYER.fullmatch(name):
        raise UserError(f"{path} has {name or key}, which fits nothing in ACE-Step's decoder")
    if leaf in modules.setdefault(name, {}):
        raise UserError(f"{path} has {name}.{leaf} twice, under two names; remove one")
    fits = tensor.numel() == 1 if leaf == "alpha" else tensor.ndim == 1 if leaf == _LENGTHS else tensor.ndim >= 2
    if not fits or tensor.numel() == 0:
        raise UserError(f"{path} has {key} of size {size(tensor)}, which no {leaf} has; copy the adapter again")
    modules[name][leaf] = tensor


# PEFT


def _read_peft(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    config_path = path.with_name(lora.CONFIG_FILE)
    refuse_pipe(config_path)
    settings = _parse(config_path.read_bytes(), str(config_path))
    readers = {"LORA": _lora_config, "OFT": _oft_config}
    if str(settings.get("peft_type")) not in readers:
        raise UserError(
            f"{config_path} has peft_type {settings.get('peft_type')!r}; only {' and '.join(readers)} can be read"
        )
    if settings.get("bias", "none") != "none":
        raise UserError(f"{config_path} uses bias, which sidestep cannot read")
    modules: Modules = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            rf"{re.escape(lora.KEY_PREFIX)}(.+)\.(lora_[AB]\.weight|lora_magnitude_vector|oft_R\.weight)", key
        )
        if not match:
            raise UserError(
                f"{path} has {key}, which is not a LoRA key of the form {lora.KEY_PREFIX}<module>.lora_A.weight"
            )
        _put(modules, path, key, to_original(match[1]), match[2], tensor)
    _require_targets(settings, modules, str(config_path))
    config = readers[settings["peft_type"]](settings, modules, str(config_path))
    scales = {name: config.scale_of(name) if isinstance(config, lora.LoraConfig) else 1.0 for name in modules}
    return _saved(path, config, modules, scales, metadata)


def _lora_config(settings: Mapping[str, Any], modules: Modules, where: str) -> lora.LoraConfig:
    _refuse(
        settings,
        (
            *("lora_bias", "modules_to_save", "trainable_token_indices", "use_qalora", "alora_invocation_tokens"),
            "layer_replication",
        ),
        where,
    )
    start = str(settings.get("init_lora_weights", True))
    if start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(f"{where} has init_lora_weights {start!r}, which changes the base model's weights as well")
    rank, alpha = _whole(settings, "r", where), _above_zero(settings, "lora_alpha", where)
    ranks = {name: _in_pattern(settings, "rank_pattern", name, rank, where) for name in modules}
    alphas = {name: _in_pattern(settings, "alpha_pattern", name, alpha, where) for name in modules}
    for name, leaves in modules.items():
        found = leaves["lora_A.weight"].shape[:1] if "lora_A.weight" in leaves else ()
        if found and found[0] != ranks[name]:
            raise UserError(f"{where} gives {name} rank {ranks[name]:g}, but its weights have rank {found[0]}")
    family = lora.DoraConfig if settings.get("use_dora") else lora.LoraConfig
    return family(
        rank=rank,
        alpha=alpha,
        use_rslora=bool(settings.get("use_rslora")),
        rank_pattern={name: int(other) for name, other in by_kind(ranks).items() if other != rank},
        alpha_pattern={name: other for name, other in by_kind(alphas).items() if other != alpha},
        target_modules=list(modules),
    )


def _require_targets(settings: Mapping[str, Any], modules: Modules, where: str) -> None:
    """Refuse weights of layers that PEFT, going by ``target_modules``, would not put them on."""
    targets = settings.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    if not isinstance(targets, list | str):
        raise UserError(f"{where} has target_modules {targets!r:.60}, which must be a list of names or a pattern")
    if isinstance(targets, str):
        _refuse_endless(targets, "target_modules", where)
    for module in modules:
        names = (module, to_diffusers(module))
        try:
            found = any(
                re.fullmatch(targets, name) if isinstance(targets, str) else any(ends_with(name, t) for t in targets)
                for name in names
            )
        except re.error as error:
            raise UserError(f"{where} has target_modules {targets!r:.60}, which is not a pattern ({error})") from error
        if not found:
            raise UserError(
                f"{where} does not name {module} in target_modules, so other players would leave out its weights"
            )


def _refuse_endless(pattern: str, key: str, where: str) -> None:
    """Refuse a pattern that could be written to take for ever: with repeated groups, or very many repetitions."""
    if re.search(r"\)[*+{]", pattern) or len(re.findall("[*+{]", pattern)) > 4 or pattern.count("?") > 8:
        raise UserError(
            f"{where} has {pattern!r:.60} in {key}, which repeats too much to be matched; name modules instead"
        )


def _in_pattern(settings: Mapping[str, Any], key: str, module: str, default: float, where: str) -> float:
    """Look a module up as PEFT does, under its original name or diffusers': the first pattern that it ends in."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where} has {key} {patterns!r:.60}, which must be an object of patterns")
    for pattern in patterns:
        _refuse_endless(pattern, key, where)
        try:
            found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in (module, to_diffusers(module)))
        except re.error as error:
            raise UserError(f"{where} has {pattern!r} in {key}, which is not a pattern ({error})") from error
        if found:
            return _above_zero(patterns, pattern, f"{key} in {where}")
    return default


def _oft_config(settings: Mapping[str, Any], modules: Modules, where: str) -> oft.OftConfig:
    _refuse(settings, ("coft", "modules_to_save"), where)
    if not isinstance(settings.get("use_cayley_neumann"), bool):
        raise UserError(
            f"{where} does not say use_cayley_neumann, so its rotations are unknown; add it from the trainer"
        )
    terms = _whole(settings, "num_cayley_neumann_terms", where) if settings["use_cayley_neumann"] else 0
    if 0 < terms < 4 or terms > oft.MOST_TERMS:
        raise UserError(f"{where} uses num_cayley_neumann_terms={terms}, which sidestep cannot read")
    version = re.match(r"(\d{1,9})\.(\d{1,9})", str(settings.get("peft_version", "")))
    if terms and (version is None or (int(version[1]), int(version[2])) < (0, 18)):
        raise UserError(f"{where} is of a PEFT before 0.18, whose approximate rotations sidestep cannot read")
    shared, typed = bool(settings.get("block_share")), settings.get("oft_block_size") or 0
    shapes = {name: leaves["oft_R.weight"] for name, leaves in modules.items() if "oft_R.weight" in leaves}
    for name, leaf in shapes.items():
        blocks, side = len(leaf), oft.block_size_of(leaf)
        if shared and blocks > 1:
            raise UserError(f"{where} says block_share, but {name} has {blocks} blocks")
        # where it does not divide the inputs, PEFT takes another
        if typed and not shared and side != typed and blocks * side % _whole(settings, "oft_block_size", where) == 0:
            raise UserError(f"{where} has oft_block_size {typed}, but the blocks of {name} have {side} inputs")
    return oft.OftConfig(
        block_size=oft.block_size_of(next(iter(shapes.values()), torch.empty(1, 1))),
        block_share=shared,
        neumann_terms=terms,
        target_modules=list(modules),
    )


# LyCORIS


def _read_lokr(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    where = f"lokr_config in {path}"
    settings = _parse(metadata["lokr_config"], where)
    modules = _lycoris_modules(path, tensors)
    for leaves in modules.values():
        leaves.pop("alpha", None)  # players take it from lokr_config
    rank = _whole(settings, "linear_dim", where)
    full = [name for name, leaves in modules.items() if {"lokr_w1", "lokr_w2"} <= leaves.keys()]
    _check_lokr(settings, modules, rank, where)
    config = lokr.LokrConfig(
        rank=rank,
        alpha=_number(settings, "linear_alpha", where) or None,  # LyCORIS reads 0 as "the same as the rank"
        factor=_whole(settings, "factor", where, least=-1),
        decompose_both=bool(settings.get("decompose_both")) and not settings.get("full_matrix"),
        full_matrix=bool(settings.get("full_matrix")),
        weight_decompose=any("dora_scale" in leaves for leaves in modules.values()),
        target_modules=list(modules),
    )
    scales = {name: 1.0 if name in full else config.scale for name in modules}
    return _saved(path, config, modules, scales, metadata)


def _read_loha(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    modules = _lycoris_modules(path, tensors)
    ranks, alphas = {}, {}
    for name, leaves in modules.items():
        if "alpha" not in leaves or "hada_w1_b" not in leaves:
            missing = "alpha" if "alpha" not in leaves else "hada_w1_b"
            raise UserError(f"{path} has no {name}.{missing}, so it is no whole loha adapter")
        ranks[name], alphas[name] = len(leaves["hada_w1_b"]), leaves.pop("alpha").item()
        if alphas[name] < 0:
            raise UserError(f"{path} has alpha {alphas[name]:g} for {name}, which must not be below 0")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = loha.LohaConfig(rank=rank, alpha=alpha or None, target_modules=list(modules))
    scales = {name: (alphas[name] or ranks[name]) / ranks[name] for name in modules}
    return _saved(path, config, modules, scales, metadata)


def _check_lokr(settings: Mapping[str, Any], modules: Modules, rank: int, where: str) -> None:
    """Refuse a header from which a player would rebuild other layers than those in the file.

    Raises:
        UserError: naming the first setting and layer that contradict each other.
    """
    lengths = settings.get("weight_decompose", settings.get("dora_wd"))
    factor = settings.get("factor")
    for name, leaves in modules.items():
        ranks = {leaves[leaf].shape[0] for leaf in ("lokr_w1_b", "lokr_w2_b") if leaf in leaves}
        if ranks - {rank}:
            raise UserError(f"{where} has linear_dim {rank}, but the weights of {name} have rank {max(ranks - {rank})}")
        if ranks and settings.get("full_matrix"):
            raise UserError(f"{where} says full_matrix, but the weights of {name} have rank {rank}")
        if lengths is not None and bool(lengths) != ("dora_scale" in leaves):
            raise UserError(
                f"{where} has weight_decompose {lengths}, but {name} has {'a' if not lengths else 'no'} dora_scale"
            )
        w1, w2 = (leaves.get(w, leaves.get(f"{w}_a")) for w in ("lokr_w1", "lokr_w2"))
        if w1 is None or w2 is None or not isinstance(factor, int) or factor < 1:
            continue
        rows = (w1.shape[0], w2.shape[0])
        # LyCORIS looks for another factor where this one does not divide, or is the larger of the two
        if rows[0] * rows[1] % factor == 0 and factor**2 <= rows[0] * rows[1] and factor not in rows:
            raise UserError(f"{where} has factor {factor}, but the factors of {name} have {rows[0]} and {rows[1]} rows")


def _lycoris_modules(path: Path, tensors: Mapping[str, Tensor]) -> Modules:
    """Group the tensors by module, under the names that LyCORIS has written with underscores for dots."""
    modules: Modules = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        _put(modules, path, key, _OUTSIDE.get(module) or _with_dots(module), leaf, tensor)
    return modules


_OUTSIDE = {
    file_name(name): name
    for name in (
        *("proj_in.1", "proj_out.1", "condition_embedder"),
        *(
            f"{embed}.{layer}"
            for embed in ("time_embed", "time_embed_r")
            for layer in ("linear_1", "linear_2", "time_proj")
        ),
    )
}


def _with_dots(module: str) -> str | None:
    inside = re.fullmatch(r"lycoris_layers_(\d+)_(self_attn|cross_attn|mlp)_(\w+)", module)
    return f"layers.{inside[1]}.{inside[2]}.{inside[3]}" if inside else None


# what sidestep.export writes for diffusers and ComfyUI


def _read_exported_lora(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> SavedAdapter:
    modules: Modules = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            r"(?:transformer|diffusion_model\.decoder)\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_down\.weight|"
            r"lora_up\.weight|alpha)",
            key,
        )
        leaf = match[2].replace("_down", "_A").replace("_up", "_B") if match else ""
        _put(modules, path, key, to_original(match[1]) if match else None, leaf, tensor)
    ranks, scales = {}, {}
    for name, leaves in modules.items():
        ranks[name] = len(leaves.get("lora_A.weight", torch.empty(1)))
        scales[name] = leaves.pop("alpha", torch.tensor(float(ranks[name]))).item() / ranks[name]
    rank = max(ranks.values())
    others = {name: other for name, other in by_kind(ranks).items() if other != rank}
    config = lora.LoraConfig(rank=rank, rank_pattern=others, target_modules=list(modules))
    return _saved(path, config, modules, scales, metadata)


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        settings = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON; copy the adapter again ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{where} is not a JSON object; copy the adapter again")
    return settings


def _refuse(settings: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Refuse what would load with another effect than it was trained with."""
    for name in names:
        if settings.get(name):
            raise UserError(f"{where} uses {name}, which sidestep cannot read")


def _number(settings: Mapping[str, Any], name: str, where: str) -> float:
    value = settings.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MOST:
        raise UserError(f"{where} needs a number for {name}, and has {value!r:.60}")
    return value


def _whole(settings: Mapping[str, Any], name: str, where: str, least: int = 1) -> int:
    value = _number(settings, name, where)
    if value != int(value) or value < least:
        raise UserError(f"{where} has {name} {value}, which must be a whole number of at least {least}")
    return int(value)


def _above_zero(settings: Mapping[str, Any], name: str, where: str) -> float:
    value = _number(settings, name, where)
    if not value > 0:
        raise UserError(f"{where} has {name} {value}, which must be above 0")
    return value
