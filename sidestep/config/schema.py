"""Typed YAML groups: one dataclass per option, registered where it is defined.

``@option("optim", "adamw")`` makes a dataclass the schema of ``conf/optim/adamw.yaml``. Hydra then refuses a
misspelt key or a wrong type while it composes, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hydra.core.config_store import ConfigStore

T = TypeVar("T")


def option(group: str, name: str) -> Callable[[type[T]], type[T]]:
    """Register the decorated dataclass as the schema of ``conf/<group>/<name>.yaml``."""

    def register(cls: type[T]) -> type[T]:
        ConfigStore.instance().store(group=f"schema/{group}", name=name, node=cls, provider="sidestep")
        return cls

    return register


def root(name: str) -> Callable[[type[T]], type[T]]:
    """Register the decorated dataclass as the root schema that ``conf/<command>.yaml`` extends by ``name``."""

    def register(cls: type[T]) -> type[T]:
        ConfigStore.instance().store(name=name, node=cls, provider="sidestep")
        return cls

    return register
