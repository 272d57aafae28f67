"""The reproduction of FlexGen says what it measured, and every row holds."""

from armillary.reproduce import registry


def test_every_row_holds_and_the_prediction_is_the_cost_models_and_not_the_paper_s():
    result = registry.get("flexgen").run()
    assert [row.quantity for row in result.rows if not row.holds] == []
    throughput = next(row for row in result.rows if row.unit == "tokens/s")
    assert round(throughput.ours, 4) == 7.1357
    assert all(len(trace) for _, trace in result.pictures)
