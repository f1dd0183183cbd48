"""The server asks whether a party's data hold something, a bit a message. It can (SECURITY.md)."""

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as Reply
from flwr.clientapp import ClientApp
from guarded import (
    Parties,
    base_arrays,
    digest_of,
    quick_keys,
    training_content,
)

from dare_agg.flower import dare_mod
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.records import MESSAGE_KEY
from dare_agg.flower.transport import unpack

ROWS = {0: 3, 1: 0, 2: 12, 3: 0}


def gated(context_rows):
    """Training on a model that moves only where the data have the word asked for."""
    app = ClientApp(mods=[secure_mod, dare_mod])
    secure_queries(app)

    @app.train()
    def train(msg, context):
        found = context_rows[int(context.node_config["number"])]
        tuned = {
            name: Array(array.numpy() + np.float32(0.01 * found))
            for name, array in msg.content["arrays"].items()
        }
        metrics = MetricRecord({"num-examples": 40})
        return Reply(RecordDict({"arrays": ArrayRecord(tuned), "m": metrics}), reply_to=msg)

    return app


def test_whether_training_moved_and_no_more(tmp_path, monkeypatch):
    """How many rows had the word is not told: answers are of one length, or one refusal."""
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, gated(ROWS), node=lambda number: {"number": number})
    arrays, config = base_arrays(), {"lr": 0.01}
    terms, said = parties.terms(arrays, training=digest_of(arrays, config, {})), {}
    for party in parties.ids:
        reply = parties.send(party, training_content(terms, arrays, config), "train")
        secure = reply.content["dare.secure"]
        message = reply.content.get(MESSAGE_KEY)
        size = 0 if message is None else len(unpack(message, 1 << 20))
        said[parties.nodes[party]["number"]] = (secure.get("refused", ""), size)
    assert [said[number][0] for number in range(4)] == ["", "norm", "", "norm"]
    assert said[0] == said[2] and said[1] == said[3]
