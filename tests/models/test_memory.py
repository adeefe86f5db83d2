"""How often the weights are in memory: by process, by worker, N times; and let go again."""

import dataclasses
import gc
import json
import os
import threading
import weakref

import apache_beam as beam
import pytest
from conftest import ROOT, answer_any, chat
from tiny import tiny_gemma

from chatflow.cli import main
from chatflow.models.gemma.handler import GemmaModelHandler
from chatflow.models.handlers import LanguageModelHandler
from chatflow.models.requests import Part, Request
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.models.spec import Model
from chatflow.options import Batching, Options, WorkerSettings
from chatflow.pipeline import build, plan
from chatflow.running.runner import beam_options
from chatflow.running.summary import Summary


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("gemma3"))


def load(preset, **settings):
    return GemmaModelHandler(
        preset, False, WorkerSettings(dtype="float32", **settings)
    ).load_model()


@pytest.mark.slow
def test_the_weights_of_a_model_that_is_let_go_are_freed(preset):
    """JAX keeps what it compiled for ever; what the model held must not stay with it."""
    import jax

    def held():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    model = load(preset)
    part = Part("summary", "the parcel is late", max_tokens=4)
    request = Request("id", "analysis", "7", "c", (part,))
    model.answer([request])
    threads = threading.active_count()
    gone = weakref.ref(model)
    with_one = held()
    del model
    assert gone() is None
    without = held()
    weights = 316 * 16 * 4
    assert with_one - without > weights
    again = load(preset)
    again.answer([request])
    assert held() <= with_one + 1000
    assert threading.active_count() <= threads


class Sized(ScriptedModelHandler):
    """A model that loads at once, kept as the settings say."""

    def __init__(self, settings):
        LanguageModelHandler.__init__(
            self, "sized", Batching(max_batch_size=2, max_batch_duration_secs=0), settings
        )
        self.function = answer_any


SETUPS = {
    "by process": (WorkerSettings(large_model=False), 2),
    "by worker": (WorkerSettings(), 1),
}
TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.slow
def test_two_processes_of_a_worker_load_as_many_copies_as_they_are_told(
    lines, tmp_path, script, monkeypatch, setup
):
    """Both inference steps run in both processes."""
    places = os.path.dirname(__file__), ROOT / "tests"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))  # they import this file
    settings, expected = SETUPS[setup]
    path = lines(*(chat("the parcel is late", chat_id=str(n)) for n in range(24)))
    options = Options(input=path, output=f"{tmp_path}/out", model=script({"answer": "unused"}))
    planned = dataclasses.replace(plan(options), model=Model(Sized(settings)))
    pipeline = beam.Pipeline(options=beam_options(TWO_PROCESSES))
    build(pipeline, planned)
    result = pipeline.run()
    result.wait_until_finish()
    planned.model.forget()
    counts = Summary.of(result, 1, planned).to_dict()
    assert (counts["analysed"], counts["drafted"], counts["lost"]) == (24, 24, 0)
    assert counts["copies_loaded"] == expected


@pytest.mark.slow
def test_two_copies_of_a_gemma_serve_two_processes(preset, lines, tmp_path, capsys):
    path = lines(*(chat("the parcel is late", chat_id=str(n)) for n in range(8)))
    arguments = [
        "run", f"--input={path}", f"--output={tmp_path}/out", f"--model={preset}",
        "--max_prompt_tokens=400", "--max_batch_size=1", "--dtype=float32", "--summary=json",
        "--model_copies=2", *TWO_PROCESSES,
    ]  # fmt: skip
    assert main(arguments) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (counts["lost"], counts["copies_loaded"]) == (0, 2)


@pytest.mark.slow
def test_models_that_come_and_go_take_no_more_memory_each(preset):
    """What is compiled for a model goes with it."""

    def resident_mb():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    request = Request("id", "analysis", "7", "c", (Part("summary", "the parcel", max_tokens=4),))
    sizes = []
    for _ in range(5):
        model = load(preset)
        model.answer([request])
        del model
        sizes.append(resident_mb())
    assert sizes[-1] - sizes[1] < 3 * 40, sizes  # it was 130 for each
