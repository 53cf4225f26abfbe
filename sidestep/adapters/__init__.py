"""Adapters: the small trained weights beside a frozen transformer.

Each family is one module with its settings and its weights. They are imported here so that the settings register;
add a family by adding its module to this line and a YAML to ``conf/adapter``.
"""

from sidestep.adapters import loha, lokr, lora, oft
from sidestep.adapters.base import Adapter, AdapterConfig, SavedAdapter

__all__ = ["Adapter", "AdapterConfig", "SavedAdapter", "loha", "lokr", "lora", "oft"]
