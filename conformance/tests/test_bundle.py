"""A bundle says what the run found, and a bundle that was changed says so."""

import dataclasses
import datetime
import html.parser
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from zif.errors import ConfigError
from zif.null.platform import NullPlatform
from zif_conformance.bundle.compare import compare_results
from zif_conformance.bundle.page import report_page
from zif_conformance.bundle.result import RunFacts, build_result, digest_of
from zif_conformance.bundle.support import (
    BEGIN,
    END,
    keep_summaries,
    kept_matrix,
    support_matrix,
    text_between_markers,
    write_between_markers,
)
from zif_conformance.bundle.verify import read_result, verify_bundle
from zif_conformance.bundle.writing import claim_folder, write_bundle
from zif_conformance.describe import device_json
from zif_conformance.marks import Declaration
from zif_conformance.outcomes import Measurement, TestCase, TestOutcome, Verdict
from zif_conformance.profiles import profile
from zif_conformance.supervisor import Run

_NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
_CLAIMED = ("dtype:float32", "dtype:bfloat16")


def _profile(name):
    """Return the beginning of a profile: what holds of sixty tests holds of all."""
    whole = profile(name)
    return dataclasses.replace(whole, must_pass=whole.must_pass[:60])


@pytest.fixture(autouse=True)
def _short_lists(monkeypatch):
    monkeypatch.setattr("zif_conformance.bundle.verify.profile", _profile)


def _declaration(test_id, **changes):
    return Declaration(test_id[:2], changes.pop("gate", "none"), ("9.1",), **changes)


def _outcome(test_id, verdict=Verdict.PASSED, **changes):
    gate = changes.pop("gate", "none")
    return TestOutcome(test_id, _declaration(test_id, gate=gate), verdict, changes.pop("detail", ""), 0.25, **changes)


def _device(claims=_CLAIMED):
    described = device_json(NullPlatform().probe().devices[0])
    nothing = {
        "features": [],
        "kv_dtypes": [],
        "block_sizes": [],
        "collectives": [],
        "collective_dtypes": [],
        "notes": [],
    }
    flags = dict.fromkeys(("graph_capture", "batch_invariant", "fork_safe", "spawn_safe"), False)
    dtypes = [{"storage": c[6:], "compute": c[6:], "accumulate": "float32"} for c in claims]
    described["capabilities"] |= {**nothing, **flags, "dtypes": dtypes}
    return described


def _result(*changed, partial="", waivers=(), asked="core"):
    """Return the result of a run of a profile in which everything passed but what `changed` says."""
    chosen = _profile(asked)
    outcomes = {test_id: _outcome(test_id) for test_id in chosen.must_pass}
    first = chosen.must_pass[0]
    outcomes[first] = _outcome(first, proven=_CLAIMED, measurements=(Measurement("G3", 0.1, 1.0, "row 1"),))
    outcomes |= {outcome.test_id: outcome for outcome in changed}
    cases = tuple(TestCase(o.test_id, f"x::{o.test_id}", o.declaration, False) for o in outcomes.values())
    platform = {
        "name": "toy",
        "vendor": "v",
        "distribution": "zif-toy 1.0",
        "package": "zif_toy",
        "fingerprint": "0" * 64,
    }
    description = {"platform": platform, "device": _device(), "waivers": list(waivers)}
    run = Run(cases, cases, description, outcomes)
    return build_result(run, RunFacts("toy", chosen.levels, chosen, _NOW, _NOW, partial))


def _write(folder, result):
    return write_bundle(folder, result, {"environment": {"python": "3.11"}})


def _ids():
    return _profile("core").must_pass


