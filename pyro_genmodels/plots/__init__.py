"""Pictures of data and posteriors. Each function returns a matplotlib ``Figure``, which has ``savefig``, and shows nothing.

All take one posterior, or a mapping from a name to a posterior, which then stand side by side. Exchangeable labels are
drawn as they are in ``posterior.draws``: match them before (``dataclasses.replace(posterior, draws=posterior.matched)``).
"""

from pyro_genmodels.plots.checks import bias_variance, predictive_check, reliability
from pyro_genmodels.plots.curves import learning_curve, log_curves
from pyro_genmodels.plots.densities import Scored, density_contours
from pyro_genmodels.plots.pictures import images, latent_scatter, manifold, traversals
from pyro_genmodels.plots.posteriors import effective_growth, effective_sizes, elements, forest, ranks, traces

__all__ = [
    "Scored",
    "bias_variance",
    "density_contours",
    "effective_growth",
    "effective_sizes",
    "elements",
    "forest",
    "images",
    "latent_scatter",
    "learning_curve",
    "log_curves",
    "manifold",
    "predictive_check",
    "ranks",
    "reliability",
    "traces",
    "traversals",
]
