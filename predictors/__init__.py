"""Predictors: networks from hidden states to unit scores, and how they are trained."""

from gnomon.predictors.base import Predictor, PredictorInfo
from gnomon.predictors.calibration import Calibration
from gnomon.predictors.dejavu import DejaVu
from gnomon.predictors.folder import find_predictor, find_pretrained, load_predictor
from gnomon.predictors.prior import Prior
from gnomon.predictors.shadow import Shadow
from gnomon.predictors.sketch import Sketch
from gnomon.predictors.static import Static

__all__ = [
    "Calibration",
    "DejaVu",
    "Predictor",
    "PredictorInfo",
    "Prior",
    "Shadow",
    "Sketch",
    "Static",
    "find_predictor",
    "find_pretrained",
    "load_predictor",
]
