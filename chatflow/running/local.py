"""LocalStreamRunner: runs a stream in this process, without any service.

It is Beam's BundleBasedDirectRunner with these faults fixed: Beam's blocks while it waits for
Pub/Sub (up to 30 seconds), acknowledges messages before they are handled, fails when Pub/Sub cannot
be reached, sets up each DoFn for each bundle, slows down with each key that it has seen, counts
metrics of first bundles only, and cannot be drained. State is kept in memory; if it must survive a
crash, run on Dataflow or Flink.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from apache_beam import ParDo, TimeDomain, pvalue
from apache_beam.coders import registry as coders
from apache_beam.internal import pickler
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.pipeline import PTransformOverride
from apache_beam.runners.common import DoFnRunner, DoFnState, Receiver
from apache_beam.runners.direct import direct_runner
from apache_beam.runners.direct.bundle_factory import BundleFactory
from apache_beam.runners.direct.clock import RealClock
from apache_beam.runners.direct.consumer_tracking_pipeline_visitor import (
    ConsumerTrackingPipelineVisitor,
)
from apache_beam.runners.direct.direct_userstate import DirectUserStateContext
from apache_beam.runners.direct.evaluation_context import (
    EvaluationContext,
    _SideInputsContainer,
)
from apache_beam.runners.direct.executor import (
    Executor,
    TransformExecutor,
    _ExecutorServiceParallelExecutor,
)
from apache_beam.runners.direct.transform_evaluator import (
    TransformEvaluatorRegistry,
    _ParDoEvaluator,
    _TaggedReceivers,
    _TransformEvaluator,
)
from apache_beam.runners.direct.util import TimerFiring, TransformResult
from apache_beam.runners.runner import PipelineState
from apache_beam.runners.worker import statesampler
from apache_beam.transforms.core import Windowing
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.transforms.ptransform import PTransform
from apache_beam.transforms.userstate import is_stateful_dofn
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils import counters
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Timestamp

from chatflow.sources.puller import Puller

_log = logging.getLogger(__name__)

BUNDLE = 1000
"""Maximum messages per bundle; the next one fills up while one is handled."""

_LAG = 0.2  # watermark lag in seconds; messages can arrive out of order


class LocalStreamRunner(direct_runner.BundleBasedDirectRunner):
    """Runs a pipeline that reads from Pub/Sub until it is drained or fails."""

    def is_fnapi_compatible(self) -> bool:
        """Returns True, so that composites appear as built, and not as read from a proto."""
        return True

    def run_pipeline(self, pipeline: Any, options: Any) -> LocalStreamResult:
        """Runs as `BundleBasedDirectRunner` does, with the parts below instead of Beam's."""
        pipeline.replace_all([_TicksOverride(), *direct_runner._get_transform_overrides(options)])
        graph = ConsumerTrackingPipelineVisitor()
        pipeline.visit(graph)
        self.consumer_tracking_visitor = graph
        context = _Context(
            options,
            BundleFactory(stacked=False),
            graph.root_transforms,
            graph.value_to_consumers,
            graph.step_names,
            graph.views,
            RealClock(),
        )
        readers = _Readers()
        registry = _Registry(context, readers)
        registry.set_up(itertools.chain(*graph.value_to_consumers.values()))
        executor = Executor.__new__(Executor)
        executor._executor = _PatientExecutor(graph.value_to_consumers, registry, context)
        executor.start(graph.root_transforms)
        return LocalStreamResult(executor, context, readers, registry)


class LocalStreamResult(direct_runner.DirectPipelineResult):
    """A running stream; waiting for it returns once it is drained, or raises its failure."""

    def __init__(self, executor: Any, context: Any, readers: _Readers, registry: _Registry):
        super().__init__(executor, context)
        self._readers, self._registry = readers, registry

    def drain(self) -> None:
        """Stops reading, and ends all open chats."""
        self._readers.draining.set()

    def wait_until_finish(self, duration: Any = None) -> str:
        try:
            state: str = super().wait_until_finish(duration)
        except KeyboardInterrupt:
            self._state = PipelineState.RUNNING  # the caller may drain it now
            raise
        except BaseException:
            self._close(handled=False)
            raise
        self._close(handled=True)
        return state

    def _close(self, handled: bool) -> None:
        self._registry.tear_down()
        self._readers.close(handled)


