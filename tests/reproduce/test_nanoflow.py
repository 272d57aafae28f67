"""NanoFlow: every row holds, on one layer in place of two."""

from armillary.reproduce import nanoflow, registry


def test_every_row_holds(monkeypatch):
    whole = nanoflow.found
    monkeypatch.setattr(nanoflow, "found", lambda load: whole(load, 1))
    result = registry.get("nanoflow").run()
    assert [row.quantity for row in result.rows if not row.holds] == []
    assert all(len(trace) for _, trace in result.pictures)
