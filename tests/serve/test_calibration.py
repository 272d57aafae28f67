"""What is measured of an engine comes back as the cost of its iterations, and of no other's."""

import warnings
from dataclasses import replace

import pytest

from armillary.cluster.machine import describe
from armillary.cluster.profile import Identity, Profile, load
from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.serve import calibration
from armillary.serve.config import EngineConfig
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams
from armillary.sim.batch import Batch
from tests.serve.models import VOCABULARY, loaded, tiny

OPTIONS = {"kv_blocks": 64, "block_size": 8, "max_batch_tokens": 64, "max_running": 6, "threads": 1}


@pytest.fixture(scope="module")
def measured():
    """A tiny engine and its samples."""
    engine, said = build_engine(loaded(tiny()), EngineConfig(**OPTIONS)), []
    samples = calibration.measure(engine, VOCABULARY - 1, seconds=0.2, progress=lambda what, share: said.append((what, share)))
    return engine, samples, said


@pytest.fixture
def profile(measured):
    engine, samples, _ = measured
    machine = describe()
    known = calibration.identity(tiny().config, engine.config, 1)
    rows = calibration.rows_of(known | {"disturbed": ""}, samples)
    return Profile(
        machine=Identity.of(machine), taken="now", seconds=1.0, load_before=0.0, load_after=0.0, others=0.0, engine={"tiny": rows}
    )


def test_plans_and_requests_are_measured_as_the_engine_is_bounded(measured):
    engine, samples, said = measured
    alone, whole = ([sample for sample in samples if (sample.host is not None) is kind] for kind in (False, True))
    assert len(whole) >= 16
    assert all(sample.host > 0 for sample in whole)
    assert all(sample.ns > 0 and sample.batch.tokens <= 64 for sample in samples)
    assert {sample.batch.decodes for sample in alone if not sample.batch.prompts} == {1, 2, 3, 4, 6}
    assert {sample.batch.prompts for sample in alone} >= {((count, 0),) for count in (1, 16, 64)}
    assert any(sample.batch.prompts and sample.batch.decodes for sample in alone)
    assert {"plans", "requests as they come"} <= {what for what, _ in said}
    assert all(0 <= share < 1 for _, share in said)
    assert engine.stats.failed_iterations == 0
    engine.check()


def test_the_profile_gives_the_cost_model(measured, profile, tmp_path):
    engine, samples, _ = measured
    profile.save(tmp_path / "p.json")
    again = load(tmp_path / "p.json")
    assert calibration.samples_of(again.engine["tiny"])[1] == samples
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = calibration.cost_model(again, tiny().config, engine.config, describe())
    assert model.errors.samples == sum(sample.host is not None for sample in samples)
    assert model.iteration(Batch(((64, 0),), 6, 600, 6)) > model.iteration(Batch((), 1, 10, 1)) > 1


def test_another_engine_is_refused_and_another_machine_told(measured, profile):
    engine, _, _ = measured
    with pytest.raises(NotFoundError, match="weights none, not int4"):
        calibration.cost_model(profile, tiny().config, engine.config.model_copy(update={"quantize": "int4"}))
    with pytest.raises(NotFoundError, match="threads 1, not 2"):
        calibration.cost_model(profile, tiny().config, engine.config.model_copy(update={"threads": 2}))
    with pytest.raises(NotFoundError, match="3 layers"):
        calibration.cost_model(profile, tiny(num_layers=3).config, engine.config)
    with pytest.raises(NotFoundError, match="measured no engine"):
        calibration.cost_model(profile.model_copy(update={"engine": {}}), tiny().config, engine.config)
    with pytest.warns(UserWarning, match="another machine"):
        calibration.cost_model(profile, tiny().config, engine.config, replace(describe(), cpu="another"))
    row, *rest = profile.engine["tiny"]
    noisy = profile.model_copy(update={"engine": {"tiny": (row | {"disturbed": "load average 9"}, *rest)}})
    with pytest.warns(UserWarning, match="beside other work"):
        calibration.cost_model(noisy, tiny().config, engine.config)


@pytest.mark.parametrize(
    "change", [{"prompts": "3@"}, {"decodes": -1.0}, {"ns": "soon"}, {"prompts": "", "decodes": 0.0}, {"prompts": 3.0}]
)
def test_a_damaged_section_is_told(profile, change):
    row, first, *rest = profile.engine["tiny"]
    with pytest.raises(FormatError, match="damaged"):
        calibration.samples_of((row, first | change, *rest))
    with pytest.raises(FormatError, match="damaged"):
        calibration.samples_of((first,))


def test_engines_that_cannot_be_measured_are_refused():
    engine = build_engine(loaded(tiny()), EngineConfig(**OPTIONS))
    calibration.warm(engine, VOCABULARY)
    engine.submit(Request("a", (1, 2, 3), SamplingParams(2, ignore_eos=True)))
    engine.run_until_idle()
    with pytest.raises(InputError, match="served already"):
        calibration.measure(engine, VOCABULARY)
    for option, value in (("async_scheduling", "on"), ("speculate", "ngram")):
        engine = build_engine(loaded(tiny()), EngineConfig(**OPTIONS, **{option: value}))
        with pytest.raises(InputError, match=f"without {option}"):
            calibration.measure(engine, VOCABULARY)
