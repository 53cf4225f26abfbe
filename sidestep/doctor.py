"""Look for what would go wrong with a run, and say what it costs: ``python -m sidestep.doctor <as for train>``."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sidestep.cli import quick_imports, read_arguments, run_command
from sidestep.config.gate import VERSION_BASE, compose_or_explain, conf_dir, explain, launches_sweep, to_dataclass
from sidestep.config.naming import run_name
from sidestep.config.settings import TrainConfig
from sidestep.errors import UserError
from sidestep.sweep import points_of

if TYPE_CHECKING:
    from sidestep.checking.doctor import Cost, Examined

log = logging.getLogger("sidestep.doctor")  # __main__ would not be a child of the sidestep logger


def doctor_command(config: TrainConfig) -> None:
    """Examine the run that ``python -m sidestep.train`` with the same settings would be."""
    hydra = HydraConfig.get()
    if _examine(config, dict(hydra.runtime.choices), list(hydra.overrides.task)) is None:
        sys.exit(1)


def examine_sweep(overrides: Sequence[str]) -> None:
    """Examine every point of a sweep, and say what all of them cost; nothing is launched.

    What several points have in common is measured and said once.
    """
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # of other libraries
    logging.getLogger("sidestep").setLevel(logging.INFO)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    single = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
    compose_or_explain("train", single)  # what all points share is refused once, in one line
    sweeper = _composed(single).hydra.sweeper
    points, times = points_of(sweeper, overrides), 1
    if not points:
        if not sweeper.get("n_trials"):
            raise UserError("this sweep does not say how many points it has; type the settings of one without it")
        points, times = [dearest_point(sweeper.params or {}, overrides)], int(sweeper.n_trials)
        log.info(
            "this sweep chooses %d points as it goes; each is taken to have the largest numbers and the first words it "
            "may choose, which is not an upper bound",
            times,
        )
    with quick_imports():  # here, so that a mistyped setting is answered before torch loads
        from sidestep.checking.doctor import LESS_DISK, Examined, free_gib
        from sidestep.reporting.page import INLINE_MB

    examined, costs = Examined(), []
    for number, point in enumerate(points, start=1):
        log.info("point %d of %d: %s", number, len(points), " ".join(point))
        try:
            config = to_dataclass(compose_or_explain("train", point), TrainConfig)
            costs.append(_examine(config, dict(_composed(point).hydra.runtime.choices), point, examined))
        except UserError as error:
            log.error("%s", error)
            costs.append(None)
    known = [cost for cost in costs if cost is not None]
    num_refused = len(costs) - len(known)
    music = times * sum(cost.music_gib for cost in known)
    page = 4 / 3 * min(music, INLINE_MB / 1024)  # report.html holds that much of it as base64
    gib, free = times * sum(cost.gib for cost in known) + page, free_gib(Path("outputs"))
    log.info(
        "%d points: at most %.2f hours of devices and about %.3g GiB of disk in all; %d cannot be begun",
        len(points) * times,
        times * sum(cost.hours for cost in known),
        gib,
        num_refused * times,
    )
    if gib > free:
        log.error("that does not fit on the disk, of which %.1f GiB are free; %s", free, LESS_DISK)
    if num_refused or gib > free:
        sys.exit(1)


def dearest_point(params: Mapping[str, str], overrides: Sequence[str]) -> list[str]:
    """What is typed for a point of a sweep that chooses as it goes: its largest numbers, and of words the first.

    Args:
        params: what the sweep chooses from, ``hydra.sweeper.params``.
        overrides: what was typed for the sweep.
    """
    typed = [f"{key}={value}" for key, value in params.items()]
    point = []
    for override in OverridesParser.create().parse_overrides([*typed, *overrides]):
        key, choice = override.key_or_group, override.value()
        if isinstance(choice, IntervalSweep):
            point.append(f"{key}={choice.end}")
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            point.append(f"{key}={max(values, key=float) if all(map(_is_number, values)) else values[0]}")
        else:
            point.append(str(override.input_line))
    return point


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _composed(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        return compose("train", list(overrides), return_hydra_config=True)


def _examine(
    config: TrainConfig, choices: dict[str, str], overrides: Sequence[str], examined: Examined | None = None
) -> Cost | None:
    with quick_imports():  # here, so that a mistyped setting is answered before torch loads
        from sidestep.checking.doctor import examine

    if config.toy:
        from sidestep.demo import prepare_demo

        prepare_demo(config)
    run = run_name(choices["adapter"], choices["model_variant"], overrides, config.name)
    return examine(config, Path("outputs") / config.name / run, choices, examined)


def main() -> None:
    """Examine one run or, with ``-m`` or a sweep among the settings, every point of it."""
    typed, unknown = read_arguments()
    overrides = [f"hydra.searchpath=[file://{Path(typed.config_dir).resolve()}]"] if typed.config_dir else []
    overrides += typed.overrides
    if unknown or typed.help or not (typed.multirun or launches_sweep("train", overrides)):
        sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in ("-m", "--multirun")]
        run_command("doctor", TrainConfig, doctor_command)
        return
    try:
        examine_sweep(overrides)
    except UserError as error:
        sys.exit(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(explain(error, "train", overrides))


if __name__ == "__main__":
    main()
