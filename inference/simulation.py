"""What a program draws, for many chains at once: latents from the prior, and data given latents."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical, Multinomial
from torch.func import vmap

from inference.handlers import Drawing, base
from inference.program import Program

__all__ = ["simulate"]

_log = logging.getLogger("inference")


class _Multinomials(Messenger):
    """Draws Multinomial sites as counts of categories; torch's own way ``vmap`` refuses."""

    def _pyro_sample(self, msg: Any) -> None:
        family = base(msg["fn"])
        if isinstance(family, Multinomial) and not msg["done"] and not msg["is_observed"]:
            shape = msg["fn"].shape()
            drawn = Categorical(family.probs.expand(shape)).sample((int(family.total_count),))
            msg["value"], msg["done"] = torch.nn.functional.one_hot(drawn, shape[-1]).sum(0).to(family.probs), True


def simulate(program: Program, values: Mapping[str, Tensor], count: int, with_data: bool = True) -> dict[str, Tensor]:
    """What the program draws beside the latents in ``values``: its other latents, and all observed sites.

    All rows at once; one after the other if the program cannot be vectorised. Needs the contexts of a run.

    Args:
        program: The program.
        values: Latent site to (count, *site); other names are left out of account.
        count: Number of rows.
        with_data: Whether the observed sites are drawn, too.

    Returns:
        Site to (count, *site).
    """
    given = {name: value for name, value in values.items() if name in program.latents}
    data = tuple(program.observed_sites) if with_data else ()
    names = [name for name in (*program.latents, *data) if name not in given]

    def row(_: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        trace = program.trace(given, resampled=data, evaluated=False)
        return tuple(trace.nodes[name]["value"].detach() for name in names)

    program.arguments()  # what is transformed once is so before many draws are made at once
    index = torch.arange(count, device=program.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batching rules that torch lacks, which cost time only
        try:
            with Drawing(), _Multinomials():
                found = vmap(row, randomness="different")(index, given)
        except Exception as error:
            _log.info("%s cannot draw for many chains at once (%s); drawing for one after the other.", program.name, error)
            rows = [row(index[i], {name: value[i] for name, value in given.items()}) for i in range(count)]
            found = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    return {name: value.contiguous() for name, value in zip(names, found, strict=True)}
