"""The run's report: complete, escaped, self-contained, and drawn from unfinished records too."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from stepdistill import cli
from stepdistill.monitoring.records import read_lines, read_run
from stepdistill.monitoring.run_report import render


@pytest.fixture
def run(tmp_path):
    """A run of 40 updates at its 30th."""
    facts = {
        "method": "dmd2", "model": "me/<teacher>",
        "train_config": {"max_train_steps": 40, "validation_prompts": ["a <b>"]},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(facts))
    log = [
        {"step": s, "seconds": s / 2, "loss/student": 1 / s, "loss/fake": 0.3, "student/dm": 0.1,
         "grad_norm/student": 1.0, "grad_norm/fake": 50.0, "lr/student": 1e-4,
         "steps_per_second": 2.0}
        for s in range(1, 31)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    shots = [
        {"step": s, "seconds": s / 2, "teacher_rmse": 0.5, "frechet_diagonal": 2.0 - s / 30,
         "diversity_ratio": 0.9, "fake_lag": -0.1,
         "trajectory": {"t": [1.0, 0.5], "student": [0.6, 0.3], "teacher": [0.7, 0.4]}}
        for s in (0, 10, 20, 30)
    ]  # fmt: skip
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(x) + "\n" for x in shots))
    alarm = {"kind": "alarm", "step": 20, "line": "watchdog: drift, student, step 20: <off>"}
    (tmp_path / "events.jsonl").write_text(json.dumps(alarm) + "\n")
    (tmp_path / "validation").mkdir()
    for name in ("teacher", "step-0", "step-10", "step-20", "step-30"):
        Image.new("RGB", (32, 16), (90, 20, 200)).save(tmp_path / "validation" / f"{name}.png")
    return tmp_path


def charts(text: str) -> list[str]:
    return re.findall(r'<figure class="chart"><figcaption><h3>(.*?)</h3>', text)


def test_every_part_is_there(run) -> None:
    text = render(read_run(run))
    assert charts(text) == [
        "Diagonal Fréchet distance", "Distance to the teacher", "Diversity",
        "Lag of the fake score", "Error along the teacher&#x27;s trajectory", "Loss of student",
        "Loss of fake", "student: dm", "Gradient norms", "Learning rates", "Speed",
    ]  # fmt: skip
    assert text.count('src="data:image/png;base64,') == 5
    assert "30 of 40" in text
    assert "0 min 05 s" in text  # ten updates left at two a second


def test_it_is_escaped_and_fetches_nothing(run) -> None:
    text = render(read_run(run))
    assert "&lt;teacher&gt;" in text
    assert "a &lt;b&gt;" in text
    assert "step 20: &lt;off&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "http" not in text
    assert '<meta name="viewport"' in text


def end(run, state: str, why: str = "", step: int = 30) -> None:
    with (run / "events.jsonl").open("a") as handle:
        handle.write(json.dumps({"kind": "end", "step": step, "state": state, "why": why}) + "\n")


def test_it_reloads_only_while_the_run_goes_on(run) -> None:
    assert "location.reload()" in render(read_run(run))
    end(run, "stopped by the watchdog", "x0 <drifts>")
    text = render(read_run(run))
    assert "location.reload()" not in text
    assert "x0 &lt;drifts&gt;" in text
    assert '<span class="badge stopped">stopped by the watchdog</span>' in text


@pytest.mark.parametrize(("state", "colour"), [("failed", "b91c1c"), ("interrupted", "92400e")])
def test_a_run_broken_off_has_its_own_badge_and_its_last_update(run, state, colour) -> None:
    end(run, state, "OSError: <full>", step=33)
    text = render(read_run(run))
    assert f'<span class="badge {state}">{state}</span>' in text
    assert re.search(rf"\.badge\.{state} {{ background: #{colour}; }}", text)
    assert "OSError: &lt;full&gt;" in text
    assert "33 of 40" in text
    assert "location.reload()" not in text


def test_the_best_is_marked(run) -> None:
    best = {"step": 20, "metric": "teacher_rmse", "value": 0.5}
    (run / "best.json").write_text(json.dumps(best))
    text = render(read_run(run))
    assert text.count('<figure class="best">') == 1
    assert "0.5 at 20" in text


def test_grids_are_spread_over_a_long_run(run) -> None:
    rows = "".join(json.dumps({"step": s}) + "\n" for s in range(0, 1000, 10))
    (run / "validation.jsonl").write_text(rows)
    for step in range(0, 1000, 10):
        Image.new("RGB", (4, 4)).save(run / "validation" / f"step-{step}.png")
    text = render(read_run(run))
    shown = re.findall(r"student samples at update (\d+)", text)
    assert shown == ["0", "250", "500", "740", "990"]


def test_a_line_being_written_is_left_out(run) -> None:
    with (run / "log.jsonl").open("a") as handle:
        handle.write('{"step": 31, "loss/stu')
    assert len(read_lines(run / "log.jsonl")) == 30
    (run / "log.jsonl").write_text('{"step": 31, "lo\n{"step": 32}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl: expected JSON in line 1"):
        read_lines(run / "log.jsonl")


def test_a_run_that_has_only_begun_has_a_page(run) -> None:
    for name in ("log", "validation", "events"):
        (run / f"{name}.jsonl").unlink()
    assert "0 of 40" in render(read_run(run))


@pytest.mark.full
def test_a_big_grid_is_made_small(run) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 255, (1200, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "validation" / "step-30.png")
    text = render(read_run(run))
    assert 'width="1000" height="500" src="data:image/jpeg' in text
    assert len(text) < 1_500_000


def test_the_command_draws_it_again(run, capsys) -> None:
    cli.main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "dmd2 in" in (run / "report.html").read_text()


def test_the_command_refuses_a_folder_without_a_run(tmp_path) -> None:
    with pytest.raises(
        SystemExit, match=r"error: run_dir: expected the output_dir of a training run"
    ):
        cli.main(["report", str(tmp_path)])
