"""The verdict on each point of a sweep."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import SweepError
from pytest_gpumem.instruments.equality import compare_portraits
from pytest_gpumem.instruments.holders import blocks_on_cards
from pytest_gpumem.instruments.loads import OUTPUT, half_moved, model_in
from pytest_gpumem.instruments.module_parts import Placement, placement_of
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.trials import Attempt, Trial
from pytest_gpumem.records.record import Verdict
from pytest_gpumem.rules.rule import NOT_OOM
from pytest_gpumem.sweeps.report import Outcome, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device

#: The most leaks for which holders are searched, one for each site and mode. Each search
#: reads the whole heap several times.
_SEARCHES: Final = 8
_WORDS: Final = 400


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The facts that are kept about a model that a body has loaded."""

    placement: Placement
    output: Any


class SweepJudge:
    """Runs a body with one fault after another and judges each run.

    ``same`` tells whether two results are the same; without it they are compared by value.
    If ``run`` is given, it computes an output from each result, without faults. Then the
    outputs are compared instead of the results.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        setup: Callable[[], Sequence[Any]],
        *,
        same: Callable[[Any, Any], bool] | None,
        run: Callable[[Any], Any] | None,
        variants: bool,
        device: Device,
    ) -> None:
        self._run = run
        #: Whether the body has ended and the model that it loaded is being judged.
        self.is_looking = False
        self._variants = variants
        keep = portrait if run is None else self._loaded
        self._trial: Final = Trial(body=body, setup=setup, keep=keep, device=device)
        self._same = same
        self.device: Final = device
        self._reference: Attempt | None = None
        self._searched: set[tuple[str, str]] = set()
        # Read before the heap is frozen, because frozen tensors are not found any more.
        self._known = blocks_on_cards()
        #: Returns a block in which frozen objects are visible to the garbage collector.
        self.thawed: Callable[[], AbstractContextManager[object]] = nullcontext

    def clean(self) -> Attempt:
        """Run without a fault; the last such run is the reference.

        Raises:
            SweepError: The body raised; its own error is the cause.
        """
        try:
            attempt = self._trial.run(catches=lambda _error: False)
        except (Exception, SystemExit) as error:
            kind, text = type(error).__name__, str(error).strip()[:_WORDS]
            said = f"{kind}: {text}" if text else kind
            raise SweepError(f"the code fails without any fault: {said}") from error
        self._reference = attempt
        return attempt

    def judge(self, point: Point, timeout_s: float) -> Outcome | None:
        """Run with a fault and return the outcome; None if the fault was never reached."""
        attempt = self._trial.run(point.rule, timeout_s=timeout_s)
        is_hang = attempt.failure is not None and attempt.failure.is_hang
        if not attempt.num_injected and not is_hang:
            return None
        reference = self._reference or attempt
        verdict, detail = self._verdict(point, attempt, reference)
        left = attempt.left_bytes - reference.left_bytes
        changed = sorted(attempt.changed - reference.changed)
        if (left > 0 or changed) and verdict.passes(recover=False):
            verdict = Verdict.LEAK
        notes = [f"it leaves torch changed: {each}" for each in changed]
        return Outcome(
            point,
            verdict,
            "\n".join(filter(None, [detail, *notes, attempt.note])),
            max(left, 0),
            self._holders(point, attempt) if left > 0 else (),
            attempt.seconds,
            attempt.num_injected,
        )

    def _holders(self, point: Point, attempt: Attempt) -> tuple[str, ...]:
        kind = (point.site, point.mode)
        if kind in self._searched or len(self._searched) >= _SEARCHES:
            return ()
        self._searched.add(kind)
        with self.thawed():
            return self._trial.holders(attempt, also_known=self._known)

    def _loaded(self, result: Any) -> _Loaded:
        """Run the model that was loaded, without faults.

        Raises:
            AssertionError: The result is not a whole model.
        """
        model = model_in(result)
        if model is None:
            raise AssertionError("it returned no model and raised nothing")
        placement = placement_of(model)
        for problem in half_moved(placement):
            raise AssertionError(problem)
        self.is_looking = True
        try:
            return _Loaded(
                placement, portrait(self._run(result) if self._run else None)
            )
        finally:
            self.is_looking = False

    def _difference(self, reference: Any, result: Any) -> str | None:
        """Return the difference between a result and that of a run without faults."""
        if isinstance(reference, _Loaded) and isinstance(result, _Loaded):
            sizes = {each.placement.num_parameters for each in (reference, result)}
            if self._variants and len(sizes) > 1:
                return None
            dtypes = result.placement.dtypes
            pair = reference.output, result.output
            if self._same is None:
                return compare_portraits(*pair, where=OUTPUT, dtypes=dtypes).first
            reference, result = pair
        if self._same is None:
            return compare_portraits(reference, result).first
        same = self._same(reference, result)
        return None if same else "the result is not the same as without a fault"

    def _verdict(
        self, point: Point, attempt: Attempt, reference: Attempt
    ) -> tuple[Verdict, str]:
        failure = attempt.failure
        if failure is None:
            if point.flavour == NOT_OOM:
                return Verdict.SWALLOWED, "an error that is not an OOM was swallowed"
            wrong = self._difference(reference.result, attempt.result)
            return (Verdict.WRONG_RESULT, wrong) if wrong else (Verdict.RECOVERED, "")
        if failure.is_hang:
            return Verdict.HANG, failure.text
        words = failure.words(_WORDS)
        is_wrong = issubclass(failure.kind, AssertionError)
        if is_wrong or not failure.is_oom:
            return Verdict.WRONG_RESULT if is_wrong else Verdict.OTHER_ERROR, words
        if attempt.extra_ooms > 0 and point.flavour != NOT_OOM:
            return (
                Verdict.OVER_BUDGET,
                f"{attempt.extra_ooms} allocation(s) beyond the injected one found no "
                f"room: {words}",
            )
        return Verdict.CLEAN_OOM, words