def test_a_good_run_is_conformant_and_verifies(tmp_path):
    sealed = _write(tmp_path, _result())
    assert (sealed["verdict"], sealed["score"]) == ("conformant", 1.0)
    assert verify_bundle(tmp_path) == []
    names = {"result.json", "junit.xml", "matrix.md", "report.html", "dispatch.json", "environment.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("verdict", [Verdict.FAILED, Verdict.CRASHED, Verdict.NOT_RUN])
def test_one_bad_outcome_is_not_conformant(tmp_path, verdict):
    sealed = _write(tmp_path, _result(_outcome(_ids()[3], verdict, detail="why")))
    assert sealed["verdict"] == "not conformant"
    assert sealed["score"] == pytest.approx(1 - 1 / len(_ids()), abs=1e-6)
    assert verify_bundle(tmp_path) == []


def test_a_claim_that_nothing_exercises_fails_the_run():
    first = _ids()[0]
    result = _result(_outcome(first, proven=("dtype:float32",)))
    assert result["verdict"] == "not conformant"
    assert "claim dtype:bfloat16" in result["errors"][0]


def test_a_claim_is_not_proven_by_a_test_that_failed():
    first = _ids()[0]
    result = _result(_outcome(first, Verdict.FAILED, proven=_CLAIMED))
    assert [claim["outcome"] for claim in result["claims"]] == ["unproven", "unproven"]


def test_unsupported_is_no_failure_and_no_pass():
    result = _result(_outcome(_ids()[4], Verdict.UNSUPPORTED, missing=("graph_capture",)))
    assert (result["verdict"], result["score"]) == ("conformant", 1.0)
    assert result["counts"]["passed"] == len(_ids()) - 1


@pytest.mark.parametrize("missing", [(), ("dtype:float32",)])
def test_unsupported_without_a_missing_claim_is_an_error(missing):
    result = _result(_outcome(_ids()[4], Verdict.UNSUPPORTED, missing=missing))
    assert result["verdict"] == "not conformant"
    assert "unsupported" in result["errors"][0]


def test_a_waived_failure_is_waived_in_the_bundle(tmp_path):
    waiver = {"test": _ids()[5], "reason": "plugin bug", "link": "https://example.org/1", "expires": "2026-06-01"}
    sealed = _write(tmp_path, _result(_outcome(_ids()[5], Verdict.FAILED), waivers=[waiver]))
    assert sealed["counts"]["waived"] == 1
    assert sealed["verdict"] == "conformant"
    assert sealed["score"] < 1
    assert verify_bundle(tmp_path) == []


def test_a_partial_run_has_no_score_and_is_refused(tmp_path):
    sealed = _write(tmp_path, _result(partial="the run was ended by KeyboardInterrupt"))
    assert (sealed["status"], sealed["verdict"], sealed["score"]) == ("partial", None, None)
    assert "partial" in verify_bundle(tmp_path)[0]


def _improve(result):
    test = next(test for test in result["tests"] if test["outcome"] == "failed")
    test["outcome"] = "passed"


def _improve_all(result):
    _improve(result)
    result["counts"]["passed"] += 1
    result["counts"]["failed"] -= 1


def _drop_test(result):
    result["tests"] = [test for test in result["tests"] if test["outcome"] != "failed"]
    result["counts"]["failed"] = 0


def _call_it_unsupported(result):
    test = next(test for test in result["tests"] if test["outcome"] == "failed")
    test["outcome"] = "unsupported"
    result["counts"]["unsupported"] += 1
    result["counts"]["failed"] -= 1
    result["verdict"], result["score"] = "conformant", 1.0


def _call_it_waived(result):
    test = next(test for test in result["tests"] if test["outcome"] == "failed")
    test["outcome"] = "waived"
    result["counts"]["waived"] += 1
    result["counts"]["failed"] -= 1
    result["verdict"] = "conformant"


_EDITS = [
    _improve,
    _improve_all,
    _drop_test,
    _call_it_unsupported,
    _call_it_waived,
    lambda result: result.update(verdict="conformant"),
    lambda result: result.update(score=1.0),
    lambda result: result["claims"].pop(),
    lambda result: result["tests"][5].update(must_pass=False),
    lambda result: result["levels"].remove("L3"),
    lambda result: result["profile"].update(version="9.9"),
    lambda result: result["profile"].update(name="bronze"),
    lambda result: result["files"].pop("junit.xml"),
    lambda result: result["tests"][0].update(outcome="mostly passed"),
    lambda result: result.update(tests=[]),
    lambda result: result.pop("claims"),
]


@pytest.mark.parametrize("edit", _EDITS)
@pytest.mark.parametrize("sealed_again", [False, True])
def test_a_bundle_that_was_changed_is_refused(tmp_path, edit, sealed_again):
    _write(tmp_path, _result(_outcome(_ids()[3], Verdict.FAILED, detail="why")))
    assert verify_bundle(tmp_path) == []
    result = read_result(tmp_path)
    edit(result)
    if sealed_again:
        result["digest"] = digest_of(result)
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert verify_bundle(tmp_path) != []


@pytest.mark.parametrize("name", ["junit.xml", "matrix.md", "report.html", "dispatch.json", "environment.json"])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_every_file_is_guarded(tmp_path, name, how):
    _write(tmp_path, _result())
    path = tmp_path / name
    path.unlink() if how == "removed" else path.write_text(path.read_text().replace("3.11", "3.12") + " ")
    assert any(name in problem for problem in verify_bundle(tmp_path))


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3"])
def test_no_bundle_is_an_error_with_the_next_step(tmp_path, text):
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match="--bundle"):
        read_result(tmp_path)


