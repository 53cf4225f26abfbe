"""Write an adapter in another form: one task, from settings to a folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from sidestep.acestep.weight_files import one_line
from sidestep.adapters.base import SavedAdapter, module_kind
from sidestep.adapters.convert import (
    Factors,
    depends_on_weights,
    factorize,
    lora_factors,
    svd_of,
    write_comfyui,
    write_comfyui_lycoris,
    write_diffusers,
    write_peft,
)
from sidestep.adapters.files import EXPORT_RECORD, read_adapter
from sidestep.adapters.lora import CONVOLUTIONS, diffusers_reads
from sidestep.config.settings import ExportConfig, ExportFormat
from sidestep.devices import resolve_device
from sidestep.errors import UserError
from sidestep.exporting.base_weights import BaseWeights, base_if_there, base_of, weight_for
from sidestep.exporting.measure import output_error
from sidestep.exporting.merged import write_merged
from sidestep.files import describe, replacing_folder, write_text
from sidestep.records import parse_json

log = logging.getLogger(__name__)

_TINY = torch.finfo(torch.float32).tiny


def _how(format: ExportFormat, saved: SavedAdapter) -> str:
    """Say what reads what was written."""
    if format is ExportFormat.comfyui:
        return "put this file into ComfyUI's models/loras and load it at strength 1"
    if format is ExportFormat.diffusers:
        return "pipeline.load_lora_weights reads this folder at strength 1"
    if format is ExportFormat.merged:
        return "type it as checkpoint_dir=..., or give the model's folder in it to ACE-Step"
    if diffusers_reads(saved.paths):
        return "ACE-Step, diffusers' load_lora_weights and ComfyUI read this folder at strength 1"
    return "ACE-Step and ComfyUI read this folder at strength 1; for diffusers use format=diffusers"


@dataclass
class LayerReport:
    """What became of one module."""

    error: float
    """Norm of what is lost of the change, relative to the change."""
    rank: int | None = None


@dataclass
class ExportReport:
    """What was done."""

    format: str
    family: str
    scale: float
    output_error: float | None = None
    """How far the model's output is off, relative to the adapter's effect on it; None where it was not measured."""
    layers: dict[str, LayerReport] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Say what was lost, one row for each kind of module; nothing where nothing was."""
        if not any(layer.error for layer in self.layers.values()):
            return []
        kinds: dict[str, list[tuple[float, str]]] = {}
        for path, layer in self.layers.items():
            kinds.setdefault(module_kind(path), []).append((layer.error, path))
        lines = [f"{'error of the change':<26} {'median':>8} {'worst':>8}  {'rank':<12} worst layer"]
        for kind, rows in kinds.items():
            worst, path = max(rows)
            ranks = sorted({rank for _, at in rows if (rank := self.layers[at].rank) is not None})
            span = "-" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            lines.append(f"{kind:<26} {statistics.median(e for e, _ in rows):8.2%} {worst:8.2%}  {span:<12} {path}")
        if self.format == ExportFormat.merged:
            lines.append("This is the rounding of the merged weights to the checkpoint's own number format.")
        if self.output_error is not None:
            lines.append(f"In the model's output {self.output_error:.2%} of the adapter's effect are lost.")
        return lines


def export(config: ExportConfig) -> Path:
    """Write the adapter of ``config.adapter_dir`` in another form, whole or not at all.

    Returns:
        What to point a player at: a folder, or the file for ComfyUI.

    Raises:
        UserError: for an adapter that cannot be read or does not fit the base model where one is needed, and for an
            output folder that holds something else.
    """
    device = resolve_device(config.device)
    saved = read_adapter(Path(config.adapter_dir))
    output_dir = _output_dir(config)
    origin = _origin_of(saved, output_dir)
    _check_replaceable(output_dir, origin)
    report = ExportReport(format=config.format.value, family=saved.family, scale=config.scale)
    base = _base(saved, config, output_dir)
    try:
        with replacing_folder(output_dir) as folder:
            if config.format is ExportFormat.merged:
                assert base is not None  # _base is sure of it
                result = _merge(folder, saved, base, config, device, report)
            elif config.format is ExportFormat.comfyui and config.rank is None and _is_plain_lycoris(saved):
                _check(saved, base, config.scale)
                metadata = _metadata(saved, report)
                result = write_comfyui_lycoris(folder / _file_name(config), saved, config.scale, metadata)
            else:
                factors = _lora_of(saved, base, config, device, report)
                result = _write_lora(folder, factors, saved, config, report)
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            record = {**asdict(report), "origin": origin, "files": files}
            write_text(folder / EXPORT_RECORD, json.dumps(record, indent=2) + "\n")
            _check_replaceable(output_dir, origin)  # again, since converting may have taken minutes
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {output_dir}: {one_line(error)}; type output_dir=<another folder>") from error
    for line in report.lines():
        log.info("%s", line)
    result = output_dir / result.relative_to(folder)
    log.info("wrote %s: %s", result, _how(config.format, saved))
    return result


