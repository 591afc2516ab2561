from __future__ import annotations

import pytest

from mlx_optiq_ext.serving._stop import StopMatcher

TEXT = "one STOP two STOP"


def feed_all(matcher: StopMatcher, pieces: list[str]) -> str:
    text = ""
    for piece in pieces:
        text += matcher.feed(piece)
        if matcher.matched is not None:
            return text
    return text + matcher.flush()


@pytest.mark.parametrize("size", range(1, len(TEXT) + 1))
def test_the_first_occurrence_counts_however_the_text_is_cut(size: int) -> None:
    matcher = StopMatcher(["STOP"])
    pieces = [TEXT[start : start + size] for start in range(0, len(TEXT), size)]
    assert feed_all(matcher, pieces) == "one "
    assert matcher.matched == "STOP"


@pytest.mark.parametrize("size", range(1, 7))
def test_the_sequence_that_is_complete_first_wins(size: int) -> None:
    matcher = StopMatcher(["abcdef", "cd", "bcd"])
    text = "xabcdef"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert feed_all(matcher, pieces) == "xa"
    assert matcher.matched == "bcd"


def test_text_that_cannot_belong_to_a_sequence_is_passed_on_at_once() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("a S") == "a "
    assert matcher.feed("T") == ""
    assert matcher.feed("x") == "STx"


def test_the_start_of_a_sequence_at_the_end_is_text() -> None:
    matcher = StopMatcher(["STOP"])
    assert feed_all(matcher, ["a ST"]) == "a ST"
    assert matcher.matched is None


def test_without_sequences_nothing_is_held_back() -> None:
    assert StopMatcher([]).feed("text") == "text"
