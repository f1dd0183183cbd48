"""Run by mergekit's Python: jobs as lines of JSON on stdin, a word on each as JSON on stdout.

A job is ``{"config": mergekit's file as values, "folder": where names count from, "out": …,
"seed": …, "loras": where merged adapters are kept}``.
"""

import json
import logging
import os
import sys

import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def make_sorts_stable() -> None:
    """Which of equal magnitudes stay is left open by torch's sorts; a stable one decides it."""
    argsort, sort = torch.argsort, torch.sort

    def topk(values, k, largest=True):
        found = sort(values, descending=largest, stable=True)
        return found.values[:k], found.indices[:k]

    torch.argsort = lambda *a, **k: argsort(*a, **{**k, "stable": True})
    torch.sort = lambda *a, **k: sort(*a, **{**k, "stable": True})
    torch.topk = topk


def merge(job: dict) -> str:
    """Do a job; says "ok" or what mergekit said."""
    os.chdir(job["folder"])
    # It is kept by name, and the same names lie in several folders.
    LoaderCache().loaders.clear()
    try:
        run_merge(
            MergeConfiguration.model_validate(job["config"]),
            job["out"],
            MergeOptions(
                random_seed=job["seed"],
                copy_tokenizer=False,
                write_model_card=False,
                quiet=True,
                lora_merge_cache=job["loras"],
                lora_merge_dtype="float32",
            ),
        )
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "ok"


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    make_sorts_stable()
    # What libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(merge(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
