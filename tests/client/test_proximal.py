"""FedProx's term: its gradient, and what it does to a client's way."""

from dataclasses import replace

import numpy as np
import pytest
from plain_loop import lesson

from client.config import configure
from client.learning import learn
from client.proximal import proximal
from client.training import FineTuning, build_task
from dare_agg.errors import ConfigError

torch = pytest.importorskip("torch")


def test_the_gradient_is_mu_times_the_way_from_the_start():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    untouched = torch.nn.Parameter(torch.randn(2, generator=generator))
    pull = proximal([weight, untouched], 0.7)
    start = weight.detach().clone()
    with torch.no_grad():
        weight += torch.randn(3, 4, generator=generator)
    weight.grad = torch.randn(3, 4, generator=generator)
    own = weight.grad.clone()
    pull()
    assert torch.allclose(weight.grad, own + 0.7 * (weight.detach() - start))
    assert untouched.grad is None  # not part of this loss: it stays where it is


def test_it_is_the_gradient_of_the_whole_loss():
    """Against the term written into the loss and differentiated by torch, over several steps."""

    def trained(mu, in_loss):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        start = weight.detach().clone()

        def loss(read):
            own = ((weight - torch.tensor([3.0, 3.0, 3.0])) ** 4).sum()
            return own + in_loss / 2 * ((weight - start) ** 2).sum()

        config = configure(learning_rate=0.3, proximal_mu=mu, clip_norm=5.0, weight_decay=0.01)
        learn(lesson({"w": weight}, loss, config), [np.arange(1)] * 12)
        return weight.detach()

    assert torch.allclose(trained(40.0, 0.0), trained(0.0, 40.0), atol=1e-5)
    assert not torch.allclose(trained(40.0, 0.0), trained(0.0, 0.0), atol=1e-2)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_client_stays_nearer_to_what_it_received(tiny_model, review_files, precision):
    task = build_task(
        configure(
            model=str(tiny_model), data=str(review_files["csv"]), text_column="review",
            label_column="tone", length=12, steps=12, learning_rate=1e-3, precision=precision,
        )
    )  # fmt: skip
    start, rows = task.initial_state(), np.arange(60)

    def way(mu):
        config = replace(task.config, proximal_mu=mu)
        state, _, _ = FineTuning(config, task.data, task.kind).train(start, rows, seed=[2])
        return float(np.sqrt(sum(((state[n] - start[n]) ** 2).sum() for n in start)))

    assert 0 < way(100.0) < 0.8 * way(0.0)


def test_words():
    with pytest.raises(ConfigError, match=r"proximal-mu = -1\.0; 0 to 1e\+06 are possible"):
        configure(proximal_mu=-1.0)
