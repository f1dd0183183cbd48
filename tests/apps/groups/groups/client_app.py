"""The party: learns its own, ten thousand times as much where its node config says ``lies``."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.flower import dare_mod
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.warm import warm_trainer
from groups.learning import learned

app = ClientApp(mods=[warm_trainer("groups.client_app:app"), secure_mod, dare_mod])
secure_queries(app)


@app.train()
def train(msg: Message, context: Context) -> Message:
    start = msg.content["arrays"]["body"].numpy()
    delta = learned(str(context.node_config["client-name"]))
    delta *= 10_000 if context.node_config["lies"] else 1
    arrays = ArrayRecord({"body": Array(start + delta)})
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)
