"""Recipes of whole jobs: in place of NVFlare's FedAvg recipes, with their words and DARE's."""

from __future__ import annotations

import inspect
from typing import Any

from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.defs import FilterType

from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.nvflare.controller import DareFedAvg
from dare_agg.nvflare.filter import DareFilter
from dare_agg.nvflare.wire import TRAIN
from dare_agg.nvflare.words import CALLED, ELSEWHERE, WORDS, read_words


class _Dare:
    """What both recipes put in place of FedAvg's: the controller, and a filter for the clients."""

    def __init__(self, **words: Any) -> None:
        own = {name: words.pop(name) for name in (*WORDS, *ELSEWHERE) if name in words}
        read_words(own)
        known = (*WORDS, *inspect.signature(super().__init__).parameters)
        for word in words:
            if word not in known:
                raise ConfigError(f"{CALLED} has no word {word!r}{did_you_mean(word, known)}")
        self._dare, self._answers = own, False
        if words.get("server_expected_format", ExchangeFormat.NUMPY) != ExchangeFormat.NUMPY:
            raise ConfigError(
                f"server_expected_format = {words['server_expected_format']!r}; leave it out: "
                "updates are bytes, and scripts get tensors all the same"
            )
        super().__init__(**words)
        # The package is installed at every site, and not sent along with a job.
        self._job.set_app_packages(["dare_agg"])  # type: ignore[attr-defined]

    def enable_tensor_streaming(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ConfigError`: there are no tensors in a task to be streamed."""
        raise ConfigError(
            "tensor streaming carries the tensors of tasks and results, and a DARE job has none in "
            "them; leave it out: what brings a version is pulled in pieces"
        )

    def _create_controller(
        self, persistor_id: str, model_params: Any, model_aggregator: Any
    ) -> DareFedAvg:
        recipe: Any = self
        return DareFedAvg(
            num_clients=recipe.min_clients,
            num_rounds=recipe.num_rounds,
            persistor_id=persistor_id,
            model=model_params,
            save_filename=recipe.save_filename,
            aggregator=model_aggregator,
            stop_cond=recipe.stop_cond,
            patience=recipe.patience,
            task_name=TRAIN,
            exclude_vars=recipe.exclude_vars,
            aggregation_weights=recipe.aggregation_weights,
            memory_gc_rounds=recipe.server_memory_gc_rounds,
            enable_tensor_disk_offload=recipe.enable_tensor_disk_offload,
            dare=self._dare,
            **recipe._get_controller_kwargs(),
        )

    def _prepare_client_apps(self) -> None:
        super()._prepare_client_apps()  # type: ignore[misc]
        self._client_apps_prepared = True
        # The first to see what the server sent, whatever filters come after.
        self._add(FilterType.TASK_DATA)

    def finalize(self) -> None:
        """Add the filter of results, behind all others: they see weights, as in FedAvg."""
        super().finalize()  # type: ignore[misc]
        if not self._answers:
            self._answers = True
            self._add(FilterType.TASK_RESULT)

    def _add(self, kind: str) -> None:
        recipe: Any = self
        recipe._add_to_client_apps(DareFilter(), filter_type=kind, tasks=[TRAIN])


class DareRecipe(_Dare, FedAvgRecipe):  # type: ignore[misc]
    """A PyTorch job with DARE updates: NVFlare's ``FedAvgRecipe`` with another name.

    Takes its words and those of `dare_agg.nvflare.words.Words`::

        recipe = DareRecipe(model=Net(), min_clients=3, num_rounds=5, train_script="client.py",
                            drop_rate=0.9)

    The training script (``nvflare.client``) stays as it is. Raises `ConfigError` for a word that
    is out of bounds or has no meaning here.
    """


class NumpyDareRecipe(_Dare, NumpyFedAvgRecipe):  # type: ignore[misc]
    """A NumPy job with DARE updates: NVFlare's ``NumpyFedAvgRecipe`` with another name.

    As `DareRecipe`, of a model that is one array.
    """
