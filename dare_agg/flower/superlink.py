"""``python -m dare_agg.flower.superlink``: flower-superlink, with more patience at its database.

Takes the same options. Flower keeps all that travels in SQLite and waits five seconds for
its lock; then it answers 500, upon which SuperExec and SuperNodes end or hang. On a busy machine
that a whole model passes through, five seconds are not enough.
"""

from __future__ import annotations

import sqlite3
import sys

from dare_agg.flower.internals import on_database_connection, run_program

# Below the 30 s after which Flower's clients think a request lost and send it again.
LOCK_SECONDS = 25


def wait_longer(connection: object, *_: object) -> None:
    """Set how long a connection waits for the lock; Flower sets its own when it connects."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute(f"PRAGMA busy_timeout = {1000 * LOCK_SECONDS}")


def be_patient_with_sqlite() -> None:
    """Have every connection that this process takes from a pool wait longer."""
    on_database_connection(wait_longer)


def main() -> None:
    """``python -m dare_agg.flower.superlink``: Flower's SuperLink, as the module says."""
    be_patient_with_sqlite()
    run_program("flower-superlink", sys.argv[1:])


if __name__ == "__main__":
    main()
