from __future__ import annotations

import logging
import shutil
import threading
import time

import pytest

from sidestep.errors import UserError
from sidestep.files import alone_in, hidden_name, remove_abandoned, replacing_folder


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


def test_a_link_to_a_folder_stays_a_link_and_its_folder_is_replaced(tmp_path):
    """As where final/ is a link into the folder of a player."""
    players, final = tmp_path / "players/mine", tmp_path / "run/final"
    for folder in (players, final.parent):
        folder.mkdir(parents=True)
    (players / "old").touch()
    final.symlink_to(players)
    with replacing_folder(final) as partial:
        (partial / "new").touch()
    assert final.readlink() == players
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["final", "mine", "new", "players", "run"]

    shutil.rmtree(players.parent)  # as a disk that is not mounted
    with pytest.raises(UserError, match="final is no folder"), replacing_folder(final):
        pass
    assert not players.parent.exists()


def test_a_link_that_a_kill_left_under_a_hidden_name_is_removed_and_not_followed(tmp_path):
    (tmp_path / "kept/file").mkdir(parents=True)
    hidden_name(tmp_path / "final", "partial").symlink_to(tmp_path / "kept")
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "kept"]
