"""`armillary simulate watch`: the other end of a page that looks at an engine in virtual time, one line of JSON for one of JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, PublishedModel
from armillary.cli.simulate_scenario import Hardware, simulated_of
from armillary.cli.workload import Coming, Workload

if TYPE_CHECKING:
    from armillary.serve.simulation.playback import Playback


def watch(
    model: PublishedModel,
    /,
    *,
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    workload: Workload = Workload(),  # noqa: B008
    engine: EngineFlags = EngineFlags(),  # noqa: B008
    config: ConfigFile = None,
    replica: Annotated[int, Parameter(help="Whose engine is looked at.")] = 0,
) -> None:
    """The engine at any instant. A line `{"at": ns, "since": iteration}` is answered by what `/live` has then, `{"at": ns, "explain": id}` by that
    request's story; the first line out says that it is ready. Ends with its input. People watch in the page: `armillary simulate page`."""
    from armillary.core.errors import InputError
    from armillary.serve.simulation.playback import Playback
    from armillary.serve.simulation.scenario import Scenario

    scenario = simulated_of(model, hardware, workload, engine, config)
    if not isinstance(scenario, Scenario):
        raise InputError(
            "prefill and decode workers cannot be watched yet", "watch replicas, without --prefill-workers", field="prefill_workers"
        )
    playback = Playback(scenario, lambda: Coming(workload, scenario).source, replica)
    Coming(workload, scenario).check()
    deployment, layout = scenario.deployment, scenario.deployment.layout
    about = {
        "name": deployment.model.name,
        "description": f"{deployment.model.name} on {layout.devices} x {deployment.device.name}, virtual time",
        "context": scenario.context,
    }
    _say({"ready": True})
    try:
        for line in sys.stdin:
            _say(_answer(playback, json.loads(line), about))
    finally:
        playback.close()


def _answer(playback: Playback, asked: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    at = int(asked["at"])
    if "explain" in asked:
        return {"events": playback.explain(str(asked["explain"]), at)}
    return playback.snapshot(at, int(asked.get("since", -1))) | {"model": about}


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
