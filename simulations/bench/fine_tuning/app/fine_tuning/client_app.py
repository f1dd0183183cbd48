"""The client: AdamW on all parameters of a model that is loaded once a process."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from dare_agg.flower import dare_mod
from dare_agg.torch import federated_model

app = ClientApp(mods=[dare_mod])


@functools.cache
def model_of(base: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@app.train()
def train(msg: Message, context: Context) -> Message:
    config, node = context.run_config, context.node_config
    model = model_of(str(node["base"]))
    rows = np.load(Path(str(config["rows"])) / f"{node['client-name']}.npy")
    number = int(msg.content["config"]["server-round"])
    batch, steps = int(config["batch"]), int(config["steps"])
    drawn = np.random.default_rng([number, len(rows)]).permutation(len(rows))
    with federated_model(model, msg, context) as turn:
        optimizer = torch.optim.AdamW(model.parameters(), lr=float(config["learning-rate"]))
        losses = []
        model.train()
        for step in range(steps):
            ids = torch.from_numpy(rows[drawn[step * batch : (step + 1) * batch]])
            loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        del optimizer
    return turn.reply(num_examples=batch * steps, metrics={"loss": float(np.mean(losses))})
