"""The command line: ``tgdp-fast``."""
