"""MinHash and LSH follow their closed forms; what is reported is exact."""

from __future__ import annotations

import random

import numpy as np
import pytest

from armillary.core.errors import InputError
from armillary.data.near_duplicates import RECALL, bands_for, candidate_probability, find_near_duplicates, jaccard, minhash, shingles

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "", "l")]


def text(seed: int, words: int = 200) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(original: str, share: float, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) if draw.random() < share else word for word in original.split())


def naive_jaccard(a: str, b: str, length: int) -> float:
    left, right = ({t[i : i + length] for i in range(len(t) - length + 1)} for t in (a, b))
    return len(left & right) / len(left | right)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_the_similarity_is_that_of_the_shingles_as_strings(share: float) -> None:
    a, b = text(1), changed(text(1), share)
    assert jaccard(shingles(a, 8), shingles(b, 8)) == naive_jaccard(a, b, 8)


def test_case_spacing_and_punctuation_do_not_count() -> None:
    assert jaccard(shingles("The  stars; keep\ntheir PLACES!", 5), shingles("the stars keep their places", 5)) == 1
    assert shingles("", 8).size == shingles("?!", 8).size == 1
    assert jaccard(shingles("ab", 8), shingles("ab", 8)) == 1


def test_signatures_agree_with_probability_the_similarity() -> None:
    a, b = shingles(text(1, 600), 8), shingles(changed(text(1, 600), 0.08), 8)
    similarity = jaccard(a, b)
    agreed = (minhash(a, 4096) == minhash(b, 4096)).mean()
    assert abs(agreed - similarity) < 4 * np.sqrt(similarity * (1 - similarity) / 4096)


def test_candidates_appear_with_the_closed_forms_probability() -> None:
    bands, rows, tries = 6, 4, 600
    a, b = shingles(text(2, 300), 8), shingles(changed(text(2, 300), 0.12), 8)
    signatures = [(minhash(a, bands * rows, seed), minhash(b, bands * rows, seed)) for seed in range(tries)]
    met = sum((one == other).reshape(bands, rows).all(axis=1).any() for one, other in signatures) / tries
    expected = candidate_probability(jaccard(a, b), bands, rows)
    assert 0.2 < expected < 0.9  # where the curve is steep
    assert abs(met - expected) < 4 * np.sqrt(expected * (1 - expected) / tries)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_the_bands_find_the_threshold_and_no_steeper_ones_do(threshold: float) -> None:
    bands, rows = bands_for(threshold, 128)
    assert bands * rows <= 128
    assert candidate_probability(threshold, bands, rows) >= RECALL > candidate_probability(threshold, 128 // (rows + 1), rows + 1)


def test_groups_keep_their_first_and_nothing_else_goes() -> None:
    a, b = text(10), text(11)
    pool = [a, text(12), changed(a, 0.01, 1), b, changed(a, 0.01, 2), a, text(13), changed(b, 0.3), b.upper()]
    found = find_near_duplicates(pool, threshold=0.7)
    assert found.groups == ((0, 2, 4, 5), (3, 8))
    assert found.kept == (0, 1, 3, 6, 7)
    assert found.removed == (2, 4, 5, 8)
    for pair in found.pairs:
        assert pair.first < pair.second
        assert pair.similarity == jaccard(shingles(pool[pair.first], 8), shingles(pool[pair.second], 8)) >= 0.7
    assert find_near_duplicates(pool, threshold=0.7) == found


def test_many_copies_of_one_text_do_not_cost_their_square() -> None:
    found = find_near_duplicates([text(1, 20)] * 300)
    assert found.kept == (0,)
    assert found.candidates <= 64 * 300


def test_settings_out_of_bounds_are_named() -> None:
    with pytest.raises(InputError, match="threshold is 0"):
        find_near_duplicates(["a"], threshold=0)


@pytest.mark.slow
def test_the_two_spellings_of_shakespeare_are_near_duplicates() -> None:
    from armillary.data.corpora import corpus_files

    files = [*corpus_files("shakespeare"), *corpus_files("shakespeare-folio")]
    found = find_near_duplicates([file.read_text("utf-8") for file in files], threshold=0.4)
    # Every play of the Folio pairs with its modern edition, and nothing else pairs. Of Cymbeline the modern file has two thirds only.
    assert len(found.pairs) == len(found.groups) == 34
    assert all(pair.similarity < 0.6 for pair in found.pairs)
    alone = {files[index].name for index in found.kept if files[index].name.endswith("_gut_f.txt")}
    assert alone == {"cymbeline_gut_f.txt"}
    for pair in found.pairs:
        assert files[pair.first].name[:3] == files[pair.second].name[:3] or {"titus", "twelfe"} & set(
            files[pair.second].name.replace("-", "_").split("_")
        )
