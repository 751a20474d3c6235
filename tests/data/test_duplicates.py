"""What counts as the same row, as nearly the same, and as a held-out row given away."""

from __future__ import annotations

import math
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from sft_lab.data.duplicates import SLOTS, Leaks, digest, exact, near, normalise, signature
from sft_lab.data.requests import generate

# Random words are alike in no shingle, so how alike two texts are is what the test makes of them.
WORDS = [f"word{number}" for number in range(10_000)]
# A tolerance for estimates of a Jaccard index near 0.85: five standard deviations of SLOTS draws.
FIVE_SIGMA = 5 * math.sqrt(0.85 * 0.15 / SLOTS)


def words(rng: random.Random, count: int) -> list[str]:
    return rng.choices(WORDS, k=count)


def changed(text: str, *places: int) -> str:
    parts = text.split()
    for place in places:
        parts[place] = "other"
    return " ".join(parts)


def kept_for(texts: list[str], threshold: float = 0.85) -> list[int]:
    signatures = np.frombuffer(b"".join(map(signature, texts)), np.uint8).reshape(-1, SLOTS)
    return near(signatures, threshold).tolist()


def first_of(texts: list[str]) -> list[int]:
    return exact(np.array(list(map(digest, texts)), np.int64)).tolist()


def shingles(text: str, end: int = 0) -> set[tuple[str, ...]]:
    """Five words at a time, as the module's docstring says it; `end` empty words stand before and after the text."""
    parts = [""] * end + normalise(text).split() + [""] * end
    return {tuple(parts[at : at + 5]) for at in range(max(len(parts) - 4, 1))}


def jaccard(a: str, b: str) -> float:
    ours, theirs = shingles(a, end=4), shingles(b, end=4)
    return len(ours & theirs) / len(ours | theirs)


# -------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who are you?", "  who\tARE \n\n you? "),
        ("Straße", "STRASSE"),
        ("ｆｕｌｌ ｗｉｄｔｈ №1", "full width No1"),
        ("caf\u00e9", "cafe\u0301"),
        ("Janet’s “ducks” – 16", 'Janet\'s "ducks" - 16'),
        ("a\u00a0b\u3000c", "a b c"),
        ("don´t", "don't"),
        ("", " \n"),
    ],
)
def test_the_same_but_for_its_way_here(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)
    assert digest(one) == digest(other)
    assert signature(one) == signature(other)


@pytest.mark.parametrize(
    ("one", "other"), [("x < 3", "x > 3"), ("5", "-5"), ("a b", "ab"), ("", "a"), ("é", "e"), ("你好吗", "你好")]
)
def test_not_the_same(one: str, other: str) -> None:
    assert digest(one) != digest(other)
    assert kept_for([one, other], threshold=0.5) == [0, 1]


def test_the_first_of_equal_rows_stands_for_them() -> None:
    texts = ["a", "b", "A", "", "b ", "c", "a", " "]
    assert first_of(texts) == kept_for(texts) == [0, 1, 0, 3, 1, 5, 0, 3]
    extremes = np.array([-(2**63), 2**63 - 1, -(2**63)], np.int64)
    assert exact(extremes).tolist() == [0, 1, 0]


def test_no_rows() -> None:
    assert first_of([]) == kept_for([]) == []
    assert Leaks([]).find("some text of more than eight words, which leaks nothing at all") == []


def test_half_a_surrogate_pair_is_a_character_like_any_other() -> None:
    text = "cut in the midst of an emoji \ud83d"
    assert digest(text) != digest(text[:-1])
    assert kept_for([text, text]) == [0, 0]
    assert Leaks([text]).find(text) == [(0, "exact")]


# --------------------------------------------------------------------------------------------------------------- near


@pytest.mark.parametrize("place", [0, 30, 59])
def test_one_word_in_sixty_changed_is_near(place: int) -> None:
    """An index of 59/69 = 0.855, wherever the word stands: 0.8 is 2.5 standard deviations of the estimate below it."""
    text = " ".join(words(random.Random(place), 60))
    assert jaccard(text, changed(text, place)) == 59 / 69
    assert kept_for([text, changed(text, place)], threshold=0.8) == [0, 0]
    assert first_of([text, changed(text, place)]) == [0, 1]


