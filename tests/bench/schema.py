"""What every result file must hold."""

import json

ONCE = ["--quick", "--budget", "0.001"]  # arguments with which a call over 5 ms is timed once


def checked_rows(path, suite):
    """The rows of a result file of a suite in which nothing is wrong or failed."""
    record = json.loads(path.read_text())
    assert set(record) == {"env", "rows"}
    env = record["env"]
    assert env["benchmark"] == suite.name and env["threads"] == 1
    assert {"device", "cpu", "versions", "commit", "dirty", "date"} <= set(env)
    assert env["roofline"]["copy_gb_per_s"] > 0
    peers = {row["peer"] for row in record["rows"]}
    assert peers | set(env["absent"]) == {peer.name for peer in suite.peers}
    for row in record["rows"]:
        assert list(row)[: len(env["key"]) + 1] == [*env["key"], "peer"]
        assert row["status"] in ("ok", "skipped"), row
        if row["status"] == "ok":
            assert row["ms"] > 0 and row["iqr_ms"] >= 0 and row["repeats"] >= 1
        else:
            assert row["ms"] is None and row["reason"]
    return record["rows"]
