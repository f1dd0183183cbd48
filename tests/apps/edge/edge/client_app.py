"""The client: adds a delta that depends on round and name alone."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.flower import dare_mod, offer_base
from dare_agg.flower.warm import warm_trainer
from edge.base import base_arrays

app = ClientApp(mods=[warm_trainer("edge.client_app:app"), dare_mod])


@offer_base
def own_base(msg: Message, context: Context) -> dict[str, np.ndarray] | str:
    run = context.run_config
    if not run["public-base"]:
        return {}
    return str(run["base"]) or base_arrays(int(run["size"]))


@app.train()
def train(msg: Message, context: Context) -> Message:
    number = int(msg.content["config"]["server-round"])
    node = context.node_config
    time.sleep(float(node.get("pause", context.run_config["pause"])))
    key = [number, *str(node.get("client-name", node.get("partition-id"))).encode()]
    rng = np.random.default_rng(key)
    tuned = {}
    for name, array in msg.content["arrays"].items():
        start = array.numpy()
        tuned[name] = Array(start + rng.normal(0.002, 0.004, start.shape).astype(np.float32))
    metrics = MetricRecord({"num-examples": 10})
    content = RecordDict({"arrays": ArrayRecord(tuned), "metrics": metrics})
    return Message(content, reply_to=msg)
