"""Download ACE-Step 1.5 models from the Hugging Face hub into the layout that sidestep reads.

    python scripts/download_checkpoint.py base turbo --checkpoint-dir checkpoints

The VAE and the text encoder, which every model needs, come along. Files that are there with the right size are
skipped and an interrupted download goes on where it stopped. Only weights and settings are fetched, no code. What
arrives is compared with the hashes that the hub lists; --check compares what is already there too.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

MAIN_REPO = "ACE-Step/Ace-Step1.5"  # holds the turbo model and what all models share, each in a folder
SHARED_FOLDERS = ("vae", "Qwen3-Embedding-0.6B")
SUFFIXES = (".json", ".safetensors", ".pt", ".txt")
VARIANTS = Path(__file__).resolve().parents[1] / "conf" / "model_variant"


@dataclass(frozen=True)
class HubFile:
    """What the hub lists about a file."""

    size: int
    """Bytes."""
    sha256: str | None
    """Of a large file."""
    git_hash: str
    """Of a small file, as git makes it."""

    def is_at(self, path: Path) -> bool:
        """Say whether a file with the same hash lies at ``path``."""
        if _size_of(path) != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest() == (self.sha256 or self.git_hash)


@dataclass(frozen=True)
class Download:
    """Some files of one repository and where they go."""

    repo: str
    revision: str
    """The commit that the hashes are of."""
    target: Path
    files: dict[str, HubFile]
    """By path in the repository and below ``target``."""

    def missing(self) -> dict[str, int]:
        """Give the bytes of the files that are not there with the right size."""
        return {name: file.size for name, file in self.files.items() if _size_of(self.target / name) != file.size}

    def remove_damaged(self, names: list[str]) -> list[str]:
        """Delete the files whose hash is not the hub's, and name them."""
        damaged = [name for name in names if not self.files[name].is_at(self.target / name)]
        for name in damaged:
            (self.target / name).unlink(missing_ok=True)
        return damaged


def main(arguments: list[str] | None = None) -> None:
    """Download what the command line asks for."""
    names = sorted(path.stem for path in VARIANTS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=names, metavar="variant", help=", ".join(names))
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"), help="default: checkpoints")
    parser.add_argument("--check", action="store_true", help="compare files that are there with the hub's hashes too")
    options = parser.parse_args(arguments)
    for download in plan(options.variants, options.checkpoint_dir):
        if options.check:
            there = [name for name in download.files if name not in download.missing()]
            for name in download.remove_damaged(there):
                print(f"{download.target / name} was not what the hub holds, and is downloaded again")
        fetch(download)


def plan(variants: list[str], checkpoint_dir: Path) -> list[Download]:
    """List what the models of ``variants`` consist of.

    Raises:
        SystemExit: if the hub cannot be reached or a repository does not hold a model.
    """
    main_folders = list(SHARED_FOLDERS)
    downloads = []
    for name in variants:
        variant = OmegaConf.load(VARIANTS / f"{name}.yaml")
        if variant.repo == MAIN_REPO:
            main_folders.append(variant.folder)
        else:
            revision, files = _list(variant.repo)
            own = {path: file for path, file in files.items() if "/" not in path}
            downloads.append(Download(variant.repo, revision, checkpoint_dir / variant.folder, own))
    revision, files = _list(MAIN_REPO)
    shared = {path: file for path, file in files.items() if path.split("/")[0] in main_folders}
    downloads.append(Download(MAIN_REPO, revision, checkpoint_dir, shared))
    for download in downloads:
        if not any(path.endswith(".safetensors") for path in download.files):
            raise SystemExit(
                f"{download.repo} on the hub holds no weights where they used to be; see https://hf.co/{download.repo}"
            )
    return downloads


def fetch(download: Download) -> None:
    """Download the files that are missing, and say so first.

    Raises:
        SystemExit: if the hub cannot be reached, or a file arrives with another size or hash.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    missing = download.missing()
    if not missing:
        print(f"{download.repo}: all {len(download.files)} files are in {download.target}")
        return
    print(f"{download.repo}: {len(missing)} files, {_gigabytes(sum(missing.values()))}, to {download.target}")
    for name, size in missing.items():
        print(f"  {name}  {_gigabytes(size)}")
    try:
        snapshot_download(
            download.repo, revision=download.revision, local_dir=download.target, allow_patterns=sorted(missing)
        )
    except (OSError, HTTPError) as error:
        raise _unreachable(download.repo, error) from error
    for name in download.missing():
        raise SystemExit(f"{download.target / name} did not arrive whole; run the same command again")
    for name in download.remove_damaged(list(missing)):
        raise SystemExit(
            f"{download.target / name} arrived with another hash than the hub lists, and was deleted; "
            "run the same command again"
        )


def _list(repo: str) -> tuple[str, dict[str, HubFile]]:
    """Ask the hub for the newest commit of a repository, and the weights and settings in it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except (OSError, HTTPError) as error:
        raise _unreachable(repo, error) from error
    return info.sha or "main", {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id or "")
        for file in info.siblings or []
        if file.rfilename.endswith(SUFFIXES)
    }


def _unreachable(repo: str, error: Exception) -> SystemExit:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SystemExit(f"cannot download {repo} from the Hugging Face hub: {reason}; check the network and run it again")


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
