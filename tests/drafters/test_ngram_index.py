"""The index of earlier occurrences, against a search through the whole text."""

from __future__ import annotations

import copy
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
    assert NgramIndex([1, 1]).match() is None


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


def test_an_index_knows_how_far_another_text_is_the_same() -> None:
    text = [position * 7 % 5000 for position in range(3000)]
    index = NgramIndex(text)
    assert index.common_length([*text, 1]) == 3000
    assert index.common_length(text[:2000]) == 2000
    assert index.common_length([*text[:1500], -1, *text[1501:]]) == 1500
    assert index.common_length([]) == 0


@pytest.mark.parametrize("num_kept", [0, 1, 5, 700, 1400, 1499])
def test_a_text_that_was_cut_is_as_if_it_had_never_gone_on(num_kept: int) -> None:
    draw = random.Random(num_kept)
    text = [draw.randrange(6) for _ in range(1500)]
    cut, other = NgramIndex(text), NgramIndex(text[:num_kept])
    cut.cut(num_kept)
    for _ in range(60):
        assert cut.match() == other.match()
        token = draw.randrange(6)
        cut.extend([token])
        other.extend([token])


def test_a_copy_of_an_index_goes_its_own_way() -> None:
    index = NgramIndex([1, 2, 3, 4, 1, 2])
    other = copy.deepcopy(index)
    other.extend([9])
    assert (len(index), len(other)) == (6, 7)
    assert index.match() == Match(2, 2)


def test_a_frequent_run_does_not_hide_a_rare_one_behind_it() -> None:
    rare = [7, 1, 2, 3, 4, 5, 6]
    index = NgramIndex([*rare, 8, *[5, 6, 0] * 50, *rare])
    assert index.match() == Match(7, 7)


def test_a_token_takes_at_most_34_bytes_whatever_the_text() -> None:
    for num_words in (3, 1 << 17):
        draw = random.Random(0)
        for num_tokens in (2000, 6145, 50_000, 98_305):
            text = (draw.randrange(num_words) for _ in range(num_tokens))
            assert NgramIndex(text).nbytes <= 34 * num_tokens
