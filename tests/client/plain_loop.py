"""Fine-tuning in the fewest lines: what training must give to the bit at its usual settings.

It is the loop as it was before devices, schedules and the rest were added, on one thread of the
CPU.
"""

from __future__ import annotations

import numpy as np


def plain_training(task, state, rows, *, seed):
    """The state and the mean loss after a round of AdamW on a task's batches."""
    import torch

    torch.set_num_threads(1)
    config = task.config
    model = task.kind.network(config, len(task.data.label_names)).eval()
    named = dict(model.named_parameters())
    if config.train != "full":
        kept = "lora_" if config.train == "lora" else "head."
        named = {n: p for n, p in named.items() if kept in n or n.startswith("head.")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
        if name in named:
            parameter.data.copy_(torch.from_numpy(state[name]))
    rng = np.random.default_rng(np.random.SeedSequence(list(seed)))
    wanted = config.steps * config.batch
    drawn = np.concatenate([rng.permutation(rows) for _ in range(-(-wanted // len(rows)))])
    read = task.kind.reader(config, task.train_rows)
    head = [p for n, p in named.items() if n.startswith("head.")]
    body = [p for n, p in named.items() if not n.startswith("head.")]
    groups = [
        {"params": body, "lr": config.learning_rate},
        {"params": head, "lr": config.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    warm = max(1, round(config.warm_up * config.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warm))
    losses = []
    for lo in range(0, wanted, config.batch):
        at = drawn[lo : min(wanted, lo + config.batch)]
        batch = read(at)
        targets = task.kind.targets(batch, torch.from_numpy(task.train_rows.labels[at])).flatten()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            scores = task.kind.scores(model, batch).float().flatten(0, -2)
        loss = task.kind.loss(scores, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return {n: p.detach().numpy().copy() for n, p in named.items()}, float(np.mean(losses))


def lesson(named, loss, config, compute=None, **more):
    """Parameters that learn by a loss of our own, without a model and data."""
    from client.devices import Compute
    from client.learning import Lesson, Reading

    def read(at):
        return Reading({"at": at}, None, len(at))

    return Lesson(config, compute or Compute("cpu"), None, named, read, loss, **more)
