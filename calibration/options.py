"""The options of `edgeprune calibrate` and `compare`, and what is checked before torch is imported: values, files and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.calibration.allocate.recipes import STATISTICAL, method_names
from edgeprune.calibration.data.samples import BadSampleError, Sample, check_images, draw_samples, read_samples
from edgeprune.calibration.interop.lightcompress import is_lightcompress
from edgeprune.calibration.search.candidates import BASELINES
from edgeprune.calibration.search.goal import Goal
from edgeprune.calibration.search.tuning import check_samples, to_try
from edgeprune.checkpoint.configuration import check_folder, check_size, decoder_layers
from edgeprune.checkpoint.loading import ModelFolder, resolve_model
from edgeprune.device.jetson import module_named
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import UsageError
from edgeprune.io.files import check_output, is_file, is_folder
from edgeprune.plan import KeepPlan, Option, check_keep_ratio
from edgeprune.plan.weights import weights_path
from edgeprune.registry import METHODS, allow_method, options_of, unknown_method

AUTO, DYRATE, LEARNED, PLPHP, VTW = "auto", "dyrate", "learned", "plphp", "vtw"
LEARNING = (*(method for method in STATISTICAL if method != VTW), LEARNED)  # from samples, in `compare`
COMPARED = sorted([*method_names(), LEARNED])
DROP = 0.01  # the loss of agreement that a search allows by default
_PLACES = {  # which methods take --site or --layer
    "evit": ("layer",),
    "fastv": ("layer",),
    "random": ("site",),
    "uniform": ("site",),
    "dyrate": ("layer",),
}
PLACES = ("site", "layer")
_RANKING = ("rows", "reduce", "spread")  # of the caches, in statistics
_SEARCH = ("max_drop", "target_flops", "target_kv", "target_ttft", "target_reads", "times", "curve")


@dataclass(frozen=True)
class CalibrateOptions:
    """The command's options by name; None for options that were not given. `settings`: the options of the method, checked."""

    model: str
    data: Path
    method: str | None
    budget: float | None
    output: Path | None
    statistics: Path | None
    force: bool
    limit: int | None
    seed: int
    rows: str | None
    reduce: str | None
    spread: bool
    max_tokens: int
    image_size: tuple[int, int] | None
    device: str
    shard: tuple[int, int] | None
    ray_address: str | None
    trust_remote_code: bool
    fit: str
    site: str | None
    layer: int | None
    onto: Path | None
    max_drop: float | None
    target_flops: float | None
    target_kv: float | None
    target_ttft: float | None
    target_reads: float | None
    device_name: str | None
    times: Path | None
    curve: Path | None
    skip_bad: bool = False
    revision: str | None = None
    adapter: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the options among `names` that the user gave."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None and getattr(self, name) is not False}

    @property
    def ranking(self) -> dict[str, Any]:
        """How caches are ranked: rows, reduce and spread of `edgeprune.methods.plphp`."""
        own = {name: self.settings[name] for name in _RANKING if self.method == PLPHP and name in self.settings}
        return {"rows": "last", "reduce": "mean", "spread": False} | self.given(_RANKING) | own

    @property
    def learns_ranking(self) -> bool:
        """Whether calibration learns how caches are ranked."""
        return bool(self.ranking["rows"] == "learned")

    @property
    def allocation(self) -> dict[str, Any]:
        """The settings of `edgeprune.calibration.allocate.recipes.plan_for_budget`."""
        ranking = _RANKING if self.method == PLPHP else ()
        return self.given(PLACES) | {name: value for name, value in self.settings.items() if name not in ranking}

    @property
    def spent(self) -> float | None:
        """The share of the method's cost that the plan may spend: --budget, or r of PLPHP."""
        return self.settings.get("r") if self.budget is None else self.budget

    @property
    def to_try(self) -> list[Option]:
        """The options of the method whose values are compared."""
        return to_try(options_of(self.method, calibration=True), self.settings) if self.method in METHODS else []

    def check(self) -> None:
        """Raise UsageError for options that do not belong together, are out of range, or name files that cannot be used."""
        if self.method is None:
            if self.statistics is None:
                raise UsageError(
                    "Neither --method nor --statistics says what to make.",
                    hint="For example: --method plphp --budget 0.5 -o p.json",
                )
            unused = {"--budget": self.budget, "--output": self.output, "--onto": self.onto}
        elif self.output is None:
            raise UsageError("There is no file for the plan (-o).")
        elif self.shard is not None:
            raise UsageError("A shard gives statistics, not a plan.", hint="Leave --method out, and merge the shards first.")
        else:
            unused = {"--budget": self.budget} if self.method == AUTO else {}
            self._check_budget()
        self._check_foreign([name for name, value in unused.items() if value is not None])
        if self.method is not None and self.method not in (names := [AUTO, DYRATE, LEARNED, *method_names()]):
            raise unknown_method(self.method, names)
        self._check_files()

    def _check_budget(self) -> None:
        if self.budget is not None and not 0.0 < self.budget <= 1.0:
            raise UsageError(
                f"Budget {self.budget} is outside (0, 1].", hint="--budget 0.25 spends a quarter of the method's cost."
            )
        if self.budget is not None and "r" in self.settings:
            raise UsageError("--budget chooses r, so that it is the mean over the layers.", hint="Give --budget or --option r.")
        if self.method not in (AUTO, VTW) and self.spent is None:
            raise UsageError(f"{self.method} needs a budget.", hint="For example: --budget 0.5")
        if self.method == VTW and self.budget is not None and self.settings:
            name = next(iter(self.settings))
            raise UsageError(f"With a budget {name} of vtw decides nothing.", hint=f"Leave out --budget or {name}.")

    def goal(self) -> Goal:
        """Return the goal of a search; raise UsageError for contradictory targets."""
        drop = DROP if self.max_drop is None else self.max_drop
        return Goal(drop, self.target_flops, self.target_kv, self.target_ttft, self.target_reads)

    @property
    def statistics_path(self) -> Path:
        """Where statistics are kept: as given, or beside the plan."""
        assert self.output is not None or self.statistics is not None
        return self.statistics or self.output.with_suffix(".statistics.safetensors")  # type: ignore[union-attr]  # asserted

    def _check_files(self) -> None:
        statistics, model = self.statistics_path, Path(self.model)
        inputs = [self.data, self.onto, self.times]
        inputs += [path for path in (statistics, model) if is_file(path) or is_folder(path)]
        outputs = [path for path in (self.output, self.curve) if path is not None]
        learns = self.method in (AUTO, LEARNED) or self.learns_ranking
        learned = [weights_path(self.output)] if self.output is not None and learns else []
        for path in (*outputs, *learned):
            check_output(path, force=self.force, inputs=inputs)
        if self.method == LEARNED:
            if self.statistics is not None and not is_folder(self.statistics):
                check_output(self.statistics, force=False, inputs=[self.data, *outputs], folder=True)
        elif not is_file(statistics):
            check_output(statistics, force=False, inputs=[*inputs, *outputs])
        if len(outputs) == 2 and outputs[0].resolve() == outputs[1].resolve():
            raise UsageError(f"-o and --curve both name {self.output}.", hint="Give them files of their own.")

    def _check_foreign(self, unused: list[str]) -> None:
        foreign = [name for name in self.given(PLACES) if name not in _PLACES.get(self.method or "", ())]
        foreign += [] if self.method == AUTO else list(self.given(_SEARCH))
        foreign += [] if self.method in (None, AUTO, DYRATE, *STATISTICAL) else list(self.given(_RANKING))
        twice = [name for name in self.given(_RANKING) if self.method == PLPHP and name in self.settings]
        if twice:
            raise UsageError(f"Option {twice[0]!r} of {self.method} is given twice.", hint="Give it once.")
        if self.learns_ranking and self.method not in (PLPHP, DYRATE):
            raise UsageError(
                f"--rows learned is not for {self.method or 'statistics alone'}.", hint="It is for --method plphp and dyrate."
            )
        options = [*(f"--{name.replace('_', '-')}" for name in foreign), *unused]
        if options:
            raise UsageError(f"{options[0]} is not for {self.method or 'statistics alone'}.")
        if self.device_name is not None and self.target_ttft is None:
            hint = "Devices are cpu and cuda; others go with --target-ttft."
            raise UsageError(f"Unknown device {self.device_name!r}.", hint=hint)


