"""The server: the rule over the groups' means; it leaves the model and what it measured."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.flower.transport import to_numpy, to_record
from dare_agg.secure.roster import read_roster
from dare_agg.secure.settings import SecureSettings
from groups.learning import base

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output = Path(str(config["output"]))
    output.mkdir(parents=True, exist_ok=True)
    rounds = []
    strategy = SecureStrategy(
        secure=SecureSettings(
            "mean", drop_rate=str(config["drop-rate"]), clip=0.1, groups=int(config["groups"])
        ),
        roster=read_roster(Path(str(config["roster"]))),
        run_config=config,
        robust="median",
        byzantine=int(config["byzantine"]),
        stage_seconds=float(config["stage-seconds"]),
        fraction_evaluate=0.0,
        seed=5,
        round_hook=lambda outcome: rounds.append(outcome.measurements),
    )
    initial = to_record({"body": base()})
    result = strategy.start(grid, initial, num_rounds=int(config["num-rounds"]))
    np.save(output / "body.npy", to_numpy(result.arrays)["body"])
    (output / "report.json").write_text(json.dumps(rounds, default=str))
