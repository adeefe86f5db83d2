"""Names each private or undocumented part of Beam that chatflow uses, and finds it in Beam."""

import ast
import functools
import importlib
import inspect

import pytest
from conftest import ROOT

DIRECT = "apache_beam.runners.direct."
LOCAL, SERVER = "chatflow/running/local.py", "chatflow/models/vllm/server.py"
STAGING, EARLY = "chatflow/sinks/staging.py", "chatflow/running/early.py"
USES = (
    (LOCAL, "build its runner on Beam's", DIRECT + "direct_runner",
     "BundleBasedDirectRunner.run_pipeline BundleBasedDirectRunner.is_fnapi_compatible "
     "DirectPipelineResult._state _get_transform_overrides"),
    (LOCAL, "replace transforms", "apache_beam.pipeline",
     "PTransformOverride Pipeline.replace_all"),
    (STAGING, "write to staging folders", "apache_beam.pipeline",
     "PTransformOverride Pipeline.replace_all"),
    (EARLY, "let results come early", "apache_beam.pipeline",
     "PTransformOverride Pipeline.replace_all"),
    (LOCAL, "find the steps of a pipeline", DIRECT + "consumer_tracking_pipeline_visitor",
     "ConsumerTrackingPipelineVisitor"),
    (LOCAL, "make bundles", DIRECT + "bundle_factory", "BundleFactory"),
    (LOCAL, "tell the time", DIRECT + "clock", "RealClock"),
    (LOCAL, "read from Pub/Sub", DIRECT + "direct_runner",
     "_DirectReadFromPubSub _DirectReadFromPubSub._source"),
    (LOCAL, "read from Pub/Sub", "apache_beam.io.gcp.pubsub", "PubsubMessage._from_message"),
    (LOCAL, "begin a source's next bundle", "apache_beam.pvalue", "PBegin"),
    (LOCAL, "let side inputs change", DIRECT + "evaluation_context",
     "_SideInputsContainer._lock _SideInputsContainer._views _SideInputsContainer.add_values "
     "_SideInputsContainer._pvalue_to_value _SideInputsContainer.get_value_or_block_until_ready "
     "_SideInputsContainer._update_watermarks_for_side_input_and_unblock_tasks "
     "EvaluationContext._side_inputs_container"),
    (LOCAL, "fire timers and forget keys", DIRECT + "evaluation_context",
     "EvaluationContext.handle_result EvaluationContext.extract_all_timers "
     "EvaluationContext._transform_keyed_states EvaluationContext._watermark_manager"),
    (LOCAL, "fire timers", DIRECT + "watermark_manager", "_TransformWatermarks._fired_timers"),
    (LOCAL, "see whether elements wait", DIRECT + "watermark_manager",
     "_TransformWatermarks._pending WatermarkManager._transform_to_watermarks"),
    (LOCAL, "see whether elements wait", DIRECT + "evaluation_context",
     "EvaluationContext._lock EvaluationContext.is_root_transform"),
    (LOCAL, "return what a bundle made", DIRECT + "util", "TimerFiring TransformResult"),
    (LOCAL, "put its own evaluators in place of Beam's", DIRECT + "transform_evaluator",
     "TransformEvaluatorRegistry._evaluators TransformEvaluatorRegistry._evaluation_context "
     "TransformEvaluatorRegistry.should_execute_serially TransformEvaluatorRegistry.get_evaluator"),
    (LOCAL, "evaluate a source", DIRECT + "transform_evaluator",
     "_TransformEvaluator._applied_ptransform _TransformEvaluator._outputs "
     "_TransformEvaluator._evaluation_context"),
    (LOCAL, "set a DoFn up once for many bundles", DIRECT + "transform_evaluator",
     "_ParDoEvaluator.start_bundle _ParDoEvaluator.finish_bundle _ParDoEvaluator._side_inputs "
     "_ParDoEvaluator._step_context _TaggedReceivers"),
    (LOCAL, "set a DoFn up once for many bundles", "apache_beam.runners.common",
     "DoFnRunner.setup DoFnState Receiver.receive"),
    (LOCAL, "set a DoFn up once for many bundles", "apache_beam.internal.pickler", "roundtrip"),
    (LOCAL, "keep state and timers of a DoFn", DIRECT + "direct_userstate",
     "DirectUserStateContext.step_context DirectUserStateContext.all_timer_specs "
     "DirectUserStateContext.commit DirectUserStateContext.reset"),
    (LOCAL, "keep state and timers of a DoFn", "apache_beam.transforms.userstate",
     "is_stateful_dofn"),
    (LOCAL, "execute bundles", DIRECT + "executor", "Executor.start Executor._executor"),
    (LOCAL, "try a failed bundle again", DIRECT + "executor",
     "_ExecutorServiceParallelExecutor.schedule_consumption TransformExecutor.call "
     "TransformExecutor.attempt_call TransformExecutor._retry_count "
     "TransformExecutor._max_retries_per_bundle"),
    (LOCAL, "let a run go on after Ctrl-C", "apache_beam.runners.runner", "PipelineState.RUNNING"),
    (LOCAL, "count metrics of each bundle", "apache_beam.runners.worker.statesampler",
     "StateSampler set_current_tracker"),
    (LOCAL, "count metrics of each bundle", "apache_beam.utils.counters", "CounterFactory"),
    (SERVER, "start vLLM's server under a guard", "apache_beam.ml.inference.vllm_inference",
     "start_process"),
    (SERVER, "find, watch and stop vLLM's server", "apache_beam.ml.inference.vllm_inference",
     "_VLLMModelServer._server_port _VLLMModelServer._server_process "
     "_VLLMModelServer._stop_processes _VLLMModelServer.get_server_port "
     "_VLLMModelServer.check_connectivity"),
    (SERVER, "find a free port", "apache_beam.utils.subprocess_server", "pick_port"),
    ("chatflow/models/spec.py", "close the model that a process holds",
     "apache_beam.utils.multi_process_shared", "_process_level_singleton_manager.entries"),
    ("chatflow/running/runner.py", "run a batch in this process",
     "apache_beam.runners.portability.fn_api_runner", "FnApiRunner"),
    ("chatflow/running/runner.py", "find unknown flags and show its own on a job's page",
     "apache_beam.options.pipeline_options", "PipelineOptions._add_argparse_args"),
    ("chatflow/options.py", "name the flag that was meant, of its own and Beam's",
     "argparse", "ArgumentParser._option_string_actions"),
    ("chatflow/models/inference.py", "not import PyTorch", "apache_beam.ml.inference.model_manager",
     "ModelManager"),
    ("chatflow/models/inference.py", "measure memory without the model manager",
     "apache_beam.ml.inference.base", "resource"),
    ("chatflow/running/launch.py", "find what a pipeline reads and writes",
     "apache_beam.pipeline", "PipelineVisitor.enter_composite_transform"),
)  # fmt: skip
"""Files, what they need parts of Beam for, and the module and names of these parts."""

