"""What an encoder has no use for is refused by name, wherever it was said."""

from __future__ import annotations

import pytest

from armillary.cli.serve_encoder import check_options
from armillary.cli.settings import EngineFlags, ServerFlags, settle
from armillary.core.errors import InputError


def test_options_that_an_encoder_carries_out_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMILLARY_ENGINE__THREADS", "1")
    check_options(settle("minilm", EngineFlags(context=300, max_batch_tokens=100, max_queue=5), ServerFlags(port=0)))


@pytest.mark.parametrize(
    ("engine", "server", "named"),
    [
        ({"policy": "orca"}, {}, "policy"),
        ({"quantize": "int4"}, {}, "quantize"),
        ({}, {"shed_after": 3.0}, "shed_after"),
        ({}, {"explain": True}, "explain"),
    ],
)
def test_others_are_named(engine: dict[str, str], server: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=f"{named} .*encoder"):
        check_options(settle("minilm", EngineFlags(**engine), ServerFlags(**server)))
