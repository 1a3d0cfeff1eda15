"""remote: allowed addresses, and every way around the rules that is known."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import io
import ipaddress
import os
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from reference.synthetic_gateway import MP4, PNG, Server, check_error, video
from timeviper_platform.serving.gateway.config import GatewayConfig, RemoteMedia, Retention
from timeviper_platform.serving.gateway.media import remote
from timeviper_platform.serving.gateway.media.janitor import clean
from timeviper_platform.serving.gateway.media.remote import Addresses, RemoteFetcher, is_global, local_path, resolve
from timeviper_platform.serving.gateway.media.uploads import MediaStore
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.messages import MediaAddress, MediaFile, MediaFrames

HOST = "videos.example"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for number in range(90):
                self.wfile.write(b"X-%d: 1\r\n" % number)
                time.sleep(0.05)
            self.wfile.write(b"\r\n")
            return
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        status, headers, body = self.server.answers[self.path]  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for block in body:
            self.wfile.write(block)

    def log_message(self, *_: Any) -> None:
        pass


class Site:
    """An https server on loopback, whose certificate is for HOST."""

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName(HOST), x509.DNSName(f"cdn.{HOST}")]
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(key, hashes.SHA256())
        )
        (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / "key.pem").write_bytes(private)
        self.server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.answers, self.server.paths = {}, []
        self.server.handle_error = lambda *_: None  # clients that hang up
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, path: str, body: Any, status: int = 200, **headers: str) -> str:
        blocks = [body] if isinstance(body, bytes) else body
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.server.answers[path] = status, names, blocks
        return f"https://{HOST}{path}"

    def fetcher(self, **config: Any) -> RemoteFetcher:
        limits = RemoteMedia(**{"allowed_domains": (HOST,), "max_bytes": 5000, "timeout_s": 10.0, **config})
        return RemoteFetcher(limits, resolve=lambda host, port: ["127.0.0.1"], port=self.port, context=self.context)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.server.shutdown()
    site.server.server_close()


def error_of(fetcher: RemoteFetcher, url: str) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        fetcher.fetch(url, io.BytesIO(), "p")
    assert caught.value.param == "p"
    return caught.value.status, caught.value.code


def test_an_allowed_address_is_read_through_redirects(site: Site) -> None:
    site.put("/a.mp4?x=1", MP4)
    site.put("/two", b"", 307, Location=f"https://cdn.{HOST}/a.mp4?x=1")
    start = site.put("/one", b"", 302, Location="two")
    file = io.BytesIO()
    site.fetcher().fetch(start, file, "p")
    assert file.getvalue() == MP4


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"http://{HOST}/a", "invalid_url"),
        (f"https://user:pw@{HOST}/a", "invalid_url"),
        (f"https://{HOST}:22/a", "invalid_url"),
        (f"https://{HOST}:x/a", "invalid_url"),
        ("https:///a", "invalid_url"),
        (f"https://{HOST}/" + "a" * 9000, "invalid_url"),
        ("https://other.example/a", "domain_not_allowed"),
        (f"https://evil{HOST}/a", "domain_not_allowed"),
        (f"https://{HOST}.evil.example/a", "domain_not_allowed"),
        (f"https://evil.example\\@{HOST}/a", "domain_not_allowed"),
        ("https://127.0.0.1/a", "domain_not_allowed"),
        ("https://[::1]/a", "domain_not_allowed"),
        ("https://2130706433/a", "domain_not_allowed"),
    ],
)
def test_other_addresses_are_refused_without_a_request(site: Site, url: str, code: str) -> None:
    before = len(site.server.paths)
    status, found = error_of(site.fetcher(), url)
    assert status == 400
    assert found in (code, "invalid_url")
    assert len(site.server.paths) == before


def test_redirects_are_checked_and_counted(site: Site) -> None:
    for number, target in enumerate(("http://169.254.169.254/", "https://other.example/", "file:///etc/passwd")):
        url = site.put(f"/to{number}", b"", 302, Location=target)
        assert error_of(site.fetcher(), url)[0] == 400
    loop = site.put("/loop", b"", 301, Location="/loop")
    assert error_of(site.fetcher(), loop) == (400, "remote_failed")
    assert site.server.paths.count("/loop") == 4
    nowhere = site.put("/nowhere", b"", 302)
    assert error_of(site.fetcher(), nowhere) == (400, "remote_failed")


def test_size_and_time_are_bounded_while_it_streams(site: Site) -> None:
    declared = site.put("/declared", b"", Content_Length="999999")
    endless = site.put("/endless", (bytes(1000) for _ in range(10**6)))
    assert error_of(site.fetcher(), declared) == (413, "too_large")
    assert error_of(site.fetcher(), endless) == (413, "too_large")

    def slowly() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.05)
            yield b"x"

    began = time.monotonic()
    slow = site.put("/slow", slowly())
    assert error_of(site.fetcher(timeout_s=0.3), slow) == (408, "remote_timeout")
    assert time.monotonic() - began < 3
    cut = site.put("/cut", b"abc", Content_Length="1000")
    assert error_of(site.fetcher(), cut) == (400, "remote_failed")
    for status, headers in ((404, {}), (206, {}), (200, {"Content_Encoding": "gzip"})):
        assert error_of(site.fetcher(), site.put("/x", b"a", status, **headers)) == (400, "remote_failed")


def test_headers_that_drip_end_with_the_time(site: Site) -> None:
    """Before, each byte had its own timeout, and a thread was held as long as the site liked."""
    began = time.monotonic()
    assert error_of(site.fetcher(timeout_s=0.3), f"https://{HOST}/drip") == (408, "remote_timeout")
    assert time.monotonic() - began < 2
    cut = site.put("/slow-end", (time.sleep(0.5) or bytes(1) for _ in range(3)))  # type: ignore[func-returns-value]
    assert error_of(site.fetcher(timeout_s=0.8), cut) == (408, "remote_timeout")  # not taken for its end


def test_the_certificate_must_be_the_hosts_and_proxies_are_not_used(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = site.put("/p", b"a")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    site.fetcher().fetch(url, io.BytesIO(), "p")
    other = f"https://other.{HOST}/p"  # allowed, but not in the certificate
    assert error_of(site.fetcher(), other) == (400, "remote_failed")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "fe80::1",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "ff02::1",
        "::",
    ],
)
def test_internal_addresses_are_not_global(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_global(ipaddress.ip_address(address))
    answers = [(0, 0, 0, "", ("93.184.216.34", 443)), (0, 0, 0, "", (address, 443))]
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(OSError, match="not global"):  # one bad answer is enough
        resolve(HOST, 443)
    answers.pop()
    assert resolve(HOST, 443) == ["93.184.216.34"]


def test_public_addresses_are_global() -> None:
    for address in ("93.184.216.34", "2606:4700::1111", "64:ff9b::5db8:d822"):
        assert is_global(ipaddress.ip_address(address))


def test_local_files_lie_below_a_folder_and_nowhere_else(tmp_path: Path) -> None:
    root, secret = tmp_path / "videos", tmp_path / "secret"
    (root / "sub folder").mkdir(parents=True)
    (root / "sub folder" / "a.mp4").write_bytes(MP4)
    secret.write_bytes(b"secret")
    (root / "link").symlink_to(secret)
    (root / "up").symlink_to(tmp_path)
    (tmp_path / "videos-other").mkdir()
    (tmp_path / "videos-other" / "b").write_bytes(b"x")
    os.mkfifo(root / "pipe")
    roots = (str(root),)
    found = local_path(f"file://{root}/sub%20folder/a.mp4", roots, "p")
    assert found == str(root / "sub folder" / "a.mp4")
    paths = ["/link", "/up/secret", "/../secret", "/%2e%2e/secret", "/pipe", "", "/sub folder", "/none", "/a%00.mp4"]
    bad = [
        *(f"file://{root}{path}" for path in paths),
        f"file://{root}-other/b",
        f"file://host{root}/sub%20folder/a.mp4",
    ]
    for url in bad:
        with pytest.raises(ApiError) as caught:
            local_path(url, roots, "p")
        assert (caught.value.status, caught.value.code) == (400, "file_not_allowed"), url
    with pytest.raises(ApiError, match="no local files"):
        local_path(f"file://{root}/a", (), "p")


def test_a_stored_medium_is_found_by_its_address_before_it_is_read(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("known.mp4", "new.mp4"):
        (root / name).write_bytes(MP4)
    server = Server(tmp_path, allowed_local_media=(str(root),))
    server.features.known_addresses = {str(root / "known.mp4")}
    assert server.chat(video(f"file://{root}/known.mp4")).status_code == 200
    assert server.features.sources == [address_of(root / "known.mp4")]
    assert server.chat(video(f"FILE://{root}/new.mp4")).status_code == 200
    sha256 = hashlib.sha256(MP4).hexdigest()
    assert server.features.sources[2] == MediaFile(uri=str(root / "new.mp4"), sha256=sha256, modality="video")
    (root / "text.mp4").write_bytes(b"text")
    check_error(server.chat(video(f"file://{root}/text.mp4")), 415, "unsupported_media_type")


def address_of(path: Path) -> MediaAddress:
    return MediaAddress(uri=str(path), aliases=(f"file://{path}",))


def test_a_manifest_may_name_a_file_through_a_link(tmp_path: Path) -> None:
    """Before, only the path without links was looked for, and the video was decoded again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "a b.mp4").write_bytes(MP4)
    (tmp_path / "videos").symlink_to(disk)
    server = Server(tmp_path, allowed_local_media=(str(tmp_path / "videos"),))
    named = f"{tmp_path}/videos/a b.mp4"
    assert server.chat(video(f"file://{tmp_path}/videos/./a%20b.mp4")).status_code == 200
    assert server.features.sources[0] == MediaAddress(uri=str(disk / "a b.mp4"), aliases=(named, f"file://{named}"))


