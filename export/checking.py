"""Check every graph of a bundle for a target: the lint, and where TensorRT-RTX is installed, real builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.bundle import Bundle
from edgeprune.lint.check import lint
from edgeprune.lint.rule import Finding
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, shape_profiles
from edgeprune.runtime.backends.tensorrt.trial import Trial, can_try, substitute_capability, try_build
from edgeprune.targets import Target


@dataclass(frozen=True)
class CheckReport:
    """What was found: `findings` of the lint, and `trials`, None where no builder is installed or the target has none."""

    target: Target
    findings: tuple[Finding, ...]
    trials: tuple[Trial, ...] | None

    @property
    def passed(self) -> bool:
        """Whether the target would take every graph, as far as was tried."""
        return not any(finding.severity == "error" for finding in self.findings) and not any(
            trial.error for trial in self.trials or ()
        )


def check_bundle(
    bundle: Bundle, target: Target, limits: ProfileLimits | None = None, *, progress: Callable[[str], None] = lambda graph: None
) -> CheckReport:
    """Return what `target` would say of a bundle's graphs under the optimization profiles of `limits`.

    Weights of a precision that the bundle was not exported with are not tried. Raises BundleError and UsageError.
    """
    profiles = shape_profiles(bundle, limits or ProfileLimits())
    tried: list[Trial] | None = [] if target.tensorrt is not None and can_try() else None
    findings: list[Finding] = []
    for name, ranges in profiles.items():
        progress(name)
        given = [profile for profile in ranges if profile]
        findings += lint(bundle.file(name), target, given, name=name)
        if tried is not None:
            tried.append(try_build(bundle.file(name), name, ranges, substitute_capability(target)))
    return CheckReport(target, tuple(findings), None if tried is None else tuple(tried))
