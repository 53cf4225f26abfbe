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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sidestep.config.gate import VERSION_BASE, check_keys, compose_or_explain, conf_dir, explain, to_dataclass
from sidestep.config.help import help_page
from sidestep.config.naming import swept_keys
from sidestep.errors import UserError
from sidestep.training.signals import Interrupted

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
        if not (typed.cfg or typed.info or typed.hydra_help or typed.shell_completion):
            _check(command, root, typed)
        hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=command)(_job(root, task))()
    except UserError as error:
        sys.exit(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"{error.filename}: {error.strerror}")  # a folder that cannot be made, a full disk
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is on disk")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(explain(error, command, typed.overrides))


def _check(command: str, root: type[Any], typed: Any) -> None:
    """Refuse what is mistyped before any folder is made; composing twice costs a quarter of a second."""
    overrides = [f"hydra.searchpath=[file://{Path(typed.config_dir).resolve()}]"] if typed.config_dir else []
    if not typed.multirun:
        to_dataclass(compose_or_explain(typed.config_name or command, [*overrides, *typed.overrides]), root)
        return
    parsed = OverridesParser.create().parse_overrides(typed.overrides)
    # of a sweep only names and types, and only of one point: a bad point must not stop the others
    overrides += [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
    check_keys(compose_or_explain(typed.config_name or command, overrides), root)
    if swept := swept_keys(typed.overrides):
        sys.argv.append(f"swept=[{','.join(swept)}]")


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
        except Interrupted as stop:
            log.info("%s; the same command goes on from here", stop)
            sys.exit(stop.exit_code)  # ends a sweep too

    return job
