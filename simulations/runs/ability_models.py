"""Models tuned on one ability each, and one network that measures any of their mixtures.

Deltas of half a gigabyte are kept as files under the cache folder (``DARE_AGG_CACHE``, default
``~/.cache/dare-agg``), named by seed and settings: a run that was cut off goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from client.config import TaskConfig, configure
from client.instructions.generation import exact_match, generate_answers
from client.rows import Rows
from client.tasks import causal_lm
from client.training import FineTuning
from dare_agg.files.atomic import file_draft
from dare_agg.files.cache import cache_folder
from dare_agg.files.trust import own_folder
from dare_agg.vectors.layout import FloatVector, Layout, layout_of
from simulations.runs.ability_data import (
    ability_data,
    ability_tokenizer,
    find_ability,
    training_data,
)

NEW_TOKENS = 12  # of an answer: an equation and the end of the turn
_AT_ONCE = 50  # questions answered together
_GRAM_ROWS = 32  # of training, for RegMean


def ability_config(task: Mapping[str, Any], own: Mapping[str, Any], seed: int) -> TaskConfig:
    """The configuration of one ability: the scenario's task, then what the ability says."""
    usual = {"task": causal_lm.TASK.name, "data": "friends"}
    return configure(**{**usual, **task, **own, "seed": seed})


def delta_path(name: str, task: Mapping[str, Any], own: Mapping[str, Any], seed: int) -> Path:
    """Where a tuned model's delta is kept; what it is measured on does not name it."""
    deciding = {key: value for key, value in {**task, **own}.items() if key != "test_rows"}
    words = json.dumps([name, deciding, seed], sort_keys=True)
    digest = hashlib.sha256(words.encode()).hexdigest()[:12]
    return cache_folder("abilities") / f"{name}-{seed}-{digest}.npy"


def tuned_delta(
    name: str, task: Mapping[str, Any], own: Mapping[str, Any], seed: int
) -> FloatVector:
    """Return a model's delta, mapped from its file; tunes the model where there is none."""
    path = delta_path(name, task, own, seed)
    if not path.is_file():
        config = ability_config(task, own, seed)
        tuning = FineTuning(config, training_data(name, config), find_ability(name)[0])
        start = tuning.initial
        tuned, _, _ = tuning.train(start, np.arange(len(tuning.train_rows)), seed=(seed, 1))
        layout = state_layout(start)
        delta = layout.flatten(tuned)
        delta -= layout.flatten(start)
        own_folder(path.parent, remedy="set DARE_AGG_CACHE to a folder of this user's own")
        with file_draft(path) as file:
            np.save(file, delta)
    return np.load(path, mmap_mode="r")


def state_layout(state: Mapping[str, Any]) -> Layout:
    """The layout of all tensors of a state."""
    return layout_of({name: array.shape for name, array in state.items()})


class Decoder:
    """One language model, of which any parameters are measured on any ability."""

    def __init__(self, task: Mapping[str, Any], seed: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._config = ability_config(task, {}, seed)
        self.network = causal_lm.language_model(self._config, 0)
        self.network.eval()
        self.tokenizer = ability_tokenizer(self._config.model)
        self._named = dict(self.network.named_parameters())
        self.layout = layout_of({n: tuple(p.shape) for n, p in self._named.items()})
        self.start: FloatVector = self.layout.flatten(
            {name: p.detach().numpy() for name, p in self._named.items()}
        )

    def place(self, delta: FloatVector | None) -> None:
        """Put base + delta (None: the base) into the network."""
        import torch

        with torch.no_grad():
            for name, parameter in self._named.items():
                entry = self.layout[name]
                values = self.start[entry.offset : entry.stop]
                if delta is not None:
                    values = values + delta[entry.offset : entry.stop]
                parameter.copy_(torch.from_numpy(values.reshape(entry.shape)))

    def _precision(self) -> Any:
        import torch

        enabled = self._config.precision == "bfloat16"
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def loss(self, name: str, config: TaskConfig, rows: Rows) -> float:
        """Mean loss in nats a token of the rows' targets."""
        import torch

        kind, _ = find_ability(name)
        read = kind.reader(config, rows)
        total, count = 0.0, 0
        with torch.inference_mode(), self._precision():
            for lo in range(0, len(rows), kind.evaluate_rows):
                batch = read(np.arange(lo, min(len(rows), lo + kind.evaluate_rows)))
                scores = kind.scores(self.network, batch).float().flatten(0, -2)
                found, sums = kind.sums(scores, kind.targets(batch, None).flatten())
                total, count = total + sums["loss"], count + found
        return total / count

    def answers(self, rows: Rows) -> list[str]:
        """The greedy answers to the rows' questions, in their order."""
        asked = [row.turns[:-1] for row in rows.inputs]
        return generate_answers(
            self.network, self.tokenizer, asked, most_tokens=NEW_TOKENS, batch=_AT_ONCE
        )

    def exact_match(self, rows: Rows) -> float:
        """The share of questions whose greedy answer is the wanted one."""
        return exact_match(self.answers(rows), [row.answer for row in rows.inputs])


class Measures:
    """What a mixture is scored by: each ability's rows of one split."""

    def __init__(
        self,
        decoder: Decoder,
        task: Mapping[str, Any],
        abilities: Mapping[str, Mapping[str, Any]],
        seed: int,
        splits: Sequence[str],
    ) -> None:
        self._decoder = decoder
        self._configs = {n: ability_config(task, own, seed) for n, own in abilities.items()}
        self._rows = {n: ability_data(n, config, splits) for n, config in self._configs.items()}

    def grams(self, name: str, delta: FloatVector) -> Mapping[str, Any]:
        """Gram matrices of the Linears' inputs in a model, on its ability's training rows."""
        from dare_agg.merge.collect import collect_grams

        config = self._configs[name]
        kind, _ = find_ability(name)
        rows = ability_data(name, config, ("train",))["train"].take(np.arange(_GRAM_ROWS))
        read = kind.reader(config, rows)
        self._decoder.place(delta)
        batches = (read(np.arange(lo, lo + 8)) for lo in range(0, len(rows), 8))
        return collect_grams(self._decoder.network, batches, forward=kind.scores)

    def score(
        self, delta: FloatVector | None, names: Sequence[str], split: str
    ) -> dict[str, dict[str, float]]:
        """By ability its "loss", and "exact" where answers are asked for."""
        self._decoder.place(delta)
        found: dict[str, dict[str, float]] = {}
        for name in names:
            rows = self._rows[name][split]
            scores = {"loss": round(self._decoder.loss(name, self._configs[name], rows), 4)}
            if name == "arithmetic":
                scores["exact"] = round(self._decoder.exact_match(rows), 4)
            found[name] = scores
        return found


def main() -> None:
    """Tune what a scenario asks for: ``python -m simulations.runs.ability_models SCENARIO``."""
    import argparse

    from simulations.runs.scenario import read_scenario

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    scenario = read_scenario(options.scenario)
    settings = next(iter(scenario.cells.values()))
    for seed in options.seeds or scenario.seeds:
        for name, own in settings["abilities"].items():
            if options.only and name not in options.only:
                continue
            delta = tuned_delta(name, settings["task"], own, seed)
            with suppress(BrokenPipeError):
                print(name, seed, float(np.abs(delta).max()), flush=True)


if __name__ == "__main__":
    main()
