"""Build of the native extensions. Metadata and tool settings are in pyproject.toml.

Native extensions are declared here, because whether they can be built is only known at build time. There
are none yet, so installing needs no compiler.
"""

from setuptools import setup

setup()
