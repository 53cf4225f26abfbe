"""What every command does around its task: help, checking what was typed, one line for a mistake, exit code 1."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sidestep.config.gate import (
    UNREADABLE,
    VERSION_BASE,
    check_keys,
    check_own_files,
    check_swept,
    compose_hydra,
    compose_or_explain,
    conf_dir,
    explain,
    launches_sweep,
    parse_overrides,
    to_dataclass,
    with_params,
)
from sidestep.config.help import help_page
from sidestep.config.naming import swept_keys
from sidestep.config.settings import check_name
from sidestep.errors import PointFailed, UserError, shared
from sidestep.processes import join_processes, rank
from sidestep.sweep import check_launch, end_sweep, record_point
from sidestep.training.signals import Interrupted, noting_interrupts

log = logging.getLogger(__name__)

QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""What libraries read from the environment: ask no other machine, and tell none. What the user has set is kept."""

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a disk, which come without a file's name where an open file is written."""

TABLE_SECONDS = 60
"""How long the other processes of a failed sweep stay for process 0 to end first; it may be waiting for one of them."""


def run_command(command: str, root: type[Any], task: Callable[[Any], Any]) -> None:
    """Run one command of sidestep from ``sys.argv`` and exit.

    Args:
        command: name of the command and of its YAML in conf/.
        root: dataclass of its settings.
        task: what it does with them; what it returns is what a Hydra sweeper minimises.
    """
    typed, unknown = read_arguments()
    if unknown:
        sys.exit(f"{unknown[0]} is not an option; settings are typed as key=value, and --help shows them")
    if typed.help:
        try:
            print(help_page(command, root))
        except UserError as error:
            sys.exit(str(error))
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.raiseExceptions = False  # a full disk would print a traceback for each line of train.log
    threading.excepthook = _end_of_thread
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach this function instead of Hydra's own printer
    try:
        _run(command, root, task, typed)
    finally:
        failed = end_sweep()  # of any sweep that began, however it ended
    if failed:
        sys.exit(1)


def read_arguments() -> tuple[Namespace, list[str]]:
    """Read what was typed, and what of it Hydra does not know.

    Options may stand anywhere; they are put in front of the settings in ``sys.argv``, because Hydra's own reading of it
    refuses a setting that follows an option that follows a setting.
    """
    typed, unknown = get_args_parser().parse_known_intermixed_args()
    options = [argument for argument in sys.argv[1:] if argument not in typed.overrides]
    sys.argv[1:] = options + typed.overrides
    return typed, unknown


def _run(command: str, root: type[Any], task: Callable[[Any], Any], typed: Any) -> None:
    """Run the command, and turn what the user can mend into one line and exit code 1."""
    try:
        if typed.cfg or typed.info:
            if typed.multirun:
                raise UserError("--cfg and --info are about one run; leave out -m and the several values")
            compose_or_explain(typed.config_name or command, _typed_overrides(typed))
        elif not (typed.hydra_help or typed.shell_completion):
            _check(command, root, typed)
        with _naming_files(lambda: _folder_of(typed.config_name or command, typed)):  # Hydra's own files
            hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=command)(_job(root, task))()
    except PointFailed:
        if rank() != 0:  # torchrun ends all of them with the first that fails, and process 0 has a table to print
            time.sleep(TABLE_SECONDS)
        sys.exit(1)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is on disk", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (HydraException, OmegaConfBaseException, *UNREADABLE) as error:
        sys.exit(explain(error, command, _typed_overrides(typed)))
    except BrokenExecutor:  # of a sweep whose points are not known beforehand
        sys.exit(
            "a process of this sweep was killed, perhaps because memory ran out; the same command goes on, with less "
            "memory where hydra.launcher.n_jobs is smaller"
        )
    except ValueError as error:
        if str(error).startswith("Unable to configure"):  # what logging says of hydra.job_logging
            sys.exit(f"hydra.job_logging or hydra.hydra_logging: {error} ({error.__cause__})")
        if "No trials are completed" not in str(error):  # Optuna's, which looks for the best of them
            raise
        sys.exit("no point was finished, so none is the best")


