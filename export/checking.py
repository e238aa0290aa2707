"""Check every graph of a bundle for a target: lint, and trial builds if TensorRT-RTX is installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgeprune.bundle import DECODER, EMBED, MANIFEST, VISION, Bundle
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT, Progress
from edgeprune.lint.check import lint
from edgeprune.lint.rule import Finding
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, ShapeProfile, shape_profiles
from edgeprune.runtime.backends.tensorrt.trial import Trial, can_try, substitute_capability, try_build
from edgeprune.targets import Target


@dataclass(frozen=True)
class CheckReport:
    """Lint `findings` and trial builds; `trials` is None if no builder is installed or the target has none."""

    target: Target
    findings: tuple[Finding, ...]
    trials: tuple[Trial, ...] | None

    @property
    def passed(self) -> bool:
        """Whether there are no lint errors and no failed trial builds."""
        return not any(finding.severity == "error" for finding in self.findings) and not any(
            trial.error for trial in self.trials or ()
        )


def check_bundle(
    bundle: Bundle, target: Target, limits: ProfileLimits | None = None, *, progress: Progress = SILENT
) -> CheckReport:
    """Check a bundle's graphs for `target` under the optimization profiles of `limits`.

    Only the precision that the bundle was exported with is checked. Raises BundleError and UsageError.
    """
    findings = list(_product_findings(bundle))
    profiles = profiles_to_check(bundle, target, limits or ProfileLimits())
    trials: list[Trial] | None = [] if target.tensorrt is not None and can_try() else None
    for name, ranges in profiles.items():
        progress.begin(name)
        findings += lint(bundle.file(name), target, [profile for profile in ranges if profile], name=name)
        if trials is not None:
            trials.append(try_build(bundle.file(name), name, ranges, substitute_capability(target, bundle.manifest.precision)))
    return CheckReport(target, tuple(findings), None if trials is None else tuple(trials))


def profiles_to_check(bundle: Bundle, target: Target, limits: ProfileLimits) -> dict[str, tuple[ShapeProfile, ...]]:
    """Return the optimization profiles of each graph; none for graphs that were exported for CPUs, which no engine runs.

    Raises UsageError for those graphs and a target with engines.
    """
    made_for = bundle.manifest.lowering.target
    if not made_for.blocked:
        return shape_profiles(bundle, limits)
    if target.tensorrt is not None:
        raise UsageError(
            f"{bundle.path} was exported for {made_for.modules}: TensorRT does not read its graphs.",
            hint=f"Export it with --target {target.name}.",
        )
    return dict.fromkeys((name for name in bundle.manifest.graphs if name != EMBED), ())


def _product_findings(bundle: Bundle) -> Iterator[Finding]:
    # Engines overflow where ONNX Runtime's CPU, which multiplies in float32, does not: only the manifest knows.
    manifest = bundle.manifest
    if manifest.lowering.products != "float16":
        return
    if manifest.wide_products is None:
        reason = "It was not measured whether a product exceeds float16 (65,504), which makes an engine's answers nonsense."
        yield Finding(MANIFEST, "wide_products", "", reason, "Export the bundle again.", "warning")
    for name, size in (manifest.wide_products or {}).items():
        reason = f"Its products reached {size:,.0f} at export, so they stay in float32: more memory, and more time."
        yield Finding(DECODER if name.startswith("decoder.") else VISION, name, "", reason, "Nothing is to be done.", "warning")
