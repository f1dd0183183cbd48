import numpy as np
import pytest

from client.instructions.lengths import check_taught, cut, lengths
from client.instructions.template import Coded
from dare_agg.errors import ConfigError

TALK = (("user", "q"), ("assistant", "a"))


def example(asked, answer, length):
    mask = np.arange(asked + answer) >= asked
    return cut(TALK, Coded(np.arange(asked + answer, dtype=np.int32), mask, asked), length)


def test_statistics_are_of_whole_rows_and_count_what_is_cut():
    made = [example(5, 5, 20), example(10, 5, 20), example(15, 10, 20), example(30, 4, 20)]
    found = lengths(made, 20)
    assert (found.rows, found.median, found.p95, found.longest) == (4, 15, 34, 34)
    assert found.answer_tokens == 24
    assert (found.longer, found.lost, found.lost_answer, found.silent) == (2, 5 + 14, 5 + 4, 1)
    assert [e.ids.size for e in made] == [10, 15, 20, 20]
    said = found.line("data 'x', training")
    assert said == (
        "data 'x', training: 4 rows, tokens median 15, 95 % at most 34, longest 34; 24 of answers; "
        "2 rows are longer than length 20 and lose their end: 19 tokens, 9 of answers; 1 rows have "
        "no answer left and are left out (the first begins 'q'); length = 34 keeps all"
    )
    assert "none is longer than length 50" in lengths([example(5, 5, 50)], 50).line("it")


def test_percentiles_are_the_smallest_length_that_the_share_does_not_pass():
    found = lengths([example(1, n, 200) for n in range(1, 101)], 200)
    assert (found.median, found.p95, found.longest) == (51, 96, 101)


def test_rows_masked_entirely_say_which_and_why():
    made = [example(n, 4, 10) for n in (12, 11, 15, 20, 18, 30)]
    with pytest.raises(ConfigError) as caught:
        check_taught("data 'x'", made, lengths(made, 10))
    said = str(caught.value)
    assert "all 6 rows are masked entirely (the first begins 'q'): the question alone" in said
    assert "the shortest takes 11 tokens" in said and "set length = 34" in said
    silent = [example(5, 0, 10)]
    with pytest.raises(ConfigError, match="marks no token of an answer"):
        check_taught("data 'x'", silent, lengths(silent, 10))
    check_taught("data 'x'", [*made, example(2, 2, 10)], lengths([*made, example(2, 2, 10)], 10))
