"""The verdict on each point of a sweep."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import SweepError
from pytest_gpumem.instruments.equality import compare
from pytest_gpumem.instruments.holders import blocks_on_cards
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.trials import Attempt, Trial
from pytest_gpumem.rules.rule import NOT_OOM
from pytest_gpumem.sweeps.report import Outcome, Point, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.rules.rule import Rule

#: Leaks whose holders are looked for, one for each site and mode; each search walks the
#: whole heap several times.
_SEARCHES: Final = 8
_WORDS: Final = 400


class SweepJudge:
    """Runs a body with one fault after the other and judges each run.

    Args:
        body: The code under test.
        setup: Makes its arguments.
        same: Tells whether two portraits are the same; None means by value.
        device: The cards.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        setup: Callable[[], Sequence[Any]],
        same: Callable[[Any, Any], bool] | None,
        device: Device,
    ) -> None:
        self._trial: Final = Trial(body=body, setup=setup, keep=portrait, device=device)
        self._same = same
        self.device: Final = device
        self._reference: Attempt | None = None
        self._searched: set[tuple[str, str]] = set()
        # A frozen heap does not show what was on the cards before it was frozen.
        self._known = blocks_on_cards()
        #: What shows such objects for a block.
        self.thawed: Callable[[], AbstractContextManager[object]] = nullcontext

    def clean(self) -> Attempt:
        """Run without a fault; the last such run is the reference.

        Raises:
            SweepError: The body fails; its own error is the cause.
        """
        try:
            attempt = self._trial.run(catches=lambda _error: False)
        except (Exception, SystemExit) as error:
            kind, text = type(error).__name__, str(error).strip()[:_WORDS]
            said = f"{kind}: {text}" if text else kind
            raise SweepError(f"the code fails without any fault: {said}") from error
        self._reference = attempt
        return attempt

    def judge(self, point: Point, rule: Rule, timeout_s: float) -> Outcome | None:
        """Run with a fault; None if it was never reached."""
        attempt = self._trial.run(rule, timeout_s=timeout_s)
        is_hang = attempt.failure is not None and attempt.failure.is_hang
        if not attempt.num_injected and not is_hang:
            return None
        verdict, detail = self._verdict(point, attempt)
        left = attempt.left_bytes - (self._reference or attempt).left_bytes
        holders: tuple[str, ...] = ()
        if left > 0:
            holders = self._holders(point, attempt)
        changed = sorted(attempt.changed - (self._reference or attempt).changed)
        if (left > 0 or changed) and verdict.passes(recover=False):
            verdict = Verdict.LEAK
        notes = [f"it leaves torch changed: {each}" for each in changed]
        detail = "\n".join(filter(None, [detail, *notes, attempt.note]))
        return Outcome(
            point,
            verdict,
            detail,
            max(left, 0),
            holders,
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

    def _verdict(self, point: Point, attempt: Attempt) -> tuple[Verdict, str]:
        failure = attempt.failure
        if failure is None:
            return self._verdict_on_result(point, attempt)
        if failure.is_hang:
            return Verdict.HANG, failure.text
        words = failure.words(_WORDS)
        if failure.is_assertion:
            return Verdict.WRONG_RESULT, words
        if not failure.is_oom:
            return Verdict.OTHER_ERROR, words
        if attempt.extra_ooms > 0 and point.flavour != NOT_OOM:
            return (
                Verdict.OVER_BUDGET,
                f"{attempt.extra_ooms} allocation(s) beyond the injected one found no "
                f"room: {words}",
            )
        return Verdict.CLEAN_OOM, words

    def _verdict_on_result(self, point: Point, attempt: Attempt) -> tuple[Verdict, str]:
        if point.flavour == NOT_OOM:
            return Verdict.SWALLOWED, "an error that is no OOM vanished"
        wrong = self._wrong(attempt)
        return (Verdict.WRONG_RESULT, wrong) if wrong else (Verdict.RECOVERED, "")

    def _wrong(self, attempt: Attempt) -> str | None:
        reference = self._reference
        assert reference is not None, "unreachable: clean runs come first"  # noqa: S101  # states why
        if self._same is None:
            return compare(reference.result, attempt.result).first
        if self._same(reference.result, attempt.result):
            return None
        return "the result is not the same as without a fault"