@dataclass(frozen=True)
class CalibrationRequest:
    """Checked options with the model's folder and the samples. `skipped`: the errors of samples that were left out."""

    options: CalibrateOptions
    folder: ModelFolder
    samples: tuple[Sample, ...]
    skipped: tuple[BadSampleError, ...] = ()


def prepare(options: CalibrateOptions) -> CalibrationRequest:
    """Return the request of the options after all checks that need no torch.

    Raises UsageError for options, files or samples that cannot be used, and UnsupportedModelError for such a model folder.
    """
    options.check()
    folder = resolve_model(
        options.model, revision=options.revision, adapter=options.adapter, trust_remote_code=options.trust_remote_code
    )
    check_size(folder, options.image_size)
    check_folder(folder)
    _check_layer(options, folder)
    skipped: list[BadSampleError] = []
    on_bad = skipped.append if options.skip_bad else None
    samples = draw_samples(read_samples(options.data, need_answers=False, on_bad=on_bad), options.limit, options.seed)
    if options.method == AUTO:
        _check_search(options, len(samples[1::2]))
    check_samples(options.method or "", options.to_try, len(samples))
    if options.method == LEARNED or options.learns_ranking:
        check_images(len({str(sample.image) for sample in samples}), "The samples show")
    return CalibrationRequest(options, folder, tuple(samples), tuple(skipped))


