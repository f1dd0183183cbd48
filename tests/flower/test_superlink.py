"""The SuperLink's database under a lock that is held for longer than Flower waits."""

import sqlite3
import subprocess
import sys
import time

import pytest
from flwr.supercore.constant import SQLITE_PRAGMAS

CODE = """
import sys
from dare_agg.flower.superlink import be_patient_with_sqlite
be_patient_with_sqlite()
from sqlalchemy import create_engine, event, text
from flwr.supercore.sql_mixin import _set_sqlite_pragmas
engine = create_engine("sqlite:///" + sys.argv[1])
event.listen(engine, "connect", _set_sqlite_pragmas)
with engine.begin() as connection:
    print(connection.execute(text("PRAGMA busy_timeout")).scalar(), flush=True)
    connection.execute(text("INSERT INTO t VALUES (2)"))
"""


@pytest.mark.slow
def test_a_lock_held_for_longer_than_flower_waits_is_waited_for(tmp_path):
    assert dict(SQLITE_PRAGMAS)["busy_timeout"] == "5000"
    path = tmp_path / "state.db"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("PRAGMA journal_mode = WAL")
    holder.execute("CREATE TABLE t (x)")
    holder.execute("BEGIN IMMEDIATE")
    holder.execute("INSERT INTO t VALUES (1)")
    command = [sys.executable, "-c", CODE, str(path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline().strip() == "25000"
    time.sleep(6)
    assert writer.poll() is None
    holder.execute("COMMIT")
    assert writer.wait(30) == 0
    writer.stdout.close()
    assert holder.execute("SELECT COUNT(*) FROM t").fetchone() == (2,)
    holder.close()
