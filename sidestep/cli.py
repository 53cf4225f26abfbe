"""What every command does around its task: help, checking what was typed, one line for a mistake, exit code 1."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import sidestep.config.naming  # noqa: F401  registers ${run_name:}
from sidestep.config.gate import VERSION_BASE, compose_or_explain, conf_dir, explain, to_dataclass
from sidestep.config.help import help_page
from sidestep.errors import UserError

log = logging.getLogger(__name__)


def run_command(command: str, root: type[Any], task: Callable[[Any], Any]) -> None:
    """Run one command of sidestep from ``sys.argv`` and exit.

    Args:
        command: name of the command and of its YAML in conf/.
        root: dataclass of its settings.
        task: what it does with them; what it returns is what a Hydra sweeper minimises.
    """
    typed, unknown = get_args_parser().parse_known_args()
    if unknown:
        sys.exit(f"{unknown[0]} is not an option; settings are typed as key=value, and --help shows them")
    if typed.help:
        print(help_page(command, root))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach this function instead of Hydra's own printer
    try:
        if not (typed.multirun or typed.cfg or typed.info or typed.hydra_help or typed.shell_completion):
            # composing twice costs a quarter of a second, and no folder is made for a mistyped setting
            search = [f"hydra.searchpath=[file://{Path(typed.config_dir).resolve()}]"] if typed.config_dir else []
            to_dataclass(compose_or_explain(typed.config_name or command, [*search, *typed.overrides]), root)
        hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=command)(_job(root, task))()
    except UserError as error:
        sys.exit(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(explain(error, command, typed.overrides))


def _job(root: type[Any], task: Callable[[Any], Any]) -> Callable[[DictConfig], Any]:
    """Wrap a task so that a mistake is one line in the log and, outside a sweep, ends the process with 1."""

    def job(config: DictConfig) -> Any:
        try:
            return task(to_dataclass(config, root))
        except UserError as error:
            log.error("%s", error)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise  # the other points of the sweep go on
            sys.exit(1)

    return job
