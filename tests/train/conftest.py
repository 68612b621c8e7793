"""The world that killed runs live in, and how they end when nobody kills them."""

from tests.support.mortal import whole, world  # noqa: F401 - fixtures
