"""Examples that stand below each command's help: commands that can be typed, with what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

# The command's words -> (example without "dare-agg", what it does). A test parses each of them.
EXAMPLES: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType(
    {
        "demo": (
            ("demo", "FedAvg beside DARE on a real text encoder, with a report"),
            ("demo --task language --rounds 2", "a language model, for two rounds"),
        ),
        "run": (
            ("run", "MiniLM on Reuters over ten simulated clients"),
            ("run -c drop-rate=0.99 -c methods=fedavg,dare-ties", "two methods side by side"),
            ("run -c data=reviews.csv -c text-column=review -c label-column=stars", "your own CSV"),
            ("run -c model=smollm2 -c data=friends -c train=lora", "adapters of a language model"),
            ("run -c settings.toml -o runs/first", "words from a file, into a folder"),
            ("run --dry-run --clients 20 -c alpha=0.1", "who gets what, bytes and time; no start"),
            ("run --resume runs/first", "go on where a run stopped"),
        ),
        "predict": (
            ("predict runs/first 'A warm, clever film.'", "a text: label and probability"),
            ("predict runs/first reviews.csv --text-column review --json", "a file of texts"),
            ("predict runs/photos photo.jpg", "an image"),
        ),
        "push": (("push runs/first me/reviews --private", "the model with its card"),),
        "diff": (
            ("diff BASE TUNED -o tuned.dare --drop-rate 0.99", "an update of one value in 100"),
        ),
        "inspect": (("inspect tuned.dare", "what an update holds, and its size"),),
        "apply": (("apply BASE tuned.dare -o OUT", "base and update make the tuned model"),),
        "merge": (
            ("merge BASE MODEL_A MODEL_B -o OUT --method ties", "two models into one"),
            ("merge config.yaml -o OUT", "a mergekit file as it is"),
        ),
        "dequantise": (("dequantise model.gguf -o OUT", "a GGUF file as plain numbers"),),
        "methods": (
            ("methods", "all merge methods"),
            ("methods ties", "one, with its options and formula"),
        ),
        "statistics": (
            ("statistics MODEL --data rows.csv -o fisher.safetensors", "a Fisher diagonal"),
        ),
        "diagnose": (("diagnose BASE MODEL_A MODEL_B", "do they fit? which drop rate is safe?"),),
        "watch": (
            ("watch runs/first", "a page on 127.0.0.1 that follows the run"),
            ("watch", "the newest run here"),
        ),
        "report": (("report runs/first", "a page of one run"),),
        "compare": (("compare runs/first runs/second", "two runs side by side, and a page"),),
        "supernode": (
            ("supernode -- --superlink superlink:9092 --node-config 'data-path=\"rows.csv\"'",
             "a client of a deployment on its own data"),
        ),
        "keys": (("keys make north", "an identity for secure merging"),),
        "keys make": (("keys make north", "writes north.key and north.pub"),),
        "keys roster": (
            ("keys roster hospitals north.pub south.pub east.pub", "the parties of a merge"),
        ),
        "keys sign": (
            ("keys sign roster.json --identity coordinator.key", "once fingerprints are compared"),
        ),
        "keys show": (("keys show roster.json --trust coordinator.pub", "who signed a roster"),),
        "keys ledger": (("keys ledger north.ledger", "what this party has put into sums"),),
        "certs": (("certs --host superlink.example.org --node north --node south",
                   "certificates of a deployment of two sites"),),
        "doctor": (("doctor", "is everything here that a run needs?"),),
    }
)  # fmt: skip


def examples_text(command: str) -> str:
    """The lines below a command's help; "" for a command without examples."""
    rows = EXAMPLES.get(command, ())
    if not rows:
        return ""
    lines = [f"  dare-agg {words}\n      {said}" for words, said in rows]
    return "\n".join(["", "", "Examples:", *lines])
