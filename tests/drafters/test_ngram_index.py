"""The index of earlier occurrences, against a search through the whole text."""

from __future__ import annotations

import random

import pytest

from mlx_optiq_ext.drafters._ngram_index import (
    MAX_CANDIDATES,
    MAX_MATCH,
    MIN_MATCH,
    Match,
    NgramIndex,
)


def longest_match(tokens: list[int]) -> Match | None:
    """The longest earlier occurrence of the end, the latest of equally long ones."""
    best = None
    for position in range(len(tokens) - 1, MIN_MATCH - 1, -1):
        length = 0
        while (
            length < min(MAX_MATCH, position)
            and tokens[position - 1 - length] == tokens[-1 - length]
        ):
            length += 1
        if length >= MIN_MATCH and (best is None or length > best.length):
            best = Match(length, position)
    return best


def num_occurrences(tokens: list[int]) -> int:
    """How often the last ``MIN_MATCH`` tokens occur before the end."""
    end = tokens[-MIN_MATCH:]
    starts = range(len(tokens) - MIN_MATCH)
    return sum(tokens[start : start + MIN_MATCH] == end for start in starts)


@pytest.mark.parametrize("seed", range(20))
def test_a_match_is_the_longest_one_where_few_candidates_compete(seed: int) -> None:
    draw = random.Random(seed)
    source = [draw.randrange(500) for _ in range(300)]
    text, index = list(source), NgramIndex(source)
    for _ in range(200):
        start = draw.randrange(len(text))
        piece = text[start : start + draw.randrange(1, 12)]
        text += piece
        index.extend(piece)
        found, expected = index.match(), longest_match(text)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            if num_occurrences(text) <= MAX_CANDIDATES:
                assert found == expected
            end = text[-found.length :]
            assert text[found.position - found.length : found.position] == end


def test_the_longest_of_several_occurrences_is_found() -> None:
    index = NgramIndex([1, 2, 3, 4, 5, 9, 9, 3, 4, 5, 8, 8, 1, 2, 3, 4, 5])
    assert index.match() == Match(5, 5)
    assert index.copy(5, 3) == [9, 9, 3]


def test_the_latest_of_equally_long_occurrences_is_found() -> None:
    index = NgramIndex([3, 4, 5, 6, 0, 3, 4, 5, 7, 1, 3, 4, 5])
    assert index.match() == Match(3, 8)


def test_a_text_that_has_not_repeated_has_no_match() -> None:
    assert NgramIndex(range(100)).match() is None
    assert NgramIndex().match() is None
    assert NgramIndex([1, 2]).match() is None


def test_a_copy_goes_on_beyond_the_end_of_a_text_that_repeats() -> None:
    index = NgramIndex([1, 2, 1, 2, 1, 2])
    match = index.match()
    assert match is not None
    assert index.copy(match.position, 5) == [1, 2, 1, 2, 1]


def test_pieces_are_indexed_as_the_whole_is() -> None:
    draw = random.Random(7)
    text = [draw.randrange(4) for _ in range(400)]
    whole, pieces = NgramIndex(), NgramIndex()
    for start in range(0, len(text), 7):
        pieces.extend(text[start : start + 7])
        for token in text[start : start + 7]:
            whole.extend([token])
        assert whole.match() == pieces.match()


def test_an_index_knows_the_texts_that_it_begins() -> None:
    index = NgramIndex([1, 2, 3])
    assert index.holds([1, 2, 3, 4])
    assert not index.holds([1, 2])
    assert not index.holds([1, 2, 4, 4])
