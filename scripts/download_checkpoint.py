"""Download ACE-Step 1.5 models from the Hugging Face hub into the layout that sidestep reads.

    python scripts/download_checkpoint.py base turbo --checkpoint-dir checkpoints

The VAE and the text encoder, which every model needs, come along. Files that are there with the right size are
skipped and an interrupted download goes on where it stopped. Only weights and settings are fetched, no code.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

MAIN_REPO = "ACE-Step/Ace-Step1.5"  # holds the turbo model and what all models share, each in a folder
SHARED_FOLDERS = ("vae", "Qwen3-Embedding-0.6B")
SUFFIXES = (".json", ".safetensors", ".pt", ".txt")
VARIANTS = Path(__file__).resolve().parents[1] / "conf" / "model_variant"


@dataclass(frozen=True)
class Download:
    """Some files of one repository and where they go."""

    repo: str
    target: Path
    sizes: dict[str, int]
    """Bytes of each file, by its path in the repository and below ``target``."""

    def missing(self) -> dict[str, int]:
        """Give the files that are not there with the right size."""
        return {name: size for name, size in self.sizes.items() if _size_of(self.target / name) != size}


def main(arguments: list[str] | None = None) -> None:
    """Download what the command line asks for."""
    names = sorted(path.stem for path in VARIANTS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=names, metavar="variant", help=", ".join(names))
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"), help="default: checkpoints")
    options = parser.parse_args(arguments)
    for download in plan(options.variants, options.checkpoint_dir):
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
            sizes = {path: size for path, size in _sizes(variant.repo).items() if "/" not in path}
            downloads.append(Download(variant.repo, checkpoint_dir / variant.folder, sizes))
    sizes = {path: size for path, size in _sizes(MAIN_REPO).items() if path.split("/")[0] in main_folders}
    downloads.append(Download(MAIN_REPO, checkpoint_dir, sizes))
    for download in downloads:
        if not any(path.endswith(".safetensors") for path in download.sizes):
            raise SystemExit(
                f"{download.repo} on the hub holds no weights where they used to be; see https://hf.co/{download.repo}"
            )
    return downloads


def fetch(download: Download) -> None:
    """Download the files that are missing, and say so first.

    Raises:
        SystemExit: if the hub cannot be reached, or a file arrives with another size.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    missing = download.missing()
    if not missing:
        print(f"{download.repo}: all {len(download.sizes)} files are in {download.target}")
        return
    print(f"{download.repo}: {len(missing)} files, {_gigabytes(sum(missing.values()))}, to {download.target}")
    for name, size in missing.items():
        print(f"  {name}  {_gigabytes(size)}")
    try:
        snapshot_download(download.repo, local_dir=download.target, allow_patterns=sorted(missing))
    except (OSError, HTTPError) as error:
        raise _unreachable(download.repo, error) from error
    for name in download.missing():
        raise SystemExit(f"{download.target / name} did not arrive whole; run the same command again")


def _sizes(repo: str) -> dict[str, int]:
    """Ask the hub for the weights and settings in a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        files = HfApi().model_info(repo, files_metadata=True).siblings or []
    except (OSError, HTTPError) as error:
        raise _unreachable(repo, error) from error
    return {file.rfilename: file.size or 0 for file in files if file.rfilename.endswith(SUFFIXES)}


def _unreachable(repo: str, error: Exception) -> SystemExit:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SystemExit(f"cannot download {repo} from the Hugging Face hub: {reason}; check the network and run it again")


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
