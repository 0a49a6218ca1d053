"""The files of answers as the record of what is done: torn ends, other people's files, two runs at once."""

import json

import msgspec
import pytest

from zif.errors import ConfigError
from zif.serving.batch.answer_lines import HttpAnswer
from zif.serving.batch.journal import Journal
from zif.serving.batch.requests import parse_request

GOOD = HttpAnswer(200, "id-1", msgspec.Raw(b'{"text":"yes"}'))
BAD = HttpAnswer(400, "id-2", msgspec.Raw(b'{"error":{}}'))


def request(custom_id, **body):
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/x", "body": body}
    return parse_request(json.dumps(line).encode(), 1)


def write(output, answers, errors=None):
    journal = Journal(str(output), errors and str(errors))
    for custom_id, answer in answers.items():
        journal.write(request(custom_id), answer)
    journal.close()


def reopened(output, errors=None):
    journal = Journal(str(output), errors and str(errors))
    journal.close()
    return journal


def test_an_answer_is_a_line_of_the_batch_format(tmp_path):
    output = tmp_path / "out"
    write(output, {"a": GOOD})
    answer = json.loads(output.read_bytes())
    assert answer.pop("id").startswith("batch_req_")
    response = {"status_code": 200, "request_id": "id-1", "body": {"text": "yes"}}
    assert answer == {"custom_id": "a", "response": response, "error": None}


def test_every_cut_of_the_last_line_is_cut_off_and_asked_again(tmp_path):
    output = tmp_path / "out"
    write(output, {"a": GOOD, "b": BAD})
    whole = output.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        for lost in (b"", b"\0" * 9):
            output.write_bytes(whole[:cut] + lost)
            journal = reopened(output)
            assert (journal.has(request("a")), journal.has(request("b"))) == (True, False)
            assert output.read_bytes() == whole[:first]
    output.write_bytes(whole)
    journal = reopened(output)
    assert (journal.num_done, journal.num_failed) == (2, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"some notes",
        b"some notes\n",
        b'{"id": 5}\n',
        b'{"id":"batch_req_1","custom_id":"a"}\n',
        b"\n",
        b"[" * 10**5 + b"\n",
    ],
)
def test_a_file_of_something_else_is_refused_and_not_changed(tmp_path, content):
    output = tmp_path / "out"
    output.write_bytes(content)
    with pytest.raises(ConfigError, match=r"line 1 .* is no answer of a batch"):
        Journal(str(output))
    assert output.read_bytes() == content


def test_an_answer_to_another_request_of_the_same_id_is_refused(tmp_path):
    write(tmp_path / "out", {"a": GOOD})
    journal = reopened(tmp_path / "out")
    with pytest.raises(ConfigError, match="custom_id 'a', is not the request that was answered"):
        journal.has(request("a", changed=True))


def test_failures_go_to_the_file_of_errors_and_are_known_again(tmp_path):
    output, errors = tmp_path / "out", tmp_path / "errors"
    write(output, {"a": GOOD, "b": BAD}, errors)
    assert json.loads(output.read_text())["custom_id"] == "a"
    assert json.loads(errors.read_text())["custom_id"] == "b"
    journal = reopened(output, errors)
    assert (journal.num_done, journal.num_failed) == (2, 1)


def test_one_file_cannot_be_both_and_two_runs_cannot_share_one(tmp_path):
    output = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot take both"):
        Journal(output, f"{tmp_path}/./out")
    first = Journal(output)
    with pytest.raises(ConfigError, match="another process writes"):
        Journal(output)
    first.close()
    Journal(output).close()


def test_a_full_disk_ends_the_run_with_what_to_do():
    journal = Journal("/dev/full")
    with pytest.raises(ConfigError, match=r"No space left.*run the same command again"):
        journal.write(request("a"), GOOD)
    journal.close()
