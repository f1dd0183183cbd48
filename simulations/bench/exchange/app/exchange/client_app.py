"""The client: sends back what it received, and notes when."""

import json
import time

from flwr.app import Context, Message, MetricRecord, RecordDict
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
    content = {"arrays": msg.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=msg)
