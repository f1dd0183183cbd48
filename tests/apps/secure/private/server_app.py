"""The server: one secure TIES of whoever is online."""

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dare_agg.flower.secure.merge import secure_merge
from dare_agg.secure.roster import read_roster
from dare_agg.secure.settings import SecureSettings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output = Path(str(config["output"]))
    output.mkdir(parents=True, exist_ok=True)
    result = secure_merge(
        grid,
        Path(str(config["base"])),
        read_roster(Path(str(config["roster"]))),
        SecureSettings("ties", drop_rate=str(config["drop-rate"]), clip=0.1),
        run="test",
        parties=int(config["min-clients"]),
        out=output / "merged.safetensors",
        stage_seconds=float(config["stage-seconds"]),
    )
    (output / "report.json").write_text(json.dumps(result.measurements))