def _base(saved: SavedAdapter, config: ExportConfig, output_dir: Path) -> BaseWeights | None:
    """Find the base model. Only a merged checkpoint, or a change that depends on the weights, cannot do without."""
    variant, checkpoint_dir = config.model_variant, Path(config.checkpoint_dir)
    as_it_is = config.rank is None and (
        saved.family == "lora" or (config.format is ExportFormat.comfyui and _is_plain_lycoris(saved))
    )
    depends = depends_on_weights(saved) or not CONVOLUTIONS.isdisjoint(saved.paths)  # by the width of a kernel
    if config.format is ExportFormat.merged or (depends and not as_it_is):
        base: BaseWeights | None = base_of(saved, variant, checkpoint_dir)
    else:
        without = "not compared with the base model" if as_it_is else "the error in the model's output is not measured"
        base = base_if_there(saved, variant, checkpoint_dir, without)
    if base is not None and output_dir.resolve().is_relative_to(base.checkpoint.folder.resolve()):
        raise UserError(f"output_dir={output_dir} lies in the base model's own folder; choose another")
    return base


def _check(saved: SavedAdapter, base: BaseWeights | None, scale: float) -> None:
    """Compute every change, so that nothing is written that fits no model, is not finite, or does nothing."""
    acts = [bool(saved.change(path, weight_for(saved, path, base), scale).any()) for path in saved.paths]
    _refuse_nothing(saved, any(acts))


def _lora_of(
    saved: SavedAdapter, base: BaseWeights | None, config: ExportConfig, device: torch.device, report: ExportReport
) -> dict[str, Factors]:
    """Give the adapter as LoRA factors, and note what is lost: nothing where it is a LoRA and no rank was typed."""
    if saved.family == "lora" and config.rank is None:
        _check(saved, base, config.scale)
        return lora_factors(saved, config.scale)
    factors = {}
    for path in tqdm(saved.paths, desc="converting", unit="layer", disable=not sys.stderr.isatty()):
        weight = weight_for(saved, path, base).to(device)
        svd = svd_of(saved, path, weight, config.scale)
        factors[path] = factorize(svd, weight.shape, rank=config.rank, max_error=config.max_error)
        report.layers[path] = LayerReport(error=factors[path].error, rank=factors[path].rank)
    _refuse_nothing(saved, any(pair.b.any() for pair in factors.values()))
    _warn_of_thick(factors, config)
    if base is not None and config.measure_output:
        try:
            report.output_error = output_error(base.checkpoint, saved, factors, config.scale, device)
        except UserError as error:  # no reason to throw the conversion away
            log.warning("the error in the model's output is not measured: %s", error)
    return factors


def _warn_of_thick(factors: dict[str, Factors], config: ExportConfig) -> None:
    thick = {
        path: pair.rank
        for path, pair in factors.items()
        if pair.a.numel() + pair.b.numel() > pair.b.shape[0] * pair.a[0].numel()
    }
    if thick:
        path, rank = max(thick.items(), key=lambda item: item[1])
        log.warning(
            "%d of %d layers need a rank at which the LoRA is larger than the layer itself (%s: rank %d); "
            "raise max_error=%g, set rank=..., or use format=merged",
            len(thick), len(factors), path, rank, config.max_error,
        )  # fmt: skip


