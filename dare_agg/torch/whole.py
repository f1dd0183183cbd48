"""The turn of a message that holds whole arrays: of FedAvg, or of a secure sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dare_agg.errors import ConfigError
from dare_agg.torch.holding import whole_array
from dare_agg.torch.named import check_shape, named_tensors
from dare_agg.torch.places import check_holds_values
from dare_agg.vectors.returned import returned_tensors

if TYPE_CHECKING:
    from flwr.app import Array, ConfigRecord, Message, MetricRecord

    from dare_agg.flower.turns import Number


@dataclass(frozen=True)
class WholeTurn:
    """Answers with all tensors that came, as the model holds them after training."""

    model: nn.Module
    message: Message
    key: str
    came: Mapping[str, Array]

    def reply(
        self,
        num_examples: int,
        metrics: Mapping[str, Number] | None = None,
        *,
        records: Mapping[str, ConfigRecord | MetricRecord] | None = None,
        statistics: Mapping[str, NDArray[Any]] | None = None,
    ) -> Message:
        """The answer: whole arrays after training, and metrics."""
        from flwr.app import Message, MetricRecord, RecordDict

        from dare_agg.flower.records import STATISTICS_KEY
        from dare_agg.flower.transport import to_record

        said = {"num-examples": num_examples, **(metrics or {})}
        content = RecordDict({**(records or {}), "metrics": MetricRecord(said)})
        if self.message.metadata.message_type.partition(".")[0] == "train":
            tensors = returned_tensors(self.came, named_tensors(self.model))
            trained = {
                name: whole_array(tensors[name]).astype(np.dtype(array.dtype), copy=False)
                if name in tensors
                else array.numpy()
                for name, array in self.came.items()
            }
            content[self.key] = to_record(trained)
            if statistics is not None:
                content[STATISTICS_KEY] = to_record(statistics)
        return Message(content, reply_to=self.message)


def whole_turn(model: nn.Module, message: Message) -> WholeTurn:
    """Load the one ArrayRecord of a message into a model, in place.

    Raises `ConfigError` where there is none or several, `LayoutError` for another model.
    """
    records = message.content.array_records
    if len(records) != 1:
        raise ConfigError(
            f"the message holds {len(records)} ArrayRecords; federated_model loads the one that "
            "is the model"
        )
    ((key, record),) = records.items()
    tensors = returned_tensors(record, named_tensors(model))
    with torch.no_grad():
        for name, tensor in tensors.items():
            array = record[name].numpy()
            check_shape(name, tensor, array.shape)
            check_holds_values(name, tensor)
            tensor.copy_(torch.from_numpy(np.array(array)).reshape(tensor.shape))
    return WholeTurn(model, message, key, dict(record.items()))
