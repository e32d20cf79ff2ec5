"""The settings of a run: read from YAML and overrides, described key by key, and checked for what goes together.

Imports `methods`, `links` and `common`; no torch, so that `diffpo check` can refuse a config at once.
"""

from __future__ import annotations

from .data import PLACES, Columns, Data
from .objective import ObjectiveSettings
from .section import Section
from .settings import Config, Log, Model, SampleSettings, load_config, stored_identity
from .sources import (
    AdvantageSettings,
    BehaviourSettings,
    ForwardSettings,
    InversionSettings,
    ReferenceSettings,
    RolloutSettings,
)
from .step_scorer import ScorerConfig, ScorerTrain, StepScorerSettings
from .training import Lora, Optimisation, Output, StopSettings, Train

__all__ = [
    "PLACES",
    "AdvantageSettings",
    "BehaviourSettings",
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
    "SampleSettings",
    "ScorerConfig",
    "ScorerTrain",
    "Section",
    "StepScorerSettings",
    "StopSettings",
    "Train",
    "load_config",
    "stored_identity",
]
