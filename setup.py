"""Packaging entry point; everything it says stands in pyproject.toml. Imports no torch and needs no compiler."""

from setuptools import setup

setup()
