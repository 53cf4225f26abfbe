"""The report page, in a real browser: what it shows, what it does, and that it shows text as text."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sidestep.reporting.page import write_page
from tests.factories import run_training

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
EVIL = "</script><img src=x onerror=\"window.hurt=1\"><b>bold</b> & 'quoted' ${x}"


def write_point(
    folder: Path,
    *,
    rank: int = 8,
    lr: str = "0.001",
    best: float | None = 1.0,
    status: str = "finished",
    error: str = "",
    evaluated: str = "aaaa",
    prompt: str = "quiet piano",
    num_previews: int = 0,
    steps: int = 40,
) -> Path:
    """One point of a sweep as training leaves it, with numbers that are made up."""
    folder.mkdir(parents=True)
    overrides = ["adapter=lora", f"adapter.rank={rank}", f"optim.lr={lr}"]
    point = {"overrides": overrides, "status": status, "error": error, "objective": best, "seconds": 12.0}
    (folder / "point.json").write_text(json.dumps(point))
    validation = {"hash": evaluated, "best_loss": best, "best_step": steps // 2, "base_loss": 1.5, "train_loss": 0.9}
    record = {
        "status": status,
        "step": steps,
        "num_steps": steps,
        "error": error,
        "memory_gib": 1.25,
        "train_seconds": 9.0,
    }
    (folder / "run.json").write_text(json.dumps(record | ({"validation": validation} if best is not None else {})))
    lines = [{"step": s, "loss": 1 + math.exp(-s / 10) + 0.1 * math.sin(7 * s)} for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    times = [0.25, 0.75]
    evaluations = [
        {
            "step": s, "loss": (best or 1) + abs(s - steps // 2) / 50, "base_loss": 1.5, "times": times,
            "losses": [0.8, 1.2], "base_losses": [1.4, 1.6],
        }
        for s in range(10, steps + 1, 10)
    ]  # fmt: skip
    if best is not None:
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    for step, name, scale in ((0, "base", 0.0), (steps, "epoch_4", 1.0)):
        prompts = [prompt, *(f"piece {n}" for n in range(1, num_previews))][:num_previews]
        files = [
            {"file": f"prompt{n}-seed0-scale{scale:g}.flac", "prompt": words, "seed": 0, "scale": scale}
            for n, words in enumerate(prompts, start=1)
        ]
        if files:
            (folder / "previews" / name).mkdir(parents=True)
            listed = {"step": step, "epoch": step / 10, "hash": "bbbb", "files": files}
            (folder / "previews" / name / "previews.json").write_text(json.dumps(listed))
            for number, file in enumerate(files):
                sound = 0.1 * np.sin(np.arange(4800) * 0.05 * (1 + number + 2 * scale))
                soundfile.write(folder / "previews" / name / file["file"], sound, 48_000)
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Four points: the third is the best and is named after nothing good, the last failed."""
    folder = tmp_path_factory.mktemp("report") / "first & second"
    write_point(folder / "lora-rank8", rank=8, lr="0.001", best=1.2, num_previews=2)
    write_point(folder / "lora-rank16", rank=16, lr="0.0001", best=1.1, num_previews=2)
    write_point(folder / "lora-rank4", rank=4, lr="0.01", best=1.0, num_previews=2, prompt=EVIL)
    write_point(folder / "lora-rank0", rank=0, lr="0.001", best=None, status="failed", error=f"rank=0 {EVIL}", steps=0)
    write_page(folder, inline_mb=0)
    return folder


def embedded(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    block = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(block)


# what is written


def test_the_data_survives_and_no_text_of_a_file_is_markup(sweep):
    runs = {run["name"]: run for run in embedded(sweep / "report.html")["runs"]}
    assert runs["lora-rank0"]["error"] == f"rank=0 {EVIL}"
    assert EVIL in {preview["prompt"] for preview in runs["lora-rank4"]["previews"]}
    assert EVIL not in (sweep / "report.html").read_text()
    assert "<img" not in (sweep / "report.html").read_text()
    assert runs["lora-rank8"]["steps"][-1] == 40  # the line that was cut off is passed over


def test_small_music_is_part_of_the_page_and_more_is_linked(sweep, tmp_path):
    linked = embedded(sweep / "report.html")["runs"][1]["previews"][0]["audio"]
    assert (sweep / linked).is_file()
    copy = shutil.copytree(sweep, tmp_path / "copy")
    assert embedded(write_page(copy, inline_mb=1))["runs"][1]["previews"][0]["audio"].startswith("data:audio/flac")


def test_a_list_of_previews_cannot_name_files_elsewhere(tmp_path):
    folder = write_point(tmp_path / "s/run", num_previews=1)
    (tmp_path / "secret.flac").write_bytes(b"secret")
    listed = {"step": 1, "files": [{"file": "../../../../secret.flac", "prompt": "p"}]}
    (folder / "previews/epoch_4/previews.json").write_text(json.dumps(listed))
    page = write_page(tmp_path / "s", inline_mb=1)
    assert "secret" not in page.read_text()


def test_a_real_run_has_its_curve_its_evaluations_and_its_music(tmp_path, checkpoint_dir, dataset_dir):
    run = tmp_path / "outputs/run"
    run_training(
        run, f"checkpoint_dir={checkpoint_dir}", f"dataset_dir={dataset_dir}", "max_epochs=2",
        "validation.songs=[song1.wav]", "validation.every_epochs=1", "validation.num_times=2",
        "previews.every_epochs=2", "previews.prompts=[piano]", "previews.seconds=1", "previews.num_inference_steps=1",
    )  # fmt: skip
    (shown,) = embedded(write_page(run, inline_mb=8))["runs"]
    record = json.loads((run / "run.json").read_text())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert shown["losses"] == pytest.approx(losses, abs=1e-5)
    assert shown["validation"]["best_loss"] == record["validation"]["best_loss"] == shown["objective"]
    assert [row["step"] for row in shown["evaluations"]] == [3, 6]
    assert [(preview["scale"], preview["epoch"]) for preview in shown["previews"]] == [(0.0, 0.0), (1.0, 2.0)]
    assert shown["memory_gib"] > 0
    assert shown["seconds"] > 0


# what it does


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, sweep):
    """The page of the sweep in a fresh tab; its complaints are collected and must be none."""
    complaints: list[str] = []
    context = browser.new_context(accept_downloads=True, offline=True)
    page = context.new_page()
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto((sweep / "report.html").as_uri())
    yield page
    assert complaints == []
    assert page.evaluate("window.hurt") is None
    context.close()


