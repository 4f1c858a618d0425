"""Predictors: networks from hidden states to unit scores, and how they are trained."""

from gnomon.predictors.base import Predictor, PredictorInfo
from gnomon.predictors.calibration import Calibration
from gnomon.predictors.dejavu import DejaVu
from gnomon.predictors.folder import find_predictor, load_predictor
from gnomon.predictors.shadow import Shadow

__all__ = [
    "Calibration",
    "DejaVu",
    "Predictor",
    "PredictorInfo",
    "Shadow",
    "find_predictor",
    "load_predictor",
]
