"""LightCompress's YAML as keep plans: what its numbers mean, and what is refused, each in one line that says where and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from repository import ROOT

from edgeprune.calibration.interop.lightcompress import read_plan
from edgeprune.calibration.interop.lightcompress_methods import NO_EQUAL, READERS
from edgeprune.errors import PlanError
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.registry import method_class

BASE = unpruned_plan("qwen2_vl", 28, Geometry(672, 672, 14, 2))  # 24 x 24 = 576 visual tokens, as LLaVA's
WHOLE_FILE = """
base:
    seed: &seed 42
model:
    type: Llava
    path: model path
eval:
    eval_pos: [pretrain, transformed]
    bs: 1
sparse:
    method: TokenReduction
    special:
        method: FastV
        pruning_loc: 3
        rate: 0.778  # prune_rate
save:
    save_trans: False
"""
FASTV = Cut("layer", "fastv", 128, 3)


def read(tmp_path: Path, text: str, base: KeepPlan = BASE) -> KeepPlan:
    path = tmp_path / "settings.yml"
    path.write_text(text, encoding="utf-8")
    plan = read_plan(path, base)
    for cut in plan.cuts:
        method_class(cut.method)(cut, plan.geometry)  # its options are the method's
    return plan


def refusal(tmp_path: Path, text: str, base: KeepPlan = BASE) -> str:
    with pytest.raises(PlanError) as caught:
        read(tmp_path, text, base)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'settings.yml'}: ")
    assert "\n" not in message and len(message) < 400
    return message.partition(": ")[2]


@pytest.mark.parametrize(
    "text",
    [
        WHOLE_FILE,
        "sparse: {language: {method: TokenReduction, special: {method: FastV, pruning_loc: 3, rate: 0.778}}}",
        "quant: {token_reduction: {method: FastV, special: {pruning_loc: 3, rate: 0.778}}}",
        "token_reduction: {method: FastV, special: {pruning_loc: 3, rate: 0.778}}",
        "{method: TokenReduction, special: {method: FastV, pruning_loc: 3, rate: 0.778}}",
        "special: {method: FastV, pruning_loc: 3, rate: 0.778}",
        "{method: FastV, pruning_loc: 3, rate: 0.778}",
    ],
)
def test_every_way_to_write_the_block_is_one_plan(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == KeepPlan("qwen2_vl", 28, BASE.geometry, (FASTV,))


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("{method: FastV, pruning_loc: 2, rate: 0.5}", [Cut("layer", "fastv", 288, 2)]),
        ("{method: DivPrune, reduction_ratio: 0.9444}", [Cut("input", "divprune", 32)]),
        (
            "{method: PyramidDrop, layer_list: [8, 16, 24], image_token_ratio_list: [0.5, 0.25, 0.125]}",
            [Cut("layer", "pyramiddrop", keep, layer) for keep, layer in ((288, 8), (144, 16), (72, 24))],
        ),
        (
            "{method: SparseVLM, pruning_loc: [2, 6, 15], reduction_ratio: 0.6667, merge_flag: False}",
            [Cut("layer", "sparsevlm", keep, layer) for keep, layer in ((300, 3), (200, 7), (110, 16))],
        ),
        (
            "{method: SparseVLM, retained_tokens: 64, merge_flag: False}",
            [Cut("layer", "sparsevlm", keep, layer) for keep, layer in ((66, 3), (30, 7), (17, 16))],
        ),
        ("{method: SparseVLM, pruning_loc: [4], reduction_ratio: 0.7778, merge_flag: False}", [Cut("layer", "sparsevlm", 128, 5)]),
        ("{method: SparseVLM, pruning_loc: [4], reduction_ratio: 0.9444, merge_flag: False}", [Cut("layer", "sparsevlm", 32, 5)]),
    ],
)
def test_numbers_mean_what_they_mean_there(tmp_path: Path, text: str, cuts: list[Cut]) -> None:
    assert list(read(tmp_path, text).cuts) == cuts


def test_lots_are_drawn_by_the_seed_of_the_file(tmp_path: Path) -> None:
    block = "sparse: {special: {method: RandomPrune, metric: random, pruning_loc: 5, prune_ratio: 0.75}}"
    assert read(tmp_path, f"base: {{seed: 42}}\n{block}").cuts == (Cut("layer", "random", 144, 5, seed=42),)
    assert read(tmp_path, block).cuts[0].seed == 0


@pytest.mark.parametrize(("dominant", "contextual"), [(162, 30), (54, 10), (1, 1), (7, 93), (1, 500)])
def test_visionzip_keeps_both_counts(tmp_path: Path, dominant: int, contextual: int) -> None:
    text = f"sparse: {{vision: {{special: {{method: VisionZip, dominant: {dominant}, contextual: {contextual}}}}}}}"
    cut = read(tmp_path, text).cuts[0]
    assert (cut.site, cut.method, cut.keep) == ("input", "visionzip", dominant + contextual)
    assert int(cut.options["contextual"] * cut.keep) == contextual  # as the method counts them


def test_visionzip_by_shares_and_without_contextual_tokens(tmp_path: Path) -> None:
    cut = read(tmp_path, "{method: VisionZip, dominant: 0.2, contextual: 0.001}").cuts[0]
    assert (cut.keep, int(cut.options["contextual"] * cut.keep)) == (116, 1)
    alone = read(tmp_path, "{method: VisionZip, dominant: 162, contextual: 30, prune_only: True}").cuts[0]
    assert alone == Cut("input", "visionzip", 162, options={"contextual": 0.0})


def test_shares_are_of_the_model_that_is_meant(tmp_path: Path) -> None:
    small = unpruned_plan("qwen2_vl", 4, Geometry(84, 112, 14, 2))  # 3 x 4 visual tokens
    assert read(tmp_path, "{method: FastV, pruning_loc: 3, rate: 0.75}", small).cuts == (Cut("layer", "fastv", 3, 3),)
    one = "{method: SparseVLM, pruning_loc: [1], reduction_ratio: 0.6667, merge_flag: False}"
    assert read(tmp_path, one, small).cuts == (Cut("layer", "sparsevlm", 4, 2),)
    assert "192, 128 or 64" in refusal(tmp_path, one.replace("[1]", "[2, 6, 15]"), unpruned_plan("x", 28, small.geometry))


@pytest.mark.parametrize("rate", ["0", "1", "0.0", "1.0", "-0.5", "1.5", ".nan", ".inf"])
def test_rates_lie_between_0_and_1(tmp_path: Path, rate: str) -> None:
    assert "rate" in (line := refusal(tmp_path, f"{{method: FastV, pruning_loc: 3, rate: {rate}}}"))
    assert "outside (0, 1)" in line


@pytest.mark.parametrize("place", ["0", "-1", "28", "99"])
def test_places_lie_within_the_model(tmp_path: Path, place: str) -> None:
    line = refusal(tmp_path, f"{{method: FastV, pruning_loc: {place}, rate: 0.5}}")
    assert f"pruning_loc {place} is no place to cut in a model of 28 layers. Give 1 to 27." in line


def test_a_cut_after_the_last_layer_is_none(tmp_path: Path) -> None:
    line = refusal(tmp_path, "{method: SparseVLM, pruning_loc: [27], reduction_ratio: 0.6667, merge_flag: False}")
    assert "Give 0 to 26." in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("method: FastV, rate: 0.5", "needs the setting 'pruning_loc'"),
        ("method: FastV, pruning_loc: 3", "needs the setting 'rate'"),
        ("method: FastV, pruning_loc: 3, rate: 0.5, keep: 7", "no setting 'keep'. Settings of FastV: pruning_loc, rate"),
        ("method: FastV, pruning_loc: 3, rate: 0.5, 7: 7", "no setting 7"),
        ("method: FastV, pruning_loc: 3, rate: '0.5'", "rate must be a number, not '0.5'"),
        ("method: FastV, pruning_loc: 3, rate: true", "rate must be a number, not True"),
        ("method: FastV, pruning_loc: 3, rate: [0.5]", "rate must be a number"),
        ("method: FastV, pruning_loc: 3, rate:", "rate must be a number, not None"),
        ("method: FastV, pruning_loc: 3.0, rate: 0.5", "pruning_loc must be the number of a layer, not 3.0"),
        ("method: FastV, pruning_loc: [3], rate: 0.5", "pruning_loc must be the number of a layer, not [3]"),
        ("method: FastV, pruning_loc: true, rate: 0.5", "pruning_loc must be the number of a layer, not True"),
        ("method: FastV, pruning_loc: 3, rate: 0.9999", "keep none of the image's 576 visual tokens"),
        ("method: PyramidDrop, layer_list: 8, image_token_ratio_list: [0.5]", "layer_list must be a list, not 8"),
        ("method: PyramidDrop, layer_list: [], image_token_ratio_list: []", "layer_list must be a list"),
        ("method: PyramidDrop, layer_list: [8, 16], image_token_ratio_list: [0.5]", "has 2 entries and image_token_ratio_list 1"),
        ("method: PyramidDrop, layer_list: [8, 16], image_token_ratio_list: [0.5, 1]", "1 is outside (0, 1)"),
        ("method: PyramidDrop, layer_list: [16, 8], image_token_ratio_list: [0.5, 0.25]", "in the order"),
        ("method: PyramidDrop, layer_list: [8, 16], image_token_ratio_list: [0.25, 0.5]", "only 144 are left"),
        ("method: SparseVLM, reduction_ratio: 0.6667, merge_flag: True", "merge_flag"),
        ("method: SparseVLM, reduction_ratio: 0.6667", "merge_flag"),
        ("method: SparseVLM, reduction_ratio: 0.6667, merge_flag: 0", "merge_flag must be true or false, not 0"),
        ("method: SparseVLM, reduction_ratio: 0.6667, merge_flag: no, prune_flag: no", "prune_flag"),
        ("method: SparseVLM, reduction_ratio: 0.5, merge_flag: no", "192, 128 or 64 retained tokens; this retains 288 of 576"),
        ("method: SparseVLM, pruning_loc: [3, 9], reduction_ratio: 0.6667, merge_flag: no", "[2, 6, 15] or for one layer"),
        ("method: SparseVLM, pruning_loc: 2, reduction_ratio: 0.6667, merge_flag: no", "pruning_loc must be a list, not 2"),
        ("method: SparseVLM, retained_tokens: 192, reduction_ratio: 0.6667, merge_flag: no", "say the same"),
        ("method: SparseVLM, retained_tokens: 192.0, merge_flag: no", "retained_tokens must be a whole number"),
        ("method: RandomPrune, pruning_loc: 3, prune_ratio: 0.5", "needs the setting 'metric'"),
        ("method: RandomPrune, pruning_loc: 3, prune_ratio: 0.5, metric: holitom_merge", "metric 'holitom_merge' has no equal"),
        ("method: VisionZip, dominant: 162, contextual: 0", "contextual 0 must be 1 or more"),
        ("method: VisionZip, dominant: 162, contextual: 0.1", "two counts of tokens, or two shares"),
        ("method: VisionZip, dominant: 600, contextual: 30", "only 576 are left"),
        ("method: VisionZip, dominant: 162, contextual: 30, merge_only: True", "merge_only has no equal"),
        ("method: VisionZip, dominant: 0.2, contextual: 0.1, prune_only: True", "prune_only"),
        ("method: fastv, pruning_loc: 3, rate: 0.5", "unknown method 'fastv'. Methods that are read: DivPrune, FastV"),
        ("method: [FastV], pruning_loc: 3, rate: 0.5", "the method must be one name"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, settings: str, said: str) -> None:
    assert said in refusal(tmp_path, f"special: {{{settings}}}")


@pytest.mark.parametrize("method", sorted(NO_EQUAL))
def test_methods_without_an_equal_are_refused(tmp_path: Path, method: str) -> None:
    line = refusal(tmp_path, f"special: {{method: {method}, reduction_ratio: 0.7778}}")
    assert f"{method} has no equal here: " in line
    assert all(known in line for known in READERS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file must be names and values, not None"),
        ("- FastV", "the file must be names and values"),
        ("FastV", "the file must be names and values, not 'FastV'"),
        ("{}", "no token-reduction method"),
        ("model: {type: Llava}", "no token-reduction method"),
        ("sparse: 3", "sparse must be names and values, not 3"),
        ("sparse: {method: TokenReduction}", "no token-reduction method"),
        ("sparse: {method: TokenReduction, special: FastV}", "special must be names and values"),
        ("sparse: {method: Wanda, weight: {sparsity: 0.5}, special: {}}", "'weight' is not read beside 'special'"),
        ("sparse: {method: DivPrune, special: {method: FastV, pruning_loc: 3, rate: 0.5}}", "one name, not 'DivPrune' and 'FastV'"),
        ("sparse: {special: {method: FastV, pruning_loc: 3, rate: 0.5}}\npruning: {}", "'pruning' is a section that is not known"),
        ("sparse: {special: {method: FastV}}\nquant: {token_reduction: {}}", "of 'sparse' and 'quant'"),
        (
            "quant: {method: RTN, token_reduction: {method: FastV}}",
            "'method' is no part of a keep plan. Leave it out, and quantize",
        ),
        ("sparse: {vision: {special: {method: FastV, pruning_loc: 3, rate: 0.5}}}", "FastV under 'vision' has no equal"),
        ("sparse: {vision: {special: {method: VisionZip}}, language: {}}", "'language' is not read beside 'vision'"),
        ("base: {seed: x}\nsparse: {special: {method: FastV}}", "base.seed must be a whole number"),
        ("base: {seed: -1}\nsparse: {special: {method: FastV}}", "base.seed must be a whole number"),
        ("special: {method: FastV, pruning_loc: 3, rate: 0.5, rate: 0.6}", "'rate' stands twice in one block (line 1)"),
        ("special: {method: FastV", "this is not YAML (line 1: "),
        ("special:\n\tmethod: FastV", "this is not YAML (line 2: "),
        ("special: !!python/object/apply:os.system ['true']", "this is not YAML (line 1: could not determine a constructor"),
        ("a: 1\n---\na: 2", "this is not YAML (line 2: "),
        ("special: {method: FastV, rate: 2024-13-45}", "cannot be read"),
        ("[" * 5000, "cannot be read"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_names_within_names_do_not_blow_up(tmp_path: Path) -> None:
    lines = ["model:", "  a0: &a0 [x, x]", *(f"  a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    lines += ["sparse: {special: {method: FastV, pruning_loc: *a39, rate: 0.5}}"]
    assert "pruning_loc must be the number of a layer" in refusal(tmp_path, "\n".join(lines))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Cannot read"):
        read_plan(tmp_path / "nowhere.yml", BASE)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PlanError, match="Cannot read"):
        read_plan(tmp_path / "bytes.yaml", BASE)


def test_the_documentation_names_every_method_and_setting() -> None:
    text = (ROOT / "docs" / "lightcompress.md").read_text(encoding="utf-8")
    assert all(name in text for name in (*READERS, *NO_EQUAL))
    assert all(f"`{name}`" in text or f"`{name}:" in text for reader in READERS.values() for name in reader.names)
