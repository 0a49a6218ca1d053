"""Slow readers and leaving clients beside a real server: a few, once. `slow_reader.py` takes more, and judges waits."""

import asyncio

import pytest

from serving.http import slow_reader

OF_THE_MACHINE = ("others are not slowed", "and soon")
"""Claims about times, which other work of the machine decides too."""


@pytest.mark.slow
def test_they_are_ended_and_nothing_is_left():
    options = slow_reader.Options(readers=2, rounds=1, leavers=10, write_timeout=2)
    verdict = asyncio.run(slow_reader.measure(options))
    assert len(verdict.holds) >= 5
    assert [name for name, holds in verdict.holds.items() if not holds and name not in OF_THE_MACHINE] == [], (
        verdict.lines
    )
