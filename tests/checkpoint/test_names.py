import pytest

from dare_agg.checkpoint.names import found_names, under_names

BASE = ("encoder.bias", "encoder.weight", "pooler.weight")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (BASE, [*BASE]),
        ([*BASE, "head.bias"], [*BASE]),
        (["bert." + name for name in BASE] + ["head.bias"], ["bert." + n for n in BASE]),
        (["model.bert." + name for name in BASE], ["model.bert." + n for n in BASE]),
        # One tensor stays where it is.
        (["bert.encoder.bias", "bert.encoder.weight", "pooler.weight"],
         ["bert.encoder.bias", "bert.encoder.weight", "pooler.weight"]),
        # Most count, then the first by name.
        (["a.encoder.bias", *("b." + name for name in BASE)], ["b." + n for n in BASE]),
        ([p + name for name in BASE for p in ("b.", "a.")], ["a." + n for n in BASE]),
        # No part of a word is a prefix.
        (["big-" + name for name in BASE], []),
        (["other"], []),
        ([], []),
    ],
)  # fmt: skip
def test_the_prefix_that_gives_most_names(given, found) -> None:
    names = found_names(dict.fromkeys(given, (2,)), dict.fromkeys(BASE, (2,)))
    assert sorted(names, key=names.get) == found
    assert all(name.endswith(wanted) for name, wanted in names.items())


def test_a_prefix_is_put_before_names_that_lack_it() -> None:
    wanted = ["bert." + name for name in BASE]
    assert under(dict.fromkeys(BASE, 1), wanted) == dict.fromkeys(wanted, 1)


def under(given, wanted):
    return under_names(given, dict.fromkeys(given, (2,)), dict.fromkeys(wanted, (2,)))


def test_values_keep_their_order_and_strangers_their_names() -> None:
    given = {"head.bias": 0, **{"bert." + name: i for i, name in enumerate(BASE)}}
    assert list(under(given, BASE).items()) == [
        ("head.bias", 0),
        *zip(BASE, range(3), strict=True),
    ]


def test_two_names_never_become_one() -> None:
    given = {"bert." + name: i for i, name in enumerate(BASE)} | {"pooler.weight": 3}
    assert under(given, BASE) == dict(zip(BASE, range(3), strict=True))


def test_a_missing_tensor_and_a_stored_mask_leave_the_prefix_found() -> None:
    wanted = {"h.0.attn.bias": (1, 1, 4, 4), "h.0.c_fc.weight": (4, 8), "wte.weight": (9, 4)}
    given = {"transformer.h.0.c_fc.weight": (4, 8), "transformer.wte.weight": (9, 4)}
    assert found_names(given, wanted) == {name: name[12:] for name in given}


@pytest.mark.parametrize(
    "spelt",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.model.{}",
        "_forward_module.{}",
    ],
)
def test_what_wrappers_put_into_names_is_seen_through(spelt: str) -> None:
    wanted = {"layers.0.fc.weight": (3, 2), "layers.1.fc.weight": (3, 2), "norm.bias": (2,)}
    given = {spelt.format(name): shape for name, shape in wanted.items()}
    assert found_names(given, wanted) == {spelt.format(name): name for name in wanted}


def test_wrappers_in_the_middle_of_a_name_are_seen_through() -> None:
    wanted = {"layers.0.fc.weight": (3, 2), "norm.weight": (2,)}
    given = {"layers.0._checkpoint_wrapped_module.fc._fsdp_wrapped_module.weight": (3, 2),
             "norm.weight": (2,)}  # fmt: skip
    assert set(found_names(given, wanted).values()) == set(wanted)


def test_the_old_words_of_norms_are_the_new_ones() -> None:
    wanted = {"bert.LayerNorm.weight": (4,), "bert.LayerNorm.bias": (4,), "fc.weight": (2, 4)}
    given = {"bert.LayerNorm.gamma": (4,), "bert.LayerNorm.beta": (4,), "fc.weight": (2, 4)}
    assert found_names(given, wanted) == {
        "bert.LayerNorm.gamma": "bert.LayerNorm.weight",
        "bert.LayerNorm.beta": "bert.LayerNorm.bias",
        "fc.weight": "fc.weight",
    }
