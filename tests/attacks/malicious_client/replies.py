"""What a client may put in place of its reply's parts, by name; each is one attempt.

Run as a program it measures them: ``python replies.py NAME…`` trains a round in which client 0
fails honestly, then one for each attempt, over Flower's real client, and prints what came of each
as JSON. A process of its own has a peak of memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "flower"))
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from made_superlink import Reply, SuperLink, Zeros
from toy import toy_app, toy_arrays

from dare_agg.flower import DareStrategy
from dare_agg.flower.records import REPLY_KEY, UPDATE_KEY
from simulations.runs.memory_grid import pretend_task

GARBAGE = b"ConfigRecord  12\0" + b"\xff" * 12
DIGEST = "ab" * 32
CLIENTS = 4


def part(kind: str, children: list[str], body: bytes) -> bytes:
    """A part as Flower writes one: what it is, what it is made of, its length, its body."""
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def named(content: bytes) -> str:
    """A part's name."""
    return hashlib.sha256(content).hexdigest()


def flat(reply: Reply, parts: Mapping[str, bytes | Zeros | None], root: str = "") -> Reply:
    """A reply announced as these parts side by side; the last is the root unless one is named."""
    root = root or list(parts)[-1]
    reply.message.metadata.message_id = root
    rest = [ObjectTree(object_id=digest) for digest in parts if digest != root]
    return Reply(reply.message, ObjectTree(object_id=root, children=rest), dict(parts))


def message_of(reply: Reply, record_dict: str) -> bytes:
    """The part of a message whose content is that part."""
    bare = type(reply.message)()
    bare.metadata.CopyFrom(reply.message.metadata)
    bare.metadata.message_id = ""
    return part("Message", [record_dict], bare.SerializeToString())


def holding(reply: Reply, record: bytes, more: list[bytes] | None = None) -> Reply:
    """A message with one record that is this part, and the parts it is made of."""
    refs = part("RecordDict", [named(record)], json.dumps({"x": named(record)}).encode())
    parts = [*(more or []), record, refs, message_of(reply, named(refs))]
    return flat(reply, {named(content): content for content in parts})


def one_part_of_garbage(reply: Reply) -> Reply:
    """Twelve bytes that are no record: what Flower makes of them raises."""
    return flat(reply, {named(GARBAGE): GARBAGE})


def a_record_of_garbage(reply: Reply) -> Reply:
    """The same, as a record of a message that is one."""
    return holding(reply, GARBAGE)


def another_kind_of_root(reply: Reply) -> Reply:
    """A record where a message is due."""
    record = part("ConfigRecord", [], b"")
    return flat(reply, {named(record): record})


def an_array_for_content(reply: Reply) -> Reply:
    """A message whose content is an array."""
    body = b'{"dtype": "f4", "shape": [], "stype": "", "arraychunk_ids": []}'
    array = part("Array", [], body)
    message = message_of(reply, named(array))
    return flat(reply, {named(array): array, named(message): message})


def a_part_that_was_not_announced(reply: Reply) -> Reply:
    """A message made of a part that is not among those announced."""
    message = message_of(reply, DIGEST)
    return flat(reply, {named(message): message})


def records_within_records(reply: Reply) -> Reply:
    """A chain of 990 records, each the only part of the next: recursion."""
    parts, below = {}, ""
    for _ in range(990):
        record = part("RecordDict", [below] if below else [], json.dumps({"x": below}).encode())
        below = named(record)
        parts[below] = record
    message = message_of(reply, below)
    return flat(reply, {**parts, named(message): message})


def brackets_within_brackets(reply: Reply) -> Reply:
    """An array described by 200,000 opening brackets."""
    return holding(reply, part("ArrayRecord", [], b"[" * 200_000))


def a_tree_of_sixty_levels(reply: Reply) -> Reply:
    """Announced parts within parts within parts."""
    tree = ObjectTree(object_id=DIGEST)
    for _ in range(60):
        tree = ObjectTree(object_id=DIGEST, children=[tree])
    return Reply(reply.message, tree, {DIGEST: GARBAGE})


