"""The server side of the Flower app: run config, rounds, measurements, export."""
