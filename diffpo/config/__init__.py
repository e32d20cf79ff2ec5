"""What a run is asked to do: the settings, read from YAML and overrides, and which of them go together.

Imports `methods`, `links` and `common`; no torch, so that `diffpo check` can refuse a config at once.
"""

from __future__ import annotations

from .objective import ForwardSettings, InversionSettings, ObjectiveSettings, ReferenceSettings, RolloutSettings
from .section import Section
from .settings import PLACES, Columns, Config, Data, Log, Lora, Model, Optimisation, Output, Train, load_config
from .step_scorer import ScorerConfig, ScorerTrain, StepScorerSettings

__all__ = [
    "PLACES",
    "Columns",
    "Config",
    "Data",
    "ForwardSettings",
    "InversionSettings",
    "Log",
    "Lora",
    "Model",
    "ObjectiveSettings",
    "Optimisation",
    "Output",
    "ReferenceSettings",
    "RolloutSettings",
    "ScorerConfig",
    "ScorerTrain",
    "Section",
    "StepScorerSettings",
    "Train",
    "load_config",
]