def a_part_that_is_gone(reply: Reply) -> Reply:
    """A message whose last part is never to come."""
    digest = next(iter(reply.parts))
    return Reply(reply.message, reply.tree, {**reply.parts, digest: None})


def thirty_thousand_parts(reply: Reply) -> Reply:
    """So many parts that naming them takes megabytes."""
    parts = {f"{number:064x}": GARBAGE for number in range(30_000)}
    return flat(reply, parts)


def a_thousand_and_five_parts(reply: Reply) -> Reply:
    """A few more parts than there may be."""
    parts = {f"{number:064x}": GARBAGE for number in range(1005)}
    return flat(reply, parts)


def a_part_of_200_megabytes(reply: Reply) -> Reply:
    """One chunk of an array, larger than everything that was asked for."""
    chunk = Zeros(b"ArrayChunk  200000000\0", 200_000_000)
    return flat(reply, {DIGEST: chunk})


def one_chunk_a_hundred_thousand_times(reply: Reply) -> Reply:
    """A small chunk that an array names over and over: 10 GB once it is made."""
    chunk = part("ArrayChunk", [], bytes(100_000))
    words = {"dtype": "uint8", "shape": [10**10], "stype": "dare.payload.v1"}
    body = json.dumps({**words, "arraychunk_ids": [0] * 100_000}).encode()
    array = part("Array", [named(chunk)], body)
    record = part("ArrayRecord", [named(array)], json.dumps({"0": named(array)}).encode())
    return holding(reply, record, [chunk, array])


def an_error_of_four_megabytes(reply: Reply) -> Reply:
    """An app's failure whose text is a novel."""
    reply.message.ClearField("content")
    reply.message.error.code = 2
    reply.message.error.reason = "x" * 4_000_000
    return reply


def a_message_full_of_content(reply: Reply) -> Reply:
    """Four megabytes in the announcement itself, where no content is due."""
    item = reply.message.content.items.add()
    item.key = "x"
    item.config_record.items.add(key="x").value.string = "x" * 4_000_000
    return reply


def edited(edit: Callable[[RecordDict], Any]) -> Callable[[Reply], Reply]:
    """An attempt by Flower's own serialiser: other records, made before anything is measured."""
    content = RecordDict()
    content[REPLY_KEY] = ConfigRecord({"codec": 1, "package": ""})
    content["metrics"] = MetricRecord({"num-examples": 10})
    edit(content)
    with no_object_id_recompute():
        parts = {key: one.deflate() for key, one in get_all_nested_objects(content).items()}
    root = list(parts)[-1]

    def attempt(reply: Reply) -> Reply:
        message = message_of(reply, root)
        return flat(reply, {**parts, named(message): message})

    return attempt


def payload(nbytes: int) -> ArrayRecord:
    """One array of so many zeros, as a payload's piece."""
    data = bytes(nbytes)
    return ArrayRecord({"0": Array("uint8", (nbytes,), "dare.payload.v1", data)})


def set_metrics(content: RecordDict, metrics: dict[str, Any]) -> None:
    content["metrics"] = MetricRecord({"num-examples": 10, **metrics})


