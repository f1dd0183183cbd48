"""One job on digits in NVFlare's simulator; runs in NVFlare's environment and prints the accuracy.

``python -m simulations.bench.nvflare.digits_job WAY SEED CLIENTS ROUNDS FOLDER``; WAY is "fedavg",
or a drop rate of DARE ("auto" too).
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv

from simulations.bench.nvflare.digits import Net, rows_of


def main() -> None:
    """Run it and measure the model that it leaves."""
    way, seed, clients, rounds, folder = sys.argv[1:]
    words = {
        "name": "digits",
        "model": Net(int(seed)),
        "min_clients": int(clients),
        "num_rounds": int(rounds),
        "train_script": str(Path(__file__).with_name("digits_train.py")),
        "train_args": f"{seed} {clients}",
    }
    if way == "fedavg":
        from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

        recipe = FedAvgRecipe(**words, server_expected_format=ExchangeFormat.PYTORCH)
    else:
        from dare_agg.nvflare import DareRecipe

        drop_rate = way if way == "auto" else float(way)
        recipe = DareRecipe(**words, drop_rate=drop_rate, seed=int(seed))
    recipe.execute(SimEnv(num_clients=int(clients), workspace_root=folder))
    run = Path(folder) / "digits" / "server" / "simulate_job"
    saved = torch.load(run / "app_server" / "FL_global_model.pt", weights_only=True)
    net = Net()
    net.load_state_dict(saved["model"])
    pixels, labels = rows_of(int(seed), None, int(clients))
    with torch.no_grad():
        right = (net(pixels).argmax(1) == labels).double().mean().item()
    row = {"way": way, "seed": int(seed), "accuracy": round(100 * right, 2)}
    rounds_file = run / "dare_rounds.jsonl"
    if rounds_file.exists():
        lines = rounds_file.read_text(encoding="utf-8").splitlines()
        sizes = [json.loads(line)["update_bytes"] for line in lines]
        row["update_bytes"] = round(statistics.mean(map(statistics.mean, sizes)))
    print("result:", json.dumps(row))


if __name__ == "__main__":
    main()
