"""The client: SGD on its own rows, and the rest of the time that its machine takes."""

import functools
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.flower import dare_mod
from dare_agg.flower.warm import warm_trainer
from simulations.runs.small_classifier import Rows, train

app = ClientApp(mods=[warm_trainer("clothes.client_app:app"), dare_mod])


@functools.cache
def rows_in(path: Path) -> Rows:
    found = np.load(path)
    return Rows(found["inputs"], found["labels"])


@app.train()
def training(msg: Message, context: Context) -> Message:
    """A client called slow-N takes ``times`` as long."""
    began, config = time.monotonic(), context.run_config
    kind, _, place = str(context.node_config["client-name"]).partition("-")
    rows = rows_in(Path(str(config["rows"])) / f"{place}.npz")
    arrays = {name: array.numpy() for name, array in msg.content["arrays"].items()}
    words = (int(config["steps"]), int(config["batch"]), float(config["learning-rate"]))
    number = int(msg.content["config"]["server-round"])
    tuned = train(arrays, rows, *words, [int(config["seed"]), 4, int(place), number])
    seconds = float(config["training-seconds"]) * (float(config["times"]) if kind == "slow" else 1)
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    record = ArrayRecord({name: Array(np.asarray(array)) for name, array in tuned.items()})
    metrics = MetricRecord({"num-examples": len(rows)})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=msg)
