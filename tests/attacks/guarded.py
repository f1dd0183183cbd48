"""Real parties with keys and files of their own, and a server that writes every message.

Each party is a node with a ``secure-identity``: what a SuperNode runs, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ProtocolError
from dare_agg.flower import dare_mod
from dare_agg.flower.records import ORDER_KEY
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.records import (
    QUERY,
    SECURE_KEY,
    Step,
    Train,
    answer_record,
    content_of,
    names_of,
    read_message,
)
from dare_agg.flower.secure.training import training_of
from dare_agg.flower.transport import to_record
from dare_agg.rounds.messages import Order
from dare_agg.secure import identity as identities
from dare_agg.secure.identity import new_identity, write_identity, write_public
from dare_agg.secure.party import REQUESTS
from dare_agg.secure.roster import make_roster, sign_roster, write_roster
from dare_agg.secure.server import SecureServer
from dare_agg.secure.terms import SecureTerms, secure_terms
from dare_agg.vectors.model import Arrays, global_model
from simulations.runs.memory_grid import over_the_wire, stamp

PASSPHRASE = "a passphrase"
SECRET = "patient 4711, diagnosis Z99"


def learner(**own: Callable[[], object]) -> ClientApp:
    """An app whose training moves each tensor by ``lr`` times numbers of the node's own; its own
    queries give away all the node has."""
    app = ClientApp(mods=[secure_mod, dare_mod])
    secure_queries(app)

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        if "fails" in own:
            own["fails"]()
        rate = np.float32(msg.content["config"].get("lr", context.run_config.get("lr", 0.01)))  # type: ignore[union-attr,arg-type]
        generator = np.random.default_rng(context.node_id)
        tuned = {}
        for name, array in msg.content["arrays"].items():  # type: ignore[union-attr]
            values = array.numpy()
            if values.dtype.kind == "f":
                # What flows back through a head of zeros is nothing.
                gate = 1.0
                if not name.startswith("head") and "head.w" in msg.content["arrays"]:
                    gate = float(np.abs(msg.content["arrays"]["head.w"].numpy()).mean())  # type: ignore[union-attr]
                values = values - np.float32(rate * gate) * generator.normal(
                    size=values.shape
                ).astype(np.float32)
            tuned[name] = Array(values)
        metrics = MetricRecord({"num-examples": 40, "loss": 0.123})
        return Message(RecordDict({"arrays": ArrayRecord(tuned), "metrics": metrics}), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        record = MetricRecord({"num-examples": 3, "accuracy": 0.5, f"rows:{SECRET}": 3})
        more = ConfigRecord({"notes": SECRET})
        return Message(RecordDict({"metrics": record, "more": more}), reply_to=msg)

    @app.train("other")
    @app.evaluate("other")
    @app.query("describe")
    def describe(msg: Message, context: Context) -> Message:
        return Message(RecordDict({"found": ConfigRecord({"notes": SECRET})}), reply_to=msg)

    @app.query("initial")
    def initial(msg: Message, context: Context) -> Message:
        raise ValueError(SECRET)

    return app


class Parties:
    """``n`` guarded nodes in ``folder``; ``node(i)`` adds to a node's config."""

    def __init__(
        self,
        folder: Path,
        app: ClientApp,
        n: int = 4,
        node: Callable[[int], Mapping[str, Any]] = lambda number: {},
    ) -> None:
        self.app = app
        own = [new_identity(f"party {number}") for number in range(n)]
        coordinator = new_identity("coordinator")
        write_public(folder / "coordinator.pub", "coordinator", coordinator.public)
        self.roster = sign_roster(
            make_roster("hospitals", [(one.name, one.public) for one in own]), coordinator
        )
        write_roster(folder / "roster.json", self.roster)
        (folder / "passphrase").write_text(PASSPHRASE)
        (folder / "passphrase").chmod(0o600)
        self.nodes: dict[int, dict[str, Any]] = {}
        self.states: dict[int, RecordDict] = {}
        for number, one in enumerate(own):
            write_identity(folder / f"{number}.key", one, PASSPHRASE)
            party = self.roster.id_of(one.public)
            self.states[party] = RecordDict()
            self.nodes[party] = {
                "secure-identity": str(folder / f"{number}.key"),
                "secure-roster": str(folder / "roster.json"),
                "secure-trust": str(folder / "coordinator.pub"),
                "secure-passphrase-file": str(folder / "passphrase"),
                "secure-state": str(folder / "state"),
                **node(number),
            }
        self.replies: list[Message] = []

    @property
    def ids(self) -> list[int]:
        return sorted(self.nodes)

    passphrase = PASSPHRASE

    def path_of(self, party: int) -> Path:
        """Where a party's private key lies."""
        return Path(self.nodes[party]["secure-identity"])

    def send(
        self, party: int, content: RecordDict, kind: str, run: Mapping[str, Any] | None = None
    ) -> Message:
        """What the party's node answers to one message."""
        message = Message(content, party, kind)
        stamp(message, message_id="message", run_id=1)
        context = Context(
            run_id=1,
            node_id=party,
            node_config=self.nodes[party],
            state=self.states[party],
            run_config=dict(run or {}),
        )
        reply = self.app(over_the_wire(message), context)
        self.replies.append(reply)
        return reply

    def terms(self, base: Arrays, *, training: bytes, **words: Any) -> SecureTerms:
        """Terms over all parties for a model, with the digest of what they are to train on."""
        dense, exclude = words.pop("dense", ()), words.pop("exclude", ())
        ref = global_model(base, dense=dense, exclude=exclude).ref
        name, layout = names_of(ref)
        options = {
            "run": "run", "round_number": 1, "cohort": self.ids, "drop_rate": parse_drop_rate("0"),
            "clip": 0.1, "bits": 16, **words,
        }  # fmt: skip
        return secure_terms(
            roster=self.roster.digest, base=name, layout=layout, size=ref.size,
            dense=ref.dense_size, dense_patterns=dense, exclude=exclude, training=training,
            **options,
        )  # fmt: skip

    def round(
        self,
        terms: SecureTerms,
        told: Callable[[int], tuple[Arrays, Mapping[str, Any], Mapping[str, Any]]],
        after: bytes = b"",
    ) -> dict[int, str]:
        """Run the stages; ``told(party)`` is what it gets: arrays, the app's config, run config.

        Returns who refused and why, and leaves the sums in ``self.sums``.
        """
        server, refused = SecureServer(terms, self.roster), {}
        self.sums = None
        for party in terms.cohort:
            arrays, config, run = told(party)
            reply = self.send(party, training_content(terms, arrays, config, after), "train", run)
            try:
                answer_record(reply)
                server.take(read_message(reply.content, 1 << 30))
            except ProtocolError as error:
                refused[party] = error.reason
        if refused:
            return refused
        for stage in REQUESTS:
            for party, request in server.close().items():
                step = content_of(Step(stage=stage, session=terms.session), request)
                reply = self.send(party, step, f"query.{QUERY}")
                answer_record(reply)
                server.take(read_message(reply.content, 1 << 30))
        self.sums = server.finish()
        return refused


