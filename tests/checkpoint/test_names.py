import pytest

from dare_agg.checkpoint.names import common_prefix, renamed

BASE = ("encoder.bias", "encoder.weight", "pooler.weight")


@pytest.mark.parametrize(
    ("given", "way"),
    [
        (BASE, ("", "")),
        ([*BASE, "head.bias"], ("", "")),
        (["bert." + name for name in BASE] + ["head.bias"], ("bert.", "")),
        (["model.bert." + name for name in BASE], ("model.bert.", "")),
        # One tensor stays where it is.
        (["bert.encoder.bias", "bert.encoder.weight", "pooler.weight"], ("bert.", "")),
        # Most count, then the first by name.
        (["a.encoder.bias", *("b." + name for name in BASE)], ("b.", "")),
        ([p + name for name in BASE for p in ("b.", "a.")], ("a.", "")),
        # No part of a word is a prefix.
        (["big-" + name for name in BASE], ("", "")),
        (["other"], ("", "")),
        ([], ("", "")),
    ],
)
def test_the_prefix_that_gives_most_names(given, way) -> None:
    assert common_prefix(given, BASE) == way


def test_a_prefix_is_put_before_names_that_lack_it() -> None:
    wanted = ["bert." + name for name in BASE]
    assert common_prefix(BASE, wanted) == ("", "bert.")
    assert renamed(dict.fromkeys(BASE, 1), wanted) == dict.fromkeys(wanted, 1)


def test_values_keep_their_order_and_strangers_their_names() -> None:
    given = {"head.bias": 0, **{"bert." + name: i for i, name in enumerate(BASE)}}
    assert list(renamed(given, BASE).items()) == [
        ("head.bias", 0),
        *zip(BASE, range(3), strict=True),
    ]


def test_two_names_never_become_one() -> None:
    given = {"bert." + name: 1 for name in BASE} | {"pooler.weight": 2}
    assert renamed(given, BASE) == given
