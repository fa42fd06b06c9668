"""A mixture whose call of a submodule is replaced as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from moec.frontends.torch.body import Body
from moec.frontends.torch.calls import Call
from moec.frontends.torch.entered import replaced_by
from moec.frontends.torch.lift import weight_views
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.oplog import Log, Site
from moec.ir import Region
from moec.verify import Probe


def replaced_call(
    site: Site,
    logs: Iterable[Log],
    call: Call,
    body: Body,
    region: Region,
    dtype: torch.dtype,
    evidence: Sequence[str],
    probes: Callable[[], Iterator[Probe]],
) -> Lifted:
    """The layer at a site; `logs` are the runs that show which submodules the call enters."""
    return Lifted(
        name=site.path,
        kind="moe",
        cut="submodule",
        module=site.module,
        method=site.method,
        call=call,
        body=body,
        region=region,
        views=weight_views(body, site.path, dense=False),
        replaced=replaced_by(site, logs),
        evidence=tuple(evidence),
        probes=probes,
        dtype=dtype,
    )
