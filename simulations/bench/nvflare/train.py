"""The training script of the jobs of shapes: a made-up change of every value, in place.

It stands for training and takes next to no memory, so that what is measured is the exchange.
Plain Client API of NVFlare: the same for FedAvg and for DARE. Every model that comes is noted in
the file that ``REACH_LOG`` names, and training begins when who measures says so by a file.
"""

import json
import os
import time
import zlib

import numpy as np
import nvflare.client as flare

TILE = 1 << 20


def main() -> None:
    """Answer every round."""
    flare.init()
    site = flare.system_info()["site_name"]
    noise = np.random.default_rng(zlib.crc32(site.encode())).standard_normal(TILE, np.float32)
    noise *= np.float32(2e-4)
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        with open(os.environ["REACH_LOG"], "a", encoding="utf-8") as log:
            line = {"client": site, "round": model.current_round, "time": time.time()}
            log.write(json.dumps(line) + "\n")
        while not os.path.exists(f"{os.environ['REACH_LOG']}.{site}.{model.current_round}"):
            time.sleep(0.05)
        for value in model.params.values():
            flat = np.asarray(value).reshape(-1)
            for start in range(0, flat.size, TILE):
                part = flat[start : start + TILE]
                part += noise[: part.size]
        flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


main()
