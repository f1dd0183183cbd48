"""NVFlare's side of the exchange; runs in NVFlare's environment, not in this project's.

``python nvflare_job.py WAY CLIENTS ROUNDS WORKSPACE`` runs its FedAvg recipe in its simulator,
which gives the server and each client a process; the variable ``EXCHANGE_SHAPES`` names a JSON
file of names and shapes. WAY is "plain", "stream" (its tensor streaming), or "disk" (the server
keeps what arrives in files).
"""

import json
import os
import sys

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv


class Shapes(torch.nn.Module):
    """A model of the parameters that ``EXCHANGE_SHAPES`` names; computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        with open(os.environ["EXCHANGE_SHAPES"], encoding="utf-8") as opened:
            shapes = json.load(opened)
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.full(shape, 0.01))
            self.register_parameter(name.replace(".", "_"), parameter)


def main() -> None:
    way, clients, rounds, workspace = sys.argv[1:]
    recipe = FedAvgRecipe(
        name="exchange",
        min_clients=int(clients),
        num_rounds=int(rounds),
        model=Shapes(),
        server_expected_format=ExchangeFormat.PYTORCH,
        train_script=os.path.join(os.path.dirname(os.path.abspath(__file__)), "nvflare_client.py"),
        enable_tensor_disk_offload=way == "disk",
    )
    if way == "stream":
        recipe.enable_tensor_streaming(
            tensor_send_timeout=300.0, wait_send_task_data_all_clients_timeout=900.0
        )
    recipe.execute(SimEnv(num_clients=int(clients), workspace_root=workspace))


if __name__ == "__main__":
    main()
