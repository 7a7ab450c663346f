"""Protection, Advice and MmapOptions."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest

from aiommap import Advice, MmapOptions, Protection


def test_protections_and_their_values() -> None:
    """The four protections have the values of the contract, and no other member exists."""
    assert {member.name: member.value for member in Protection} == {
        "READ": "r",
        "READ_WRITE": "r+",
        "READ_COPY": "c",
        "READ_EXECUTE": "rx",
    }


def test_writable_protections() -> None:
    """READ_WRITE and READ_COPY take stores; nothing is writable and executable at once."""
    assert [member for member in Protection if member.writable] == [
        Protection.READ_WRITE,
        Protection.READ_COPY,
    ]


@pytest.mark.parametrize("member", Protection)
def test_protection_from_itself_and_from_its_value(member: Protection) -> None:
    """Wherever a protection is taken, its value is taken too."""
    assert Protection.parse(member) is member
    assert Protection.parse(member.value) is member
    assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize("value", ["", "w", "R", "rb", "READ"])
def test_unknown_protection(value: str) -> None:
    """An unknown string is a ValueError that lists the known ones."""
    with pytest.raises(ValueError, match=r"'r' \(READ\), 'r\+' \(READ_WRITE\)"):
        Protection.parse(value)


@pytest.mark.parametrize("value", [None, 0, b"r", Advice.NORMAL])
def test_protection_of_a_wrong_type(value: object) -> None:
    """What is neither a protection nor a string is a TypeError."""
    with pytest.raises(TypeError, match="must be a Protection or a string"):
        Protection.parse(value)  # type: ignore[arg-type]


def test_advice_has_the_safe_ones() -> None:
    """Advice has the hints of the contract; none that can change bytes is among them."""
    assert [member.name for member in Advice] == [
        "NORMAL", "RANDOM", "SEQUENTIAL", "WILL_NEED", "COLD", "PAGE_OUT", "HUGE_PAGE",
        "NO_HUGE_PAGE", "DONT_FORK", "DO_FORK", "DONT_DUMP", "DO_DUMP", "MERGEABLE",
        "UNMERGEABLE",
    ]  # fmt: skip


@pytest.mark.parametrize("member", Advice)
def test_advice_from_itself_and_from_its_value(member: Advice) -> None:
    """An advice is taken as itself and as its value."""
    assert Advice.parse(member) is member
    assert Advice.parse(member.value) is member


@pytest.mark.parametrize("value", ["", "dont_need", "free", "NORMAL"])
def test_unknown_advice(value: str) -> None:
    """An unknown string, dangerous advice included, is a ValueError that lists the known ones."""
    with pytest.raises(ValueError, match="'normal', 'random'"):
        Advice.parse(value)


@pytest.mark.parametrize("value", [None, 3, Protection.READ])
def test_advice_of_a_wrong_type(value: object) -> None:
    """What is neither an advice nor a string is a TypeError."""
    with pytest.raises(TypeError, match="must be an Advice or a string"):
        Advice.parse(value)  # type: ignore[arg-type]


def test_options_are_frozen_and_off_by_default() -> None:
    """MmapOptions compare by value, are frozen, and ask for nothing by default."""
    assert MmapOptions() == MmapOptions(stack=False, huge=False, populate=False)
    assert MmapOptions(huge=True) != MmapOptions()
    with pytest.raises(FrozenInstanceError, match="stack"):
        MmapOptions().stack = True  # type: ignore[misc]


@pytest.mark.parametrize("name", ["stack", "huge", "populate"])
@pytest.mark.parametrize("value", [None, 1, 0, "yes"])
def test_options_are_booleans(name: str, value: object) -> None:
    """An option that is no bool is a TypeError that names it."""
    with pytest.raises(TypeError, match=f"{name} must be True or False"):
        MmapOptions(**{name: value})  # type: ignore[arg-type]


def test_options_are_keyword_only() -> None:
    """Booleans are given by name."""
    with pytest.raises(TypeError, match="positional"):
        MmapOptions(True)  # type: ignore[call-arg]