def test_a_local_file_is_hashed_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = tmp_path / "a.mp4", []
    digest = hashlib.file_digest
    monkeypatch.setattr(remote.hashlib, "file_digest", lambda file, name: hashed.append(1) or digest(file, name))
    path.write_bytes(MP4)
    first = [remote._local_file(str(path), "p") for _ in range(3)]
    path.write_bytes(MP4 + b"x")
    second = remote._local_file(str(path), "p")
    assert ({file.sha256 for file in first}, len(hashed)) == ({hashlib.sha256(MP4).hexdigest()}, 2)
    assert second.sha256 == hashlib.sha256(MP4 + b"x").hexdigest()


def test_pictures_at_addresses_in_a_row_are_the_frames_of_one_video(tmp_path: Path) -> None:
    """Before, each was a medium of its own, and nine were too many."""
    paths = [tmp_path / f"{number:02}.png" for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(PNG + bytes([number]))
    (tmp_path / "film.gif").write_bytes(b"GIF89a" + bytes(50))
    server = Server(tmp_path, allowed_local_media=(str(tmp_path),))
    pictures = [{"type": "image_url", "image_url": {"url": path.as_uri()}} for path in paths]
    animation = {"type": "image_url", "image_url": {"url": (tmp_path / "film.gif").as_uri()}}
    assert server.chat([*pictures, {"type": "text", "text": "?"}, pictures[0], animation]).status_code == 200
    joined, alone, film = server.features.sources
    assert isinstance(joined, MediaFrames)
    assert [frame.uri for frame in joined.frames if isinstance(frame, MediaFile)] == [str(path) for path in paths]
    assert (alone.modality, film.modality) == ("image", "video")  # type: ignore[union-attr]
    server.features.sources.clear()
    server.features.known_addresses = {str(paths[0])}
    assert server.chat([pictures[0]]).status_code == 200
    assert server.features.sources == [address_of(paths[0])]  # one picture may be in the feature store
    bad = {"type": "image_url", "image_url": {"url": (tmp_path / "none.png").as_uri()}}
    error = check_error(server.chat([*pictures, bad]), 400, "file_not_allowed")
    assert error["param"] == "messages.0.content.12"


def test_a_download_is_shared_kept_and_then_read_again(site: Site, tmp_path: Path) -> None:
    url = site.put("/shared.png", PNG)
    store = MediaStore(str(tmp_path))

    async def scenario(keep_s: float) -> list[MediaFile]:
        config = GatewayConfig(remote=replace(RemoteMedia(allowed_domains=(HOST,)), keep_s=keep_s))
        addresses = Addresses(config, store, site.fetcher())
        address = await addresses.check(url, "p")
        together = await asyncio.gather(*(addresses.load(address, "a", "p") for _ in range(3)))
        return [*together, await addresses.load(address, "a", "p")]

    async def of_another_tenant() -> None:
        addresses = Addresses(GatewayConfig(remote=RemoteMedia(allowed_domains=(HOST,))), store, site.fetcher())
        address = await addresses.check(url, "p")
        for tenant in ("a", "b", "a"):
            await addresses.load(address, tenant, "p")

    files = asyncio.run(scenario(60))
    assert site.server.paths.count("/shared.png") == 1
    assert len(set(files)) == 1
    assert Path(files[0].uri).read_bytes() == PNG
    asyncio.run(scenario(0))
    assert site.server.paths.count("/shared.png") > 2
    assert store.list("public") == []  # no client's upload
    site.server.paths.clear()
    asyncio.run(of_another_tenant())
    assert site.server.paths.count("/shared.png") == 2  # time tells nobody what others have asked about


def test_a_download_that_was_deleted_is_read_again(site: Site, tmp_path: Path) -> None:
    """Before, its address led to no file until `keep_s` had passed."""
    url, store = site.put("/deleted.png", PNG), MediaStore(str(tmp_path))

    async def scenario() -> list[MediaFile]:
        addresses = Addresses(GatewayConfig(remote=RemoteMedia(allowed_domains=(HOST,))), store, site.fetcher())
        address = await addresses.check(url, "p")
        first = await addresses.load(address, "a", "p")
        assert len(clean(store, Retention(max_bytes=1))) == 1
        return [first, *await asyncio.gather(*(addresses.load(address, "a", "p") for _ in range(3)))]

    files = asyncio.run(scenario())
    assert len(set(files)) == 1
    assert Path(files[0].uri).read_bytes() == PNG
    assert site.server.paths.count("/deleted.png") == 2


def test_slow_sites_hold_up_no_other_work(tmp_path: Path) -> None:
    """Before, they took the threads that also look up files and read data: URIs, for a minute."""
    go = threading.Event()

    class Slow(RemoteFetcher):
        def fetch(self, url: str, file: Any, param: str) -> None:
            go.wait(20)
            file.write(PNG)

    async def scenario() -> None:
        fetcher = Slow(RemoteMedia(allowed_domains=(HOST,)))
        addresses = Addresses(GatewayConfig(), MediaStore(str(tmp_path)), fetcher)
        urls = [f"https://{HOST}/{number}" for number in range(50)]
        loads = [asyncio.ensure_future(addresses.load(MediaAddress(uri=url), "a", "p")) for url in urls]
        await asyncio.sleep(0.1)
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 5) == 7
        finally:
            go.set()
        assert len({file.sha256 for file in await asyncio.gather(*loads)}) == 1

    asyncio.run(scenario())


def test_a_failed_download_is_tried_again(site: Site, tmp_path: Path) -> None:
    url = site.put("/late.png", b"", 503)

    async def scenario() -> None:
        addresses = Addresses(GatewayConfig(), MediaStore(str(tmp_path)), site.fetcher())
        address = await addresses.check(url, "p")
        with pytest.raises(ApiError):
            await addresses.load(address, "a", "p")
        site.put("/late.png", PNG)
        assert (await addresses.load(address, "a", "p")).modality == "image"

    asyncio.run(scenario())
