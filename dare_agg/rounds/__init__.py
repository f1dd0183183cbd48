"""A federated round without a network: the client's half and the server's half.

The Flower strategy and mod call these functions, and so does any in-process simulation, so
both run the same round::

    plans = make_plans(secret, 1, [None] * n, settings.terms, model.ref)
    update = make_client_update(plans[i], base_arrays, tuned_arrays)          # on each client
    reply = check_reply(plans[i], update.blob, update.dense_blob, weight)     # on the server
    passed = chain(*steps)(accepted, StepContext(model, settings, 1, secret))
    merged = merge_round(model, passed.accepted, settings)
    model, state = advance(model, state, merged, settings)

Rounds that wait for nobody: `dare_agg.rounds.buffer` says who is asked and what is merged,
`dare_agg.rounds.buffered` makes their plans.
"""
