"""Build entry point; every fact about the package stands in ``setup.cfg``."""

from setuptools import setup

setup()
