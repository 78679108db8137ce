"""The gate of ``vlmeff serve`` alone: what it lets through, which addresses it fetches, what has to be installed."""

from __future__ import annotations

import base64
import http.client
import http.server
import io
import ipaddress
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmeff.errors import ConfigError, EnvironmentMismatchError, MissingExtraError
from vlmeff.integrations import server, server_fetch
from vlmeff.integrations.server_fetch import check_address, fetch, is_public
from vlmeff.integrations.server_gate import RequestLimits, check_chat, check_responses
from vlmeff.integrations.server_images import PictureLimits, RefusedRequest, picture_as_png


def _png(mode: str = "RGB", color: Any = "red", kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 3), color).save(file, kind, **options)
    return file.getvalue()


def _url(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


GOOD = _url(_png())
LIMITS = RequestLimits(pictures=PictureLimits(max_images=2))

# Any JSON, made of the words that mean something to the routes.
_WORDS = st.sampled_from(
    "messages input role user assistant system tool content type text image_url input_image url path image video_url "
    "input_text images tools function name arguments tool_calls tool_call_id message function_call_output output "
    "chat_template_kwargs file:///etc/passwd /etc/passwd http://127.0.0.1/a.png data:image/png;base64,aaaa".split()
)
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.just(GOOD) | st.text(max_size=5)
_ANY = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=4), max_leaves=12
)
_PART = (
    _ANY
    | st.fixed_dictionaries({"type": st.sampled_from(["image_url", "input_image"]), "image_url": _ANY})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": _ANY})})
    | st.fixed_dictionaries({"type": st.just("text"), "text": _ANY})
)
_MESSAGE = _ANY | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.lists(_PART, max_size=3) | _ANY},
    optional={"tool_calls": _ANY, "url": _ANY},
)


def _urls(value: Any) -> Iterator[Any]:
    """What transformers would look for a picture at: every value beside a text, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("url", "path", "image", "images", "base64", "video", "audio", "image_url") and not isinstance(
                inner, dict
            ):
                yield inner
            yield from _urls(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _urls(inner)


@settings(max_examples=300, deadline=None)
@example(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": GOOD}}]}], more={})
@given(messages=st.lists(_MESSAGE, max_size=3) | _ANY, more=st.dictionaries(_WORDS, _ANY, max_size=2))
@pytest.mark.parametrize(("check", "own"), [(check_chat, "messages"), (check_responses, "input")])
def test_whatever_is_sent_only_our_own_pngs_come_through(check: Any, own: str, messages: Any, more: Any) -> None:
    try:
        made = check({**more, own: messages}, LIMITS)
    except RefusedRequest:
        return
    assert set(made) <= {own, "stream", "tools", "max_completion_tokens", "max_output_tokens"}
    for url in _urls(made[own]):
        kind, _, data = url.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")


def test_a_good_picture_comes_through() -> None:
    parts = [{"type": "input_image", "image_url": GOOD}, {"type": "image_url", "image_url": {"url": GOOD}}]
    for check, own in ((check_chat, "messages"), (check_responses, "input")):
        made = check({own: [{"role": "user", "content": parts}]}, LIMITS)
        assert len(list(_urls(made[own]))) == 2


def test_a_picture_comes_out_upright_on_white_and_without_what_was_beside_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010E] = "where I live"
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    cases = [
        (_url(_png(exif=exif)), (3, 4), (255, 0, 0)),
        (_url(_png("RGBA", (255, 0, 0, 0))), (4, 3), (255, 255, 255)),
        (_url(file.getvalue(), "gif"), (4, 3), (255, 0, 0)),
    ]
    for url, size, color in cases:
        made = base64.b64decode(picture_as_png(url, LIMITS.pictures).partition(",")[2])
        with Image.open(io.BytesIO(made)) as picture:
            assert (picture.format, picture.size, picture.getpixel((1, 1))) == ("PNG", size, color)
        assert b"where I live" not in made


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(RefusedRequest, match=r"E-SERVE-01.*4 x 3 pixels"):
        picture_as_png(GOOD, PictureLimits(max_image_pixels=11))
    with pytest.raises(AssertionError, match="decoded"):
        picture_as_png(GOOD, PictureLimits(max_image_pixels=12))


@pytest.mark.parametrize(
    "url",
    """http://a.example/x HTTPS://a.example/x https://b.example/x https://a.example.b.example/x https://xa.example/x
    https://a.example:8443/x https://u@a.example/x https://a.example@b.example/x https://A.example/x
    https://a.example\\@b.example/x https://b.example/https://a.example/x https://127.0.0.1/x https://2130706433/x
    https://0x7f000001/x https://a.0x7f/x https://[::1]/x https://a.example./x https://a%2eexample/x //a.example/x
    https:/a.example/x https://a.example/\u00e9""".split(),
)
def test_addresses_are_spelt_in_one_way_and_of_an_allowed_host(url: str) -> None:
    with pytest.raises(ValueError, match=r"spelt|not one of|in numbers"):
        check_address(url, ("a.example",))
    limits = RequestLimits(pictures=PictureLimits(media_domains=("a.example",)))
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    with pytest.raises(RefusedRequest, match="E-SERVE-01"):
        check_chat(body, limits)


