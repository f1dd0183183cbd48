"""The client: sends back what it received, a little larger, and notes when it came.

Flower does not send again what a server has, so unchanged arrays would not travel.
"""

import json
import time

import numpy as np
from flwr.app import Array, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    line = {
        "client": str(context.node_config["client-name"]),
        "round": int(msg.content["config"]["server-round"]),
        "time": time.time(),
    }
    with open(str(context.run_config["log"]), "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    factor = np.float32(1 + 1e-3 * (1 + int(line["client"].rpartition("-")[2])))
    arrays = msg.content["arrays"]
    for name in list(arrays):
        arrays[name] = Array(arrays[name].numpy() * factor)
    content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=msg)
