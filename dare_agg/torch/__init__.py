"""For client apps that hold a torch model: no arrays, no second copy of it.

`federated_model` loads a round's version into the model's own parameters and encodes what
training changed from them, on whatever device they are.
"""

from dare_agg.torch.federated import FederatedTurn, federated_model
from dare_agg.torch.planned import PlannedUpdate, plan_update

__all__ = ["FederatedTurn", "PlannedUpdate", "federated_model", "plan_update"]