def test_the_default_takes_what_is_nearly_the_same_and_leaves_what_says_something_else() -> None:
    text = " ".join(words(random.Random(0), 400))
    one_word, twenty_words = changed(text, 70), changed(text, *range(0, 400, 20))
    assert jaccard(text, one_word) > 0.85 + FIVE_SIGMA
    assert jaccard(text, twenty_words) < 0.85 - FIVE_SIGMA
    assert kept_for([text, one_word, twenty_words]) == [0, 0, 2]


def test_a_common_beginning_makes_no_duplicates_and_hides_none() -> None:
    """An index of 120/208 between rows of one template, of 159/169 between a row and its copy."""
    rng = random.Random(0)
    prompt = words(rng, 120)
    texts = [" ".join(prompt + words(rng, 40)) for _ in range(300)]
    copies = [changed(text, 140) for text in texts[-5:]]
    assert kept_for(texts + copies) == [*range(300), 295, 296, 297, 298, 299]


def test_short_rows_are_duplicates_only_when_they_are_the_same() -> None:
    texts = ["yes", "Yes", "yes, I do", "yes, I do so", "no", "yes, I do", "one two three four"]
    assert kept_for(texts, threshold=0.1) == [0, 0, 2, 3, 4, 2, 6]


def test_a_long_row_is_compared_as_a_whole() -> None:
    text = " ".join(words(random.Random(0), 10_000))
    halves = [" ".join(text.split()[:5000]), " ".join(text.split()[5000:])]
    assert kept_for([text, changed(text, 0, 5000, 9999), *halves]) == [0, 0, 2, 3]


def test_characters_count_as_words_where_no_space_stands_between_words() -> None:
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(200))
    assert kept_for([text, text[:100] + "好" + text[101:], text[100:]]) == [0, 0, 2]


def test_the_first_row_of_a_cluster_stays() -> None:
    rng = random.Random(0)
    one, other = " ".join(words(rng, 150)), " ".join(words(rng, 150))
    texts = [
        one,
        other,
        changed(one, 5),
        changed(other, 5),
        changed(one, 80),
        one,
        changed(other, 149),
        changed(one, 5),
    ]
    assert kept_for(texts) == [0, 1, 0, 1, 0, 0, 1, 0]


def test_a_row_like_two_that_stay_goes_for_the_first() -> None:
    """The two have an index of 304/504 = 0.60 with each other, of 354/454 = 0.78 with the row between them."""
    between = " ".join(words(random.Random(0), 400))
    one, other = changed(between, *range(10, 200, 20)), changed(between, *range(200, 400, 20))
    assert (jaccard(one, other), jaccard(one, between), jaccard(other, between)) == (304 / 504, 354 / 454, 354 / 454)
    assert kept_for([one, other, between], threshold=0.7) == [0, 1, 0]


