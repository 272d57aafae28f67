"""A simulation begins at once: nothing that it needs is heavy."""

import subprocess
import sys


def test_a_simulation_loads_neither_torch_nor_scipy():
    code = (
        "import sys; import armillary.serve.simulation.scenario, armillary.models.graph.cost, armillary.serve.workload as w;"
        "next(w.published('conversation').draw()); print([name for name in ('torch', 'scipy', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
