"""The server: DARE over a base on disk; saves the last version as a checkpoint."""

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dare_agg.deploy.identities import read_identities
from dare_agg.flower import DareStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output, count = Path(str(config["output"])), int(config["min-clients"])
    rows = []

    def after(outcome):
        measured = outcome.measurements
        rows.append(
            {
                "accepted": measured["accepted"],
                "upload_bytes": max(measured["upload_bytes"]),
                "download_bytes": max(measured["download_bytes"]),
                "seconds": round(measured["seconds"], 1),
                "train_loss": round(float(outcome.train_metrics["loss"]), 4),
            }
        )

    strategy = DareStrategy(
        min_available_nodes=count,
        min_train_nodes=count,
        fraction_evaluate=0.0,
        drop_rate=str(config["drop-rate"]),
        seed=1,
        deadline=3600.0,
        identities=read_identities(config["identities"]) if config["identities"] else None,
        base=str(config["base"]),
        state=str(output / "state"),
        round_hook=after,
    )
    strategy.start(grid, num_rounds=int(config["num-rounds"]))
    strategy.save_model(output / "model")
    (output / "report.json").write_text(json.dumps({"rounds": rows}))
