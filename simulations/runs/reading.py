"""What a server reads from one client's update in plain mode: simple attacks, so lower bounds.

Each takes the decoded delta of one client, which a plain server has. ``head`` deltas are those
of a linear layer under cross-entropy: for one example of features x, scores p and label y the
gradient of row c is (p_c − y_c)·x and of bias c is p_c − y_c, so the label's row alone rises, and
along x (Zhu et al. 2019, arXiv 1906.08935; Zhao et al. 2020, arXiv 2001.02610).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_Z = 1.96  # 95 %


def label_scores(weight: Array, bias: Array, mean: Array) -> NDArray[np.float64]:
    """How much each class rose, shape (classes,), from the delta of a head.

    ``weight`` (classes, width), ``bias`` (classes,); ``mean`` are the features that texts have on
    average, which a server knows from public ones: where few elements survive, rows say more
    than biases.
    """
    return np.asarray(weight @ mean + bias, np.float64)


def features_read(weight: Array, scores: NDArray[np.float64], examples: int) -> NDArray[np.float64]:
    """An estimate of the features behind the class that rose most, shape (width,).

    With one example all rows are along its features, up to their signs. With more the row of
    the class alone is.
    """
    if examples == 1:
        return np.asarray(np.sign(scores) @ weight, np.float64)
    return np.asarray(weight[int(np.argmax(scores))], np.float64)


def label_scores_by_encoder(bias: Array, survived: NDArray[np.bool_], head: Array) -> Array:
    """The same from the delta of the encoder's last additive term, without the head's delta.

    With mean pooling its gradient is Wᵀ(p − y): ``bias`` (width,) moves towards the label's row
    of ``head`` (classes, width), which the server knows where all start from a seeded one.
    """
    rows = (head - head.mean(axis=0))[:, survived]
    norms = np.linalg.norm(rows, axis=1)
    return rows @ bias[survived] / np.where(norms > 0, norms, 1)


def words_read(embedding: Array, words: Sequence[int], common: Sequence[int]) -> float:
    """Share of a client's ``words`` among as many rows of most energy in the embedding's delta.

    Only the rows of words that occur are trained. ``common`` tokens, in every text, do not
    count. With a random order the share is that of the words in the vocabulary.
    """
    energy = np.einsum("ij,ij->i", embedding, embedding, dtype=np.float64)
    energy[list(common)] = -1
    wanted = set(words) - set(common)
    return len(wanted & set(np.argsort(-energy, kind="stable")[: len(wanted)].tolist())) / len(
        wanted
    )


def correlation(one: NDArray, others: NDArray) -> NDArray[np.float64]:
    """Pearson's correlation of a vector with each row of ``others``; 0 where one is constant."""
    a = one - one.mean()
    b = others - others.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(a) * np.linalg.norm(b, axis=1)
    return np.asarray(b @ a / np.where(norms > 0, norms, 1), np.float64)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Chance that a member scores above another; ties count half (Mann and Whitney)."""
    a, b = np.asarray(members)[:, None], np.asarray(others)[None, :]
    return float(np.mean((a > b) + 0.5 * (a == b)))


def interval(values: Sequence[float], *, yes_or_no: bool) -> tuple[float, float, float]:
    """Mean and 95 % interval over independent clients: Wilson's for yes or no, else Student's."""
    n, mean = len(values), float(np.mean(values))
    if yes_or_no:
        middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + (_Z / (2 * n)) ** 2)
        return mean, middle - half, middle + half
    if n == 1:
        return mean, -math.inf, math.inf
    # The t quantile's expansion in 1/df (Abramowitz and Stegun 26.7.5): 3 digits from df = 4 on.
    df, z = n - 1, _Z
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half