def _check_layer(options: CalibrateOptions, folder: ModelFolder) -> None:
    layers = decoder_layers(folder) if options.method != "evit" else None  # a block of the vision encoder
    if options.layer is not None and (options.layer < 0 or (layers is not None and options.layer >= layers)):
        last = "the last" if layers is None else str(layers - 1)
        raise UsageError(f"{options.method} cannot act at layer {options.layer}.", hint=f"Layers are 0 to {last}.")


def _check_search(options: CalibrateOptions, samples: int) -> None:
    if options.times is not None and options.device_name is not None:
        raise UsageError("Times are either measured or computed.", hint="Give --times or a target --device, not both.")
    if options.times is not None:
        DeviceProfile.load(options.times)
    if options.device_name is not None:
        module_named(options.device_name)
    options.goal().check_inputs(has_times=options.times is not None or options.device_name is not None, samples=samples)


RESULTS = "results.json"  # what a folder of a comparison holds from the beginning


@dataclass(frozen=True)
class CompareOptions:
    """The options of `edgeprune compare`. `methods`: those that were named, `shares`: of --keep; `calibrate_on`: learned from."""

    methods: tuple[str, ...]
    shares: tuple[float, ...]
    plans: tuple[Path, ...]
    data: Path
    calibrate_on: Path | None
    output: Path
    fit: str
    max_tokens: int
    device: str
    ray_address: str | None = None

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods that are compared: those that were named, or all that need no training, the baselines last."""
        known = [name for name in COMPARED if name not in BASELINES and (self.calibrate_on or name not in LEARNING)]
        return self.methods or (*known, *BASELINES)

    def learning(self) -> list[Sample]:
        """Return the samples that methods learn from."""
        assert self.calibrate_on is not None
        return read_samples(self.calibrate_on, need_answers=False)

    def check(self) -> None:
        """Raise UsageError for methods, shares or files that cannot be compared."""
        if not self.shares:
            raise UsageError("--keep names no share.", hint="For example: --keep 0.5,0.25")
        if len(set(self.methods)) < len(self.methods) or len(set(self.shares)) < len(self.shares):
            raise UsageError("A method or a share is named twice.", hint="Name each once in --methods and --keep.")
        for share in self.shares:
            check_keep_ratio(share)
        for method in self.methods:
            self._check_method(method)
        self._check_files()

    def _check_files(self) -> None:
        for path in self.plans:
            if not is_lightcompress(path):
                KeepPlan.load(path)
        check_output(self.output, force=True, inputs=[self.data, self.calibrate_on, *self.plans], folder=True)
        if is_folder(self.output) and any(self.output.iterdir()) and not is_file(self.output / RESULTS):
            raise UsageError(f"{self.output} holds no comparison, but other files.", hint="Give a new folder.")
        if self.calibrate_on is not None:
            self._check_learning(self.calibrate_on)

    def _check_learning(self, samples: Path) -> None:
        if is_file(self.data) and is_file(samples) and self.data.samefile(samples):
            hint = "What methods learn from is not what they are compared on: give another file."
            raise UsageError("--calibrate-on names the questions of --data.", hint=hint)
        images = {str(sample.image) for sample in self.learning()}
        if LEARNED in self.methods:
            check_images(len(images), f"The samples of {samples} show")

    def _check_method(self, method: str) -> None:
        if method == DYRATE:
            make = "edgeprune calibrate MODEL --data FILE --method dyrate --budget 0.25 -o dyrate.json"
            raise UsageError("dyrate is trained for the plan that it joins.", hint=f"Give --plan dyrate.json, made by: {make}")
        if method in LEARNING and self.calibrate_on is None:
            raise UsageError(f"{method} learns from samples, others than those of --data.", hint="Give them: --calibrate-on FILE")
        if method not in COMPARED:
            if ":" not in method:
                raise unknown_method(method, COMPARED, "or package.module:Class")
            allow_method(method)  # the user named it, which allows it
