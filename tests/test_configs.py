"""Configuration: what loads, and the one line that is said where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

import configs
from configs import Bool, ConfigError, Float, Int, Section, build, differences, dump, fingerprint, leaf_paths, load
from pretrain.run import TrainRun


class Model(Section):
    layers: Int = Field(gt=0)
    dropout: Float = Field(default=0.0, ge=0, lt=1)


class Torch(Section):
    kind: Literal["torch"] = "torch"
    threads: Int = 1


class Zero(Section):
    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Int = 1
    precision: Literal["bf16", "fp32"] = "bf16"


Engine = Annotated[Torch | Zero, Field(discriminator="kind")]


class Corpus(Section):
    shards: Path
    weight: Float = 1.0


class Run(Section):
    name: str
    model: Model
    engine: Engine = Torch()
    corpora: dict[str, Corpus] = Field(default_factory=dict)
    steps: Int = Field(default=3, gt=0)
    rate: Float = 0.1
    strict: Bool = False
    track: tuple[Engine, ...] = ()
    tags: list[str] = Field(default_factory=list)
    note: str | None = None

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if name == "bad":
            raise ValueError("expected a good name, got 'bad'")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Run:
        if self.steps == 13:
            raise ValueError("steps: 13 with rate is unlucky")
        return self


BASE = "name: x\nmodel: {layers: 2}\n"


def loaded(folder: Path, text: str, *overrides: str) -> Run:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load(Run, path, overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    """The message, in which the folder is F."""
    with pytest.raises(ConfigError) as error:
        loaded(folder, text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(folder), "F").replace(str(configs.CONFIGS), "CONFIGS")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512", 512),
        ("10e9", 10_000_000_000),
        ("512Ki", 524_288),
        ("0.5Mi", 524_288),
        ("2Gi", 2**31),
        ("1Ti", 2**40),
        ("1_000", 1000),
        ("1e3", 1000),
        ("'7'", 7),
        ("9007199254740993", 2**53 + 1),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_whole_numbers(text: str, value: int, tmp_path: Path) -> None:
    assert loaded(tmp_path, f"{BASE}steps: {text}").steps == value
    assert loaded(tmp_path, BASE, f"steps={text}").steps == value


@pytest.mark.parametrize(
    "text",
    ["4.5", "1e-3", "nan", "inf", "1e400", "9223372036854775808", "0.1Ki", "512ki", "0x10", "many", "true", "[1]"],
)
def test_no_whole_numbers(text: str, tmp_path: Path) -> None:
    got = "['1']" if text == "[1]" else f"'{text}'"
    expected = f"steps: expected a whole number (such as 512, 10e9 or 512Ki), got {got}"
    assert refused(tmp_path, f"{BASE}steps: {text}") == f"F/run.yaml:3: {expected}"


@pytest.mark.parametrize(("text", "value"), [("6e-4", 6e-4), ("0.1", 0.1), ("3", 3.0), ("375e6", 375e6), ("-1", -1.0)])
def test_numbers(text: str, value: float, tmp_path: Path) -> None:
    assert loaded(tmp_path, f"{BASE}rate: {text}").rate == value


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "fast", "512Ki", "true"])
def test_no_numbers(text: str, tmp_path: Path) -> None:
    assert refused(tmp_path, f"{BASE}rate: {text}") == (
        f"F/run.yaml:3: rate: expected a finite number (such as 0.1 or 6e-4), got '{text}'"
    )


def test_flags(tmp_path: Path) -> None:
    assert loaded(tmp_path, f"{BASE}strict: true").strict is True
    assert loaded(tmp_path, f"{BASE}strict: false").strict is False
    for text in ("no", "True", "1", "on"):
        assert refused(tmp_path, f"{BASE}strict: {text}") == (
            f"F/run.yaml:3: strict: expected true or false, got '{text}'"
        )


@pytest.mark.parametrize(
    "text", ["no", "1e-3", "0x10", "2024-01-01", "'null'", '"~"', "''", "true", "a.yaml", "12:30", "=", "'<<'"]
)
def test_text_stays_text(text: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, f"{BASE}note: {text}").note == text.strip("'\"")


def test_null(tmp_path: Path) -> None:
    for text in ("null", "~", ""):
        assert loaded(tmp_path, f"{BASE}note: {text}").note is None
        assert loaded(tmp_path, f"{BASE}note: given", f"note={text}").note is None
    assert (
        refused(tmp_path, "name:\nmodel: {layers: 2}") == "F/run.yaml:1: name: input should be a valid string, got None"
    )
    assert refused(tmp_path, f"{BASE}steps: null").endswith(
        "steps: expected a whole number (such as 512, 10e9 or 512Ki), got None"
    )


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("stpes: 4", "stpes: unknown key; did you mean steps?"),
        ("layers: 4", "layers: unknown key; did you mean model.layers?"),
        ("zero_stage: 4", "zero_stage: unknown key; did you mean engine.zero_stage?"),
        ("weight: 4", "weight: unknown key; did you mean corpora.*.weight?"),
        (
            "zzz: 4",
            "zzz: unknown key; valid here: name, model, engine, corpora, steps, rate, strict, track, tags, note",
        ),
        (
            "corpora: {wiki: {shards: a, wieght: 1}}",
            "corpora.wiki.wieght: unknown key; did you mean corpora.wiki.weight?",
        ),
        (
            "corpora: {wiki: {shrads: a}}",
            "corpora.wiki.shrads: unknown key; did you mean corpora.wiki.shards? (and 1 more)",
        ),
        ("corpora: {wiki: {weight: 1}}", "corpora.wiki.shards: required, and not given"),
        (
            "engine: {kind: torch, zero_stage: 2}",
            "engine.zero_stage: unknown key of kind torch; it is one of kind deepspeed",
        ),
        ("engine: {kind: torch, thread: 2}", "engine.thread: unknown key; did you mean engine.threads?"),
        ("engine: {kind: torhc}", "engine: kind: expected torch | deepspeed, got 'torhc'; did you mean torch?"),
        ("engine: {kind: megatron}", "engine: kind: expected torch | deepspeed, got 'megatron'"),
        ("engine: {threads: 2}", "engine: needs `kind: torch | deepspeed`"),
        (
            "engine: torch",
            "engine: expected a section (`key: value` lines, or the name of a .yaml file), got 'torch'",
        ),
        (
            "engine: {kind: deepspeed, precision: bf61}",
            "engine.precision: expected 'bf16' or 'fp32', got 'bf61'",
        ),
        (
            "track: [{kind: torch}, {kind: torch, threds: 1}]",
            "track.1.threds: unknown key; did you mean track.1.threads?",
        ),
        ("track: {kind: torch}", "track: expected a list, got {'kind': 'torch'}"),
        ("tags: one", "tags: expected a list, got 'one'"),
        ("tags: [[a]]", "tags.0: input should be a valid string, got ['a']"),
        ("steps: 0", "steps: input should be greater than 0, got 0"),
        ("corpora: 5", "corpora: expected a section (`key: value` lines, or the name of a .yaml file), got '5'"),
        ("steps: 4\nsteps: 5", None),
    ],
)
def test_one_line_says_what_is_wrong(more: str, message: str | None, tmp_path: Path) -> None:
    if message is None:
        assert refused(tmp_path, BASE + more) == "F/run.yaml:4: steps: given twice"
    else:
        assert refused(tmp_path, BASE + more) == f"F/run.yaml:3: {message}"


def test_the_line_is_that_of_the_key(tmp_path: Path) -> None:
    text = "name: x\n\n# a comment\nmodel:\n  layers: 2\n  dropout: much\n"
    assert refused(tmp_path, text) == (
        "F/run.yaml:6: model.dropout: expected a finite number (such as 0.1 or 6e-4), got 'much'"
    )
    text = "name: x\nmodel:\n  layers: 2\n  engine: 1\n  layers: 3\n"
    assert refused(tmp_path, text) == "F/run.yaml:5: model.layers: given twice"


def test_required_keys(tmp_path: Path) -> None:
    assert refused(tmp_path, "name: x\n") == "F/run.yaml:1: model: required, and not given"
    assert refused(tmp_path, "name: x\nmodel: {}\n") == "F/run.yaml:2: model.layers: required, and not given"
    assert refused(tmp_path, "steps: 1\n") == "F/run.yaml:1: name: required, and not given (and 1 more)"


def test_an_unknown_key_is_said_before_the_one_that_is_missing(tmp_path: Path) -> None:
    assert refused(tmp_path, "nmae: x\nmodel: {layers: 2}\n") == (
        "F/run.yaml:1: nmae: unknown key; did you mean name? (and 1 more)"
    )


def test_the_words_of_validators(tmp_path: Path) -> None:
    assert refused(tmp_path, "model: {layers: 2}\nname: bad\n") == "F/run.yaml:2: name: expected a good name, got 'bad'"
    assert refused(tmp_path, f"{BASE}steps: 13") == "F/run.yaml:1: steps: 13 with rate is unlucky"


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            load(Run, path)
        return str(error.value).replace(str(tmp_path), "F")

    assert message(tmp_path / "none.yaml") == "F/none.yaml: no such file"
    assert message(tmp_path) == "F: cannot be read: [Errno 21] Is a directory: 'F'"
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9")
    assert message(tmp_path / "latin.yaml") == (
        "F/latin.yaml: cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 6: invalid continuation byte"
    )
    assert refused(tmp_path, "") == "F/run.yaml: expected `key: value` lines, got nothing"
    assert refused(tmp_path, "# nothing\n") == "F/run.yaml: expected `key: value` lines, got nothing"
    assert refused(tmp_path, "- a") == "F/run.yaml: expected `key: value` lines, got a value"


def test_a_section_may_be_a_file_beside_the_one_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("layers: 4\n")
    assert loaded(tmp_path, "name: x\nmodel: model/small.yaml").model.layers == 4
    (tmp_path / "list.yaml").write_text("kind: torch\nthreads: 5\n")
    assert loaded(tmp_path, f"{BASE}track: [list.yaml, {{kind: deepspeed}}]").track == (Torch(threads=5), Zero())
    (tmp_path / "corpora.yaml").write_text("shards: a\n")
    assert loaded(tmp_path, f"{BASE}corpora: {{wiki: corpora.yaml}}").corpora["wiki"].shards == Path("a")


def test_a_section_may_be_a_file_of_the_project(tmp_path: Path) -> None:
    shipped = configs.CONFIGS / "gpt2-small.yaml"
    path = tmp_path / "run.yaml"
    path.write_text(shipped.read_text())
    assert load(TrainRun, path) == load(TrainRun, shipped)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "gpt2-small.yaml").write_text(
        (configs.CONFIGS / "model" / "gpt2-small.yaml").read_text().replace("layers: 12", "layers: 1")
    )
    assert load(TrainRun, path).model.layers == 1  # the one beside it comes first


def test_a_section_file_that_is_missing(tmp_path: Path) -> None:
    assert refused(tmp_path, "name: x\nmodel: small.yaml") == (
        "F/run.yaml:2: model: no file small.yaml in F or CONFIGS"
    )


def test_what_is_wrong_in_a_section_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("# small\nlayers: 4\ndropuot: 0.1\n")
    assert refused(tmp_path, "name: x\nmodel: small.yaml") == (
        "F/small.yaml:3: model.dropuot: unknown key; did you mean model.dropout?"
    )
    (tmp_path / "small.yaml").write_text("dropout: 0.1\n")
    assert refused(tmp_path, "name: x\nmodel: small.yaml") == "F/small.yaml:1: model.layers: required, and not given"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loaded(
        tmp_path, f"{BASE}engine: {{kind: deepspeed, zero_stage: 3}}", "steps=10e9", "model.dropout=0.5",
        "engine={kind: torch}", "corpora.wiki.shards=out/wiki", "note='a b'", "tags=[a, 1]", "steps=7", "name=a=b",
    )  # fmt: skip
    assert (run.steps, run.model.dropout, run.engine, run.note, run.tags) == (7, 0.5, Torch(), "a b", ["a", "1"])
    assert (run.corpora, run.name) == ({"wiki": Corpus(shards=Path("out/wiki"))}, "a=b")
    (tmp_path / "small.yaml").write_text("layers: 4\n")
    assert loaded(tmp_path, "name: x\nmodel: small.yaml", "model.dropout=0.5").model == Model(layers=4, dropout=0.5)
    monkeypatch.chdir(tmp_path)
    assert loaded(tmp_path, BASE, "model=small.yaml", "model.dropout=0.5").model == Model(layers=4, dropout=0.5)
    assert loaded(tmp_path, "name: x\n", "model.layers=3").model == Model(layers=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "steps: expected section.key=value"),
        ("=3", "=3: expected section.key=value"),
        ("model..layers=3", "model..layers=3: expected section.key=value"),
        ("model.=3", "model.=3: expected section.key=value"),
        ("stpes=4", "command line (stpes=4): stpes: unknown key; did you mean steps?"),
        (
            "modle.layers=3",
            "command line (modle.layers=3): modle: unknown key; did you mean model?",
        ),
        ("model.layer=3", "command line (model.layer=3): model.layer: unknown key; did you mean model.layers?"),
        (
            "corpora.wiki.wieght=3",
            "command line (corpora.wiki.wieght=3): corpora.wiki.wieght: unknown key; "
            "did you mean corpora.wiki.weight? (and 1 more)",
        ),
        ("model.layers.x=3", "model.layers.x=3: model.layers holds a value, not a section"),
        ("track.0.kind=torch", "track.0.kind=torch: track holds a value, not a section"),
        (
            "steps=",
            "command line (steps=): steps: expected a whole number (such as 512, 10e9 or 512Ki), got None",
        ),
        ("steps=[1", "command line (steps=[1): not YAML: expected ',' or ']', but got '<stream end>'"),
        ("model={layers: 1, layers: 2}", "command line (model={layers: 1, layers: 2}): model.layers: given twice"),
        ("engine.zero_stage=2", "command line (engine.zero_stage=2): engine.zero_stage: unknown key of kind torch; "
         "it is one of kind deepspeed"),
        ("model=none.yaml", "command line (model=none.yaml): model: no file none.yaml in F or CONFIGS"),
    ],
)  # fmt: skip
def test_overrides_that_are_refused(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"{BASE}engine: {{kind: torch}}\ntrack: [{{kind: torch}}]\n"
    assert refused(tmp_path, text, override) == message


# --- hostile files ----------------------------------------------------------------------------------------------------

BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)
])  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "F/run.yaml:1: aliases expand to more than 100000 values"),
        ("a: &a [*a]", "F/run.yaml:1: nested more than 50 deep"),
        ("a: " + "[" * 5000, "F/run.yaml: nested more than 50 deep"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "F/run.yaml:1: nested more than 50 deep"),
        (
            "a: !!python/object/apply:os.system [id]",
            "F/run.yaml:1: a: tag !!python/object/apply:os.system: tags are not read",
        ),
        ("a: !!python/name:os.system ''", "F/run.yaml:1: a: tag !!python/name:os.system: tags are not read"),
        ("a: !secret b", "F/run.yaml:1: a: tag !secret: tags are not read"),
        ("a: !!binary aGk=", "F/run.yaml:1: a: tag !!binary: tags are not read"),
        (
            "model: &m {layers: 1}\nengine: {<<: *m}",
            "F/run.yaml:2: engine.<<: merge keys are not read; write the keys out",
        ),
        ("name: x\n\tmodel: 1", "F/run.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("name: [x", "F/run.yaml:1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("name: x\n---\nname: y", "F/run.yaml:2: not YAML: found another document"),
        ("name: *none", "F/run.yaml:1: not YAML: found undefined alias 'none'"),
        ("name: a\x00b", "F/run.yaml: not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("? [a]\n: 1", "F/run.yaml:1: expected a name as key"),
        ("a: b: c", "F/run.yaml:1: not YAML: mapping values are not allowed here"),
    ],
)
def test_hostile_files(text: str, message: str, tmp_path: Path) -> None:
    assert refused(tmp_path, text) == message


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    text = "name: x\nmodel: {layers: 2}\ncorpora: {a: &one {shards: s}, b: *one}"
    run = loaded(tmp_path, text, "corpora.b.weight=3")
    assert (run.corpora["a"].weight, run.corpora["b"].weight) == (1.0, 3.0)


# --- trees ------------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12) | st.sampled_from(["null", "~", "", "no", "1e-3", "a.yaml", "<<", "=", "- a", "# x", "'"])
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ENGINES = st.builds(Torch, threads=st.integers(-(2**63) + 1, 2**63 - 1)) | st.builds(
    Zero, zero_stage=st.integers(0, 3), precision=st.sampled_from(["bf16", "fp32"])
)
RUNS = st.builds(
    Run,
    name=TEXTS,
    model=st.builds(Model, layers=st.integers(1, 2**62), dropout=st.floats(0, 1, exclude_max=True)),
    engine=ENGINES,
    corpora=st.dictionaries(TEXTS, st.builds(Corpus, shards=TEXTS.map(Path), weight=NUMBERS), max_size=3),
    steps=st.integers(14, 2**62),
    rate=NUMBERS,
    strict=st.booleans(),
    track=st.lists(ENGINES, max_size=2).map(tuple),
    tags=st.lists(TEXTS, max_size=3),
    note=st.none() | TEXTS,
)


@given(run=RUNS)
@settings(max_examples=150, deadline=None)
def test_what_is_dumped_loads_to_the_same(run: Run) -> None:
    with TemporaryDirectory() as folder:
        assert loaded(Path(folder), dump(run)) == run


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "é"])
def test_odd_line_ends_are_dumped_and_loaded(text: str, tmp_path: Path) -> None:
    class Noted(configs.Section):
        note: str

    (tmp_path / "noted.yaml").write_text(dump(Noted(note=text)))
    assert load(Noted, tmp_path / "noted.yaml") == Noted(note=text)


def test_a_run_is_dumped_and_loaded(tmp_path: Path) -> None:
    for path in configs.all_files():
        if path.parent == configs.CONFIGS:
            run = load(TrainRun, path)
            (tmp_path / "run.yaml").write_text(dump(run))
            assert load(TrainRun, tmp_path / "run.yaml") == run


def test_sections_are_frozen(tmp_path: Path) -> None:
    run = loaded(tmp_path, BASE)
    with pytest.raises(ValueError, match="frozen"):
        run.steps = 4  # type: ignore[misc]


def test_a_tree_of_ours_is_built_and_overridden() -> None:
    assert build(Run, {"name": "x", "model": {"layers": 2}}, "record", ["steps=5"]).steps == 5
    with pytest.raises(ConfigError) as error:
        build(Run, {"name": "x", "model": {"layers": 2, "layer": 3}}, "record")
    assert str(error.value) == "record: model.layer: unknown key; did you mean model.layers?"


def test_differences() -> None:
    old: dict[str, Any] = {"a": 1, "b": {"c": [1, 2], "d": {}}, "e": None}
    new: dict[str, Any] = {"a": 2, "b": {"c": [1, 2], "d": {"x": 1}}, "f": "y"}
    assert differences(old, old) == []
    assert differences(old, new) == [
        "a: 1 -> 2",
        "b.d: {} -> (absent)",
        "b.d.x: (absent) -> 1",
        "e: None -> (absent)",
        "f: (absent) -> y",
    ]


def test_fingerprints_know_values_and_not_their_order() -> None:
    assert fingerprint({"a": 1, "b": [1, None]}) == fingerprint({"b": [1, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint({"é": 0.1}) == "cb3e88a1f6ca1f439315380b53777f7d3c35d5772ddc0063f5dc867e6507be70"
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(float("nan"))


def test_leaf_paths() -> None:
    assert leaf_paths(Run) == [
        "corpora.*.shards",
        "corpora.*.weight",
        "engine.kind",
        "engine.precision",
        "engine.threads",
        "engine.zero_stage",
        "model.dropout",
        "model.layers",
        "name",
        "note",
        "rate",
        "steps",
        "strict",
        "tags",
        "track.*.kind",
        "track.*.precision",
        "track.*.threads",
        "track.*.zero_stage",
    ]
    paths = leaf_paths(TrainRun)
    assert {"seed", "model.layers", "data.sources.*.weight", "optim.lr_peak", "track.*.kind"} <= set(paths)
    assert not any(path in ("model", "data", "data.sources", "track") for path in paths)


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = loaded(tmp_path, BASE, "corpora={a: {shards: out/a}, b: {shards: /b}}", "note=out/a")
    tree = configs.absolute(run.model_dump())
    assert [tree["corpora"][name]["shards"] for name in "ab"] == [f"{tmp_path}/out/a", "/b"]
    assert tree["note"] == "out/a"
    assert build(Run, tree, "test").model == run.model


# --- the messages of a real run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr_peek=1"],
         "command line (optim.lr_peek=1): optim.lr_peek: unknown key; did you mean optim.lr_peak?"),
        (["lr_peak=1"], "command line (lr_peak=1): lr_peak: unknown key; did you mean optim.lr_peak?"),
        (["data.sources.wikipedia.max_epoch=1"], "command line (data.sources.wikipedia.max_epoch=1): "
         "data.sources.wikipedia.max_epoch: unknown key; did you mean data.sources.wikipedia.max_epochs?"),
        (["batch_tokens=512"], "{file}:5: batch_tokens: 512 is less than one sequence of data.seq_tokens 1024"),
        (["data.seq_tokens=2Ki"], "{file}:5: data.seq_tokens: 2048 is longer than model.context 1024"),
        (["model=model/gpt3.yaml"],
         "command line (model=model/gpt3.yaml): model: no file model/gpt3.yaml in {here} or CONFIGS"),
        (["engine={kind: jax}"],
         "command line (engine={kind: jax}): engine: kind: expected torch | deepspeed, got 'jax'"),
    ],
)  # fmt: skip
def test_a_run_is_refused_in_one_line(overrides: Sequence[str], message: str) -> None:
    path = configs.CONFIGS / "gpt2-small.yaml"
    with pytest.raises(ConfigError) as error:
        load(TrainRun, path, overrides)
    expected = message.replace("{file}", str(path)).replace("{here}", str(Path.cwd()))
    assert str(error.value) == expected.replace("CONFIGS", str(configs.CONFIGS))


def test_shipped_files_are_plain_yaml() -> None:
    """Nothing in them means something else to another reader of YAML."""
    for path in configs.all_files():
        assert isinstance(yaml.safe_load(path.read_text()), dict)
