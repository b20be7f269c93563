"""Classical models: mixtures, regressions, factor models."""

from pyro_genmodels.classical.factor import PPCA, FactorAnalysis
from pyro_genmodels.classical.gmm import GMM
from pyro_genmodels.classical.hmm import HMM
from pyro_genmodels.classical.margin import MarginClassifier
from pyro_genmodels.classical.mixture import Mixture
from pyro_genmodels.classical.naive_bayes import NaiveBayes
from pyro_genmodels.classical.regression import LinearRegression, LogisticRegression, SoftmaxRegression
from pyro_genmodels.classical.topics import LDA

__all__ = [
    "GMM",
    "HMM",
    "LDA",
    "PPCA",
    "FactorAnalysis",
    "LinearRegression",
    "LogisticRegression",
    "MarginClassifier",
    "Mixture",
    "NaiveBayes",
    "SoftmaxRegression",
]