def test_an_allowed_address_is_taken_apart() -> None:
    assert check_address("https://a.example/b/c.png?d=e#f", ("a.example",)) == ("a.example", "/b/c.png?d=e")
    assert check_address("https://a.example:443", ("a.example",)) == ("a.example", "/")


PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 ::1
:: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001:0:1::1
240.0.0.1""".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_no_private_address_is_public(address: str) -> None:
    assert not is_public(address)
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")

    def never(*_: Any) -> Any:
        raise AssertionError("connected")

    for addresses in ([address], ["93.184.215.14", address]):  # one private address among public ones is enough
        with pytest.raises(ValueError, match="not public"):
            fetch("https://a.example/x", ["a.example"], max_bytes=9, resolve=lambda host: addresses, connect=never)  # noqa: B023


class _Site(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        kind = "text/html" if self.path == "/page" else "image/png"
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("Location", "/picture")
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(b"x" * 5000 if self.path == "/long" else _png())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def ask() -> Iterator[Callable[[str], bytes]]:
    """``fetch`` of a path at a.example, whose public address leads to a site in this process, without TLS."""
    _Site.seen = []
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    thread = threading.Thread(target=site.serve_forever)
    thread.start()

    class Here(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = server_fetch.socket.create_connection(site.server_address, self.timeout)

    def connect(host: str, addresses: Sequence[str], timeout: float) -> http.client.HTTPConnection:
        assert list(addresses) == ["93.184.215.14"]
        return Here(host, timeout=timeout)

    yield lambda path: fetch(
        f"https://a.example{path}",
        ["a.example"],
        max_bytes=4000,
        resolve=lambda host: ["93.184.215.14"],
        connect=connect,
    )
    site.shutdown()
    thread.join()
    site.server_close()


def test_a_picture_of_an_allowed_host_is_fetched(ask: Callable[[str], bytes]) -> None:
    assert ask("/picture?a=b") == _png()
    assert _Site.seen == [("/picture?a=b", "a.example")]


@pytest.mark.parametrize(
    ("path", "why"), [("/moved", "redirects"), ("/page", "no picture"), ("/long", "more than 4000 bytes")]
)
def test_redirects_pages_and_long_answers_are_refused(ask: Callable[[str], bytes], path: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ask(path)
    assert [seen for seen, _ in _Site.seen] == [path]


def test_the_connection_goes_to_the_address_that_was_checked_under_the_hosts_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone: list[Any] = []

    def create(address: Any, *_: Any) -> Any:
        gone.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(server_fetch.socket, "create_connection", create)
    answers = iter([["93.184.215.14", "93.184.215.15"], ["127.0.0.1"]])  # a name server that changes its mind
    with pytest.raises(OSError, match="nobody there"):
        fetch("https://a.example/x", ["a.example"], max_bytes=9, resolve=lambda host: next(answers))
    assert gone == [("93.184.215.14", 443), ("93.184.215.15", 443)]
    connection = server_fetch._Pinned("a.example", ["93.184.215.14"], 1.0)
    assert connection._pinned_context.check_hostname
    assert connection._pinned_context.verify_mode == server_fetch.ssl.CERT_REQUIRED


@given(number=st.integers(0, 2**32 - 1))
def test_an_ipv4_address_in_ipv6_is_as_public_as_it_is_alone(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    assert is_public(f"::ffff:{address}") == is_public(str(address))


def test_the_gate_and_the_command_need_neither_torch_nor_the_extra() -> None:
    names = "vlmeff.cli_serve, vlmeff.integrations.server, vlmeff.integrations.server_gate"
    program = f"import sys, {names}; print(sorted({{'torch', 'transformers', 'fastapi', 'openai'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--allow-media-domain", "https://a.example"], "--allow-media-domain"),
        (["--allow-media-domain", "127.0.0.1"], "--allow-media-domain"),
        (["--dtype", "int8"], "--dtype"),
        (["--log-level", "loud"], "--log-level"),
    ],
)
def test_bad_options_are_refused_by_name(options: list[str], why: str) -> None:
    import typer
    from typer.testing import CliRunner

    from vlmeff.cli_serve import serve_command

    app = typer.Typer()
    app.command()(serve_command)
    error = CliRunner().invoke(app, options).exception
    assert isinstance(error, ConfigError)
    assert why in str(error)


def test_a_port_in_use_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "check_environment", lambda: None)
    with server_fetch.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"--port.*choose another"):
            server.serve("no-such-model", "fast", port=taken.getsockname()[1])


def test_another_transformers_is_refused_with_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    version = server.importlib.metadata.version
    monkeypatch.setattr(
        server.importlib.metadata, "version", lambda name: "5.24.1" if name == "transformers" else version(name)
    )
    with pytest.raises(EnvironmentMismatchError, match=r"E-ENV-02.*>=5\.23,<5\.24.*5\.24\.1"):
        server.check_environment()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = server.importlib.util.find_spec
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    with pytest.raises(MissingExtraError, match=r'E-ENV-01.*pip install "vlmeff\[serve\]"'):
        server.check_environment()
