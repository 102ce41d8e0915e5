"""Tokens with equal tokens before them are found, and no others."""

import random

from llama_lightning.data.prefixes import find_prefixes


def test_the_docstrings_example() -> None:
    prefixes = find_prefixes([[5, 6, 7], [5, 6, 8]])
    assert prefixes.distinct.tolist() == [0, 1, 2, 5]
    assert prefixes.representative.tolist() == [0, 1, 2, 0, 1, 3]


def test_no_rows() -> None:
    prefixes = find_prefixes([])
    assert prefixes.distinct.tolist() == prefixes.representative.tolist() == []


def test_one_token_stands_for_all_with_the_same_beginning_and_for_no_other() -> None:
    rng = random.Random(0)
    shared = 0
    for _ in range(300):
        # Three token numbers: rows agree for a while by chance.
        rows = [
            [rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 8))
        ]
        beginnings = [tuple(row[: i + 1]) for row in rows for i in range(len(row))]
        distinct, representative = (tensor.tolist() for tensor in find_prefixes(rows))
        assert [beginnings[distinct[node]] for node in representative] == beginnings
        assert len(distinct) == len(set(beginnings))
        assert [beginnings.index(beginnings[token]) for token in distinct] == distinct
        shared += len(beginnings) - len(distinct)
    print(f"{shared} tokens shared in 300 batches")
    assert shared > 500
