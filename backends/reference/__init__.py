"""The reference back end: the meaning of every op in plain torch, and faster ways on a CPU where there are any."""

from moec.backends.reference.backend import Reference, backend, why_not

__all__ = ["Reference", "backend", "why_not"]
