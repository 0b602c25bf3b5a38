import subprocess
import sys
from pathlib import Path

import pytest

import data_pipeline.standard_library_docs as docs
from data_pipeline.sources.bookcorpus import BookCorpus
from data_pipeline.sources.common_crawl import CommonCrawl
from data_pipeline.sources.wikipedia import Wikipedia
from tests.data_pipeline.inputs import read


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("docs")
    return folder, docs.make_corpora(folder, 400_000)


def test_each_corpus_has_about_what_was_asked_for(corpora: tuple[Path, dict[str, int]]) -> None:
    folder, sizes = corpora
    assert set(sizes) == {"common_crawl", "wikipedia", "bookcorpus"}
    assert all(300_000 < size < 600_000 for size in sizes.values()), sizes
    assert {path.name for path in folder.iterdir()} == set(sizes)


def test_the_readers_read_them_whole(corpora: tuple[Path, dict[str, int]]) -> None:
    folder, sizes = corpora
    for source, kept in (
        (CommonCrawl(paths=[str(folder / "common_crawl")]), 0.6),
        (Wikipedia(paths=[str(folder / "wikipedia")]), 0.9),
        (BookCorpus(paths=[str(folder / "bookcorpus")]), 0.9),
    ):
        texts, aside = [], 0
        for input in source.inputs():
            documents, reading = read(source, Path(input.name))
            texts += [document.text for document in documents]
            aside += reading.set_aside.total()
            assert not reading.set_aside["damaged input"] and not reading.notes
        assert sum(map(len, texts)) > kept * sizes[source.kind], source.kind
        assert (aside > 5) == (source.kind != "bookcorpus")  # pages that are none, redirects, talk


def test_articles_come_out_without_markup(corpora: tuple[Path, dict[str, int]]) -> None:
    source = Wikipedia(paths=[str(corpora[0] / "wikipedia")])
    documents = [d for input in source.inputs() for d in read(source, Path(input.name))[0]]
    for document in documents:
        title = str(document.meta["title"])
        assert document.text.startswith(f"{title}\n\n{title.rpartition('.')[2]} is a "), document.text[:200]
        assert "{{" not in document.text.split("\n")[2] and "wikitable" not in document.text
        assert "Category:" not in document.text.rsplit("\n", 1)[-1]


def test_the_same_python_gives_the_same_bytes_with_nothing_installed_and_nothing_imported(
    corpora: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    program = (
        f"import runpy, sys\nsys.argv = ['docs', {str(tmp_path)!r}, '400000']\n"
        f"runpy.run_path({docs.__file__!r}, run_name='__main__')\n"
        "print(*(name for name in ('antigravity', 'this', 'turtle', 'tkinter', 'idlelib') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True)
    *lines, imported = done.stdout.split("\n")[:-1]
    assert lines == [f"{corpus}: {size} bytes of text" for corpus, size in corpora[1].items()] and imported == ""
    for path in corpora[0].rglob("*.*"):
        assert (tmp_path / path.relative_to(corpora[0])).read_bytes() == path.read_bytes(), path
