import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
import yaml

import configs
from configs import ConfigError
from data_pipeline import prepare
from data_pipeline.preparation import Preparation
from data_pipeline.sources import remote
from data_pipeline.sources.inputs import Input, InputError, Part, Reading, describe, find_inputs
from data_pipeline.sources.remote import Patience
from data_pipeline.sources.text_files import TextFiles
from data_pipeline.work import WorkError
from tests.data_pipeline.inputs import http, page, sentences, warc_record
from tests.data_pipeline.servers import KEY, Server, forget, moto
from tests.data_pipeline.test_prepare import contents
from tests.data_pipeline.test_text_files import TEXTS, write_parquet

DATA = b"".join(b"%07d\n" % i for i in range(40_000))
PATIENT = Patience(attempts=4, wait_s=0.01, longest_wait_s=0.05, silence_s=0.3, range_s=0.8)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with /b/x.txt that answers for s3:// too, and little patience."""
    server = Server()
    server.files["/b/x.txt"] = DATA
    for key, value in {**KEY, "AWS_ENDPOINT_URL": server.address}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(remote, "PATIENCE", PATIENT)
    monkeypatch.setattr("data_pipeline.sources.inputs.READ_AHEAD", 100_000)
    forget()
    yield server
    server.close()
    forget()


@pytest.fixture(params=["http", "s3"])
def name(request: pytest.FixtureRequest, server: Server) -> str:
    return f"{server.address}/b/x.txt" if request.param == "http" else "s3://b/x.txt"


def content(input: Input, start: int = 0, stop: int | None = None) -> bytes:
    with Reading(Part(input, start, stop), "c") as reading:
        data = b""
        while chunk := reading.read(9_999):
            data += chunk
        assert reading.finish() == hashlib.sha256(data[: reading.stop - start]).hexdigest()
    return data


def ranges(server: Server) -> list[str]:
    return [asked.removeprefix("bytes=") for _, asked in server.requests if asked not in ("", "bytes=0-0")]


def test_an_object_is_read_by_ranges(server: Server, name: str) -> None:
    input = describe(name)
    assert input == Input(name, len(DATA), f'"{hashlib.md5(DATA).hexdigest()}"')
    assert content(input) == DATA and content(input, 150_000, 160_000) == DATA[150_000:]
    assert ranges(server)[:5] == ["0-99999", "100000-199999", "200000-299999", "300000-319999", "150000-249999"]
    assert content(Input(name, None, None)) == DATA  # of a list


@pytest.mark.parametrize("status", ["404", "403", "418"])
def test_what_is_not_there_or_refused_is_said(server: Server, name: str, status: str) -> None:
    input = describe(name)
    server.faults["/b/x.txt"] = [f"{status}*"]
    why = {
        ("404", "http"): ": not there (HTTP 404); check the address, or put it back",
        ("404", "s3"): ": not there (no such object or bucket); check the address, or put it back",
        ("403", "http"): ": its server refuses it (HTTP 403); it may need credentials, or less haste",
        ("403", "s3"): ": its store refuses it; check AWS_ACCESS_KEY_ID, or set AWS_SKIP_SIGNATURE=true",
        ("418", "http"): ": unexpected HTTP 418",
        ("418", "s3"): ": Generic S3 error: ",
    }[status, name.partition(":")[0]]
    with pytest.raises(ConfigError) as refused:
        find_inputs([name], (".txt",))
    with pytest.raises(InputError) as lost:
        content(input)
    for said, line in ((str(refused.value), f"paths: {name}{why}"), (str(lost.value), f"{name}{why}")):
        assert said.startswith(line) and "\n" not in said and len(said) < 500


def test_errors_that_pass_are_waited_for(server: Server, name: str) -> None:
    input = describe(name)
    server.requests.clear()
    server.faults["/b/x.txt"] = ["500", "503", "500", "", "429", ""]
    assert content(input) == DATA
    assert ranges(server)[:4] == ["0-99999"] * 4


def test_errors_that_stay_are_said_after_some_attempts(server: Server, name: str) -> None:
    input = describe(name)
    server.requests.clear()
    server.faults["/b/x.txt"] = ["500*"]
    with pytest.raises(InputError) as error:
        content(input)
    assert len(server.requests) == PATIENT.attempts
    if name.startswith("http"):
        said = f"{name}: HTTP 500, after 4 attempts; run the same command again to go on"
        assert str(error.value) == said


@pytest.mark.parametrize("fault", ["reset", "stall"])
def test_a_body_that_breaks_off_is_resumed_where_it_broke(server: Server, name: str, fault: str) -> None:
    input = describe(name)
    server.requests.clear()
    server.faults["/b/x.txt"] = ["", fault, fault, ""]
    assert content(input) == DATA
    begins = [int(span.partition("-")[0]) for span in ranges(server)]
    assert begins[:2] == [0, 100_000] and 100_000 < begins[2] <= begins[3] < 200_000  # and none anew
    assert [span.partition("-")[2] for span in ranges(server)[1:4]] == ["199999"] * 3


