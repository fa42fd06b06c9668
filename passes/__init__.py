"""Passes: one rewrite of the IR per file, each a frozen dataclass whose fields are its options."""

# The folder stands at the root but its import name is moec.passes; under another name its classes would exist twice.
if __name__ != "moec.passes":
    raise ImportError("import moec.passes, not passes")
