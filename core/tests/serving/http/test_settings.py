"""The server's settings: where they come from, what is refused, and that keys stay out of sight."""

import subprocess
import sys
import tomllib

import pytest

from zif.errors import ConfigError
from zif.serving.http.settings import (
    KEY_VARIABLE,
    ServeSettings,
    format_serve_settings,
    resolve_serve_settings,
    serve_setting_fields,
)
from zif.settings import resolve_settings


def resolve(cli=(), environ=(), toml_path=None):
    return resolve_serve_settings(dict(cli), dict(environ), toml_path)


def write(path, text):
    path.write_text(text)
    return path


def test_command_line_over_environment_over_file_over_defaults(tmp_path):
    file = write(tmp_path / "zif.toml", "model='m'\n[serve]\nport=1\ndrain_s=2\nhost='127.0.0.2'\n")
    resolved = resolve({"port": "3"}, {"ZIF_SERVE_PORT": "2", "ZIF_SERVE_DRAIN_S": "4"}, file)
    settings = resolved.settings
    assert (settings.port, settings.drain_s, settings.host, settings.max_json_depth) == (3, 4, "127.0.0.2", 64)
    assert resolved.origins["drain_s"] == "environment ZIF_SERVE_DRAIN_S"
    assert resolve_settings({}, {}, file).settings.model == "m"


def test_what_is_printed_is_read_back(tmp_path):
    resolved = resolve({"port": "0", "uds": "/tmp/é", "strict": True}, {KEY_VARIABLE: "very-secret-key"})
    text = format_serve_settings(resolved)
    assert "very-secret" not in text + repr(resolved)
    assert "# API keys: 1" in text
    assert resolve(toml_path=write(tmp_path / "a.toml", text)).settings == resolved.settings
    assert set(tomllib.loads(text)["serve"]) == {declared.name for declared in serve_setting_fields()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[serve]\nprot = 1", "did you mean port"),
        ("[serve]\nmax_num_seqs = 1", "above the table"),
        ("[serve]\nport = 'x'", "port='x' must be an integer"),
        ("[serve]\nport = 70000", "out of range"),
        ("[serve]\nmax_body_bytes = '1KB'", "out of range"),
        ("serve = 3", "must be a table"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=expected):
        resolve(toml_path=write(tmp_path / "zif.toml", text))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_needs_a_key(host):
    with pytest.raises(ConfigError, match="--insecure"):
        resolve({"host": host})
    assert resolve({"host": host, "insecure": True}).settings.host == host
    assert len(resolve({"host": host}, {KEY_VARIABLE: "some-long-key"}).keys) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_a_local_address_needs_none(host):
    assert len(resolve({"host": host}).keys) == 0


def test_keys_of_a_file_and_of_the_environment(tmp_path):
    file = write(tmp_path / "keys", "first-key-1\n# comment\nsecond-key tenant=x\n")
    assert len(resolve({"api_key_file": file}, {KEY_VARIABLE: " third-key-3 "}).keys) == 3


@pytest.mark.parametrize(("content", "text"), [(None, "cannot read"), (b"", "no key"), (b"\xff", "UTF-8")])
def test_a_key_file_that_cannot_be_used(tmp_path, content, text):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        resolve({"api_key_file": str(path)})


def test_unknown_variables_are_named():
    (warning,) = resolve({}, {"ZIF_SERVE_PROT": "1", "ZIF_OTHER": "2"}).warnings
    assert "did you mean ZIF_SERVE_PORT" in warning
    assert resolve_settings({"model": "m"}, {"ZIF_SERVE_PORT": "1"}).warnings == ()


@pytest.mark.parametrize("values", [{"tls_key": "a"}, {"tls_certificate": "a"}, {"served_model_name": "a,,b"}])
def test_settings_that_do_not_fit(values):
    with pytest.raises(ConfigError):
        ServeSettings(**values)


def test_names_of_the_model():
    assert ServeSettings(served_model_name="a, b").model_names("x") == ("a", "b")
    assert ServeSettings().model_names("x") == ("x",)


def test_the_command_line_knows_the_settings_without_the_servers_libraries():
    script = (
        "import sys; from zif.cli.main import build_parser; build_parser();"
        "print([m for m in ('msgspec', 'zmq', 'starlette', 'uvicorn', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("value", ["", "  ", "#secret"])
def test_a_variable_that_holds_no_key_does_not_open_the_server(value):
    with pytest.raises(ConfigError, match="holds no key"):
        resolve_serve_settings({}, environ={"ZIF_SERVE_API_KEY": value})