@pytest.mark.parametrize("fault", ["reset", "stall", "trickle"])
def test_a_body_that_never_comes_whole_is_given_up(server: Server, name: str, fault: str) -> None:
    input = describe(name)
    server.faults["/b/x.txt"] = [f"{fault}*"]
    with pytest.raises(InputError) as error:
        content(input)
    why = {"reset": "broke off", "stall": "broke off", "trickle": "(broke off|too slow)"}[fault]
    assert str(error.value).endswith("after 4 attempts; run the same command again to go on")
    assert why.strip("()").split("|")[0] in str(error.value) or "too slow" in str(error.value)


def test_a_body_without_an_end_is_cut_at_what_was_asked(server: Server) -> None:
    name = f"{server.address}/b/x.txt"
    input = describe(name)
    server.faults["/b/x.txt"] = ["endless*"]
    assert content(input) == DATA


@pytest.mark.parametrize("fault", ["", "old"])
def test_an_object_that_changes_is_noticed(server: Server, name: str, fault: str) -> None:
    input = describe(name)
    line = f"{name}: changed since it was planned; run data-prep run again, which plans anew"
    with Reading(Part(input), "c") as reading:
        reading.read(150_000)
        server.files["/b/x.txt"] = DATA.replace(b"1", b"2")
        server.faults["/b/x.txt"] = [f"{fault}*"]
        with pytest.raises(InputError) as error:
            while reading.read(50_000):
                pass
    assert str(error.value) == line and len(server.requests) < 8  # at once, not after attempts
    with pytest.raises(InputError, match="changed since it was planned"):
        content(input)
    server.files["/b/x.txt"] = DATA[:10]  # shorter than the range
    with pytest.raises(InputError, match="changed since it was planned"):
        content(input, 200_000)


def test_a_weak_version_is_compared_too(server: Server) -> None:
    server.faults["/b/x.txt"] = ["weak*"]
    input = describe(f"{server.address}/b/x.txt")
    assert content(input) == DATA
    server.files["/b/x.txt"] = DATA.replace(b"1", b"2")
    with pytest.raises(InputError, match="changed since it was planned"):
        content(input)


def test_a_server_without_ranges_serves_small_files_only(server: Server) -> None:
    server.faults = {"/b/x.txt": ["whole*"], "/b/y.txt": ["whole*"]}
    server.files["/b/y.txt"] = b"small"
    assert content(describe(f"{server.address}/b/y.txt")) == b"small"
    with pytest.raises(InputError, match=r"x\.txt: its server does not answer range requests; copy it here"):
        content(describe(f"{server.address}/b/x.txt"))


def test_an_empty_object_is_empty(server: Server, name: str) -> None:
    server.files["/b/x.txt"] = b""
    assert describe(name).size == 0 and content(describe(name)) == b""


# --- addresses ------------------------------------------------------------------------------------------------------


def test_redirects_within_the_host_are_followed(server: Server) -> None:
    server.faults["/b/r.txt"] = ["redirect:x.txt*"]
    name = f"{server.address}/b/r.txt"
    assert content(describe(name)) == DATA
    server.faults["/b/r.txt"] = ["redirect:/b/r.txt*"]
    with pytest.raises(InputError, match="redirected more than 5 times; name the last address itself"):
        describe(name)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254, which is no public address: refused"),
        ("http://[fe80::1]/x", "fe80::1, which is no public address: refused"),
        ("http://10.0.0.1/x", "10.0.0.1, which is no public address: refused"),
        ("http://[::ffff:169.254.169.254]/x", "::ffff:169.254.169.254, which is no public address: refused"),
        ("http://localhost:{port}/b/x.txt", "localhost, which is no public address: refused"),
        ("http://no-such-host.invalid/x", "no-such-host.invalid, which is no public address: refused"),
        ("file:///etc/passwd", "'file:///etc/passwd': refused"),
        ("ftp://127.0.0.1/x", "'ftp://127.0.0.1/x': refused"),
        ("http://127.0.0.1:99999999/x", "'http://127.0.0.1:99999999/x': refused"),
    ],
)
def test_redirects_out_of_the_host_lead_to_public_addresses_only(server: Server, target: str, why: str) -> None:
    other = Server()  # the canary: on loopback, and never asked
    other.files["/b/x.txt"] = b"secret"
    server.faults["/b/x.txt"] = [f"redirect:{target.replace('{port}', str(other.http.server_port))}*"]
    name = f"{server.address}/b/x.txt"
    with pytest.raises(InputError) as error:
        describe(name)
    assert str(error.value).startswith(f"{name}: redirected to {why}; name ")
    assert other.requests == []
    other.close()


def test_a_public_address_is_one(server: Server) -> None:
    assert remote._public_address("http://example.org/", "https://93.184.216.34/x") == "93.184.216.34"
    with pytest.raises(InputError):
        remote._public_address("https://example.org/", "http://93.184.216.34/x")  # out of the safe connection


