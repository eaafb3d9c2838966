"""Bridges to other libraries, one module each; nothing is imported before it is asked for."""
