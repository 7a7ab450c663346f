"""Names and numbers in sentences for people."""

from __future__ import annotations


def printable(text: str) -> str:
    """With escapes for what would steer a terminal, and for bytes of a name that are no text."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def counted(number: int, noun: str) -> str:
    """So many of them."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