def _merge(
    folder: Path,
    saved: SavedAdapter,
    base: BaseWeights,
    config: ExportConfig,
    device: torch.device,
    report: ExportReport,
) -> Path:
    acts = False

    def merge(path: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal acts
        weight = weight.to(device)
        change = saved.change(path, weight, config.scale)
        merged = (weight + change).to(dtype)
        if not merged.isfinite().all():
            raise UserError(f"{saved.path} at scale={config.scale:g} makes {path} too large for {dtype}; lower scale")
        rounding = (merged.float() - weight - change).norm() / change.norm().clamp_min(_TINY)
        acts |= bool(change.any())
        report.layers[path] = LayerReport(error=rounding.item())
        return merged

    changed = {base.locate(path): partial(merge, path) for path in saved.paths}
    write_merged(base.checkpoint, folder, changed, _metadata(saved, report))
    _refuse_nothing(saved, acts)
    return folder


def _write_lora(
    folder: Path, factors: dict[str, Factors], saved: SavedAdapter, config: ExportConfig, report: ExportReport
) -> Path:
    metadata = _metadata(saved, report)
    if config.format is ExportFormat.comfyui:
        return write_comfyui(folder / _file_name(config), factors, metadata)
    if config.format is ExportFormat.diffusers:
        return write_diffusers(folder, factors, metadata)
    return write_peft(folder, factors, metadata)


def _refuse_nothing(saved: SavedAdapter, acts: bool) -> None:
    if not acts:
        raise UserError(f"{saved.path} changes no weight, so there is nothing to write; train it first")


def _is_plain_lycoris(saved: SavedAdapter) -> bool:
    """Whether ComfyUI reads the family itself and applies it as trained, which it does not with dora_scale."""
    return saved.family in ("lokr", "loha") and not depends_on_weights(saved)


def _metadata(saved: SavedAdapter, report: ExportReport) -> dict[str, str]:
    """What the adapter says about its training, and what was done to it. Other programs' headers may hold paths."""
    own = {"sidestep": saved.metadata["sidestep"]} if "sidestep" in saved.metadata else {}
    done = {name: value for name, value in asdict(report).items() if name != "layers"}
    if report.layers:
        done["worst_error"] = max(layer.error for layer in report.layers.values())
    return {**own, "sidestep_export": json.dumps(done, sort_keys=True)}


def _output_dir(config: ExportConfig) -> Path:
    source = Path(config.adapter_dir)
    source = source if source.name not in ("", "..") else source.resolve()
    plain = source if source.is_dir() else source.with_suffix("")
    folder = Path(config.output_dir) if config.output_dir else plain.with_name(f"{plain.name}-{config.format.value}")
    for name, read in (("adapter_dir", source), ("checkpoint_dir", Path(config.checkpoint_dir))):
        if folder.resolve() in (read.resolve(), *read.resolve().parents):
            raise UserError(f"output_dir={folder} holds {name}={read}; choose another")
    return folder


def _origin_of(saved: SavedAdapter, output_dir: Path) -> str:
    """Sixteen hex digits that tell an adapter's place from others, seen from the output, without naming it."""
    place = saved.path.resolve()
    with suppress(ValueError):  # which Windows raises for another drive
        place = Path(os.path.relpath(place, output_dir.resolve()))  # stays if both are moved
    return hashlib.sha256(str(place).encode()).hexdigest()[:16]


def _check_replaceable(folder: Path, origin: str) -> None:
    """Refuse to write over anything but an earlier export of the same adapter.

    Raises:
        UserError: naming what lies there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    earlier = _earlier_export(folder)
    if earlier is None:
        raise UserError(f"output_dir={folder} is not an exported adapter ({describe(folder)}); choose another")
    made_from, written = earlier
    if made_from != origin:
        raise UserError(f"output_dir={folder} holds the export of another adapter ({describe(folder)}); choose another")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in (EXPORT_RECORD, *written) and (path.is_symlink() or not path.is_dir()):
            raise UserError(f"output_dir={folder} holds {name}, which export did not write; move it, or choose another")


def _earlier_export(folder: Path) -> tuple[str, list[str]] | None:
    """What an earlier export was made from, and the names of the files it wrote; None if there was none."""
    path = folder / EXPORT_RECORD
    try:
        record = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        return None
    match record:
        case {"origin": str(origin), "files": list(names)} if all(isinstance(name, str) for name in names):
            return origin, names
    return None


def _file_name(config: ExportConfig) -> str:
    """Name the file for a list in which only file names are seen: ``lokr-base-final.safetensors``."""
    folder = Path(config.adapter_dir).resolve()
    folder = folder.parent if folder.is_file() else folder
    return f"{folder.parent.name}-{folder.name}.safetensors".lstrip("-")
