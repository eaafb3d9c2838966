"""The version of the package; the packaging metadata reads it from here."""

__version__ = "0.1.0"
