"""Back ends: each turns a region of the IR into something that runs."""

# The folder stands at the root but its import name is moec.backends; under another name its classes would exist twice.
if __name__ != "moec.backends":
    raise ImportError("import moec.backends, not backends")
