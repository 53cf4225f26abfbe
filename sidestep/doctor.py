"""Look for what would go wrong with a run, and say what it costs: ``python -m sidestep.doctor <as for train>``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from sidestep.cli import run_command
from sidestep.config.gate import VERSION_BASE, compose_or_explain, conf_dir, launches_sweep, to_dataclass
from sidestep.config.naming import run_name
from sidestep.config.settings import TrainConfig
from sidestep.errors import UserError
from sidestep.sweep import points_of

log = logging.getLogger("sidestep.doctor")  # __main__ would not be a child of the sidestep logger


def doctor_command(config: TrainConfig) -> None:
    """Examine the run that ``python -m sidestep.train`` with the same settings would be."""
    hydra = HydraConfig.get()
    if _examine(config, dict(hydra.runtime.choices), list(hydra.overrides.task)) is None:
        sys.exit(1)


def examine_sweep(overrides: Sequence[str]) -> None:
    """Examine every point of a sweep, and say what all of them cost; nothing is launched."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sidestep").setLevel(logging.INFO)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    single = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        sweeper = compose("train", single, return_hydra_config=True).hydra.sweeper
    points = points_of(sweeper, overrides)
    if not points:
        raise UserError("this sweep chooses its points as it goes; type the settings of one of them without the sweep")
    hours, num_refused = 0.0, 0
    for number, point in enumerate(points, start=1):
        log.info("point %d of %d: %s", number, len(points), " ".join(point))
        try:
            config = to_dataclass(compose_or_explain("train", point), TrainConfig)
            with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
                choices = dict(compose("train", point, return_hydra_config=True).hydra.runtime.choices)
            cost = _examine(config, choices, point)
        except UserError as error:
            log.error("%s", error)
            cost = None
        hours += cost or 0.0
        num_refused += cost is None
    log.info("%d points: at most %.2f hours of devices in all; %d cannot be begun", len(points), hours, num_refused)
    if num_refused:
        sys.exit(1)


def _examine(config: TrainConfig, choices: dict[str, str], overrides: Sequence[str]) -> float | None:
    # imported here so that a mistyped setting is answered before torch loads
    from sidestep.checking.doctor import examine

    if config.toy:
        from sidestep.demo import prepare_demo

        prepare_demo(config)
    run = run_name(choices["adapter"], choices["model_variant"], overrides, config.name)
    return examine(config, Path("outputs") / config.name / run, choices)


if __name__ == "__main__":
    typed = [argument for argument in sys.argv[1:] if argument not in ("-m", "--multirun")]
    with_m = len(typed) < len(sys.argv) - 1
    if not {"-h", "--help"} & set(typed) and (with_m or launches_sweep("train", typed)):
        try:
            examine_sweep(typed)
        except UserError as error:
            sys.exit(str(error))
    else:
        sys.argv[1:] = typed
        run_command("doctor", TrainConfig, doctor_command)
