"""Why a candidate is no mixture, or none that is understood."""

from __future__ import annotations


class NotLifted(Exception):  # noqa: N818 - no error: most candidates are no MoE
    """A candidate cannot be lifted; the text says why, for the report.

    `shown` has the values that show it, `tried` a line for each module that was looked at with what stood in the way.
    """

    tried: tuple[str, ...] = ()

    def __init__(self, text: str, shown: str = "") -> None:
        super().__init__(text)
        self.shown = shown

    @property
    def whole(self) -> str:
        """The reason and the values that show it."""
        return f"{self}; {self.shown}" if self.shown else str(self)


class Unsuited(NotLifted):
    """A call that could not even be looked at in this way: what another call showed says more."""


class Chained(NotLifted):
    """Products follow each other as layers do: no mixture, but there may be plain FFNs in them."""
