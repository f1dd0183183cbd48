"""One party keeps all others from finishing a sum. It can (SECURITY.md), and learns nothing."""

import numpy as np
import pytest
from parties import consortium

from dare_agg.errors import ProtocolError
from dare_agg.secure import SecureServer, client
from dare_agg.secure import messages as wire
from dare_agg.secure.messages import SEALED_BYTES


def test_shares_that_nobody_can_open():
    """The others stop before any data is put in; the liar's own vector stays alone and masked."""
    group = consortium(4)
    liar, terms = 2, group.terms
    server, states = SecureServer(terms, group.roster), {}
    for party, identity in group.identities.items():
        states[party], answer = client.advertise(identity, group.roster, terms, group.policy())
        server.take(answer)
    for party, request in server.close().items():
        me = group.identities[party]
        states[party], answer = client.share(me, group.roster, states[party], request)
        if party == liar:
            upload = wire.decode_shares(answer, terms, group.roster)
            noise = [(to, bytes(SEALED_BYTES)) for to, _ in upload.sealed]
            answer = wire.encode_shares(me, terms.session, liar, upload.nonce, noise)
        server.take(answer)
    for party, request in server.close().items():
        if party != liar:
            with pytest.raises(ProtocolError, match=f"shares of party {liar} do not open") as why:
                client.open_shares(states[party], request)
            assert why.value.reason == "shares"
            continue
        state = client.open_shares(states[party], request)
        values = np.ones(terms.values, np.float32)
        server.take(client.contribute(group.identities[party], state, values)[1])
    with pytest.raises(ProtocolError, match="no data was shown") as end:
        server.close()
    assert end.value.reason == "threshold"
