"""The metrics a validation measures, by name, and which of them may choose the best checkpoint."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """mode: which of its values is the best; None where no end is, and `why` that is.

    teacher, several: whether it needs the teacher's samples, and several samples of a prompt.
    """

    mode: Literal["min", "max"] | None = None
    teacher: bool = False
    several: bool = False
    why: str = ""


_GREY = "a student of grey images has the least of it"
_TEACHERS_OWN = "it is of the teacher's samples alone, the same at every validation"
# What a validation measures. best_metric may name those with a mode.
METRICS = {
    "frechet_diagonal": Metric("min", teacher=True),
    "teacher_rmse": Metric("min", teacher=True),
    "trajectory_rmse": Metric("min", teacher=True),
    "x0_mean_drift": Metric("min", teacher=True),
    "diversity": Metric("max", several=True),
    "diversity_ratio": Metric("max", teacher=True, several=True),
    "movement": Metric(why="more of it than the teacher's is noise"),
    "movement_ratio": Metric(why="1 is its best, neither its lowest nor its highest"),
    "x0_std_ratio": Metric(why="1 is its best, neither its lowest nor its highest"),
    "saturation": Metric(why=_GREY),
    "saturation_excess": Metric(why=_GREY),
    "guided_mean_drift": Metric(why=_TEACHERS_OWN),
    "guided_std_ratio": Metric(why=_TEACHERS_OWN),
    "guided_saturation_excess": Metric(why=_TEACHERS_OWN),
    "fake_lag": Metric(why="it judges the fake, and 0 is its best"),
    "fake_lag_error": Metric(why="it says how sure fake_lag is, nothing of the student"),
}
BEST_METRICS = [name for name, metric in METRICS.items() if metric.mode is not None]
