"""How much each module matters on a dataset, and ranks that follow from it.

The importance of a weight matrix W is its Fisher information, the mean over examples of |dL/dW|^2, where L is the
velocity loss of one example at one time. A module whose importance per weight is four times another's gets twice its
rank: ranks go with the root of the mean squared gradient, which is what a step of training would move a weight by.
All ranks together cost no more parameters than one flat rank.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.acestep.attention import WindowedAttention
from sidestep.acestep.checkpoint import find_checkpoint
from sidestep.acestep.keymap import to_original
from sidestep.adapters.base import resolve_targets
from sidestep.adapters.lora import read_rank_pattern
from sidestep.config.data import DataConfig, Excerpts
from sidestep.config.evaluation import ValidationConfig
from sidestep.config.settings import AnalyzeConfig
from sidestep.config.typed import as_typed
from sidestep.data.dataset import SongDataset, collate
from sidestep.data.holdout import content_id, hold_out
from sidestep.devices import resolve_device, resolve_dtype
from sidestep.errors import UserError
from sidestep.files import write_text
from sidestep.inspecting.plot import check_picture, draw_heatmap
from sidestep.inspecting.summary import Heatmap, LayerChange, heatmap
from sidestep.training.flow import VelocityLoss
from sidestep.training.forward import Forward
from sidestep.training.run import check_dataset_fits
from sidestep.training.signals import StopSignals

log = logging.getLogger(__name__)

CONFIDENCE = 1.96
"""Standard errors to either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Fisher information of one module."""

    mean: float
    error: float
    """Standard error of the mean."""
    sides: tuple[int, int]
    """(out, in) of the weight."""

    @property
    def per_weight(self) -> float:
        """Root of the mean squared gradient of one weight."""
        return math.sqrt(self.mean / math.prod(self.sides))


class Importances(Heatmap):
    """Root mean squared gradients by block and kind of module, in thousandths of the largest."""

    @property
    def unit(self) -> str:
        return "root mean squared gradient of a weight, the largest is 1000"

    def text(self, value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"


class Ranks(Heatmap):
    """Ranks by block and kind of module."""

    @property
    def unit(self) -> str:
        return "rank"

    def text(self, value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"


def analyze(config: AnalyzeConfig) -> Path:
    """Measure every target module, print the ranks, and write them as a file for ``adapter.rank_pattern_file``.

    Returns:
        The file; pictures of the ranks and of the importance lie beside it.

    Raises:
        UserError: if the model, the dataset or a target does not exist or fit, or no module matters.
    """
    output = Path(config.output)
    if output.suffix != ".json":
        raise UserError(f"output={output} must end in .json, which it is written as")
    if os.path.lexists(output):
        try:
            known = "about" in read_rank_pattern(output)
        except UserError:
            known = False
        if not known:
            raise UserError(f"output={output} is another file; type output=<a file that is not there yet>")
    for picture in _pictures(output):
        check_picture(picture, "output")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    checkpoint = find_checkpoint(Path(config.checkpoint_dir), config.model_variant)
    excerpts = DataConfig(
        excerpts=Excerpts.random,  # also of datasets with windows longer than max_seconds
        allow_leaked_reference=config.allow_leaked_reference,
    )
    dataset = SongDataset(Path(config.dataset_dir), max_seconds=config.max_seconds, seed=config.seed, config=excerpts)
    check_dataset_fits(dataset, checkpoint)
    trained, held_out = hold_out(dataset.songs, ValidationConfig(**vars(config.validation)))
    dataset = dataset.only(trained)
    if held_out:
        log.info("%d of %d songs are left out, for the run to hold out", len(held_out), len(trained) + len(held_out))
    transformer = checkpoint.load_transformer(device=device, dtype=dtype)
    paths = resolve_targets(transformer, config.target_modules)
    transformer.requires_grad_(False).train()
    transformer.enable_gradient_checkpointing()
    model = checkpoint.config
    forward = Forward(
        transformer,
        WindowedAttention(transformer),
        objective=VelocityLoss(),
        timesteps=config.timesteps.with_defaults(model.timestep_mu, model.timestep_sigma),
        condition_dropout=0.0,
        silence=checkpoint.silence().to(device),
        null_condition=checkpoint.null_condition().to(device),
        seed=config.seed,
    )
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        importance = measure(forward, transformer, paths, dataset, config.num_examples)
    ranks = allocate(importance, config.rank, config.max_rank)
    largest = max(module.per_weight for module in importance.values())
    matters = {path: 1000 * module.per_weight / largest for path, module in importance.items()}
    tables = [_arranged(Ranks, ranks), _arranged(Importances, matters)]
    _print(importance, ranks, tables[0], config)
    return _write(config, dataset, checkpoint.fingerprint("transformer"), importance, ranks, tables)


def _pictures(output: Path) -> tuple[Path, Path]:
    """Where the ranks and the importance are drawn."""
    return output.with_suffix(".png"), output.with_name(f"{output.stem}_importance.png")


def _arranged(kind: type[Heatmap], values: Mapping[str, float]) -> Heatmap:
    return kind(**vars(heatmap({path: LayerChange(norm=value, relative=None) for path, value in values.items()})))


def measure(
    forward: Forward, transformer: nn.Module, paths: Sequence[str], dataset: SongDataset, num_examples: int
) -> dict[str, Importance]:
    """Measure the Fisher information of modules, example by example.

    Args:
        forward: of ``transformer``; its draws depend on the seed and the example's number only.
        transformer: frozen but for what is made trainable here; no gradient outlives its use.
        paths: diffusers' names of linear layers.
        dataset: the examples, in the order of a run with the same seed.
        num_examples: how many.

    Returns:
        Original path -> its importance.

    Raises:
        UserError: if a gradient is not finite.
        Interrupted: after the example at hand, by a signal.
    """
    squares: dict[str, list[float]] = {to_original(path): [] for path in paths}
    weights = {to_original(path): transformer.get_parameter(f"{path}.weight") for path in paths}
    found: dict[str, Tensor] = {}

    def note(path: str, weight: Tensor) -> None:
        assert weight.grad is not None
        found[path] = weight.grad.float().square().sum()
        weight.grad = None

    hooks = []
    for path, weight in weights.items():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(lambda weight, path=path: note(path, weight)))
    try:
        with StopSignals() as stop:  # Ctrl-C may come out of a library as another error
            for number in range(num_examples):
                stop.raise_if_received()
                batch = dataclasses.replace(collate([dataset[number]]), weights=None).to(weight.device)
                forward(batch, number, 0).losses.sum().backward()
                for path in squares:
                    squares[path].append(found[path].item())
                if not all(math.isfinite(values[-1]) for values in squares.values()):
                    song = dataset.songs[batch.songs[0]].audio
                    raise UserError(f"the gradient of {song} is not finite; leave that song out, or use precision=fp32")
    finally:
        for hook in hooks:
            hook.remove()
        transformer.requires_grad_(False)
    return {
        path: Importance(
            mean=sum(values) / num_examples,
            error=torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(num_examples),
            sides=(weights[path].shape[0], weights[path].shape[1]),
        )
        for path, values in squares.items()
    }


def allocate(importance: Mapping[str, Importance], rank: int, max_rank: int) -> dict[str, int]:
    """Give each module a rank that goes with the root of its mean squared gradient.

    Args:
        importance: of each module.
        rank: the flat rank whose parameters are not exceeded.
        max_rank: none gets more, and none less than 1.

    Raises:
        UserError: if all gradients are 0.
    """
    wanted = {path: module.per_weight for path, module in importance.items()}
    if not any(wanted.values()):
        raise UserError("no target module has a gradient, so none matters more than another")
    cost = {path: sum(module.sides) for path, module in importance.items()}
    limit = {path: min(max_rank, *module.sides) for path, module in importance.items()}
    budget = rank * sum(cost.values())

    def ranks(factor: float) -> dict[str, int]:
        return {path: max(1, min(limit[path], math.floor(factor * value))) for path, value in wanted.items()}

    low, high = 0.0, max_rank / min(value for value in wanted.values() if value)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(cost[path] * each for path, each in ranks(middle).items()) <= budget:
            low = middle
        else:
            high = middle
    chosen = ranks(low)
    left = budget - sum(cost[path] * each for path, each in chosen.items())
    for path in sorted(wanted, key=lambda path: chosen[path] - low * wanted[path]):  # who was rounded down most
        if cost[path] <= left and chosen[path] < limit[path]:
            chosen[path] += 1
            left -= cost[path]
    return chosen


def _print(
    importance: Mapping[str, Importance], ranks: Mapping[str, int], table: Heatmap, config: AnalyzeConfig
) -> None:
    log.info("importance of each module over %d examples, with the 95 %% interval of its mean", config.num_examples)
    for path, module in sorted(importance.items(), key=lambda item: -item[1].per_weight):
        log.info(
            "%-40s %10.3g +- %.0f %%   rank %d",
            path,
            module.mean,
            100 * CONFIDENCE * module.error / module.mean if module.mean else 0,
            ranks[path],
        )
    for line in table.lines():
        log.info("%s", line)
    parameters = sum(ranks[path] * sum(module.sides) for path, module in importance.items())
    flat = config.rank * sum(sum(module.sides) for module in importance.values())
    log.info("%s parameters; a flat rank of %d has %s", f"{parameters:,}", config.rank, f"{flat:,}")


def _write(
    config: AnalyzeConfig,
    dataset: SongDataset,
    checkpoint: str,
    importance: Mapping[str, Importance],
    ranks: Mapping[str, int],
    tables: Sequence[Heatmap],
) -> Path:
    about: dict[str, Any] = {
        "model_variant": config.model_variant.name,
        "checkpoint": checkpoint,
        "dataset": dataset.fingerprint(),
        "num_examples": config.num_examples,
        "songs": sorted({content_id(dataset.songs[dataset.draw(n).song]) for n in range(config.num_examples)}),
        "seed": config.seed,
        "rank": config.rank,
        "importance": {path: [module.mean, module.error] for path, module in importance.items()},
    }
    path = Path(config.output)
    content = {"rank": config.rank, "target_modules": config.target_modules, "rank_pattern": ranks, "about": about}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n")
        for table, picture in zip(tables, _pictures(path), strict=True):
            draw_heatmap(table, f"{path.name}: {config.model_variant.name}", picture)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; type output=<another file>") from error
    log.info("next: %s", next_command(config, path))
    return path


def next_command(config: AnalyzeConfig, path: Path) -> str:
    """Give the command that trains with the ranks in ``path``, as it is typed."""
    settings: dict[str, str | list[str]] = {
        "adapter.target_modules": config.target_modules,
        "adapter.rank_pattern_file": str(path),
        "dataset_dir": config.dataset_dir,
    }
    if config.checkpoint_dir != "checkpoints":
        settings["checkpoint_dir"] = config.checkpoint_dir
    if config.validation.songs:
        settings["validation.songs"] = config.validation.songs
    typed = " ".join(as_typed(key, value) for key, value in settings.items())
    if config.validation.fraction:
        typed += f" validation.fraction={config.validation.fraction:g}"
    variant = config.model_variant.name
    return f"python -m sidestep.train adapter=lora adapter.rank={config.rank} {typed} model_variant={variant}"
