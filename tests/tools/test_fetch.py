"""The authors' weights from an address: against a server of this process, on this machine."""
import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import timm
import torch

from zoo import downloads
from zoo.errors import InputError
from zoo.tools import fetch as program

CONTENT = bytes(range(256)) * 40_000  # 10 MB, more than one piece
NAME = "biformer_nano"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `cuts` says after how many bytes each answer in turn breaks off, `etags` under which version each is sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.etags, self.codes, self.asked, self.announce = CONTENT, [], [], [], [], True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/release/weights.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        tag = server.etags.pop(0) if server.etags else '"one"'
        if server.codes and (code := server.codes.pop(0)) != 200:
            self.send_error(code)
            return
        start = 0
        if self.headers.get("Range") and self.headers.get("If-Range") == tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        if server.announce:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_a_file_comes_whole_once_and_with_progress(server, tmp_path):
    seen = []
    options = dict(licence="mit", cache_dir=tmp_path / "new" / "cache", size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest(),
                   progress=lambda done, total: seen.append((done, total)))
    path = downloads.fetch(server.url, NAME, **options)
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert downloads.fetch(server.url, NAME, **options) == path
    assert len(server.asked) == 1
    assert left(tmp_path) == [path.name]


def test_names_cannot_clash(tmp_path):
    urls = ["https://a.example/shares/1/root/content", "https://a.example/shares/2/root/content", "https://a.example/x/y.pth.tar"]
    places = {downloads.place(url, name, tmp_path) for url in urls for name in ("a", "b")}
    assert len(places) == 6
    assert {path.suffix for path in places} == {".pth", ".tar"}


def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.cuts = [3_000_000, 2_000_000]
    path = downloads.fetch(server.url, NAME, licence="mit", cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=3000000-", "bytes=5000000-"]


def test_another_version_in_between_starts_anew(server, tmp_path):
    server.cuts, server.etags = [3_000_000], ['"one"', '"two"']
    assert downloads.fetch(server.url, NAME, licence="mit", cache_dir=tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=3000000-"]


def test_without_a_version_it_starts_anew(server, tmp_path):
    server.cuts, server.etags = [3_000_000], ['W/"weak"', '"one"']
    assert downloads.fetch(server.url, NAME, licence="mit", cache_dir=tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, None]


@pytest.mark.parametrize(("change", "options", "said"), [
    (dict(cuts=[10] * 9), {}, rf"tried 5 times: the connection ended after 50 of {len(CONTENT)} bytes"),
    (dict(codes=[503] * 9), {}, "tried 5 times: the server answers 503"),
    (dict(codes=[404]), {}, "cannot be downloaded: the server answers 404"),
    ({}, dict(size=7), rf"is a file of {len(CONTENT)} bytes, where 7 are expected"),
    (dict(announce=False), dict(size=7), "gave more than the 7 bytes that it should"),
    (dict(announce=False), dict(size=len(CONTENT) + 1), "the connection ended after"),
    ({}, dict(sha256="0" * 64), "gave a file with SHA-256 [0-9a-f]{64}, where 0{64} is expected"),
    (dict(content=b"<!DOCTYPE html><p>Sign in"), {}, "gave a page, not a file; open it in a browser"),
])
def test_nothing_is_left_of_what_is_not_the_file(server, tmp_path, change, options, said):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(InputError, match=said):
        downloads.fetch(server.url, NAME, licence="mit", cache_dir=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_server_error_in_between_is_waited_out(server, tmp_path):
    server.codes = [503, 200]
    assert downloads.fetch(server.url, NAME, licence="mit", cache_dir=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "nvidia-source-code-nc", None])
def test_licences_are_accepted_first(server, tmp_path, licence):
    with pytest.raises(InputError, match=rf"licence is {licence or 'not stated'}. Read it; .*: zoo fetch {NAME} --accept-licence"):
        downloads.fetch(server.url, NAME, licence=licence, cache_dir=tmp_path)
    assert not server.asked
    path = downloads.fetch(server.url, NAME, licence=licence, cache_dir=tmp_path, accept_licence=True)
    assert downloads.fetch(server.url, NAME, licence=licence, cache_dir=tmp_path) == path  # they were accepted when it came


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x.pth", "file:///etc/passwd", "x.pth"])
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(InputError, match="no address of http or https"):
        downloads.fetch(url, NAME, licence="mit", cache_dir=tmp_path)


def test_an_interrupted_download_leaves_nothing(server, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        downloads.fetch(server.url, NAME, licence="mit", cache_dir=tmp_path, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_pretrained_models_come_from_their_address(server, tmp_path):
    weights = timm.create_model(NAME).state_dict()
    torch.save({"model": weights, "model_ema": {name: value * 0 for name, value in weights.items()}}, tmp_path / "x.pth")
    server.content = (tmp_path / "x.pth").read_bytes()
    cache = tmp_path / "cache"
    for _ in range(2):
        model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(url=server.url), cache_dir=cache)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(server.asked) == 1
    assert left(cache) == [downloads.place(server.url, NAME, cache).name]
    with pytest.raises(InputError, match="--accept-licence"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(url=server.url, license="cc-by-nc-4.0"), cache_dir=tmp_path)


def test_the_program_downloads_and_says_how_to_go_on(server, tmp_path, monkeypatch, capsys):
    cfg = timm.get_pretrained_cfg("litv2_s")
    monkeypatch.setattr(cfg, "url", server.url)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    assert program.main(["litv2_s", "--cache", str(tmp_path)]) == 0
    path = downloads.place(server.url, "litv2_s", tmp_path)
    assert path.read_bytes() == CONTENT
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[:2] == [f"litv2_s: litv2_s.pth by its authors, from {server.url}", "licence: apache-2.0"]
    assert lines[-1] == f'  timm.create_model("litv2_s", pretrained=True, pretrained_cfg_overlay=dict(file="{path}"))'
    assert said.err.splitlines()[-1] == "10.2 of 10.2 MB"


def test_the_program_asks_about_licences_and_prints_pages(capsys, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match=r"licence of these weights \(nvidia-source-code-nc\) does not allow .*--accept-licence"):
        program.main(["fan_tiny_12_p16_224", "--cache", str(tmp_path)])
    capsys.readouterr()
    assert program.main(["biformer_small"]) == 0
    said = capsys.readouterr().out
    assert "from https://api.onedrive.com/v1.0/shares/" in said and "licence: mit" in said
    use = '  timm.create_model("biformer_small", pretrained=True, pretrained_cfg_overlay=dict(file="biformer_small_best.pth"))\n'
    assert said.endswith(use)
    with pytest.raises(InputError, match=r"no weights of biformer_nano were released"):
        program.main(["biformer_nano"])
    with pytest.raises(InputError, match=r"no model 'biformer_smal'; did you mean biformer_small"):
        program.main(["biformer_smal"])
    assert program.main(["all", "--cache", str(tmp_path)]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows if row[1] == "nvidia-source-code-nc"} == {name for name in timm.list_models("fan_*")
                                                                             if timm.get_pretrained_cfg(name).url}
