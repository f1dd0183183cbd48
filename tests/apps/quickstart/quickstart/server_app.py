"""The server: FedAvg over the clients, a test after each round."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import Net, load_test_data
from quickstart.task import test as test_fn

app = ServerApp()


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test_fn(model, load_test_data())
    return MetricRecord({"loss": loss, "accuracy": accuracy})


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    torch.manual_seed(0)
    arrays = ArrayRecord(Net().state_dict())
    strategy = FedAvg(fraction_train=config["fraction-train"])
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": config["lr"]}),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
    if config["output"]:
        report = {
            "accuracy": [
                result.evaluate_metrics_serverapp[number]["accuracy"]
                for number in sorted(result.evaluate_metrics_serverapp)
            ],
            "checksum": sum(
                float(tensor.double().abs().sum())
                for tensor in result.arrays.to_torch_state_dict().values()
            ),
        }
        Path(config["output"]).write_text(json.dumps(report))
