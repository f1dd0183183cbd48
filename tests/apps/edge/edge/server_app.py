"""The server: DARE with the version downlink, or plain FedAvg; keeps its state, can resume.

With ``base`` the model lies there on disk, and no arrays are made of it.
"""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from dare_agg.codec.budget import UploadBudget
from dare_agg.deploy.identities import read_identities
from dare_agg.downlink.ways import make_downlink
from dare_agg.files.atomic import replace_file
from dare_agg.flower import DareStrategy
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.transport import to_record
from dare_agg.rounds.buffer import BufferSettings
from dare_agg.rounds.state import StateFolder
from edge.base import base_arrays

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output = Path(str(config["output"]))
    base = str(config["base"])
    initial = None if base else to_record(base_arrays(int(config["size"])))
    if config["method"] == "fedavg":
        run_fedavg(grid, initial, config, output)
        return
    kept = StateFolder(output / "state")
    settings = json.dumps({"status": "running", "config": dict(config)})
    replace_file(output / "run.json", (settings.encode(),))
    rows = []
    began = time.monotonic()

    def after(outcome):
        measured = outcome.measurements
        rows.append(
            {
                "round": outcome.round,
                "accepted": measured["accepted"],
                "rejected": [r["reason"] for r in measured["rejected"]],
                "refused": [r["detail"] for r in measured["refused"]],
                "upload_bytes": measured["upload_bytes"],
                "drop_rates": measured["drop_rates"],
                "download_bytes": measured["download_bytes"],
                "seconds": measured["seconds"],
                "clients": measured["clients"],
                "ages": measured.get("buffer", {}).get("staleness", []),
            }
        )
        save(strategy, kept, outcome)

    count = int(config["min-clients"])
    seconds = float(config["upload-seconds"])
    strategy = DareStrategy(
        min_available_nodes=count,
        min_train_nodes=count,
        fraction_evaluate=0.0,
        seed=5,
        drop_rate=str(config["drop-rate"]),
        dense=[r"^head\."],
        deadline=float(config["deadline"]),
        identities=read_identities(config["identities"]) if config["identities"] else None,
        downlink=make_downlink(str(config["downlink"])),
        base=base or None,
        state=output / "state" if base else None,
        verify_every=1 if base else 0,
        upload_budget=UploadBudget(seconds=seconds) if seconds else None,
        buffer=buffered(config, output),
        round_hook=after,
    )
    resumed = resume(strategy, kept)
    if resumed is None:
        keep_base(kept, initial or strategy)
    strategy.start(
        grid,
        resumed.arrays if resumed else initial,
        num_rounds=int(config["num-rounds"]),
        start_round=resumed.round + 1 if resumed else 1,
        step_state=resumed.step_state if resumed else None,
    )
    if base:
        strategy.save_model(output / "model", overwrite=True)
    report = {
        "fingerprint": strategy.fingerprint(),
        "version": strategy.outcome.model.ref.version,
        "resumed_after": resumed.round if resumed else 0,
        "seconds": time.monotonic() - began,
        "rounds": rows,
    }
    replace_file(output / "report.json", (json.dumps(report).encode(),))


def buffered(config: dict, output: Path) -> BufferSettings | int:
    """The run's buffer, 0 for rounds."""
    size = int(config["buffer"])
    words = {"record": output / "buffer", "arrivals": str(config["arrivals"])}
    return BufferSettings(size, **words) if size else 0


def run_fedavg(grid: Grid, initial: ArrayRecord, config: dict, output: Path) -> None:
    count = int(config["min-clients"])
    began = time.monotonic()
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    result = strategy.start(
        grid=grid,
        initial_arrays=initial,
        num_rounds=int(config["num-rounds"]),
        timeout=float(config["deadline"]),
    )
    output.mkdir(parents=True, exist_ok=True)
    report = {
        "seconds": time.monotonic() - began,
        "trained": len(result.train_metrics_clientapp),
    }
    (output / "report.json").write_text(json.dumps(report))