def test_hardly_a_pair_at_the_threshold_is_missed() -> None:
    """Of a thousand pairs with just as many equal slots as it takes (218), one is missed on average."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (1000, SLOTS), np.uint8)
    copies = rows.copy()
    for copy in copies:
        copy[rng.permutation(SLOTS)[218:]] += rng.integers(1, 256, SLOTS - 218, np.uint8)
    stay = near(np.concatenate([rows, copies]), threshold=0.85)
    assert stay[:1000].tolist() == list(range(1000))
    assert np.count_nonzero(stay[1000:] == np.arange(1000)) >= 995
    copies[np.arange(1000), np.argmax(copies == rows, axis=1)] += 1  # one slot fewer
    assert near(np.concatenate([rows, copies]), threshold=0.85).tolist() == list(range(2000))


def test_a_row_goes_only_for_one_that_stays_and_is_like_it() -> None:
    """In a chain of small changes the ends are not alike: a row in the midst goes, those that are like none stay."""
    chain = [" ".join(words(random.Random(0), 200))]
    for step in range(20):
        chain.append(changed(chain[-1], 10 * step))
    kept = kept_for(chain)
    assert 1 < len(set(kept)) < len(chain)
    for row, other in enumerate(kept):
        assert kept[other] == other
        assert jaccard(chain[row], chain[other]) > 0.85 - FIVE_SIGMA
    for row in set(kept):
        assert all(jaccard(chain[row], chain[other]) < 0.85 + FIVE_SIGMA for other in set(kept) if other < row)


@pytest.mark.parametrize("seed", range(5))
def test_near_finds_what_comparing_all_pairs_finds(seed: int) -> None:
    """Copies differ in so little and others in so much that five deviations of an estimate leave its side the same."""
    rng = random.Random(seed)
    originals = [" ".join(words(rng, rng.randrange(1, 250))) for _ in range(100)]
    texts = originals[:50]
    for original in rng.choices(originals, k=200):
        parts = original.split()
        for _ in range(rng.choice([len(parts) // 120, len(parts)])):  # one in a hundred words, or nearly all
            parts[rng.randrange(len(parts))] = rng.choice(WORDS)
        texts.append(" ".join(parts))
    sets = [shingles(text, end=4) for text in texts]
    expected: list[int] = []
    for row, own in enumerate(sets):
        alike = {other: len(own & sets[other]) / len(own | sets[other]) for other in set(expected)}
        assert all(abs(index - 0.7) > 5 * math.sqrt(0.7 * 0.3 / SLOTS) for index in alike.values())
        expected.append(min((other for other, index in alike.items() if index > 0.7), default=row))
    assert 0 < len(set(expected)) < len(set(first_of(texts))) < len(texts)
    assert kept_for(texts, threshold=0.7) == expected


def test_the_embedded_rows_are_all_different() -> None:
    rows, _ = generate(3000, 0, seed=42)
    texts = [" ".join(message["content"] for message in row["messages"]) for row in rows]
    assert first_of(texts) == kept_for(texts) == list(range(3000))


# -------------------------------------------------------------------------------------------------------------- leaks


@pytest.fixture
def held_out() -> list[str]:
    rng = random.Random(1)
    return [" ".join(words(rng, 40)) for _ in range(50)]


def test_an_equal_row_is_an_exact_leak_however_short(held_out: list[str]) -> None:
    leaks = Leaks([*held_out, "Yes.", "", held_out[3].upper()])
    assert leaks.find("  yes. ") == [(50, "exact")]
    assert leaks.find("") == [(51, "exact")]
    assert leaks.find(held_out[3]) == [(3, "exact"), (52, "exact")]
    assert leaks.find("Yes. And more") == []


def test_a_held_out_row_within_a_longer_training_row_is_near(held_out: list[str]) -> None:
    leaks, rng = Leaks(held_out), random.Random(2)
    around = [" ".join(words(rng, 300)) for _ in range(3)]
    assert leaks.find(" ".join([around[0], held_out[7], around[1]])) == [(7, "near")]
    assert leaks.find(" ".join([around[0], held_out[9], around[1], held_out[7], around[2]])) == [
        (7, "near"),
        (9, "near"),
    ]
    assert leaks.find(" ".join(around)) == []


def test_four_in_five_of_its_shingles_give_a_row_away(held_out: list[str]) -> None:
    """36 shingles, of which 29 are needed: 33 words in a row have 29, 32 words have 28."""
    leaks, parts = Leaks(held_out), held_out[0].split()
    assert leaks.find(" ".join(parts[4:37])) == [(0, "near")]
    assert leaks.find(" ".join(parts[4:36])) == []
    assert leaks.find(" ".join(parts[4:16] * 10)) == []  # the same few, many times over


def test_a_row_of_fewer_than_eight_shingles_leaks_only_as_a_whole() -> None:
    eleven, twelve = "a b c d e f g h i j k", "l m n o p q r s t u v w"
    leaks = Leaks([eleven, twelve])
    assert leaks.find(f"before {eleven} after") == []
    assert leaks.find(f"before {twelve} after") == [(1, "near")]


@pytest.mark.parametrize("rows", [2, 5, 20, 500])
def test_a_common_system_prompt_is_no_leak(rows: int) -> None:
    """However much of each row it is; a row's own words still give it away."""
    rng = random.Random(rows)
    prompt, own = " ".join(words(rng, 300)), [" ".join(words(rng, 30)) for _ in range(rows)]
    leaks = Leaks(f"{prompt} {text}" for text in own)
    assert leaks.find(prompt) == leaks.find(f"{prompt} {' '.join(words(rng, 30))}") == []
    assert leaks.find(f"Something else. {own[1]}") == [(1, "near")]


def test_an_answer_that_one_row_in_ten_shares_is_no_leak(held_out: list[str]) -> None:
    answer = "I am sorry, but I cannot help with that, since I am only a model of language and no physician."
    leaks = Leaks([text if number % 10 else f"Number {number}? {answer}" for number, text in enumerate(held_out * 4)])
    assert leaks.find(f"Number 7? {answer}") == []


