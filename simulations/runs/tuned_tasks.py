"""Models of several tasks, tuned from one base: what runs that merge them begin with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dare_agg.vectors.layout import FloatVector, Layout
from simulations.runs.single import State, body_layout, tuned_state


@dataclass(frozen=True)
class TunedTasks:
    """Tasks by name, the base's body, each model's change of it, and each one's own head."""

    tasks: Mapping[str, Any]
    layout: Layout
    start: FloatVector
    deltas: Mapping[str, FloatVector]
    heads: Mapping[str, State]

    def scores(
        self, body: FloatVector, names: Iterable[str] | None = None, rows: Any = None
    ) -> dict[str, float]:
        """Accuracy of each task (or those named) with this body and its own head."""
        shared = self.layout.unflatten(body)
        return {
            name: round(
                self.tasks[name].evaluate({**shared, **self.heads[name]}, rows)["accuracy"], 4
            )
            for name in (self.tasks if names is None else names)
        }


def tuned_tasks(settings: Mapping[str, Mapping[str, Any]], seed: int) -> TunedTasks:
    """The tasks of these settings, as `tuned_state` tunes each."""
    models = {name: tuned_state(own, seed) for name, own in settings.items()}
    base = next(iter(models.values()))[1]
    layout = body_layout(base)
    start = layout.flatten(base)
    return TunedTasks(
        {name: task for name, (task, _, _) in models.items()},
        layout,
        start,
        {name: layout.flatten(tuned) - start for name, (_, _, tuned) in models.items()},
        {
            name: {n: a for n, a in tuned.items() if n not in layout}
            for name, (_, _, tuned) in models.items()
        },
    )
