"""``python -m simulations.bench.fine_tuning.loss MODEL ROWS`` prints a model's loss a token."""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    rows = torch.from_numpy(np.load(sys.argv[2]))
    total = count = 0.0
    with torch.no_grad():
        for ids in rows.split(8):
            labels = ids.masked_fill(ids == 0, -100)
            tokens = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * tokens
            count += tokens
    print(total / count)


if __name__ == "__main__":
    main()
