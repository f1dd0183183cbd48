"""Tables of rounds on large models: this project's, beside other tools on the same exchange."""

from __future__ import annotations

from simulations.pages.tables import human_bytes, markdown

TOOLS = {
    "flower": "FedAvg, SuperLink with a database",
    "flower-memory": "FedAvg, SuperLink in memory",
    "nvflare": "FedAvg",
    "nvflare-stream": "tensor streaming",
    "nvflare-disk": "tensors kept on disk",
}


def large_table(rows: list[dict], exchanged: list[dict]) -> str:
    """One line a point; other tools' points below."""
    lines = [
        (
            f"dare-agg, p = {row['drop_rate']}",
            f"{row['parameters'] / 1e6:,.0f} M {row['dtype']}",
            str(row["clients"]),
            str(row["rounds"]),
            f"{row['server_anonymous_mib']:,}",
            f"{row['client_anonymous_mib']:,} ({row['client_extra_mib']:,})",
            human_bytes(row["upload_bytes"]),
            human_bytes(row["download_bytes"]),
            f"{row['server_cpu_seconds']:.1f}",
            f"{row['client_cpu_seconds']:.1f}",
            f"{row['disk_bytes']:.2f}" if "disk_bytes" in row else "",
            "",
        )
        for row in rows
    ]
    lines += [
        (
            f"{row['version'].replace('flwr', 'Flower').replace('nvflare', 'NVFlare')}, "
            f"{TOOLS[row['tool']]}",
            f"{row['parameters'] / 1e6:,.0f} M {row['dtype']}",
            str(row["clients"]),
            str(row["rounds"]),
            f"{row['server_anonymous_mib']:,}",
            f"{row['client_anonymous_mib']:,}",
            human_bytes(row["upload_bytes"]),
            human_bytes(row["download_bytes"]),
            "",
            "",
            "",
            f"{row['seconds']:,.0f}",
        )
        for row in exchanged
    ]
    columns = (
        "Who",
        "Parameters",
        "Clients",
        "Rounds",
        "Server, MiB",
        "A client, MiB (beyond training)",
        "Up a client and round",
        "Down",
        "Server, CPU s a round",
        "A client, CPU s a round",
        "Server's disk, bytes a parameter",
        "Seconds a round",
    )
    return markdown(columns, lines)


def fine_tuning_table(rows: list[dict]) -> str:
    """One line a run."""
    lines = [
        (
            row["model"],
            f"{row['clients']} × {row['num_rounds']} × {row['steps']}",
            f"{row['loss_before']:.2f} → {row['loss_after']:.2f}",
            f"{row['server_anonymous_mib']:,}",
            f"{row['client_anonymous_mib']:,}",
            human_bytes(max(one["upload_bytes"] for one in row["rounds"])),
            human_bytes(max(one["download_bytes"] for one in row["rounds"])),
        )
        for row in rows
    ]
    columns = (
        "Model",
        "Clients × rounds × steps",
        "Loss",
        "Server, MiB",
        "A client, MiB",
        "Up a client and round",
        "Down",
    )
    return markdown(columns, lines)
