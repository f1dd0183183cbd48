"""What users write over FedAvg: each habit is laid over `DareStrategy` too."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from toy import numpy_of, record_of, toy_delta

DENSE = {"drop_rate": 0, "values": "f32", "dense_values": "f32", "seed": 7}
FLOATS = ("encoder.weight", "encoder.bias", "norm.running_mean", "norm.running_var", "head.weight")


class Looks:
    """Reads everything, keeps copies, passes all on."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            arrays, metrics = reply.content["arrays"], reply.content["metrics"]
            assert list(arrays) == list(self.names) and len(reply.content.array_records) == 1
            assert all(a.dtype == str(a.numpy().dtype) for a in arrays.values())
            assert all(a.shape == a.numpy().shape for a in arrays.values())
            self.seen.append((server_round, metrics["num-examples"], numpy_of(arrays)))
        return super().aggregate_train(server_round, replies)


class LeavesSmallOnesOut:
    def aggregate_train(self, server_round, replies):
        kept = [r for r in replies if r.has_content() and r.content["metrics"]["num-examples"] > 10]
        return super().aggregate_train(server_round, kept)


class Scales:
    """Puts other arrays in the place of a client's, one tensor by one."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            if reply.content["metrics"]["num-examples"] > 20:
                continue
            record = reply.content["arrays"]
            record["encoder.bias"] = Array(np.float32(0.5) * record["encoder.bias"].numpy())
        return super().aggregate_train(server_round, replies)


class ReplacesAll:
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            clipped = {
                n: np.asarray(np.clip(a, -1, 1))
                for n, a in numpy_of(reply.content["arrays"]).items()
            }
            reply.content = RecordDict({**reply.content, "arrays": record_of(clipped)})
        return super().aggregate_train(server_round, replies)


class Copies:
    """Works on copies of its own."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            reply.content = RecordDict(dict(reply.content))
            reply.content["arrays"] = copy.deepcopy(reply.content["arrays"])
        return super().aggregate_train(server_round, replies)


class WeighsAlike:
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            reply.content["metrics"]["num-examples"] = 1
        return super().aggregate_train(server_round, replies)


class MovesHalfTheWay:
    """Changes what was merged, as server-side momentum or noise does."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        half = {n: (self.before[n] + a) / 2 for n, a in numpy_of(arrays).items()}
        half = {n: np.asarray(a, numpy_of(arrays)[n].dtype) for n, a in half.items()}
        return record_of(half), metrics

    def configure_train(self, server_round, arrays, config, grid):
        self.before = numpy_of(arrays)
        return super().configure_train(server_round, arrays, config, grid)


class KeepsTheOldModelOnce:
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return (None if server_round == 2 else arrays), metrics


class MergesByItself:
    """No word of super: the plain mean of what the clients sent."""

    def aggregate_train(self, server_round, replies):
        rows = [numpy_of(r.content["arrays"]) for r in replies if r.has_content()]
        mean = {
            n: np.asarray(np.mean([row[n] for row in rows], 0), rows[0][n].dtype) for n in rows[0]
        }
        return record_of(mean), MetricRecord({"clients": len(rows)})


class MergesWithTheStrategysFunctions(MergesByItself):
    """By itself, and the metrics by the function that the strategy was made with, or has."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays, _ = super().aggregate_train(server_round, replies)
        contents = [reply.content for reply in replies]
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)


class AsksThree:
    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        # FedAvg draws nodes at random: which three is told by what they are.
        return [m for m in messages if grid.partitions[m.metadata.dst_node_id] != 3]


class TellsEachItsOwn:
    """Another config for each client, in messages made anew from those of super."""

    def configure_train(self, server_round, arrays, config, grid):
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            own = ConfigRecord({**message.content["config"], "extra": float(grid.partitions[node])})
            content = RecordDict({**message.content, "config": own})
            yield Message(content, dst_node_id=node, message_type="train")


class MakesPlainMessages:
    """Samples and writes messages as if there were FedAvg alone."""

    def configure_train(self, server_round, arrays, config, grid):
        own = ConfigRecord({"server-round": server_round, "extra": 2.0})
        content = RecordDict({"arrays": arrays, "config": own})
        nodes = [node for node in grid.get_node_ids() if grid.partitions[node] < 3]
        return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


class MakesPlainMessagesForSupers:
    """The same for the nodes that super drew."""

    def configure_train(self, server_round, arrays, config, grid):
        drawn = super().configure_train(server_round, arrays, config, grid)
        own = ConfigRecord({"server-round": server_round, "extra": 3.0})
        content = RecordDict({"arrays": arrays, "config": own})
        return [Message(content, m.metadata.dst_node_id, "train") for m in drawn]


class ChangesTheMergedRecord(MovesHalfTheWay):
    """Puts what it makes into the record that super returned."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super(MovesHalfTheWay, self).aggregate_train(server_round, replies)
        for name in FLOATS:
            half = (self.before[name] + arrays[name].numpy()) / 2
            arrays[name] = Array(half.astype(np.float32))
        return arrays, metrics


class UsesThePiecesOfFedAvg:
    """Merges as Flower's own strategies do, by what they inherit of FedAvg."""

    def configure_train(self, server_round, arrays, config, grid):
        config["server-round"] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(content, list(grid.get_node_ids()), "train")

    def aggregate_train(self, server_round, replies):
        valid, errors = self._check_and_log_replies(replies, is_train=True)
        assert not errors
        contents = [reply.content for reply in valid]
        arrays, _ = MergesByItself.aggregate_train(self, server_round, valid)
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)


HABITS = [
    Looks, LeavesSmallOnesOut, Scales, ReplacesAll, Copies, WeighsAlike, MovesHalfTheWay,
    KeepsTheOldModelOnce, MergesByItself,
    MergesWithTheStrategysFunctions, AsksThree, TellsEachItsOwn, MakesPlainMessages,
    MakesPlainMessagesForSupers, ChangesTheMergedRecord, UsesThePiecesOfFedAvg,
]  # fmt: skip


def with_extra(mods):
    """The toy app; what its config calls "extra" is added to the bias."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(msg, context):
        partition = int(context.node_config["partition-id"])
        config = msg.content["config"]
        tuned = {}
        for name, array in numpy_of(msg.content["arrays"]).items():
            if array.dtype.kind == "f":
                array = array + toy_delta(name, array.shape, partition, int(config["server-round"]))
            if name == "encoder.bias":
                array = array + np.float32(config.get("extra", 0.0))
            tuned[name] = np.asarray(array)
        metrics = MetricRecord({"num-examples": 10 * (partition + 1), "loss": 1 / (partition + 1)})
        own = ConfigRecord({"device": "cpu"})
        content = {"arrays": record_of(tuned), "metrics": metrics, "info": own}
        return Message(RecordDict(content), reply_to=msg)

    @app.evaluate()
    def evaluate(msg, context):
        content = {
            "metrics": MetricRecord({"num-examples": 5, "accuracy": 0.75}),
            "info": ConfigRecord({"device": "cpu"}),
        }
        return Message(RecordDict(content), reply_to=msg)

    return app


def assert_equal(flowers, ours):
    expected, found = numpy_of(flowers.arrays), numpy_of(ours.arrays)
    assert list(found) == list(expected)
    for name in FLOATS:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=3e-6, err_msg=name)
    assert set(ours.train_metrics_clientapp) == set(flowers.train_metrics_clientapp)
    for number, metrics in flowers.train_metrics_clientapp.items():
        assert dict(ours.train_metrics_clientapp[number]) == pytest.approx(dict(metrics))
