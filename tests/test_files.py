from __future__ import annotations

import logging
import threading
import time

import pytest

from sidestep.errors import UserError
from sidestep.files import alone_in


def test_who_waits_for_a_folder_gets_it_when_its_owner_leaves(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    order = []

    def come_second():
        with alone_in(tmp_path, wait=True):
            order.append("second")

    second = threading.Thread(target=come_second)
    with alone_in(tmp_path):
        second.start()
        deadline = time.monotonic() + 10
        while "waiting for" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        order.append("first")
    second.join(timeout=10)
    assert order == ["first", "second"]
    assert f"waiting for {tmp_path}, which is in use by process " in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be written"), alone_in(tmp_path / "file"):
        pass
