"""Absorbing abilities: models tuned on one ability each, merged into one that has them all.

    python -m simulations.run simulations/scenarios/abilities.toml --workers 1
    python -m simulations.pages.results --only abilities

A cell says what each model sends (its whole delta, or an update of a drop rate and a value format,
with or without the directions of its layers' inputs) and by which methods sets of models are
merged; one without methods measures the base and each model alone. A seed tunes its own models,
draws its own problems and masks. Scalings and ridges are chosen by cells with ``split =
"tuning"``, on rows that no cell reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dare_agg.errors import ConfigError
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.methods import find_method
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import array_source
from simulations.runs.ability_models import Decoder, Measures, delta_path, tuned_delta
from simulations.runs.ability_updates import Sent, send
from simulations.runs.directions import Directions

GRAMS = ("own", "whole", "directions", "inputs")


@lru_cache(maxsize=1)
def _decoder(task: str, seed: int) -> Decoder:
    return Decoder(json.loads(task), seed)


@lru_cache(maxsize=2)
def _measures(task: str, abilities: str, seed: int, split: str) -> Measures:
    decoder = _decoder(task, seed)
    return Measures(decoder, json.loads(task), json.loads(abilities), seed, (split,))


def run_row(row: Any) -> dict[str, Any]:
    """Merge each set by each method and measure all abilities of the set."""
    settings = row.settings
    abilities, split = settings["abilities"], settings["split"]
    words = json.dumps(settings["task"]), json.dumps(abilities)
    decoder = _decoder(words[0], row.seed)
    measures = _measures(*words, row.seed, split)
    whole = {
        name: tuned_delta(name, settings["task"], own, row.seed) for name, own in abilities.items()
    }
    if not settings["methods"]:
        points = _alone(measures, whole, split)
    else:
        update = settings["update"]
        sent = {
            name: send(
                name,
                delta,
                decoder.layout,
                update,
                row.seed,
                delta_path(name, settings["task"], abilities[name], row.seed),
            )
            for name, delta in whole.items()
        }
        points = []
        for names in settings["sets"]:
            for spec in settings["methods"]:
                merged = merge(spec, names, decoder, sent, whole, measures)
                scores = measures.score(merged, names, split)
                del merged
                points.append(
                    {
                        "set": list(names),
                        "method": spec["method"],
                        "scaling": spec.get("scaling", 1.0),
                        "options": spec.get("options", {}),
                        "gram": spec.get("gram", ""),
                        "drop_rate": update.get("drop_rate", "0"),
                        "values": update.get("values", "f32"),
                        "exclude": update.get("exclude", ""),
                        "bits_per_parameter": bits_of(spec, [sent[n] for n in names]),
                        "scores": scores,
                    }
                )
    return {
        "split": split,
        "parameters": decoder.layout.size,
        "test_rows": {name: own["test_rows"] for name, own in abilities.items()},
        "update": dict(settings["update"]),
        "points": points,
    }


def _alone(measures: Measures, whole: Mapping[str, FloatVector], split: str) -> list[Any]:
    """The base on all abilities, and each tuned model on its own."""
    names = list(whole)
    points = [{"model": "base", "scores": measures.score(None, names, split)}]
    for name, delta in whole.items():
        points.append(
            {
                "model": name,
                "scores": measures.score(delta, [name], split),
                "norm": round(float(np.linalg.norm(delta)), 4),
                "moved": round(float(np.mean(delta != 0)), 4),
            }
        )
    return points


def bits_of(spec: Mapping[str, Any], sent: Sequence[Sent]) -> float:
    """Bits a parameter and model that a merge was made from; exact Gram matrices are not in it."""
    extra = spec.get("gram") == "directions"
    return round(float(np.mean([s.bits + extra * s.direction_bits for s in sent])), 4)


def merge(
    spec: Mapping[str, Any],
    names: Sequence[str],
    decoder: Decoder,
    sent: Mapping[str, Sent],
    whole: Mapping[str, FloatVector],
    measures: Measures,
) -> FloatVector:
    """Return the merged delta of a set by one method.

    ``gram`` says what Gram matrices are made of: the values that were "sent" themselves ("own"),
    the "whole" deltas, the "directions" beside the values, or training rows' "inputs".
    """
    row = find_method(spec["method"])
    gram = spec.get("gram", "")
    statistics: list[Any] = []
    if gram == "whole":
        statistics = [array_source(whole[name]) for name in names]
    elif gram == "directions":
        statistics = [_asked(sent[name]) for name in names]
    elif gram == "inputs":
        statistics = [measures.grams(name, whole[name]) for name in names]
    elif gram not in ("", "own"):
        raise ConfigError(f"gram {gram!r} is unknown; known: {', '.join(GRAMS)}")
    result, _ = merge_deltas(
        decoder.layout,
        [sent[name].values for name in names],
        row.name,
        scaling=spec.get("scaling", 1.0),
        options=spec.get("options", {}),
        base=array_source(decoder.start),
        statistics=statistics,
        measure=False,
    )
    return result


def _asked(sent: Sent) -> Directions:
    if sent.directions is None:
        raise ConfigError('gram = "directions" needs rank and bits in the update; give both')
    return sent.directions
