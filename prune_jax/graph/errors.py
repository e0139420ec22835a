"""What can go wrong while a program is read."""

from __future__ import annotations


class UnknownPrimitiveError(NotImplementedError):
    """A primitive without a rule lies between a parameter and the output: nothing is guessed about it."""