class _Readers:
    def __init__(self) -> None:
        self.draining = threading.Event()
        self.by_path: dict[str, _Reader] = {}

    def of(self, source: Any) -> _Reader:
        path = source.full_subscription or source.full_topic
        if path not in self.by_path:
            self.by_path[path] = _Reader(path)
        return self.by_path[path]

    def close(self, handled: bool) -> None:
        for reader in self.by_path.values():
            reader.close(handled)


class _Reader:
    """Reads the messages of a source, a bundle at a time."""

    def __init__(self, path: str):
        self._puller = Puller(path, BUNDLE).start()
        self._unacknowledged: list[tuple[int, Any]] = []
        self.watermark = Timestamp.of(0)

    def read(self, wait: float, moves: int, enough: int) -> list[Any]:
        """Returns up to a bundle of messages; waits up to `wait` seconds for the first.

        It first acknowledges earlier messages that no step holds any part of: they were taken
        `enough` moves ago, see `_Context.moves`.
        """
        self._acknowledge(moves - enough)
        taken = self._puller.take(BUNDLE, wait)
        self._unacknowledged += [(moves, received) for received in taken]
        messages = [received.message for received in taken]
        # More messages as old as these may come. If none come, event time follows the clock; it
        # stops while the service cannot be reached.
        oldest = min((m.publish_time.timestamp() for m in messages), default=time.time())
        if messages or self._puller.error is None:
            self.watermark = max(self.watermark, Timestamp.of(oldest - _LAG))
        return messages

    def _acknowledge(self, upto: float) -> None:
        handled = [received for moves, received in self._unacknowledged if moves <= upto]
        if handled:
            self._puller.acknowledge(handled)
            self._unacknowledged = self._unacknowledged[len(handled) :]

    def close(self, handled: bool) -> None:
        if handled:
            self._acknowledge(math.inf)
        self._puller.close()


class _ReadEvaluator(_TransformEvaluator):
    """Reads the next bundle; the runner calls it when it has nothing else to do."""

    readers: _Readers

    def start_bundle(self) -> None:
        self.reader = self.readers.of(self._applied_ptransform.transform._source)

    def process_element(self, element: Any) -> None:
        pass

    def finish_bundle(self) -> TransformResult:
        # Check before reading: an empty read then means that nothing is left.
        draining = self.readers.draining.is_set()
        moves, enough = self._evaluation_context.moves()
        messages = self.reader.read(0.0 if draining else 0.05, moves, enough)
        if draining and not messages:
            return TransformResult(self, [], [], None, {None: MAX_TIMESTAMP})
        bundle = self._evaluation_context.create_bundle(next(iter(self._outputs)))
        for message in messages:
            element = PubsubMessage._from_message(message)
            at = Timestamp.from_utc_datetime(message.publish_time)
            bundle.output(GlobalWindows.windowed_value(element, timestamp=at))
        begin = pvalue.PBegin(self._applied_ptransform.transform.pipeline)
        again = self._evaluation_context.create_bundle(begin)
        return TransformResult(self, [bundle], [again], None, {None: self.reader.watermark})


class _Ticks(PTransform):
    """Replaces `PeriodicImpulse`: emits the time at each interval, until the runner is drained."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def expand(self, begin: pvalue.PBegin) -> pvalue.PCollection:
        return pvalue.PCollection(begin.pipeline, is_bounded=False)

    def get_windowing(self, inputs: Any) -> Windowing:
        return Windowing(GlobalWindows())


class _TicksOverride(PTransformOverride):
    """Replaces Beam's `PeriodicImpulse`, a splittable DoFn that this runner cannot drain."""

    def matches(self, applied: Any) -> bool:
        return isinstance(applied.transform, PeriodicImpulse)

    def get_replacement_transform_for_applied_ptransform(self, applied: Any) -> PTransform:
        return _Ticks(applied.transform.interval)


