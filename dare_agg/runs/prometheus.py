"""A run's measurements for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.runs.rows import RunRow

# Prometheus name → (field of a row, help); bytes and rejections are counted besides.
GAUGES: Mapping[str, tuple[str, str]] = {
    "dare_agg_round": ("round", "Rounds finished"),
    "dare_agg_clients": ("clients", "Clients sampled in the last round"),
    "dare_agg_accepted": ("accepted", "Updates merged in the last round"),
    "dare_agg_accuracy": ("accuracy", "Accuracy after the last round"),
    "dare_agg_loss": ("loss", "Evaluation loss after the last round"),
    "dare_agg_train_loss": ("train_loss", "Training loss of the last round"),
    "dare_agg_round_seconds": ("round_seconds", "Seconds the last round took"),
    "dare_agg_seconds": ("seconds", "Seconds since the method began"),
}


@dataclass
class Exporter:
    """A Prometheus endpoint on ``host:port``; port 0 takes a free one. Make with `exporter`."""

    host: str
    port: int
    _metrics: dict[str, Any] = field(default_factory=dict)
    _server: Any = None

    def row(self, row: RunRow, left: float | None = None) -> None:
        """Show a finished round."""
        method = row.method
        for name, (what, _) in GAUGES.items():
            value = getattr(row, what)
            if value is not None:
                self._metrics[name].labels(method).set(value)
        if left is not None:
            end = time.monotonic() + left
            self._metrics["dare_agg_seconds_left"].set_function(
                lambda: max(0.0, end - time.monotonic())
            )
        for direction, count in (("upload", row.upload_bytes), ("download", row.download_bytes)):
            self._metrics["dare_agg_bytes"].labels(method, direction).inc(count)
        for rejection in row.rejected:
            self._metrics["dare_agg_rejected"].labels(method, str(rejection.get("reason"))).inc()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def exporter(port: int, host: str = "127.0.0.1") -> Exporter:
    """Start a Prometheus endpoint (``/metrics``) in a thread.

    It shows measurements without asking who looks, so it listens on loopback unless told
    otherwise. Raises `ConfigError` where the library is missing or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
    except ImportError as error:
        raise ConfigError(
            "prometheus-port needs prometheus-client: pip install 'dare-agg[report]'"
        ) from error
    registry = CollectorRegistry()
    metrics: dict[str, Any] = {
        name: Gauge(name, text, ["method"], registry=registry) for name, (_, text) in GAUGES.items()
    }
    metrics["dare_agg_seconds_left"] = Gauge(
        "dare_agg_seconds_left", "Estimated seconds to the end of the run", registry=registry
    )
    metrics["dare_agg_bytes"] = Counter(
        "dare_agg_bytes", "Payload bytes of all clients", ["method", "direction"], registry=registry
    )
    metrics["dare_agg_rejected"] = Counter(
        "dare_agg_rejected", "Rejected updates", ["method", "reason"], registry=registry
    )
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"prometheus-port {host}:{port} cannot be listened on: {error.strerror or error}; "
            "choose another port"
        ) from error
    return Exporter(host, int(server.server_port), metrics, server)
