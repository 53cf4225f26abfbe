"""Music rendered while a run trains, from the adapter's saved files, without disturbing the run.

previews/base/      what the base model makes of the same prompts and seeds, rendered once
previews/step_N/    prompt1-seed0-scale1.flac, its spectrogram .png, and previews.json
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
import torch
from torch import Tensor, nn

from sidestep.adapters import Adapter
from sidestep.devices import tensors_of
from sidestep.errors import UserError
from sidestep.files import replacing_folder
from sidestep.inference.pipeline import Request, Sampling
from sidestep.inference.previews import Preview, render, spectrogram
from sidestep.records import parse_json
from sidestep.training.signals import Interrupted

if TYPE_CHECKING:
    from sidestep.training.metrics import StepLog
    from sidestep.training.run import Run

log = logging.getLogger(__name__)

MANIFEST = "previews.json"


class Previews:
    """Renders what ``previews`` of a run's settings asks for.

    Args:
        run: whose adapter is rendered and whose folder is written to.

    Raises:
        UserError: if there is nothing to render.
    """

    def __init__(self, run: Run) -> None:
        settings = run.config.previews
        self.run, self.settings = run, settings
        self.folder = run.output_dir / "previews"
        self._rendered = {path.parent.name for path in self.folder.glob(f"*/{MANIFEST}")}
        self._base_shown = False
        self.requests = [
            Request(prompt=prompt, seconds=settings.seconds, lyrics=settings.lyrics) for prompt in self._prompts()
        ]
        self.sampling = Sampling(
            shift=run.config.shift,
            num_inference_steps=settings.num_inference_steps or run.config.num_inference_steps,
            guidance_scale=run.config.model_variant.guidance_scale,
        )

    def _prompts(self) -> list[str]:
        if self.settings.prompts:
            return self.settings.prompts
        captions: dict[str, None] = {}
        for number in [*self.run.held_out, *self.run.trained]:
            if caption := self.run.all_songs.caption(number):
                captions[caption] = None
            if len(captions) == 2:
                break
        if not captions:
            raise UserError("the songs have no captions to render previews of; type previews.prompts=['warm jazz']")
        return list(captions)

    def are_missing(self, step: int) -> bool:
        """Whether previews of a step are due, and were not there when the run was started."""
        every_epochs = self.settings.every_epochs
        return every_epochs is not None and self.run.is_due(step, every_epochs) and f"step_{step}" not in self._rendered

    def render_base(self) -> None:
        """Render the base model, unless it was done before; doing it first shows early that rendering works.

        Raises:
            UserError: if it does not.
        """
        base = self.folder / "base"
        listed = _read(base)
        files = [base / preview["file"] for preview in listed.get("files", [])]
        is_there = listed.get("hash") == self._hash() and all(file.is_file() for file in files)
        if 0 in self.settings.scales and not is_there:
            log.info("rendering previews of the base model")
            with blaming_previews(self.settings.seconds):
                self._render("base", None, [0.0], step=0)

    def render(
        self, adapter: Adapter, step: int, steps: StepLog, between_pieces: Callable[[], None] = lambda: None
    ) -> None:
        """Render the adapter as it is at the end of a step; what keeps that from working costs only the preview.

        Args:
            adapter: what is trained.
            step: the one just done.
            steps: where the music is shown.
            between_pieces: called before every piece of music; may raise ``Interrupted`` to end the rendering.
        """
        name = f"step_{step}"
        log.info("rendering previews of step %d", step)
        try:
            self._render(name, adapter, [scale for scale in self.settings.scales if scale != 0], step, between_pieces)
            for folder in [self.folder / name] if self._base_shown else [self.folder / "base", self.folder / name]:
                self._show(folder, steps, step)
            self._base_shown = True
        except Interrupted:
            log.info("previews of step %d are rendered when the run goes on", step)
        except torch.OutOfMemoryError:
            log.warning(
                "previews of step %d did not fit in memory; training goes on; use a smaller previews.seconds than %g",
                step,
                self.settings.seconds,
            )
        except (UserError, OSError) as error:
            log.warning("there are no previews of step %d: %s; training goes on", step, error)

    def _show(self, folder: Path, steps: StepLog, step: int) -> None:
        """Put the music of a folder into TensorBoard."""
        for preview in _read(folder).get("files", []):
            try:
                samples, rate = soundfile.read(folder / preview["file"], dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                log.warning("%s is not shown in TensorBoard: %s", folder / preview["file"], error)
                continue
            audio = torch.from_numpy(samples.T)
            tag = f"previews/{Path(preview['file']).stem}"
            steps.record_audio(tag, audio.mean(dim=0, keepdim=True), rate, spectrogram(audio), step)

    def _render(
        self,
        name: str,
        adapter: Adapter | None,
        scales: Sequence[float],
        step: int,
        between_pieces: Callable[[], None] = lambda: None,
    ) -> None:
        run = self.run
        with replacing_folder(self.folder / name) as partial:
            saved = None
            if adapter is not None:
                saved = partial / "adapter"
                saved.mkdir()
                adapter.save(saved, run.metadata(step))
            files: list[Preview] = render(
                run.checkpoint,
                saved,
                self.requests,
                seeds=self.settings.seeds,
                scales=scales,
                sampling=self.sampling,
                device=run.device,
                dtype=run.dtype,
                folder=partial,
                between_pieces=between_pieces,
            )
            if not files:
                raise UserError(f"all music was made of numbers that are not finite in {run.dtype}")
            if saved is not None:
                shutil.rmtree(saved)
            about = {"step": step, "epoch": round(run.epoch_at(step), 4), "hash": self._hash()}
            listed = about | {"files": [asdict(file) for file in files]}
            (partial / MANIFEST).write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _hash(self) -> str:
        """Sixteen hex digits of what decides the base model's music; previews with different ones do not compare."""
        decides = {
            "requests": [asdict(request) for request in self.requests],
            "seeds": self.settings.seeds,
            "sampling": asdict(self.sampling),
            "checkpoint": self.run.record.model["fingerprint"],
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def blaming_previews(seconds: float) -> Iterator[None]:
    """Say of memory that runs out in the block that rendering needed it, and not a step of training.

    Raises:
        UserError: naming ``previews.seconds``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"previews did not fit in memory; use a smaller previews.seconds than {seconds:g}, "
            f"or leave previews.every_epochs out"
        ) from error


@contextmanager
def out_of_the_way(model: nn.Module, optimizer: Any, device: torch.device) -> Iterator[None]:
    """Free a GPU of a model and its optimiser's state while the block runs, and bring both back as they were.

    What waits in main memory stays there.

    Args:
        model: perhaps wrapped by Accelerate; it has no gradients now.
        optimizer: of its adapter.
        device: where they are; on a CPU nothing is moved, since there is no other memory.
    """
    if device.type == "cpu":
        yield
        return
    places: list[tuple[dict[str, Any], str, torch.device]] = [
        (state, key, value.device)
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor)
    ]
    moved = [tensor for tensor in tensors_of(model) if tensor.device.type != "cpu"]
    for tensor in moved:
        tensor.data = tensor.data.to("cpu")
    for state, key, _ in places:
        state[key] = state[key].to("cpu")
    _empty_cache(device)
    try:
        yield
    finally:
        _empty_cache(device)
        for tensor in moved:
            tensor.data = tensor.data.to(device)
        for state, key, place in places:
            state[key] = state[key].to(place)


def _empty_cache(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _read(folder: Path) -> dict[str, Any]:
    """The list of a folder's previews; empty if they were never finished, or it is damaged."""
    try:
        listed = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return listed if isinstance(listed, dict) and _names_files(listed.get("files")) else {}


def _names_files(files: Any) -> bool:
    """Whether these are the previews of a list, each a file of its folder."""
    return isinstance(files, list) and all(
        isinstance(preview, dict) and isinstance(name := preview.get("file"), str) and Path(name).name == name
        for preview in files
    )
