"""Helpers that tests of several rooms share: tiny models, a stand-in for the hub, disks that fail,
runs that are killed.

A helper module lies here and is imported by its name, ``from tests.support.tiny import LLAMA``; what
one test file needs stays in it, fixtures of one folder in its ``conftest.py``
(`tests/test_imports.py` holds it).
"""
