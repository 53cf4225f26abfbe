"""What a device must have is looked for before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

from sidestep.devices import check_compiler
from sidestep.errors import UserError


@pytest.fixture
def there(monkeypatch):
    """Says what is installed."""

    def say(*names, cc=None):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
        monkeypatch.setattr(shutil, "which", lambda name: name if name in names else None)
        monkeypatch.delenv("CC", raising=False)
        if cc is not None:
            monkeypatch.setenv("CC", cc)

    return say


@pytest.mark.skipif(os.name == "nt", reason="Triton brings a compiler there")
def test_what_compiles_for_a_gpu_is_looked_for(there):
    there("gcc")
    with pytest.raises(UserError, match=r"compile=true needs Triton, .* pip install triton; or leave it out"):
        check_compiler("compile=true")
    there("triton")
    with pytest.raises(UserError, match=r"flex needs a C compiler, .* leave attention_kernel=flex out"):
        check_compiler("attention_kernel=flex")
    there("triton", "clang")
    check_compiler("compile=true")
    there("triton", cc="/opt/cc")
    check_compiler("compile=true")
