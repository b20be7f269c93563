"""A saved result as one HTML page: what was asked, what came out, and how far it can be trusted.

A folder is one of these, told apart by what it holds:

checkpoint.json     ``Posterior.save``, ``genmodels fit --out``
comparison.json     ``genmodels compare --out``: one page, the back-ends side by side
settings.json       ``genmodels train --out``: learning curves, and pictures that the model draws
*.jsonl             logs of ``inference.JSONLines``; such a file may be given by itself
"""

from pyro_genmodels.report.folders import find, record, report

__all__ = ["find", "record", "report"]
