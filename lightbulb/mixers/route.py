"""How a mixer asks a router."""

from torch import Tensor

from lightbulb.mixers.base import Context
from lightbulb.routing.router import Router, Routing


def route(router: Router, x: Tensor, context: Context) -> Routing:
    """Where the tokens ``x [rows, batch, dim]`` go, outside any tensor region; ``T = rows x batch`` in this order."""
    noise = context.at("router").uniform(x) if router.config.jitter else None
    return router(x.flatten(0, 1), None if noise is None else noise.flatten(0, 1))