def _check(command: str, root: type[Any], typed: Any) -> None:
    """Refuse what is mistyped before any folder is made; composing twice costs a quarter of a second."""
    overrides = _typed_overrides(typed)
    name = typed.config_name or command
    if not typed.multirun and not launches_sweep(name, overrides):
        to_dataclass(compose_or_explain(name, overrides), root)
        return
    check_own_files(name, overrides)
    given = parse_overrides(with_params(name, overrides))
    last = {override.key_or_group: override for override in given}
    swept = [override for override in last.values() if override.is_sweep_override()]
    fixed = [o.input_line for o in last.values() if not o.is_sweep_override() and o.input_line]
    config = compose_or_explain(name, fixed)
    if swept:  # a bad point must not stop the others, so only what all of them share is refused
        check_keys(config, root)
        check_swept(name, config, fixed, swept)
    else:
        to_dataclass(config, root)
    check_launch(name, compose_hydra(name, overrides), fixed, swept)
    if "swept" in {field.name for field in fields(root)}:
        check_name(config.name)
        if unnamed := swept_keys(swept):
            sys.argv.append(f"swept=[{','.join(unnamed)}]")


def _typed_overrides(typed: Namespace) -> list[str]:
    """What was typed, and ``--config-dir`` as the setting that means the same."""
    folder = [f"hydra.searchpath=[file://{Path(typed.config_dir).resolve()}]"] if typed.config_dir else []
    return [*folder, *typed.overrides]


def _job(root: type[Any], task: Callable[[Any], Any]) -> Callable[[DictConfig], Any]:
    """Wrap a task so that a mistake is one line in the log and, outside a sweep, ends the process with 1."""

    def job(config: DictConfig) -> Any:
        join_processes()
        swept = HydraConfig.get().mode is RunMode.MULTIRUN
        if swept and "sweep" in HydraConfig.get().callbacks:
            return record_point(lambda: logged(config))
        try:
            return logged(config)
        except (UserError, SystemExit) as error:
            if swept:  # of a command whose points have no folders, as report; the others go on
                raise PointFailed(str(error)) from None
            sys.exit(1)

    def logged(config: DictConfig) -> Any:
        folder = HydraConfig.get().runtime.output_dir
        log.disabled = False  # as hydra/job_logging=disabled leaves it; Python prints errors that no handler takes
        try:
            with _naming_files(lambda: folder), noting_interrupts():
                with shared():
                    settings = to_dataclass(config, root)
                return task(settings)
        except UserError as error:
            log.error("%s", error)
            raise
        except Interrupted as stop:
            log.info("%s; the same command goes on from here", stop)
            raise  # ends a sweep too
        except Exception as error:
            log.exception("this is a fault of sidestep, please report it; the folder is %s", folder)
            raise UserError(f"{type(error).__name__}: {error} (a fault of sidestep, in {folder})") from error

    return job


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import PyTorch and what needs it in three quarters of the time: nothing of it is garbage to look for.

    What is there afterwards is passed over for good, so later collections are quick too.
    """
    if "torch" in sys.modules:  # as in the second point of a sweep
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _naming_files(folder: Callable[[], str]) -> Iterator[None]:
    """Turn what the user can mend about files into a line that names one: permissions, a full disk, a file gone.

    Args:
        folder: gives what to name where the error knows no file.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        found = error if isinstance(error, OSError) else error.__cause__  # logging wraps it where it opens its file
        if not isinstance(found, OSError) or (found.filename is None and found.errno not in WRITE_ERRORS):
            raise
        where = folder() if found.filename is None else os.fsdecode(found.filename)
        raise UserError(f"{where}: {found.strerror}; mend that and type the same command again") from error


def _folder_of(command: str, typed: Any) -> str:
    """The folder that Hydra makes for a command, which it forgets when it fails to write there."""
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir())):
        config = compose(command, typed.overrides, return_hydra_config=True)
    return str(config.hydra.sweep.dir if typed.multirun else config.hydra.run.dir)


def _end_of_thread(ended: threading.ExceptHookArgs) -> None:
    """Say in one line that TensorBoard's thread could not write; the run itself finds out at the next step it logs."""
    if isinstance(ended.exc_value, OSError):
        log.error("TensorBoard: %s", ended.exc_value.strerror)
    else:
        threading.__excepthook__(ended)
