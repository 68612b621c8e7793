"""The suite, which mirrors ``src/lorry``. It is a package so that helpers are imported by their whole
name from anywhere in it (``from tests.support import tiny``).
"""
