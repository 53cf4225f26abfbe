"""The report page, in a real browser: what it shows, what it does, and that it shows text as text."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sidestep.reporting.page import write_page
from sidestep.reporting.runs import PointRecord, as_csv, as_json, as_table, collect_points, is_alive
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
    validation = {"hash": evaluated, "best_loss": best, "best_step": steps // 2, "base_loss": 1.5}
    validation |= {"train_loss": 0.7, "best_train_loss": 0.9}
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
            "losses": [0.8, 1.2], "base_losses": [1.4, 1.6], "hash": evaluated,
            "train_loss": 1.1 - s / 100, "drift": s / 50,
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
    runs = {run["row"]["point"]: run for run in embedded(sweep / "report.html")["runs"]}
    assert runs["lora-rank0"]["row"]["error"] == f"rank=0 {EVIL}"
    assert EVIL in {preview["prompt"] for preview in runs["lora-rank4"]["previews"]}
    assert EVIL not in (sweep / "report.html").read_text()
    assert "<img" not in (sweep / "report.html").read_text()
    assert runs["lora-rank8"]["steps"][-1] == 40  # the line that was cut off is passed over


def test_small_music_is_part_of_the_page_and_more_is_linked(sweep, tmp_path, browser):
    linked = embedded(sweep / "report.html")["runs"][1]["previews"][0]["audio"]
    assert (sweep / linked).is_file()
    whole = write_page(shutil.copytree(sweep, tmp_path / "copy"), inline_mb=1).rename(tmp_path / "alone.html")
    assert embedded(whole)["runs"][1]["previews"][0]["audio"].startswith("data:audio/flac")
    page = browser.new_page()
    for path, says_so in ((sweep / "report.html", True), (whole, False)):
        page.goto(path.as_uri())
        assert page.locator("#linked").is_visible() == says_so
    page.close()


def test_the_page_of_one_run_leads_to_its_record(sweep, tmp_path, browser):
    run = shutil.copytree(sweep / "lora-rank8", tmp_path / "s/run")
    page = browser.new_page()
    page.goto(write_page(run, inline_mb=0).as_uri())
    assert (run / page.locator("#runs tbody a").get_attribute("href")).samefile(run / "run.json")
    page.close()


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
    row = shown["row"]
    assert row["validation_best_loss"] == record["validation"]["best_loss"] == row["objective"]
    assert shown["evaluations"]["steps"] == [3, 6]
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    curves = {"losses": "loss", "train_losses": "train_loss", "base_losses": "base_loss", "drifts": "drift"}
    for curve, key in curves.items():
        assert shown["evaluations"][curve] == [line[key] for line in rows]
    best = min(rows, key=lambda line: line["loss"])
    assert row["validation_best_train_loss"] == best["train_loss"]
    assert shown["by_time"] == {key: best[key] for key in ("times", "losses", "base_losses")}
    assert [(preview["scale"], preview["epoch"]) for preview in shown["previews"]] == [(0.0, 0.0), (1.0, 2.0)]
    assert row["memory_gib"] == round(record["memory_gib"], 2) > 0
    assert row["train_seconds"] == round(record["train_seconds"], 1) > 0


def test_the_page_csv_and_json_show_one_table(sweep):
    points = collect_points(sweep)
    shown = [run["row"] for run in embedded(sweep / "report.html")["runs"]]
    assert shown == json.loads(as_json(points))
    columns, *rows = csv.reader(io.StringIO(as_csv(points)))
    for row, cells in zip(shown, rows, strict=True):
        in_csv = dict(zip(columns, cells, strict=True))
        assert {key: in_csv[key] for key in row["settings"]} == row["settings"]
        values = {key: "" if value is None else str(value) for key, value in row.items() if key != "settings"}
        assert {key: in_csv[key] for key in values} == values
    assert {row["point"]: row["rank"] for row in shown} == {
        "lora-rank4": 1, "lora-rank16": 2, "lora-rank8": 3, "lora-rank0": None,
    }  # fmt: skip


def test_words_from_files_move_no_cursor_and_are_no_formulas(tmp_path):
    (tmp_path / "a\x1b[2Jb").mkdir()
    overrides = ["seed=-1", "adapter.alpha==1+1", "name=s", "optim.lr=\x1b[31m1\n2"]
    PointRecord(overrides=overrides, status="failed", error="@x\n\x1b[31m").write(tmp_path / "a\x1b[2Jb")
    points = collect_points(tmp_path)
    table = as_table(points, tmp_path)
    assert table.splitlines()[-2:] == ["a\\x1b[2Jb failed: @x\\n\\x1b[31m", "1 failed"]
    assert table.replace("\n", "").isprintable()
    columns, cells = csv.reader(io.StringIO(as_csv(points)))
    row = dict(zip(columns, cells, strict=True))
    assert row["point"] == "a\\x1b[2Jb"
    assert row["error"] == "'@x\n\\x1b[31m"
    assert (row["seed"], row["adapter.alpha"], row["optim.lr"]) == ("-1", "'=1+1", "\\x1b[31m1\n2")


DAMAGE = {
    "point.json": ['{"overrides": [1], "status": 3}', '{"overrides": "x", "seconds": "long"}', "[1]", "\xff", "{",
                   json.dumps({"overrides": [], "status": "running", "started": "yesterday",
                               "host": socket.gethostname(), "process": os.getpid()})],
    "run.json": ['{"validation": {"best_loss": "low"}}', "[]", '{"status": "finished", "error": "\\ud800"}'],
    "metrics.jsonl": ['{"step": "one", "loss": 1}\n{"step": 2, "loss": [3]}\n[]\n7\n{"step": 3, "loss": NaN}'],
    "validation.jsonl": ['{"step": 20, "loss": 1}', '{"step": 20, "loss": 1, "times": 3, "losses": [null]}', "null"],
    "previews/base/previews.json": ['{"files": [{"file": 3}, 7, {"seed": "x"}]}', '{"files": "no", "step": []}', "[3]"],
}  # fmt: skip


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_costs_no_more_than_what_it_said(file, tmp_path):
    write_point(tmp_path / "good", num_previews=1)
    whole = embedded(write_page(tmp_path, inline_mb=0))["runs"][0]
    bad = write_point(tmp_path / "hurt", best=1.1, num_previews=1)
    for damage in DAMAGE[file]:
        (bad / file).write_text(damage, encoding="latin-1")
        points = collect_points(tmp_path)
        assert "good" in as_table(points, tmp_path)
        shown = embedded(write_page(tmp_path, inline_mb=0))["runs"]
        assert [run["row"] for run in shown] == json.loads(as_json(points))
        assert [run["row"]["point"] for run in shown] == ["good", "hurt"]
        assert {**shown[0], "row": None} == {**whole, "row": None}


@pytest.mark.parametrize("process", [-1, 10**15])
def test_what_is_no_number_of_a_process_is_no_process(process):
    assert is_alive(PointRecord(overrides=[], host=socket.gethostname(), process=process), None) is False


def test_a_setting_that_is_called_like_a_column_has_its_own_in_the_table(tmp_path):
    point = write_point(tmp_path / "run")
    record = json.loads((point / "point.json").read_text())
    (point / "point.json").write_text(json.dumps(record | {"overrides": ["objective=velocity"]}))
    (row,) = csv.DictReader(io.StringIO(as_csv(collect_points(tmp_path))))
    assert (row["objective"], row["settings.objective"]) == ("1.0", "velocity")


def test_evaluations_with_other_settings_are_not_in_a_runs_curve(tmp_path):
    point = write_point(tmp_path / "sweep/point", steps=20)
    with (point / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "loss": 0.1, "hash": "bbbb"}) + "\n")
    (run,) = embedded(write_page(tmp_path / "sweep", inline_mb=0))["runs"]
    assert run["evaluations"]["steps"] == [10, 20]
    assert min(run["evaluations"]["losses"]) == 1


def test_long_curves_are_thinned_and_the_lowest_evaluation_stays(tmp_path):
    folder = write_point(tmp_path / "run", steps=3000)
    lines = [{"step": s, "loss": 1 if s == 1501 else 2, "base_loss": 3, "hash": "aaaa"} for s in range(1, 3001)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = embedded(write_page(tmp_path, inline_mb=0))["runs"]
    assert run["steps_per_point"] == 12
    assert len(run["steps"]) == len(run["losses"]) == 250
    metrics = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()[:12]]
    assert run["losses"][0] == pytest.approx(sum(metrics) / 12, abs=1e-5)
    evaluations = run["evaluations"]
    assert len(evaluations["steps"]) <= 252
    assert dict(zip(evaluations["steps"], evaluations["losses"], strict=True))[1501] == 1
    assert evaluations["steps"][-1] == 3000


def test_the_page_of_one_run_can_be_written_from_inside_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write_point(tmp_path / "s/run"))
    (run,) = embedded(write_page(Path(), inline_mb=0))["runs"]
    assert (run["row"]["point"], run["folder"]) == ("run", ".")


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


def test_every_number_of_the_table_is_that_of_the_files(opened, sweep):
    heads = opened.locator("#runs thead th").all_inner_texts()
    for row in opened.locator("#runs tbody tr").all():
        shown = dict(zip((head.strip(" ↑↓") for head in heads), row.locator("td").all_inner_texts(), strict=True))
        record = json.loads((sweep / shown["run"] / "run.json").read_text())
        point = json.loads((sweep / shown["run"] / "point.json").read_text())
        settings = dict(override.split("=") for override in point["overrides"])
        measured = record.get("validation", {})
        numbers = {"held-out loss": "best_loss", "base": "base_loss", "training songs": "best_train_loss"}
        assert {name: shown[name] for name in numbers} == {
            name: f"{measured[key]:.4f}" if measured else "" for name, key in numbers.items()
        }
        assert shown["best step"] == str(measured.get("best_step", ""))
        assert shown["status"] == record["status"] == point["status"]
        assert shown["error"] == record["error"]
        assert (shown["adapter.rank"], shown["optim.lr"]) == (settings["adapter.rank"], settings["optim.lr"])
        assert shown["steps"] == (f"{record['step']} of {record['num_steps']}" if record["num_steps"] else "")
        assert (shown["time of steps"], shown["time in all"]) == ("9 s", "12 s")
        assert (record["train_seconds"], point["seconds"]) == (9, 12)
        assert shown["memory"] == "1.3 GiB"
        assert record["memory_gib"] == 1.25


def test_the_table_filters_by_words_and_status(opened):
    opened.locator("#filter").fill("rank=16 finished")
    assert names(opened) == ["lora-rank16"]
    opened.locator("#filter").fill("")
    opened.locator("#status").select_option("failed")
    assert names(opened) == ["lora-rank0"]
    assert opened.locator("#errors dd").inner_text() == f"rank=0 {EVIL}"


def test_ticked_runs_are_drawn_and_can_be_zoomed(opened):
    assert opened.locator("#legend li").count() == 3
    for chart in ("chart-train", "chart-validation", "chart-times", "chart-drift", "chart-setting"):
        assert opened.locator(f"#{chart} canvas").count() == 1
    lines = opened.locator("#chart-validation .u-legend .u-label").all_inner_texts()
    assert (lines.count("training songs"), lines.count("base model")) == (3, 3)
    opened.get_by_label("show lora-rank8").uncheck()
    assert opened.locator("#legend li").all_inner_texts() == ["lora-rank16", "lora-rank4"]


def shown_part(page, chart: str = "chart-train") -> tuple[float, float]:
    """From where to where a chart shows its curves, as it says itself."""
    page.wait_for_timeout(50)  # it draws in the next frame
    _, first, _, last = page.locator(f"#{chart} .zoom span").inner_text().split()
    return float(first), float(last)


def test_curves_zoom_by_dragging_and_a_double_click_shows_all(opened):
    assert shown_part(opened) == (1, 40)
    area = opened.locator("#chart-train .u-over").bounding_box()
    opened.mouse.move(area["x"] + 0.3 * area["width"], area["y"] + 20)
    opened.mouse.down()
    opened.mouse.move(area["x"] + 0.6 * area["width"], area["y"] + 20, steps=3)
    opened.mouse.up()
    first, last = shown_part(opened)
    assert first == pytest.approx(1 + 0.3 * 39, abs=1)
    assert last == pytest.approx(1 + 0.6 * 39, abs=1)
    assert shown_part(opened, "chart-validation") == (10, 40)
    opened.mouse.dblclick(area["x"] + 0.5 * area["width"], area["y"] + 20)
    assert shown_part(opened) == (1, 40)


def test_curves_zoom_by_keyboard_and_keep_their_part_when_drawn_anew(opened):
    buttons = opened.locator("#chart-train .zoom")
    buttons.get_by_label("zoom in").press("Enter")
    first, last = shown_part(opened)
    assert (first, last) == (11, 30)  # of 10.75 to 30.25
    buttons.get_by_label("to the right").press("Space")
    assert shown_part(opened) == (21, 40)  # 20.5 to 40
    opened.get_by_label("show lora-rank8").uncheck()
    assert shown_part(opened) == (21, 40)
    buttons.get_by_label("to the right").press("Enter")  # there is nothing past the end
    assert shown_part(opened) == (21, 40)
    buttons.get_by_label("zoom out").press("Enter")
    assert shown_part(opened) == (1, 40)
    buttons.get_by_label("zoom in").press("Enter")
    buttons.get_by_label("show all").press("Enter")
    assert shown_part(opened) == (1, 40)


def test_a_curve_that_is_zoomed_is_drawn_anew(opened):
    """That the words are true: the end of the axis moves with them."""
    ends = "() => [...document.querySelectorAll('#chart-train .u-over')].map(o => o.clientWidth)"
    canvas = opened.locator("#chart-train canvas")
    before, width = canvas.screenshot(), opened.evaluate(ends)
    opened.locator("#chart-train .zoom").get_by_label("zoom in").press("Enter")
    opened.locator("#chart-train .zoom").get_by_label("show all").press("Enter")
    shown_part(opened)
    assert canvas.screenshot() == before
    opened.locator("#chart-train .zoom").get_by_label("zoom in").press("Enter")
    shown_part(opened)
    assert canvas.screenshot() != before
    assert opened.evaluate(ends) == width


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


def hold(page, key: str) -> str:
    """Hold a key until it repeats, and say how many comparisons are left."""
    for _ in range(4):
        page.keyboard.down(key)
    page.keyboard.up(key)
    return page.locator("#blind-count").inner_text()


def test_a_blind_comparison_shows_no_name_and_saves_what_was_chosen(opened, tmp_path):
    opened.locator("#blind-start").focus()
    assert hold(opened, "Enter") == "10 to go"  # begun, and nothing chosen
    assert not opened.locator("#players").is_visible()
    assert hold(opened, "a") == "9 to go"
    opened.locator("[data-choice=b]").focus()
    assert hold(opened, "Enter") == "8 to go"
    opened.locator("[data-choice=none]").click()
    opened.locator("#blind-end").click()
    assert opened.locator("#choices tbody tr").count() >= 2
    with opened.expect_download() as download:
        opened.locator("#save").click()
    download.value.save_as(tmp_path / "choices.json")
    choices = json.loads((tmp_path / "choices.json").read_text())["choices"]
    assert [choice["better"] for choice in choices] == ["a", "b", "none"]
    assert all(choice["a"]["file"].endswith(".flac") and choice["a"] != choice["b"] for choice in choices)


def test_it_fits_a_phone_in_the_dark_and_zooms_by_touch(browser, tmp_path):
    long = "lora-base-" + "x" * 54
    write_point(tmp_path / "s" / long, prompt="w" * 200, num_previews=1)
    write_point(tmp_path / "s" / long[:-1], rank=16, best=1.5, num_previews=1, error="y" * 300)
    context = browser.new_context(
        viewport={"width": 360, "height": 800}, color_scheme="dark", has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(write_page(tmp_path / "s", inline_mb=0).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    page.locator("#chart-train .zoom").get_by_label("zoom in").tap()
    assert shown_part(page) == (11, 30)
    page.locator("#blind-start").tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
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


def test_a_run_that_is_not_finished_is_not_compared_silently(browser, tmp_path):
    write_point(tmp_path / "s/a", rank=1, best=1.0)
    other = write_point(tmp_path / "s/b", rank=2, best=0.5, evaluated="cccc", status="interrupted")
    point = json.loads((other / "point.json").read_text())
    (other / "point.json").write_text(json.dumps(point | {"objective": None}))
    assert "evaluated in 2 ways" in as_table(collect_points(tmp_path / "s"), tmp_path / "s")
    page = browser.new_page()
    page.goto(write_page(tmp_path / "s", inline_mb=0).as_uri())
    assert "cannot be compared" in page.locator("#warning").inner_text()
    assert "evaluated" in page.locator("#runs thead th").all_inner_texts()
    page.close()


def test_of_very_many_runs_the_table_shows_some_until_asked(browser, tmp_path):
    for number in range(320):
        folder = tmp_path / f"s/run{number}"
        folder.mkdir(parents=True)
        point = {"overrides": [f"seed={number}"], "status": "finished", "objective": 1 + number / 1000}
        (folder / "point.json").write_text(json.dumps(point))
    page = browser.new_page()
    page.goto(write_page(tmp_path / "s", inline_mb=0).as_uri())
    assert page.locator("#runs tbody tr").count() == 300
    assert page.locator("#count").inner_text() == "300 of 320 shown"
    page.locator("#more").click()
    assert page.locator("#runs tbody tr").count() == 320
    assert not page.locator("#more").is_visible()
    assert page.locator("#chart-setting canvas").count() == 1
    page.close()


def test_two_hundred_points_with_four_previews_open_in_two_seconds(browser, tmp_path):
    """In processor time of the page, because other tests share the cores; -s shows the time on the clock, too."""
    first = write_point(tmp_path / "s/run0", best=1.0, num_previews=2, steps=1000)
    for i in range(1, 200):
        point = json.loads((shutil.copytree(first, tmp_path / f"s/run{i}") / "point.json").read_text())
        point["overrides"] = ["adapter=lora", f"adapter.rank={i + 1}"]
        (tmp_path / f"s/run{i}/point.json").write_text(json.dumps(point))
    path = write_page(tmp_path / "s", inline_mb=0)
    page = browser.new_page()
    watch = page.context.new_cdp_session(page)
    watch.send("Performance.enable", {"timeDomain": "threadTicks"})
    began = time.monotonic()
    page.goto(path.as_uri())
    page.wait_for_selector("#chart-setting canvas")
    seconds = time.monotonic() - began
    measured = {metric["name"]: metric["value"] for metric in watch.send("Performance.getMetrics")["metrics"]}
    assert page.locator("#runs tbody tr").count() == 200
    took = (
        f"{path.stat().st_size / 2**20:.1f} MiB, {measured['TaskDuration']:.2f} s of processor, {seconds:.2f} s in all"
    )
    print(took)
    assert 0 < measured["TaskDuration"] < 2, took
    page.close()