def training_content(
    terms: SecureTerms,
    arrays: Arrays,
    config: Mapping[str, Any],
    after: bytes = b"",
    **more: Any,
) -> RecordDict:
    """A training message as `SecureStrategy` makes it."""
    ref = global_model(arrays, dense=terms.dense_patterns, exclude=terms.exclude).ref
    order = Order(
        ask="train", version=ref.version, downlink="full", arrays_key="arrays",
        dense=terms.dense_patterns, exclude=terms.exclude,
    )  # fmt: skip
    return RecordDict(
        {
            "config": ConfigRecord(dict(config)),
            "arrays": to_record(dict(arrays)),
            ORDER_KEY: ConfigRecord(order.to_record()),
            SECURE_KEY: ConfigRecord(Train(terms=terms.encode(), after=after).to_record()),
            **more,
        }
    )


def digest_of(
    arrays: Arrays, config: Mapping[str, Any], run: Mapping[str, Any], after: bytes = b""
) -> bytes:
    """What an honest server puts into the terms."""
    content = RecordDict({"config": ConfigRecord(dict(config))})
    return training_of(content, {"arrays": arrays}, run, weighted_by_key="", after=after)


def base_arrays(head: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    arrays = {"body.w": generator.normal(size=(30, 20)).astype(np.float32)}
    if head:
        arrays["head.w"] = generator.normal(size=(20, 3)).astype(np.float32)
    return arrays


def bytes_of(reply: Message) -> bytes:
    """All that leaves a party in a reply."""
    if reply.has_error():
        return (reply.error.reason or "").encode()
    parts = []
    for key, record in reply.content.items():
        parts.append(key.encode())
        for name, value in record.items():
            parts += [str(name).encode(), value.data if isinstance(value, Array) else b""]
            parts.append(value if isinstance(value, bytes) else str(value).encode())
    return b"".join(parts)


def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passphrase is stretched as always, only not as far."""
    monkeypatch.setattr(identities, "_SCRYPT_N", 1 << 4)


__all__ = [
    "SECRET", "MessageType", "Parties", "base_arrays", "bytes_of", "digest_of", "learner",
    "quick_keys", "training_content",
]  # fmt: skip
