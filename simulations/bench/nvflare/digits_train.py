"""A training script as a user of NVFlare has it: the same for FedAvg and for DARE."""

import sys

import nvflare.client as flare
import torch

from simulations.bench.nvflare.digits import Net, rows_of

STEPS, BATCH = 20, 32


def main() -> None:
    """Train on this site's digits each round."""
    seed, clients = (int(word) for word in sys.argv[1:])
    flare.init()
    number = int(flare.system_info()["site_name"].removeprefix("site-")) - 1
    pixels, labels = rows_of(seed, number, clients)
    net = Net()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        net.load_state_dict(model.params)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(seed * 1000 + model.current_round * 50 + number)
        for _ in range(STEPS):
            chosen = torch.randint(len(labels), (BATCH,), generator=generator)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(pixels[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
        state = {name: value.detach().clone() for name, value in net.state_dict().items()}
        flare.send(flare.FLModel(params=state, meta={"NUM_STEPS_CURRENT_ROUND": len(labels)}))


if __name__ == "__main__":
    main()