def test_a_folder_with_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        claim_folder(tmp_path)


class _Page(html.parser.HTMLParser):
    """Collects what a page would load, and checks that tags close."""

    _EMPTY = ("meta", "input", "circle", "line", "rect")

    def __init__(self):
        super().__init__()
        self.loads, self.open, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "action", "poster")]
        if tag not in self._EMPTY or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing():
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    text = report_page(_result(_outcome(_ids()[3], Verdict.FAILED, detail=attack)))
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "img" not in page.tags
    assert page.tags.count("script") == 1
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") == 2
    assert all(test_id in text for test_id in _ids())


def test_the_junit_file_is_xml_with_every_outcome(tmp_path):
    words = [Verdict.FAILED, Verdict.CRASHED, Verdict.NOT_RUN, Verdict.UNSUPPORTED]
    changed = [_outcome(_ids()[i], word, detail="bad \x00 <b>") for i, word in enumerate(words, start=1)]
    _write(tmp_path, _result(*changed))
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert int(suite.get("tests")) == len(suite.findall("testcase")) == len(_ids())
    assert [len(suite.findall(f"testcase/{tag}")) for tag in ("failure", "error", "skipped")] == [1, 1, 2]


def test_compare_names_what_became_worse_and_what_better():
    near = _outcome(_ids()[0], proven=_CLAIMED, measurements=(Measurement("G3", 0.9, 1.0, "row 1"),))
    before = _result(_outcome(_ids()[2], Verdict.FAILED))
    after = _result(_outcome(_ids()[3], Verdict.CRASHED), near)
    comparison = compare_results(before, after)
    assert comparison.regressions == (f"{_ids()[3]}: passed -> crashed",)
    assert comparison.improvements == (f"{_ids()[2]}: failed -> passed",)
    assert "head-room fell from 10x to 1.11x" in comparison.other[0]


def test_compare_counts_a_lost_claim_and_a_lost_test_as_worse():
    after = _result(_outcome(_ids()[0], proven=("dtype:float32",)))
    after["tests"] = after["tests"][:-1]
    regressions = compare_results(_result(), after).regressions
    assert any("claim dtype:bfloat16" in line for line in regressions)
    assert any(_ids()[-1] in line for line in regressions)


def test_the_support_matrix_stands_between_its_markers(tmp_path):
    readme, bundle = tmp_path / "README.md", tmp_path / "bundle"
    bundle.mkdir()
    _write(bundle, _result())
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(readme, support_matrix([bundle]))
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "core 1.0: conformant" in text
    assert "| bfloat16 | yes |" in text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_file_without_markers_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ConfigError, match="once each"):
        write_between_markers(readme, "| table |")
    assert readme.read_text() == text


def test_the_support_matrix_takes_no_bundle_that_does_not_verify(tmp_path):
    _write(tmp_path, _result(partial="killed"))
    with pytest.raises(ConfigError, match="does not verify"):
        support_matrix([tmp_path])


def test_kept_summaries_draw_the_same_table_and_prove_nothing_alone(tmp_path):
    bundle, kept = tmp_path / "bundle", tmp_path / "kept"
    bundle.mkdir()
    _write(bundle, _result(_outcome(_ids()[3], Verdict.FAILED)))
    keep_summaries([bundle], kept)
    assert kept_matrix(kept) == support_matrix([bundle])
    assert (kept / "toy.json").stat().st_size < 4096
    (kept / "toy.json").rename(kept / "result.json")
    assert verify_bundle(kept) != []


def test_the_matrix_of_the_readme_is_that_of_the_kept_bundles():
    root = Path(__file__).parents[2]
    table = text_between_markers((root / "README.md").read_text(encoding="utf-8"))
    assert table == kept_matrix(root / "docs" / "bundles"), "written by `zif conform matrix`, not by hand"


def test_a_bundle_of_another_suite_is_not_judged(tmp_path, monkeypatch):
    _write(tmp_path, _result())
    monkeypatch.setattr("zif_conformance.bundle.verify.metadata.version", lambda name: "9.9")
    assert "with that version" in verify_bundle(tmp_path)[0]
