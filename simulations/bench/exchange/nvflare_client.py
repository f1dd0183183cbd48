"""NVFlare's client: sends back what it received, as its own comparison does, and notes when."""

import json
import os
import time

import nvflare.client as flare


def main() -> None:
    flare.init()
    site = flare.system_info()["site_name"]
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        with open(os.environ["EXCHANGE_LOG"], "a", encoding="utf-8") as log:
            line = {"client": site, "round": model.current_round, "time": time.time()}
            log.write(json.dumps(line) + "\n")
        flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


main()
