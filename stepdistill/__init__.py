"""stepdistill: distil any Diffusers pipeline to 1-4 steps, get a stock Diffusers pipeline back."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module; loaded on first use, so `import stepdistill` costs nothing.
_PUBLIC = {
    "TrainConfig": "stepdistill.config.run",
    "RunConfig": "stepdistill.config.run",
    "Tuning": "stepdistill.config.tuning",
    "AdversarialTrainer": "stepdistill.trainers",
    "ConsistencyTrainer": "stepdistill.trainers",
    "DistributionMatchingTrainer": "stepdistill.trainers",
    "LoRADistillationTrainer": "stepdistill.trainers",
    "PreferenceTrainer": "stepdistill.trainers",
    "ReflowTrainer": "stepdistill.trainers",
    "SuperResolutionTrainer": "stepdistill.trainers",
    "TrajectorySegmentedTrainer": "stepdistill.trainers",
    "VariationalScoreTrainer": "stepdistill.trainers",
    "ScoreGradientConfig": "stepdistill.losses.score_options",
    "ScoreGuidance": "stepdistill.particles.guidance",
    "SideInputs": "stepdistill.particles.side_inputs",
    "METHODS": "stepdistill.methods",
    "ModelSource": "stepdistill.loading.source",
    "load_family": "stepdistill.families.registry",
    "load_pipeline": "stepdistill.export.load",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from stepdistill.config.run import RunConfig as RunConfig
    from stepdistill.config.run import TrainConfig as TrainConfig
    from stepdistill.config.tuning import Tuning as Tuning
    from stepdistill.export.load import load_pipeline as load_pipeline
    from stepdistill.families.registry import load_family as load_family
    from stepdistill.loading.source import ModelSource as ModelSource
    from stepdistill.losses.score_options import ScoreGradientConfig as ScoreGradientConfig
    from stepdistill.methods import METHODS as METHODS
    from stepdistill.particles.guidance import ScoreGuidance as ScoreGuidance
    from stepdistill.particles.side_inputs import SideInputs as SideInputs
    from stepdistill.trainers import AdversarialTrainer as AdversarialTrainer
    from stepdistill.trainers import ConsistencyTrainer as ConsistencyTrainer
    from stepdistill.trainers import DistributionMatchingTrainer as DistributionMatchingTrainer
    from stepdistill.trainers import LoRADistillationTrainer as LoRADistillationTrainer
    from stepdistill.trainers import PreferenceTrainer as PreferenceTrainer
    from stepdistill.trainers import ReflowTrainer as ReflowTrainer
    from stepdistill.trainers import SuperResolutionTrainer as SuperResolutionTrainer
    from stepdistill.trainers import TrajectorySegmentedTrainer as TrajectorySegmentedTrainer
    from stepdistill.trainers import VariationalScoreTrainer as VariationalScoreTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