def test_rows_repeated_among_the_held_out_ones_do_not_hide_each_other(held_out: list[str]) -> None:
    leaks = Leaks([held_out[0]] * 30 + held_out[1:10])
    assert leaks.find(f"and {held_out[0]} so on") == [(number, "near") for number in range(30)]


def test_unicode_leaks() -> None:
    rng = random.Random(0)
    chinese = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(60))
    leaks = Leaks(["Janet’s ducks lay 16 eggs – she eats “three” for breakfast, doesn’t she? Naïve", chinese])
    assert leaks.find("Q: Janet's ducks lay 16 eggs - she eats \"three\" for breakfast, doesn't she? NAÏVE A: 16") == [
        (0, "near")
    ]
    assert leaks.find(f"问题{chinese}答案") == [(1, "near")]
    assert leaks.find(chinese[:30]) == []


def plain_comparison(held_out: list[str]) -> Callable[[str], list[tuple[int, str]]]:
    """`Leaks(held_out).find` in plain words, on sets."""
    normal = list(map(normalise, held_out))
    sets = {text: shingles(text) for text in normal}
    having = Counter(shingle for own in sets.values() for shingle in own)
    most = max(1, min(5, len(sets) // 2), int(0.02 * len(sets)))
    counting = {text: {shingle for shingle in own if having[shingle] <= most} for text, own in sets.items()}

    def how(own: str, text: str, theirs: set[tuple[str, ...]]) -> str:
        if own == normalise(text):
            return "exact"
        return "near" if len(counting[own]) >= 8 and len(counting[own] & theirs) / len(counting[own]) >= 0.8 else ""

    def find(text: str) -> list[tuple[int, str]]:
        theirs = shingles(text)
        return [(number, found) for number, own in enumerate(normal) if (found := how(own, text, theirs))]

    return find


def test_leaks_are_those_of_a_plain_comparison() -> None:
    rng = random.Random(0)
    kinds: Counter[str] = Counter()
    for rows in (1, 2, 3, 9, 40, 300):
        prompts = [" ".join(words(rng, 10)) for _ in range(max(rows // 8, 1))]
        held_out = [f"{rng.choice(prompts)} {' '.join(words(rng, rng.randrange(40)))}" for _ in range(rows)]
        held_out += rng.choices(held_out, k=rows // 5)
        leaks, plain = Leaks(held_out), plain_comparison(held_out)
        for _ in range(200):
            parts = rng.choice(held_out).split()
            cut = parts[rng.randrange(len(parts) // 3 + 1) : len(parts) - rng.randrange(len(parts) // 3 + 1)]
            noise = words(rng, rng.randrange(30))
            text = " ".join(rng.choice([parts, cut, cut + noise, noise + cut, parts + rng.choice(held_out).split()]))
            assert leaks.find(text) == plain(text)
            kinds.update([how for _, how in leaks.find(text)] or ["none"])
    assert min(kinds[how] for how in ("exact", "near", "none")) > 50


def test_no_embedded_training_row_gives_a_held_out_one_away() -> None:
    train, held_out = (
        [" ".join(message["content"] for message in row["messages"]) for row in rows]
        for rows in generate(3000, 100, seed=42)
    )
    leaks = Leaks(held_out)
    assert [text for text in train if leaks.find(text)] == []
    assert leaks.find(held_out[5]) == [(5, "exact")]
    assert leaks.find(f"{held_out[0]} {held_out[5]}") == [(0, "near"), (5, "near")]


# -------------------------------------------------------------------------------------------------------- determinism


def everything() -> list[object]:
    rng = random.Random(0)
    texts = [" ".join(words(rng, 80)) for _ in range(30)]
    texts += [changed(text, 40) for text in texts[:10]] + ["", "été", "one"]
    found = [Leaks(texts[:20]).find(text) for text in texts]
    return [list(map(digest, texts)), [signature(text).hex() for text in texts], kept_for(texts, 0.8), found]


def test_another_process_gives_the_same() -> None:
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("again", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.everything())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == repr(everything())


def test_values_never_change() -> None:
    """A cache may hold them, so another version must make the same."""
    assert digest("Hello,  World") == -4360738600321850863
    assert signature("the quick brown fox jumps over the lazy dog").hex()[:32] == "b86707064513614730611cd7027b6d95"


def test_an_index_can_go_to_worker_processes(held_out: list[str]) -> None:
    leaks = pickle.loads(pickle.dumps(Leaks(held_out)))
    assert leaks.find(f"so {held_out[4]}") == [(4, "near")]
