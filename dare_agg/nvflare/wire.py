"""Words under which DARE's records and payloads travel in NVFlare's messages."""

from __future__ import annotations

from dare_agg.rounds.messages import ORDER_KEY, REPLY_KEY

# In the meta of a task's and of a result's DXO.
ORDER, REPLY = ORDER_KEY, REPLY_KEY
# Public properties of a site: who it is, for every message, and why it refuses, with a result.
HELLO = "dare.hello"
REFUSAL = "dare.refusal"
# The topic under which sites pull what they lack of a version, and the words of a request.
PULL = "dare.pull"
VERSION, HAVE, AT = "version", "have", "at"
ANSWER = "dare.piece"

TRAIN = "train"
