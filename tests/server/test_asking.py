"""Questions to nodes before the first round."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.errors import RunError
from server.asking import ask
from simulations.runs.memory_grid import MemoryGrid, pretend_task, stamp


@pytest.fixture
def app() -> ClientApp:
    pretend_task()
    app = ClientApp()

    @app.query("describe")
    def describe(msg: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return Message(RecordDict({"it": ConfigRecord({"number": number})}), reply_to=msg)

    return app


def failing(code: int, times: int):
    """A tamper that answers for node 1 with Flower's error, so often."""
    left = [times]

    def tamper(partition: int, reply: Message) -> Message:
        if partition != 1 or left[0] == 0:
            return reply
        left[0] -= 1
        asked = Message(RecordDict(), reply.metadata.src_node_id, "query.describe")
        stamp(asked, message_id=reply.metadata.reply_to_message_id)
        return Message(Error(code=code, reason="gone"), reply_to=asked)

    return tamper


def test_a_node_that_was_lost_is_asked_again(app: ClientApp) -> None:
    grid = MemoryGrid(app, 3, tamper=failing(code=5, times=2), shuffle=3)
    contents = ask(grid, list(grid.partitions), "describe", ConfigRecord(), 30)
    assert [content["it"]["number"] for content in contents] == [0, 1, 2]


def test_an_app_that_fails_is_named_at_once(app: ClientApp) -> None:
    grid = MemoryGrid(app, 3, tamper=failing(code=2, times=1))
    with pytest.raises(RunError, match="could not describe its data: gone"):
        ask(grid, list(grid.partitions), "describe", ConfigRecord(), 30)


def test_a_node_that_stays_away_is_named_in_time(app: ClientApp) -> None:
    grid = MemoryGrid(app, 2)
    grid.offline = {list(grid.partitions)[1]}
    with pytest.raises(RunError, match="did not describe its data within 1 s"):
        ask(grid, list(grid.partitions), "describe", ConfigRecord(), 1)
