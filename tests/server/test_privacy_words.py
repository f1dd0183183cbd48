"""Words of privacy in the run config: what they make, and what they refuse before a run."""

import pytest

from dare_agg.errors import ConfigError
from server.privacy import BUDGET_FILE, client_privacy, privacy_facts, shared_privacy
from server.reading import read_config

WORDS = {"dp": "clients", "dp-members": 100, "weighting": "equal", "drop-rate": "0.9"}


def test_the_words_make_the_promise(tmp_path):
    config = read_config({**WORDS, "dp-epsilon": 4.0, "dp-quantile": 0.5})
    privacy = client_privacy(config, tmp_path)
    assert (privacy.members, privacy.epsilon, privacy.quantile) == (100, 4.0, 0.5)
    assert privacy.delta == pytest.approx(0.001)
    assert privacy.ledger == tmp_path / BUDGET_FILE
    assert client_privacy(read_config({}), tmp_path) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"dp-epsilon": 0.0}, "above 0"),
        ({"dp-epsilon": 70333.0}, "dp-weak"),
        ({"dp-delta": 0.01}, "less than 1/100"),
        ({"dp-members": 0}, "dp-members"),
        ({"dp-clip": -1.0}, "clip"),
        ({"weighting": "examples"}, "equal"),
        ({"methods": "dare-ties"}, "dare-task-arithmetic"),
        ({"drop-rate": "auto"}, "set drop-rate"),
        ({"keep-rates": "last"}, "keep-rates"),
        ({"upload-budget": "300kB"}, "upload budget"),
        ({"dp": "client"}, "dp"),
        ({"dp-apart": 5}, r"fraction_train = 1 .* take at most 0\.2"),
        ({"dp-apart": 5, "fraction-train": 0.001}, "is nobody"),
        ({"dp-apart": 5, "fraction-train": 0.2, "dp-quantile": 0.5}, "leave quantile out"),
        ({"dp-apart": 2000}, "dp-apart"),
    ],
)
def test_what_promises_nothing_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        read_config({**WORDS, **words})


def test_clients_that_come_apart_are_asked_in_turn(tmp_path):
    config = read_config({**WORDS, "dp-apart": 5, "fraction-train": 0.2})
    privacy = client_privacy(config, tmp_path)
    assert privacy.apart == 5 and privacy.begin(10, 0.2).expected == 20


@pytest.mark.parametrize("words", [{"dp-epsilon": 1.0}, {"dp-apart": 5}])
def test_words_of_privacy_alone_are_refused(words):
    with pytest.raises(ConfigError, match="without dp"):
        read_config(words)


def test_rows_are_not_kept_apart():
    with pytest.raises(ConfigError, match="dp-apart with dp = 'records'"):
        read_config({"dp": "records", "dp-apart": 5})


def test_a_row_says_what_is_spent():
    found = privacy_facts({"privacy": {"epsilon": 1.0, "delta": 1e-5, "noise": 2.0}})
    assert found == {"privacy_epsilon": 1.0, "privacy_delta": 1e-5, "privacy_noise": 2.0}
    assert privacy_facts({}) == {}


SECURE = {
    "dp": "clients", "secure": "mean", "secure-roster": "r", "weighting": "equal",
    "drop-rate": "0.9", "evaluate": False,
}  # fmt: skip


def test_the_words_of_noised_sums_make_their_promise(tmp_path):
    config = read_config({**SECURE, "dp-epsilon": 4.0, "dp-clip": 2.0})
    privacy = shared_privacy(config, tmp_path)
    assert (privacy.epsilon, privacy.clip) == (4.0, 2.0)
    assert privacy.ledger == tmp_path / BUDGET_FILE
    assert client_privacy(read_config({**WORDS}), tmp_path) is not None
    assert shared_privacy(read_config({**WORDS}), tmp_path) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"secure": "ties"}, "secure = mean"),
        ({"secure": "wudi"}, "secure = mean"),
        ({"secure": "task-arithmetic"}, "secure = mean"),
        ({"secure-merge": True}, "secure-merge"),
        ({"secure-groups": 3, "robust": "median", "byzantine": 1}, "robust"),
        ({"weighting": "examples"}, "equal"),
        ({"evaluate": True}, "evaluate = false"),
        ({"dp-members": 10}, "roster says"),
        ({"dp-quantile": 0.5}, "norms stay with them"),
        ({"dp-apart": 3}, "no later round knows"),
        ({"dp-delta": 0.2, "min-clients": 5}, "less than 1/5"),
        ({"dp-epsilon": 0.0}, "above 0"),
        ({"dp-epsilon": 70333.0}, "dp-weak"),
        ({"dp-clip": -1.0}, "clip"),
    ],
)
def test_what_noised_sums_cannot_promise_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        read_config({**SECURE, **words})