class _TicksEvaluator(_TransformEvaluator):
    readers: _Readers
    due: dict[Any, float]

    def start_bundle(self) -> None:
        pass

    def process_element(self, element: Any) -> None:
        pass

    def finish_bundle(self) -> TransformResult:
        applied = self._applied_ptransform
        if self.readers.draining.wait(timeout=0.05):
            return TransformResult(self, [], [], None, {None: MAX_TIMESTAMP})
        now = time.time()
        bundles = []
        if now >= self.due.get(applied, 0.0):
            self.due[applied] = now + applied.transform.seconds
            bundle = self._evaluation_context.create_bundle(next(iter(self._outputs)))
            at = Timestamp.of(now)
            bundle.output(GlobalWindows.windowed_value(at, timestamp=at))
            bundles.append(bundle)
        begin = pvalue.PBegin(applied.transform.pipeline)
        again = self._evaluation_context.create_bundle(begin)
        return TransformResult(self, bundles, [again], None, {None: Timestamp.of(now - _LAG)})


class _SideInputs(_SideInputsContainer):
    """Side inputs that change: a view is the last value, and is ready when there is one."""

    def get_value_or_block_until_ready(self, side_input: Any, task: Any, block_until: Any) -> Any:
        with self._lock:
            view = self._views[side_input]
            if view.elements:
                return self._pvalue_to_value(side_input, view.elements[-1:])
        return super().get_value_or_block_until_ready(side_input, task, block_until)

    def add_values(self, side_input: Any, values: Iterable[Any]) -> None:
        with self._lock:
            view = self._views[side_input]
            view.elements = [*view.elements, *values][-1:]

    def _update_watermarks_for_side_input_and_unblock_tasks(
        self, side_input: Any, watermark: Any
    ) -> list[Any]:
        with self._lock:
            view = self._views[side_input]
            ready = [task for task, _ in view.blocked_tasks] if view.elements else []
            if ready:
                view.blocked_tasks.clear()
        for task in ready:
            task.blocked = False
        others: list[Any] = super()._update_watermarks_for_side_input_and_unblock_tasks(
            side_input, watermark
        )
        return ready + others


class _Registry(TransformEvaluatorRegistry):
    def __init__(self, context: Any, readers: _Readers):
        super().__init__(context)
        self._serial: dict[Any, bool] = {}
        reads = type("_ReadEvaluator", (_ReadEvaluator,), {"readers": readers})
        self._evaluators[direct_runner._DirectReadFromPubSub] = reads
        ticks = type("_TicksEvaluator", (_TicksEvaluator,), {"readers": readers, "due": {}})
        self._evaluators[_Ticks] = ticks
        self.steps: dict[Any, _Step] = {}
        runs = type("_StepEvaluator", (_StepEvaluator,), {"steps": self.steps})
        self._evaluators[ParDo] = runs

    def set_up(self, steps: Iterable[Any]) -> None:
        """Sets up all DoFns, models among them, before anything is read."""
        for step in steps:
            nothing = self._evaluation_context.create_empty_committed_bundle(step.inputs[0])
            if isinstance(step.transform, ParDo) and not step.side_inputs:
                evaluator = self.get_evaluator(step, nothing, [])
                if isinstance(evaluator, _StepEvaluator):
                    self.steps[step] = _Step(evaluator)

    def tear_down(self) -> None:
        """Tears down the DoFns, so that they finish what they hold, e.g. files."""
        while self.steps:
            _, step = self.steps.popitem()
            try:
                step.runner.teardown()
            except Exception:
                _log.warning("a step could not be torn down", exc_info=True)

    def should_execute_serially(self, transform: Any) -> bool:
        if transform not in self._serial:
            self._serial[transform] = super().should_execute_serially(transform)
        return self._serial[transform]


class _Forward(Receiver):
    """Passes elements on to the bundle in progress."""

    bundle: Any = None

    def receive(self, element: Any) -> None:
        self.bundle.output(element)


class _Step:
    """A DoFn that is set up once and runs many bundles."""

    def __init__(self, evaluator: _ParDoEvaluator):
        applied = evaluator._applied_ptransform
        transform = applied.transform
        dofn = pickler.roundtrip(transform.dofn)
        self.timers: dict[str, Any] = {}
        self.key_coder = self.state = None
        if is_stateful_dofn(dofn):
            hint = applied.inputs[0].element_type
            coder = coders.get_coder(hint)
            self.key_coder = coder.key_coder() if hint != Any else coder
            self.state = DirectUserStateContext(evaluator._step_context, dofn, self.key_coder)
            self.timers = {f"user/{timer.name}": timer for timer in self.state.all_timer_specs}
        self.receivers = _TaggedReceivers(evaluator._evaluation_context)
        for tag in applied.outputs:
            self.receivers[tag] = _Forward()
        self.runner = DoFnRunner(
            dofn,
            getattr(transform, "args", []),
            getattr(transform, "kwargs", {}),
            [],
            applied.inputs[0].windowing,
            tagged_receivers=self.receivers,
            step_name=applied.full_label,
            state=DoFnState(counters.CounterFactory()),
            user_state_context=self.state,
        )
        self.runner.setup()


