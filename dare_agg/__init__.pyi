from dare_agg.rounds.simulation import simulate as simulate

__version__: str
