"""The party: all it needs is in its node config."""

from flwr.clientapp import ClientApp

from dare_agg.flower.secure.mod import secure_mod, secure_queries

app = ClientApp(mods=[secure_mod])
secure_queries(app)
