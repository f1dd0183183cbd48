"""A Flower app as a job of NVFlare: Flower's HTTP travels in NVFlare's messages.

NVFlare's own integration relays gRPC, which Flower no longer speaks. This stands on NVFlare's
base classes for third-party integration (``nvflare.app_common.tie``) and patches nothing.
"""

from dare_agg.nvflare.relay.client import FlowerRelayExecutor
from dare_agg.nvflare.relay.job import flower_job
from dare_agg.nvflare.relay.server import FlowerRelayController

__all__ = ["FlowerRelayController", "FlowerRelayExecutor", "flower_job"]
