"""Data: small classics that come with the package, and tables of the reader's own."""

from pyro_genmodels.datasets.bundled import coal_mining, digits, eight_schools, galaxies, load, names, old_faithful
from pyro_genmodels.datasets.pictures import Pictures, pictures
from pyro_genmodels.datasets.planar import PLANAR, planar
from pyro_genmodels.datasets.tables import Dataset, read_table

__all__ = [
    "PLANAR",
    "Dataset",
    "Pictures",
    "coal_mining",
    "digits",
    "eight_schools",
    "galaxies",
    "load",
    "names",
    "old_faithful",
    "pictures",
    "planar",
    "read_table",
]