def names(page) -> list[str]:
    return page.locator("#runs tbody tr td:nth-child(3)").all_inner_texts()


def test_the_best_run_is_first_and_columns_sort_both_ways(opened):
    assert names(opened) == ["lora-rank4", "lora-rank16", "lora-rank8", "lora-rank0"]
    rank = opened.get_by_role("button", name="adapter.rank")
    rank.click()
    assert names(opened) == ["lora-rank0", "lora-rank4", "lora-rank8", "lora-rank16"]
    rank.press("Enter")  # by keyboard
    assert names(opened) == ["lora-rank16", "lora-rank8", "lora-rank4", "lora-rank0"]
    assert opened.locator("th[aria-sort=descending]").inner_text().startswith("adapter.rank")


def test_the_table_filters_by_words_and_status(opened):
    opened.locator("#filter").fill("rank=16 finished")
    assert names(opened) == ["lora-rank16"]
    opened.locator("#filter").fill("")
    opened.locator("#status").select_option("failed")
    assert names(opened) == ["lora-rank0"]
    assert opened.locator("#errors dd").inner_text() == f"rank=0 {EVIL}"


def test_ticked_runs_are_drawn_and_can_be_zoomed(opened):
    assert opened.locator("#legend li").count() == 3
    for chart in ("chart-train", "chart-validation", "chart-times", "chart-setting"):
        assert opened.locator(f"#{chart} canvas").count() == 1
    opened.get_by_label("show lora-rank8").uncheck()
    assert opened.locator("#legend li").all_inner_texts() == ["lora-rank16", "lora-rank4"]
    area = opened.locator("#chart-train .u-over").bounding_box()
    before = opened.locator("#chart-train canvas").screenshot()
    opened.mouse.move(area["x"] + 0.3 * area["width"], area["y"] + 20)
    opened.mouse.down()
    opened.mouse.move(area["x"] + 0.6 * area["width"], area["y"] + 20, steps=3)
    opened.mouse.up()
    assert opened.locator("#chart-train canvas").screenshot() != before


def test_music_plays_side_by_side_one_at_a_time(opened):
    assert opened.locator(".player strong").all_inner_texts() == [
        "base model",
        *(f"lora-rank{rank}, epoch 4, scale 1" for rank in (16, 4, 8)),
    ]
    playing = """async () => {
        const all = [...document.querySelectorAll('.player audio')];
        await all[0].play(); const first = !all[0].paused;
        await all[1].play(); return [first, all[0].paused || all[0].ended, all[1].duration];
    }"""
    first, stopped, seconds = opened.evaluate(playing)
    assert first
    assert stopped
    assert seconds == pytest.approx(0.1)


def test_a_blind_comparison_shows_no_name_and_saves_what_was_chosen(opened, tmp_path):
    opened.locator("#blind-start").click()
    assert not opened.locator("#players").is_visible()
    opened.keyboard.press("a")
    opened.keyboard.press("b")
    opened.locator("[data-choice=none]").click()
    opened.locator("#blind-end").click()
    assert opened.locator("#choices tbody tr").count() >= 2
    with opened.expect_download() as download:
        opened.locator("#save").click()
    download.value.save_as(tmp_path / "choices.json")
    choices = json.loads((tmp_path / "choices.json").read_text())["choices"]
    assert [choice["better"] for choice in choices] == ["a", "b", "none"]
    assert all(choice["a"]["file"].endswith(".flac") and choice["a"] != choice["b"] for choice in choices)


def test_it_fits_a_phone_in_the_dark(browser, sweep):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.goto((sweep / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    context.close()


def test_runs_that_were_evaluated_differently_are_not_ranked(browser, tmp_path):
    write_point(tmp_path / "s/a", rank=1, best=1.0, evaluated="aaaa")
    write_point(tmp_path / "s/b", rank=2, best=0.5, evaluated="cccc")
    page = browser.new_page()
    page.goto(write_page(tmp_path / "s", inline_mb=0).as_uri())
    assert "cannot be compared" in page.locator("#warning").inner_text()
    headers = page.locator("#runs thead th").all_inner_texts()
    assert "rank" not in headers
    assert "evaluated" in headers
    assert page.locator("#chart-setting canvas").count() == 0
    page.close()


def test_two_hundred_points_with_four_previews_open_in_two_seconds(browser, tmp_path):
    for i in range(200):
        write_point(tmp_path / f"s/run{i}", rank=i + 1, best=1 + i / 100, num_previews=2, steps=1000)
    path = write_page(tmp_path / "s", inline_mb=0)
    page = browser.new_page()
    began = time.monotonic()
    page.goto(path.as_uri())
    page.wait_for_selector("#chart-train canvas")
    took = time.monotonic() - began
    assert page.locator("#runs tbody tr").count() == 200
    assert took < 2, f"{took:.2f} s for {path.stat().st_size / 2**20:.1f} MiB"
    page.close()