PRIVATE = (
    "apache_beam.internal", "apache_beam.runners", "apache_beam.utils.counters",
    "apache_beam.utils.multi_process_shared", "apache_beam.utils.subprocess_server",
)  # fmt: skip
"""Modules of which nothing is meant for users."""

NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}

TABLE = [(*use, name) for *use, names in USES for name in names.split()]


@pytest.mark.parametrize(
    ("file", "purpose", "module", "name"), TABLE, ids=[f"{row[2]}.{row[3]}" for row in TABLE]
)
def test_beam_has_the_part(file, purpose, module, name):
    *path, last = name.split(".")
    try:
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        gone = not (hasattr(owner, last) or sets(owner, last))
    except (AttributeError, ImportError):
        gone = True
    assert not gone, f"{module}.{name} is gone; {file} needs it to {purpose}"


def sets(owner, name):
    """Returns whether a class, or one that it extends, sets an attribute of its instances."""
    classes = [kind for kind in inspect.getmro(owner) if kind.__module__ != "builtins"]
    return any(f"self.{name}" in inspect.getsource(kind) for kind in classes)


def test_the_table_is_complete():
    named = {(file, part) for file, _, _, name in TABLE for part in name.split(".")}
    sources = {str(p.relative_to(ROOT)): p.read_text() for p in ROOT.glob("chatflow/**/*.py")}
    trees = {file: ast.parse(text) for file, text in sources.items()}
    functions = {n.name for tree in trees.values() for n in ast.walk(tree) if is_definition(n)}
    used = {
        (file, part)
        for file, tree in trees.items()
        if "apache_beam" in sources[file]
        for part in privates(tree, functions)
    }
    missing = {f"{file}: {part}" for file, part in used - named}
    assert missing == set(), "private parts of Beam that the table above does not name"
    unused = [row for row in TABLE if row[3].split(".")[-1] not in sources.get(row[0], "")]
    assert unused == [], "the table above names what is not used"


def is_definition(node):
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def privates(tree, functions):
    """Yields the names of Beam's private parts in a module.

    An attribute with an underscore is Beam's where chatflow does not define it.
    """
    nodes, modules = list(ast.walk(tree)), {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("apache_beam."):
            for alias in node.names:
                if is_module(path := f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = path
                elif is_private(node.module, alias.name):
                    yield alias.name
    own = functions | {n.id for n in nodes if isinstance(n, ast.Name)}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and is_set_on(n, "self")}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            value = node.value
            inherited = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "super"
            if isinstance(value, ast.Name) and value.id in modules:
                if is_private(modules[value.id], node.attr):
                    yield node.attr
            elif is_underscored(node.attr) and (inherited or node.attr not in own):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, _, name = node.value.rpartition(".")
            if module.startswith(PRIVATE) and name[:1].isupper():
                yield name


def is_set_on(node, name):
    is_stored = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
    return is_stored and node.value.id == name


def is_private(module, name):
    public = getattr(importlib.import_module(module), "__all__", [name])
    return module.startswith(PRIVATE) or name not in public or is_underscored(name)


def is_underscored(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLES


def is_module(path):
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # its parent is not a package
        return False
