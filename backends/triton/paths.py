"""A plan turned into launches whose grids and constants are computed once, for one number of tokens."""

from __future__ import annotations

from moec.backends.triton.choose import GEMV, Plan
from moec.backends.triton.grouped_path import grouped_run
from moec.backends.triton.rows_path import gemv_run
from moec.backends.triton.site import Run, Site


def make_run(site: Site, plan: Plan, tokens: int) -> Run:
    """The launches of a plan for so many tokens, at least one."""
    if plan.path == GEMV:
        return gemv_run(site, plan, tokens)
    return grouped_run(site, plan, tokens)
