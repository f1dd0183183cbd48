"""Makes a job of shapes and runs it; runs in NVFlare's environment.

``python job.py WAY CLIENTS ROUNDS --simulator FOLDER`` or ``--kit FOLDER`` (an administrator's
start-up kit of a provisioned federation). WAY is "fedavg" (NVFlare's recipe), "stream" (with its
tensor streaming) or a drop rate of DARE.
"""

import argparse
import os
import sys

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import ProdEnv, SimEnv

HERE = os.path.dirname(os.path.abspath(__file__))


def recipe_of(way: str, clients: int, rounds: int):
    """The recipe of a way to exchange the model."""
    words = {
        "name": "reach",
        "min_clients": clients,
        "num_rounds": rounds,
        # Named, not made: this process holds no model while the job runs.
        "model": {"class_path": "simulations.bench.nvflare.model.Shapes", "args": {}},
        "train_script": os.path.join(HERE, "train.py"),
    }
    if way not in ("fedavg", "stream"):
        from dare_agg.nvflare import DareRecipe

        return DareRecipe(**words, drop_rate=float(way), values="b1", downlink="auto")
    recipe = FedAvgRecipe(**words, server_expected_format=ExchangeFormat.PYTORCH)
    if way == "stream":
        recipe.enable_tensor_streaming(
            tensor_send_timeout=300.0, wait_send_task_data_all_clients_timeout=900.0
        )
    return recipe


def main() -> None:
    """Run the job to its end; the status is 1 where it did not complete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way")
    parser.add_argument("clients", type=int)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--threads", type=int, help="clients at a time in the simulator")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--simulator")
    where.add_argument("--kit")
    options = parser.parse_args()
    recipe = recipe_of(options.way, options.clients, options.rounds)
    if options.simulator:
        where = {"num_clients": options.clients, "num_threads": options.threads}
        recipe.execute(SimEnv(**where, workspace_root=options.simulator))
        return
    run = recipe.execute(
        ProdEnv(startup_kit_location=options.kit, login_timeout=30.0, username="admin@reach.org")
    )
    run.get_result()
    status = run.get_status()
    print("status:", status)
    sys.exit(status != "FINISHED:COMPLETED")


if __name__ == "__main__":
    main()
