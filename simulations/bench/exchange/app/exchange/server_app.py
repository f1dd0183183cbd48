"""The server: Flower's FedAvg as it is."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    shapes = json.loads(Path(str(config["shapes"])).read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)  # equal contents would travel once
    initial = ArrayRecord(
        {name: Array(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    )
    count = int(config["min-clients"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    strategy.start(grid, initial, num_rounds=int(config["num-rounds"]))