@pytest.mark.parametrize(
    ("evil", "said"),
    [
        ("http://169.254.169.254/x.txt", "http://169.254.169.254: a link-local address: refused"),
        ("https://user:secret@example.org/x.txt", "https://example.org/x.txt: no query, fragment or password"),
        ("https://example.org/x.txt?key=1", "https://example.org/x.txt: no query, fragment or password"),
        ("https://example.org/*.txt", "https://example.org/*.txt: only s3:// can be listed"),
        ("https:///x.txt", "https:///x.txt: expected an address such as https://example.org/file"),
        ("ftp://example.org/x.txt", "ftp://example.org/x.txt: expected a file, https://, http:// or s3://"),
    ],
)
def test_addresses_that_will_not_be_asked(server: Server, evil: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_inputs([evil], (".txt",))
    assert str(error.value).startswith(f"paths: {said}") and "secret" not in str(error.value)


# --- moto's S3 ------------------------------------------------------------------------------------------------------


def test_patterns_and_prefixes_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    with moto(monkeypatch, "corpus") as bucket:
        names = ["a/1.txt", "a/2.txt", "a/b/3.txt", "a/other.dat", "c d/ü+%.txt"]
        for key in names:
            obstore.put(bucket, key, key.encode())

        def find(*patterns: str) -> list[str]:
            return [input.name for input in find_inputs(patterns, (".txt",))]

        assert find("s3://corpus/a/*.txt") == ["s3://corpus/a/1.txt", "s3://corpus/a/2.txt"]
        assert find("s3://corpus/a/", "s3://corpus/a/1.txt") == [f"s3://corpus/a/{x}.txt" for x in ("1", "2", "b/3")]
        assert find("s3://corpus/*/[0-2].txt") == ["s3://corpus/a/1.txt", "s3://corpus/a/2.txt"]
        assert content(describe("s3://corpus/c d/ü+%.txt")) == "c d/ü+%.txt".encode()
        (listed,) = find_inputs(["s3://corpus/a/1*.txt"], (".txt",))
        assert listed == describe("s3://corpus/a/1.txt") and listed.size == 7
        for missing in ("s3://corpus/z/*.txt", "s3://corpus/z/"):
            with pytest.raises(ConfigError) as error:
                find(missing)
            assert str(error.value) == f"paths: no object matches {missing!r}"


def test_parquet_is_read_out_of_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    with moto(monkeypatch, "corpus") as bucket:
        obstore.put(bucket, "a.parquet", path.read_bytes())
        source = TextFiles(paths=["s3://corpus/a.parquet"])
        with Reading(Part(source.inputs()[0]), "c") as reading:
            assert [d.text for d in source.read(reading)] == TEXTS
            assert reading.finish() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_shards_are_the_same_wherever_the_inputs_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files, a web server by a list, and S3: the same tars. An object that changes is refused."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": sentences(i, 10), "id": i}) for i in range(300)]
    lines = "\n".join(rows).encode()
    crawl = b"".join(
        gzip.compress(warc_record("response", f"https://e.org/{i}", http(page(sentences(i, 20))), f"{i:036d}"))
        for i in range(20)
    )
    Path("x").mkdir()
    Path("x/rows.jsonl").write_bytes(lines)
    Path("x/0.warc.gz").write_bytes(crawl)
    Path("warc.paths.gz").write_bytes(gzip.compress(b"x/0.warc.gz\n"))
    config = {
        "name": "small",
        "out": "local",
        "tokenizer": {"kind": "train", "vocab_size": 400},
        "corpora": {
            "rows": {"kind": "text_files", "paths": ["x/rows.jsonl"], "id_field": "id"},
            "crawl": {"kind": "common_crawl", "paths": ["warc.paths.gz"], "base": "."},
        },
        "slice_bytes": 30_000,
        "block_tokens": 1024,
    }
    Path("small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def run(*overrides: str) -> dict[str, str]:
        preparation = configs.load(Preparation, Path("small.yaml"), overrides)
        assert [s.documents for s in prepare.run(preparation)] == [300, 20]
        return {k: v for k, v in contents(preparation.out).items() if k.endswith((".tar", "tokenizer.json"))}

    local = run()
    given = ["tokenizer={kind: file, path: local/tokenizer.json}"]
    server = Server()
    server.files["/x/0.warc.gz"] = crawl
    server.faults["/x/0.warc.gz"] = ["reset", "500"]
    with moto(monkeypatch, "corpus") as bucket:
        obstore.put(bucket, "x/rows.jsonl", lines)
        away = ["out=away", "corpora.rows.paths=[s3://corpus/x/*.jsonl]", f"corpora.crawl.base={server.address}"]
        assert run(*given, *away) == local and len(local) > 6
        assert len(server.requests) > 2  # of an input of which nothing was known before
        server.close()  # all is made: the inputs may be gone
        assert run(*given, *away) == local
        obstore.put(bucket, "x/rows.jsonl", lines.replace(b"a", b"o"))
        with pytest.raises(
            ConfigError, match=r"inputs of finished shards have changed: s3://corpus/x/rows\.jsonl: written"
        ):
            run(*given, *away)
        (tmp_path / "away/rows/MANIFEST.json").unlink()
        obstore.delete(bucket, "x/rows.jsonl")
        with pytest.raises((ConfigError, WorkError)):
            run(*given, "out=fresh", *away[1:])