EDITS: dict[str, Callable[[RecordDict], Any]] = {
    "an update of 200 MB": lambda content: content.__setitem__(UPDATE_KEY, payload(200_000_000)),
    "a record of 200 MB": lambda content: content.__setitem__("junk", payload(200_000_000)),
    "100,000 metrics": lambda content: set_metrics(
        content, {f"k{number}": 1.0 for number in range(100_000)}
    ),
    "a metric of 1,000,000 numbers": lambda content: set_metrics(content, {"x": [1.0] * 1_000_000}),
    "a key of 2 MB": lambda content: set_metrics(content, {"k" * 2_000_000: 1.0}),
    "a receipt of 50 MB": lambda content: content[REPLY_KEY].__setitem__("have", "a" * 50_000_000),
    "a refusal of 50 MB": lambda content: content[REPLY_KEY].update(
        {"refused": "busy", "detail": "x" * 50_000_000}
    ),
    "10,000 records": lambda content: [
        content.__setitem__(f"c{number}", ConfigRecord({"a": 1})) for number in range(10_000)
    ],
    "20,000 arrays": lambda content: content.__setitem__(
        "junk",
        ArrayRecord({str(number): Array("uint8", (0,), "", b"") for number in range(20_000)}),
    ),
    "1,000,000 texts": lambda content: content[REPLY_KEY].__setitem__("x", [""] * 1_000_000),
}
UNREADABLE = [
    one_part_of_garbage,
    a_record_of_garbage,
    another_kind_of_root,
    an_array_for_content,
    a_part_that_was_not_announced,
    records_within_records,
    brackets_within_brackets,
]
TOO_LARGE = [
    a_tree_of_sixty_levels,
    thirty_thousand_parts,
    a_thousand_and_five_parts,
    a_part_of_200_megabytes,
    one_chunk_a_hundred_thousand_times,
    an_error_of_four_megabytes,
    a_message_full_of_content,
]
BY_PARTS = {one.__name__: one for one in (*UNREADABLE, *TOO_LARGE, a_part_that_is_gone)}


def raises(reply: Reply) -> Reply:
    """A client that fails in Flower's own way."""
    reply.message.ClearField("content")
    reply.message.error.code = 2
    return reply


def in_anothers_name(reply: Reply) -> Reply:
    """The honest reply, signed as another node in the part that only the ServerApp opens."""
    old = reply.tree.object_id
    announced = reply.message.metadata.message_id
    honest = reply.message.metadata.src_node_id
    reply.message.metadata.src_node_id = 4242
    forged = message_of(reply, reply.tree.children[0].object_id)
    reply.message.metadata.src_node_id = honest
    parts = {digest: one for digest, one in reply.parts.items() if digest not in (old, announced)}
    return flat(reply, {**parts, named(forged): forged})


def never_ends(reply: Reply) -> Reply:
    """Announced, and never uploaded."""
    return Reply(reply.message, reply.tree, dict.fromkeys(reply.parts, b""))


def run(
    link: SuperLink,
    attempt: Callable[[Reply], Reply],
    asked: str,
    attackers: Iterable[int] = (0,),
    **words: Any,
) -> DareStrategy:
    """A round in which some clients attempt something when they are asked that."""
    link.attack = lambda client, ask, reply: (
        attempt(reply) if client in attackers and ask == asked else reply
    )
    arrays = ArrayRecord({name: Array(array) for name, array in toy_arrays().items()})
    strategy = DareStrategy(seed=1, **{"min_available_nodes": link.clients, **words})
    with link.serve() as grid:
        strategy.start(grid, arrays, num_rounds=1)
    return strategy


def measure(attempt: Callable[[Reply], Reply]) -> dict[str, Any]:
    """What comes of an attempt in place of an update, and what it takes."""
    link = SuperLink(toy_app(), CLIENTS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before, cpu = memory("VmRSS"), time.process_time()
    outcome = run(link, attempt, "train", fraction_evaluate=0.0).outcome
    found = hashlib.sha256()
    for name, array in outcome.arrays.items():
        found.update(name.encode() + array.data)
    rejected = outcome.measurements["rejected"]
    return {
        "model": found.hexdigest(),
        "accepted": outcome.measurements["accepted"],
        "rejected": [(row["client"], row["reason"], row["detail"]) for row in rejected],
        "seconds": time.process_time() - cpu,
        "bytes": memory("VmHWM") - before,
        "sent": link.sent_bytes,
        "confirmed": len(link.confirmed),
    }


def memory(word: str) -> int:
    """This process's memory in bytes, now or at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    pretend_task()
    found = {"": measure(raises)}
    for name in sys.argv[1:]:
        found[name] = measure(BY_PARTS.get(name) or edited(EDITS[name]))
    print(json.dumps(found))
