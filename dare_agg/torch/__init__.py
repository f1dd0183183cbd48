"""For client apps that hold a torch model: no arrays, no second copy of it.

`federated_model` loads a round's version into the model's own parameters and encodes what
training changed from them, on whatever device they are. `learn_survivors` trains outside of rounds
what an update will hold, and nothing else.
"""

from dare_agg.torch.federated import FederatedTurn, federated_model
from dare_agg.torch.planned import PlannedUpdate, plan_update
from dare_agg.torch.survivors import LearnedSurvivors, learn_survivors

__all__ = [
    "FederatedTurn",
    "LearnedSurvivors",
    "PlannedUpdate",
    "federated_model",
    "learn_survivors",
    "plan_update",
]
