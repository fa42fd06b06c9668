"""Tests of moec; a package, so that they can share the corpus of modules."""
