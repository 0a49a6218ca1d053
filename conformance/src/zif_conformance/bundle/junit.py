"""A result as JUnit XML, which build servers read. Unsupported, waived and not run are skipped there, with the word."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from zif_conformance.outcomes import reason_line

_SKIPPED = ("unsupported", "waived", "not run")
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 has no spelling for."""


def junit_xml(result: Mapping[str, Any]) -> str:
    """Return the document."""
    counts = result["counts"]
    suite = ET.Element(
        "testsuite",
        name=f"zif-conformance {result['platform']['name']}",
        tests=str(len(result["tests"])),
        failures=str(counts["failed"]),
        errors=str(counts["crashed"]),
        skipped=str(sum(counts[word] for word in _SKIPPED)),
        time=f"{result['duration_s']:.3f}",
        timestamp=result["started"],
    )
    for test in result["tests"]:
        _add_case(suite, test)
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ET.Element, test: Mapping[str, Any]) -> None:
    group, _, name = test["id"].rpartition(".") if "[" not in test["id"] else _split_parametrized(test["id"])
    case = ET.SubElement(suite, "testcase", classname=group, name=name, time=f"{test['duration_s']:.4f}")
    outcome, detail = test["outcome"], _ILLEGAL.sub("\ufffd", test["detail"])
    tag = {"failed": "failure", "crashed": "error", **dict.fromkeys(_SKIPPED, "skipped")}.get(outcome)
    if tag:
        message = f"{outcome}: {reason_line(detail)}"
        ET.SubElement(case, tag, message=message).text = detail


def _split_parametrized(test_id: str) -> tuple[str, str, str]:
    head, bracket, parameters = test_id.partition("[")
    group, dot, name = head.rpartition(".")
    return group, dot, name + bracket + parameters
