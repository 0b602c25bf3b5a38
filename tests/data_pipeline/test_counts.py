import json
from pathlib import Path

from data_pipeline import counts
from data_pipeline.counts import Counts, LanguageSample, Totals
from data_pipeline.document import Document
from data_pipeline.dropped import Dropped

ENGLISH = "The house stood on a hill above the river, and nobody had lived in it for many years. "
GERMAN = "Das Haus stand auf einem Hügel über dem Fluss, und seit vielen Jahren wohnte niemand darin. "


def document(i: int, text: str, **meta: str | int) -> Document:
    return Document(text, f"id-{i}", "c", "", meta)


def test_kept_documents_are_counted_by_length_and_language(tmp_path: Path) -> None:
    tally = Counts(gone=Dropped(tmp_path))
    tally.keep(document(0, "é" * 1023, language="fr"), "train", 255)
    tally.keep(document(1, "x" * 1024, language="fr"), "validation", 256)
    tally.keep(document(2, ENGLISH * 5), "train", 100)
    record = tally.record()
    assert record["languages"] == {"en": 1, "fr": 2} and record["languages_looked_at"] == 1
    assert record["length_characters"] == {"9": 1, "10": 1, "11": 1}
    assert record["length_tokens"] == {"7": 1, "8": 1, "9": 1}
    assert record["text_bytes"] == 2 * 1023 + 1024 + len(ENGLISH) * 5 and record["tokens"]["train"] == 357


def test_shares_of_languages_come_from_a_sample() -> None:
    sample = LanguageSample()
    for i in range(6000):
        sample.add(document(i, (GERMAN if i % 4 == 0 else ENGLISH) * 3))
    assert sample.seen == 6000 and sample.looked_at == counts.SAMPLE
    found = sample.languages()
    assert set(found) == {"de", "en"} and abs(found["de"] - 1500) < 300 and abs(found.total() - 6000) < 6


def test_records_add_up_to_the_same_whichever_way_they_are_cut(tmp_path: Path) -> None:
    one, halves = Counts(gone=Dropped(tmp_path)), [Counts(gone=Dropped(tmp_path)) for _ in range(2)]
    for i in range(50):
        for tally in (one, halves[i % 2]):
            tally.keep(document(i, ENGLISH * (i + 1)), "train", 20 * i)
            tally.dropped["too short"] += 1
    total = Totals()
    for half in halves:
        total.add(json.loads(json.dumps(half.record())))
    total.add({"read": 3})  # a record of an older version
    assert total.as_json() | {"notes": []} == one.record() | {"read": 3}
