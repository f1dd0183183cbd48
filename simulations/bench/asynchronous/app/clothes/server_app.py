"""The server: rounds or a buffer; notes accuracy and bytes with the time after every merge."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dare_agg.deploy.identities import read_identities
from dare_agg.downlink.ways import make_downlink
from dare_agg.flower import DareStrategy
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.transport import to_record
from dare_agg.rounds.buffer import BufferSettings
from dare_agg.rounds.state import StateFolder
from simulations.runs.rows import append_row
from simulations.runs.small_classifier import accuracy, rows_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output, count = Path(str(config["output"])), int(config["min-clients"])
    buffer, seed = int(config["buffer"]), int(config["seed"])
    staleness = str(config["staleness"])
    kept, test = StateFolder(output / "state"), rows_of("t10k")

    def after(outcome):
        measured = outcome.measurements
        arrays = outcome.model.arrays()
        append_row(
            output / "curve.jsonl",
            {
                "time": time.time(),
                "merge": outcome.round,
                "accepted": measured["accepted"],
                "rejected": [reply["reason"] for reply in measured["rejected"]],
                "upload_bytes": measured["upload_bytes"],
                "download_bytes": measured["download_bytes"],
                "accuracy": round(
                    accuracy({n: np.asarray(a, np.float32) for n, a in arrays.items()}, test), 4
                ),
            },
        )
        save(strategy, kept, outcome)

    strategy = DareStrategy(
        min_available_nodes=count,
        min_train_nodes=count,
        fraction_evaluate=0.0,
        seed=seed,
        drop_rate=str(config["drop-rate"]),
        values=str(config["values"]),
        server_step=str(config["server-step"]),
        deadline=3600.0,
        identities=read_identities(config["identities"]) if config["identities"] else None,
        downlink=make_downlink("auto"),
        round_hook=after,
        buffer=BufferSettings(buffer, staleness, record=output / "buffer") if buffer else 0,
    )
    initial = to_record(dict(np.load(Path(str(config["rows"])) / "base.npz")))
    resumed = resume(strategy, kept)
    if resumed is None:
        keep_base(kept, initial)
    from_merge = resumed.round if resumed else 0
    append_row(output / "curve.jsonl", {"time": time.time(), "from": from_merge})
    strategy.start(
        grid,
        resumed.arrays if resumed else initial,
        num_rounds=int(config["num-rounds"]),
        start_round=resumed.round + 1 if resumed else 1,
        step_state=resumed.step_state if resumed else None,
    )
    (output / "report.json").write_text(json.dumps({"fingerprint": strategy.fingerprint()}))