class _StepEvaluator(_ParDoEvaluator):
    """Runs a bundle on a DoFn that stays; Beam's evaluator sets one up for each bundle."""

    steps: dict[Any, _Step]

    def start_bundle(self) -> None:
        if self._side_inputs:
            self.step = None
            super().start_bundle()
            return
        applied = self._applied_ptransform
        # Removed while it runs, so that the bundle after a failure starts with a fresh one.
        self.step = step = self.steps.pop(applied, None) or _Step(self)
        self.bundles = []
        for tag, receiver in step.receivers.items():
            output = pvalue.PCollection(None, tag=tag)
            output.producer = applied
            receiver.bundle = self._evaluation_context.create_bundle(output)
            receiver.bundle.tag = tag
            self.bundles.append(receiver.bundle)
        if step.state is not None:
            step.state.step_context = self._step_context
        self.user_timer_map, self.key_coder, self.runner = step.timers, step.key_coder, step.runner
        step.runner.start()

    def finish_bundle(self) -> TransformResult:
        step = self.step
        if step is None:
            return super().finish_bundle()
        step.runner.finish()
        if step.state is not None:
            step.state.commit()
            step.state.reset()
        self.steps[self._applied_ptransform] = step
        return TransformResult(self, self.bundles, [], None, None)


class _Timer(NamedTuple):
    """A timer that is set, with the fields of a `TimerFiring`."""

    encoded_key: bytes
    window: Any
    name: str
    time_domain: str
    timestamp: Timestamp
    dynamic_timer_tag: str


class _Timers:
    """The timers of a step, soonest first."""

    def __init__(self, states: dict[bytes, Any]):
        self.states = states
        self.firing: set[_Timer] = set()
        self._known: set[_Timer] = set()
        self._waiting: dict[str, list[tuple[Timestamp, int, _Timer]]] = {
            TimeDomain.WATERMARK: [],
            TimeDomain.REAL_TIME: [],
        }
        self._number = itertools.count()  # orders timers of the same time

    def note(self, key: bytes) -> None:
        """Adds the timers that a bundle set for a key."""
        for window, timers in self.states[key].timers.items():
            for (name, domain, tag), at in timers.items():
                timer = _Timer(key, window, name, domain, at, tag)
                if timer not in self._known and timer not in self.firing:
                    self._known.add(timer)
                    heapq.heappush(self._waiting[domain], (at, next(self._number), timer))

    def due(self, watermark: Timestamp, clock: float) -> list[_Timer]:
        """Removes and returns the timers that fire now."""
        due = []
        for domain, until in (
            (TimeDomain.WATERMARK, watermark),
            (TimeDomain.REAL_TIME, Timestamp.of(clock)),
        ):
            while (timer := self.next(domain)) and timer.timestamp <= until:
                self._drop_next(domain)
                due.append(timer)
        self.firing.update(due)
        return sorted(due, key=lambda timer: timer.timestamp)

    def next(self, domain: str) -> _Timer | None:
        """Returns the soonest timer that was neither cleared nor set again."""
        while waiting := self._waiting[domain]:
            timer = waiting[0][2]
            state = self.states.get(timer.encoded_key)
            timers = state.timers.get(timer.window, {}) if state else {}
            if timers.get((timer.name, domain, timer.dynamic_timer_tag)) == timer.timestamp:
                return timer
            self._drop_next(domain)
        return None

    def of_real_time(self) -> list[_Timer]:
        """Returns the timers of real time that wait or fire now, with some that were cleared."""
        waiting = [timer for _, _, timer in self._waiting[TimeDomain.REAL_TIME]]
        firing = [timer for timer in self.firing if timer.time_domain == TimeDomain.REAL_TIME]
        return waiting + firing

    def _drop_next(self, domain: str) -> None:
        self._known.discard(heapq.heappop(self._waiting[domain])[2])

    def hold(self) -> Timestamp:
        """Returns the watermark hold of the step: the time of its next timer, which may emit."""
        times = [t.timestamp for t in self.firing if t.time_domain == TimeDomain.WATERMARK]
        if soonest := self.next(TimeDomain.WATERMARK):
            times.append(soonest.timestamp)
        return min(times, default=MAX_TIMESTAMP)


