"""NanoFlow: every row holds, on one layer in place of two."""

from armillary.reproduce import nanoflow, registry


def test_every_row_holds(monkeypatch):
    whole = nanoflow.tasks
    monkeypatch.setattr(nanoflow, "tasks", lambda parts: whole(parts, 1))
    result = registry.get("nanoflow").run()
    assert [row.quantity for row in result.rows if not row.holds] == []
    assert all(len(trace) for _, trace in result.pictures)


def test_a_layer_s_products_are_the_model_s():
    """Two parts compute what one does, and read the weights twice."""
    one, two = ({name: 0.0 for name, _, _ in nanoflow.layer(1)} for _ in range(2))
    for name, resource, seconds in nanoflow.layer(1):
        one[name] += seconds if resource == "compute" else 0
    for name, resource, seconds in nanoflow.layer(2):
        two[name] += 2 * seconds if resource == "compute" else 0
    assert all(abs(one[name] - two[name]) < 1e-9 for name in one)
