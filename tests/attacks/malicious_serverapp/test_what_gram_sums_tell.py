"""What the sums of Gram matrices tell a server of single parties, as SECURITY.md says it."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "secure"))
from sketching import LAYOUT, deltas_of, gathering, summed

from dare_agg.errors import ConfigError
from dare_agg.merge.by_tensor import read_matrix
from dare_agg.merge.directions import leading_directions
from dare_agg.secure.sketch import sketch_of
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source

NAME = "wide.weight"


def part_of(plan, name=NAME):
    """A Linear's sketch, and where its two parts lie."""
    return next(part for part in plan.parts() if part[0].linear.entry.name == name)


def read_sums(plan, values):
    """Eigenvectors of Σ G by size, their eigenvalues, and what the sums map them to."""
    one, grams, mapped = part_of(plan)
    signs = plan.signs(one)
    y = values[grams].reshape(-1, one.width) / plan.unit(one)
    sizes, vectors = np.linalg.eigh(signs.T @ y)
    few = sizes > 1e-4 * sizes[-1]
    basis, roots, _ = np.linalg.svd(
        y @ (vectors[:, few] / np.sqrt(sizes[few])), full_matrices=False
    )
    out = np.linalg.lstsq((basis.T @ signs).T, values[mapped].reshape(-1, one.width).T)[0].T
    return basis, roots**2, out


def matrix_of(delta, name=NAME):
    return read_matrix(array_source(delta), LAYOUT[name], 0, False)


def sums_of(group, deltas):
    result = summed(group, dict(zip(group.terms.cohort, deltas, strict=True)))
    point = result.terms.quantiser
    return result.sums.total[result.terms.survivors :] * (point.clip / point.top)


def test_directions_show_and_what_a_party_does_with_them():
    """It tells: in many dimensions parties' directions hardly overlap, and stand in the sum as
    eigenvectors, with what their party maps them to. Not whose they are."""
    group, deltas = gathering(4), deltas_of(4)
    plan = group.terms.sketch_plan(LAYOUT)
    basis, sizes, out = read_sums(plan, sums_of(group, deltas))
    found = []
    for delta in deltas:
        first = leading_directions(matrix_of(delta), 1)[0]
        first /= np.linalg.norm(first)
        # The sum's mapping of this party's direction against the party's own.
        theirs, mine = out @ (basis.T @ first), matrix_of(delta) @ first
        cosine = theirs @ mine / np.linalg.norm(theirs) / np.linalg.norm(mine)
        found.append((np.linalg.norm(basis.T @ first), cosine))
    assert min(inside for inside, _ in found) > 0.999
    assert min(cosine for _, cosine in found) > 0.9
    assert abs(sizes.sum() - 4) < 1e-3
    closest = max(
        abs(basis[:, 0] @ row / np.linalg.norm(row))
        for delta in deltas
        for row in leading_directions(matrix_of(delta), 1)
    )
    assert closest > 0.6  # a random direction of 96 inputs has 0.08


def test_whose_they_are_does_not_show():
    group, deltas = gathering(4), deltas_of(4)
    swapped = [deltas[2], deltas[0], deltas[3], deltas[1]]
    rounding = 4 * group.terms.clip / group.terms.quantiser.top
    assert np.abs(sums_of(group, deltas) - sums_of(group, swapped)).max() <= rounding


def test_nothing_beyond_the_leading_directions_is_in_a_sketch():
    """Nor the size of a change in the Gram part: a party has divided by its own norm."""
    plan = gathering(4).terms.sketch_plan(LAYOUT)
    (delta,) = deltas_of(1)
    few, twice = delta.copy(), delta.copy()
    entry = LAYOUT[NAME]
    left, sizes, right = np.linalg.svd(matrix_of(delta), full_matrices=False)
    few[entry.offset : entry.stop] = ((left[:, :2] * sizes[:2]) @ right[:2]).reshape(-1)
    twice[entry.offset : entry.stop] *= 2
    assert np.abs(few - delta).max() > 1e-4
    _, grams, values = part_of(plan)
    whole = sketch_of(plan, delta)
    for other, size in ((sketch_of(plan, few), 1), (sketch_of(plan, twice), 2)):
        assert np.abs(other[grams] - whole[grams]).max() < 1e-5 * np.abs(whole[grams]).max()
        assert np.abs(other[values] - size * whole[values]).max() < 1e-5 * np.abs(whole).max()


def test_all_others_together_know_the_last_ones_directions():
    """As with every sum: n − 1 who collude subtract their own."""
    group, deltas = gathering(4), deltas_of(4)
    plan = group.terms.sketch_plan(LAYOUT)
    left = sums_of(group, deltas) - sum(
        sketch_of(plan, delta).astype(float) for delta in deltas[1:]
    )
    basis, sizes, out = read_sums(plan, left)
    assert (sizes > 1e-3).sum() == 2
    rows = leading_directions(matrix_of(deltas[0]), 2)
    for row in rows:
        unit = row / np.linalg.norm(row)
        assert np.linalg.norm(basis[:, :2].T @ unit) > 0.9999
    mapped = (out[:, :2] / sizes[:2]) @ basis[:, :2].T
    own = matrix_of(deltas[0]) @ (rows.T @ np.linalg.pinv(rows).T)
    assert np.linalg.norm(mapped - own) / np.linalg.norm(own) < 1e-2


@pytest.mark.parametrize("n", [1, 2])
def test_of_two_each_would_know_the_other(n):
    with pytest.raises(ConfigError, match="3"):
        gathering(n)


def test_no_chosen_signs_show_more_than_the_sum():
    """A server that names runs until the signs suit it reads the same Σ G, whatever they are."""
    deltas, read = deltas_of(4), []
    for run in ("a", "b"):
        group = gathering(4, run=run)
        basis, sizes, _ = read_sums(group.terms.sketch_plan(LAYOUT), sums_of(group, deltas))
        read.append((basis * sizes) @ basis.T)
    assert np.abs(read[0] - read[1]).max() < 1e-3 * np.abs(read[0]).max()


def test_a_small_linear_is_shown_whole():
    """Fewer inputs than columns: Σ G and Σ τ·G travel as they are, still of k directions each."""
    layout = layout_of({"small.weight": (12, 8)})
    plan = gathering(4, layout).terms.sketch_plan(layout)
    ((one, _, _),) = plan.parts()
    assert one.width == 8 and (plan.signs(one) == np.eye(8)).all()
