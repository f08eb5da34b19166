"""What a person asks of a run first: is it learning, how long still, does it look right, what now.

Each answer is read from the records alone, with the figures that it rests on.
"""

from __future__ import annotations

import shlex
from typing import Any

from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.reporting.values import counted, short

from .records import RunRecords, series

# Of the validations, the first that is there: a distance between distributions before one between
# samples, which students of distribution matching need not come close to.
_DISTANCES = {"frechet_diagonal": "Fréchet distance", "teacher_rmse": "distance to the teacher"}
_NOTICEABLE = 0.1  # a change of less is told as none

Answer = tuple[str, str, str, str]  # kind of a verdict, its word, question, answer


def answers(run: RunRecords) -> list[Answer]:
    """Lines for a block of verdicts."""
    return [_learning(run), _left(run), _looks(run), _next(run)]


def _learning(run: RunRecords) -> Answer:
    question, values = "Is it learning?", series(run.validations, "")
    metric = next((name for name in _DISTANCES if name in values), None)
    if metric is None:
        asked = run.facts.get("train_config", {}).get("validation_steps")
        text = "the first validation is to come" if asked else "--validation_steps measures it"
        return "open", "not known", question, text
    (first_step, first), (step, last) = values[metric][0], values[metric][-1]
    lowest_step, lowest = min(values[metric], key=lambda point: point[1])
    if step == first_step:
        return "open", "not known", question, f"{_DISTANCES[metric]} {short(first)} at {step}"
    text = f"{_DISTANCES[metric]} {short(first)} at {first_step}, {short(last)} at {step}"
    if last > (1 + _NOTICEABLE) * lowest and lowest_step > first_step:
        text += f", {short(lowest)} at {lowest_step}"
    if last < (1 - _NOTICEABLE) * first:
        return "good", "yes", question, text
    if last > (1 + _NOTICEABLE) * first:
        return "bad", "no", question, text
    return "open", "level", question, text


def _left(run: RunRecords) -> Answer:
    question, config = "How long still?", run.facts.get("train_config", {})
    last: dict[str, Any] = run.log[-1] if run.log else {}
    seconds, speed = float(last.get("seconds", 0.0)), float(last.get("steps_per_second", 0.0))
    if run.end:
        took = f"{counted(run.step, 'update')} in {clock(seconds)}"
        return "open", run.end["state"], question, took
    limits = []
    if speed and config.get("max_train_steps"):
        limits.append((int(config["max_train_steps"]) - run.step) / speed)
    if config.get("max_train_seconds"):
        limits.append(float(config["max_train_seconds"]) - seconds)
    left = clock(max(0.0, min(limits))) if limits and run.log else "not known yet"
    return "open", "running", question, left


def _looks(run: RunRecords) -> Answer:
    question, limits = "Does it look right?", WatchdogConfig()
    last: dict[str, Any] = run.validations[-1] if run.validations else {}
    diversity, saturation = last.get("diversity_ratio"), last.get("saturation_excess", 0.0)
    lines = []
    if diversity is not None:
        lines.append(f"diversity {short(diversity)} of the teacher's")
    if saturation > limits.max_saturation:
        lines.append(f"{saturation:.0%} more values at black or white than the teacher's")
    lines.append(counted(len(run.alarms), "alarm") if run.alarms else "no alarm")
    bad = saturation > limits.max_saturation or (diversity or 1.0) < limits.min_diversity
    if bad or run.alarms:
        return "bad", "look", question, ", ".join(lines)
    if not last:
        return "open", "not known", question, "no samples yet; no alarm"
    return "good", "yes", question, ", ".join(lines)


def _next(run: RunRecords) -> Answer:
    question, state = "What now?", run.end["state"] if run.end else "running"
    folder = shlex.quote(str(run.folder))
    if state == "running":
        return (
            "open",
            "wait",
            question,
            "or stop it at any time: it saves, and goes on where it was",
        )
    if state == "finished":
        exported = run.folder / "pipeline"
        if exported.is_dir():
            command = f"stepdistill sample {shlex.quote(str(exported))} --prompt ..."
        else:
            command = f"stepdistill export {folder} OUT --format pipeline"
        return "good", "try it", question, command
    if state.startswith("stopped"):
        return "bad", "change it", question, "as the reason above says"
    return "open", "go on", question, "the same command with --resume_from_checkpoint latest"


def clock(seconds: float) -> str:
    """Such as 3 h 05 min, or 2 min 09 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
