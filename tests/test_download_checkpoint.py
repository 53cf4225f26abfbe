import hashlib
import importlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHARED = {"vae/config.json": 3, "vae/diffusion_pytorch_model.safetensors": 40, "Qwen3-Embedding-0.6B/merges.txt": 5}
REPOS = {
    "ACE-Step/Ace-Step1.5": {
        "README.md": 7,
        "acestep-5Hz-lm-1.7B/model.safetensors": 900,
        "acestep-v15-turbo/model.safetensors": 60,
        "acestep-v15-turbo/modeling_acestep_v15_turbo.py": 8,
        **SHARED,
    },
    "ACE-Step/acestep-v15-base": {
        "config.json": 4,
        "model.safetensors": 50,
        "modeling_acestep_v15_base.py": 8,
        "silence_latent.pt": 6,
    },
}


@dataclass
class Hub:
    """Stands in for the hub: lists REPOS and writes files of the listed sizes."""

    fetched: list[str]
    shorten_by: int = 0
    byte: bytes = b"\0"
    """What its files are full of."""

    def model_info(self, repo, files_metadata):
        assert files_metadata
        return SimpleNamespace(sha="c0ffee", siblings=[listed(name, size) for name, size in REPOS[repo].items()])

    def snapshot_download(self, repo, *, revision, local_dir, allow_patterns):
        assert revision == "c0ffee"
        for name, size in REPOS[repo].items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                path = local_dir / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.byte * (size - self.shorten_by))
                self.fetched.append(f"{repo}:{name}")


def listed(name, size):
    """What the hub says of a file full of zeros: the hash of large files, and git's own of all."""
    content = bytes(size)
    large = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if name.endswith(".safetensors") else None
    blob_id = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    return SimpleNamespace(rfilename=name, size=size, lfs=large, blob_id=blob_id)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub([])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("download_checkpoint")


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_model_comes_with_what_all_models_share_and_without_code(script, hub, tmp_path, capsys):
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    base = {f"acestep-v15-base/{name}" for name in ("config.json", "model.safetensors", "silence_latent.pt")}
    assert files_below(tmp_path) == base | SHARED.keys()
    assert f"ACE-Step/acestep-v15-base: 3 files, 0.00 MB, to {tmp_path / 'acestep-v15-base'}" in capsys.readouterr().out


def test_turbo_comes_from_the_main_repository(script, hub, tmp_path):
    script.main(["turbo", "--checkpoint-dir", str(tmp_path)])
    assert files_below(tmp_path) == {"acestep-v15-turbo/model.safetensors"} | SHARED.keys()


def test_only_files_that_are_missing_or_of_another_size_are_fetched(script, hub, tmp_path, capsys):
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    (tmp_path / "vae" / "config.json").unlink()
    (tmp_path / "acestep-v15-base" / "model.safetensors").write_bytes(b"half")
    hub.fetched.clear()
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    assert hub.fetched == ["ACE-Step/acestep-v15-base:model.safetensors", "ACE-Step/Ace-Step1.5:vae/config.json"]

    hub.fetched.clear()
    capsys.readouterr()
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    assert hub.fetched == []
    assert "all 3 files are in" in capsys.readouterr().out


def test_a_file_that_arrives_short_is_named(script, hub, tmp_path):
    hub.shorten_by = 1
    with pytest.raises(SystemExit, match=r"acestep-v15-base/config\.json did not arrive whole; run the same command"):
        script.main(["base", "--checkpoint-dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_what_the_hub_lists_is_named_and_fetched_again(script, hub, tmp_path, name):
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    path = tmp_path / "acestep-v15-base" / name
    whole = path.read_bytes()
    path.unlink()
    hub.byte = b"x"
    with pytest.raises(SystemExit, match=rf"acestep-v15-base/{name} arrived with another hash than the hub lists"):
        script.main(["base", "--checkpoint-dir", str(tmp_path)])
    assert not path.exists()
    hub.byte = b"\0"
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    assert path.read_bytes() == whole


def test_files_that_were_damaged_later_are_found_by_check(script, hub, tmp_path, capsys):
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    hub.fetched.clear()
    script.main(["base", "--checkpoint-dir", str(tmp_path)])
    assert hub.fetched == []
    script.main(["base", "--checkpoint-dir", str(tmp_path), "--check"])
    assert hub.fetched == ["ACE-Step/Ace-Step1.5:vae/diffusion_pytorch_model.safetensors"]
    assert f"{path} was not what the hub holds" in capsys.readouterr().out
    assert path.read_bytes() == bytes(40)


def test_being_offline_is_one_line(script, tmp_path, monkeypatch):
    def refuse(repo, files_metadata):
        raise OSError("[Errno 111] Connection refused")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=refuse))
    with pytest.raises(SystemExit) as error:
        script.main(["base", "--checkpoint-dir", str(tmp_path)])
    assert error.value.code == (
        "cannot download ACE-Step/acestep-v15-base from the Hugging Face hub: [Errno 111] Connection refused; "
        "check the network and run it again"
    )


def test_an_unknown_model_is_answered_with_the_known_ones(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["medium"])
    assert "'base', 'sft', 'turbo', 'xl_base', 'xl_sft', 'xl_turbo'" in capsys.readouterr().err
