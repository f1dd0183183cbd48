"""A model of given shapes that computes nothing; runs in NVFlare's environment."""

import json
import os

import torch


class Shapes(torch.nn.Module):
    """The parameters that the JSON file named by ``REACH_SHAPES`` lists, normal(0, .02)."""

    def __init__(self) -> None:
        super().__init__()
        with open(os.environ["REACH_SHAPES"], encoding="utf-8") as opened:
            shapes = json.load(opened)
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            values = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(values))
