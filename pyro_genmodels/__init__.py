"""A zoo of generative models, each a Pyro program that every back-end of ``inference`` can run."""

from pyro_genmodels.base import GenerativeModel, StochasticModule
from pyro_genmodels.classical import (
    GMM,
    HMM,
    LDA,
    PPCA,
    FactorAnalysis,
    LinearRegression,
    LogisticRegression,
    MarginClassifier,
    Mixture,
    NaiveBayes,
    SoftmaxRegression,
)

__all__ = [
    "GMM",
    "HMM",
    "LDA",
    "PPCA",
    "FactorAnalysis",
    "GenerativeModel",
    "LinearRegression",
    "LogisticRegression",
    "MarginClassifier",
    "Mixture",
    "NaiveBayes",
    "SoftmaxRegression",
    "StochasticModule",
]

__version__ = "0.1.0"