class _Context(EvaluationContext):
    """Finds the next timers without a search, and drops keys that have no state left.

    A timer holds the watermark of the steps after it, as in Beam's model. Otherwise, what timers
    emit while the stream is drained would be dropped as late.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._side_inputs_container = _SideInputs(self.views)
        self._timers: dict[Any, _Timers] = {}
        self._moves = 0
        self._awaited: set[Any] = set()

    def handle_result(self, completed_bundle: Any, completed_timers: Any, result: Any) -> Any:
        states = self._transform_keyed_states[result.transform]
        if isinstance(result.transform.transform, ParDo) and result.partial_keyed_state:
            timers = self._timers.setdefault(result.transform, _Timers(states))
            timers.firing.difference_update(_Timer(**vars(timer)) for timer in completed_timers)
            states.update(result.partial_keyed_state)
            for key in result.partial_keyed_state:
                timers.note(key)
            result.keyed_watermark_holds[None] = timers.hold()
        committed = super().handle_result(completed_bundle, completed_timers, result)
        for key in result.partial_keyed_state:
            state = states[key]
            kept = any(any(tags.values()) for tags in state.state.values())
            if not (kept or any(state.timers.values()) or state.global_state):
                del states[key]
        return committed

    def moves(self) -> tuple[int, int]:
        """Returns how often everything read has moved on, and after how many moves it is in a sink.

        The runner reads when no step is executing. But the results of a step that has ended may
        not have been handed on, and steps that batch hold elements in state until a timer of real
        time fires. When no step has anything to handle, each element is in a sink or waits for such
        a timer. When these timers are gone, and again no step has anything to handle, each element
        has passed one more step that batches.
        """
        with self._lock:
            watermarks = self._watermark_manager._transform_to_watermarks
            is_idle = not any(
                marks._pending
                for step, marks in watermarks.items()
                if not self.is_root_transform(step)
            )
            steps = len(self._timers) + 1
            if is_idle:
                waiting = {
                    (step, timer)
                    for step, timers in self._timers.items()
                    for timer in timers.of_real_time()
                }
                if not waiting:
                    self._moves += steps
                elif self._awaited.isdisjoint(waiting):
                    self._moves += 1
                    self._awaited = waiting
            return self._moves, steps

    def extract_all_timers(self) -> tuple[list[Any], bool]:
        fired, any_real_time = [], False
        for transform, timers in self._timers.items():
            watermarks = self._watermark_manager.get_watermarks(transform)
            clock = watermarks.synchronized_processing_output_time
            if due := timers.due(watermarks.input_watermark, clock):
                firings = [TimerFiring(*timer) for timer in due]
                watermarks._fired_timers.update(firings)
                fired.append((transform, firings))
            any_real_time = any_real_time or timers.next(TimeDomain.REAL_TIME) is not None
        return fired, any_real_time


class _PatientExecutor(_ExecutorServiceParallelExecutor):
    """Retries a bundle that fails, with growing pauses, as streaming runners do."""

    def schedule_consumption(
        self, consumer: Any, committed_bundle: Any, fired_timers: Any, on_complete: Any
    ) -> None:
        services = self.transform_executor_services
        serial = self.transform_evaluator_registry.should_execute_serially(consumer)
        service = services.serial(consumer) if serial else services.parallel()
        work = _PatientTransformExecutor(
            self.transform_evaluator_registry,
            self.evaluation_context,
            committed_bundle,
            fired_timers,
            consumer,
            on_complete,
            service,
        )
        service.schedule(work)


class _PatientTransformExecutor(TransformExecutor):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self._max_retries_per_bundle = 12  # within two minutes

    def call(self, state_sampler: Any) -> None:
        """Uses a new sampler, because a reused one counts the first bundle only."""
        own = statesampler.StateSampler("", counters.CounterFactory())
        statesampler.set_current_tracker(own)
        super().call(own)

    def attempt_call(self, *args: Any) -> Any:
        try:
            return super().attempt_call(*args)
        except Exception:
            if self._retry_count + 1 < self._max_retries_per_bundle:
                time.sleep(min(0.1 * 2**self._retry_count, 30))
            raise
