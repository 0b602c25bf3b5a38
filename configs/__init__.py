"""Configuration: YAML files and `section.key=value` overrides become one frozen, typed tree.

    run = load(TrainRun, Path("configs/gpt2-small.yaml"), ["optim.lr_peak=3e-4"])

Scalars stay text until the declared type of their field reads them, so `6e-4`, `10e9` and `512Ki` mean what they say
wherever a number is declared, and `no` or `1e-3` stay text wherever text is. What is wrong is said in one line:
file and line, full path of the key, what was expected, what was got, the nearest valid key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

CONFIGS = Path(__file__).parent
MAX_NODES = 100_000  # what a file may expand to through its aliases
MAX_DEPTH = 50
YAML = "tag:yaml.org,2002:"
TAGS = {YAML + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map")}
SUFFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

Tree = Any  # dict, list, str or None, as read from YAML
KeyPath = tuple[str | int, ...]


class ConfigError(Exception):
    """A configuration that cannot be used. The message is one line; commands print it and exit with 2."""


def parse_int(value: object) -> int:
    """Read a whole number: 512, 10e9, 512Ki, 1_000."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text, scale = value, 1
        for suffix, factor in SUFFIXES.items():
            if text.endswith(suffix):
                text, scale = text.removesuffix(suffix), factor
        for read in (int, float):
            try:
                number = read(text) * scale
                if math.isfinite(number) and number == int(number) and abs(number) < 2**63:
                    return int(number)
            except (ValueError, OverflowError):
                continue
    raise ValueError(f"expected a whole number (such as 512, 10e9 or 512Ki), got {value!r}")


def parse_float(value: object) -> float:
    """Read a finite number: 0.1, 6e-4, 375e6."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, str):
        try:
            number = float(value)
            if math.isfinite(number):
                return number
        except ValueError:
            pass
    raise ValueError(f"expected a finite number (such as 0.1 or 6e-4), got {value!r}")


def parse_bool(value: object) -> bool:
    """Read true or false, and nothing else."""
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise ValueError(f"expected true or false, got {value!r}")


Int = Annotated[int, BeforeValidator(parse_int)]
Float = Annotated[float, BeforeValidator(parse_float)]
Bool = Annotated[bool, BeforeValidator(parse_bool)]


class Section(BaseModel):
    """A part of a configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def load(schema: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Read `path`, apply `section.key=value` overrides and build `schema`. Raises ConfigError."""
    source = _Source()
    tree = source.read(path)
    for override in overrides:
        source.override(schema, tree, override)
    return source.build(schema, tree, str(path))


def build(schema: type[S], tree: Tree, name: str, overrides: Sequence[str] = ()) -> S:
    """Build `schema` from a tree that no user wrote (a record, a default), overridden; `name` stands in messages."""
    source = _Source()
    for override in overrides:
        source.override(schema, tree, override)
    return source.build(schema, tree, name)


def read(path: Path) -> dict[str, Tree]:
    """The top of a file as it stands, neither expanded nor checked. Raises ConfigError."""
    tree: dict[str, Tree] = _Source().read(path)
    return tree


LINE_ENDS = re.compile("[\\x85\\u2028\\u2029]")  # what YAML 1.1 takes for line ends besides ours


def dump(section: Section) -> str:
    """The whole tree as YAML that `load` reads back to an equal one."""
    text = yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if LINE_ENDS.search(text):  # PyYAML writes them bare and folds there, so that they come back as spaces
        text = yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)
    return text


def absolute(tree: Tree) -> Tree:
    """A dumped tree (`model_dump()`) with its paths made absolute, as text."""
    if isinstance(tree, dict):
        return {key: absolute(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [absolute(value) for value in tree]
    return str(tree.absolute()) if isinstance(tree, Path) else tree


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a dumped tree by its dotted path; an empty mapping or a list is a leaf."""
    if isinstance(tree, dict) and tree:
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): tree}


def differences(old: Tree, new: Tree) -> list[str]:
    """One `path: old -> new` for each leaf in which two dumped trees differ."""
    a, b = flatten(old), flatten(new)
    absent = "(absent)"
    return [
        f"{path}: {a.get(path, absent)} -> {b.get(path, absent)}"
        for path in sorted(a.keys() | b.keys())
        if a.get(path, absent) != b.get(path, absent)
    ]


def canonical_json(value: Any) -> str:
    """JSON with one spelling only: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a value: the identity of a configuration or a record."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def all_files() -> list[Path]:
    """Every YAML file that ships with the project."""
    return sorted(CONFIGS.rglob("*.yaml"))


@dataclass(frozen=True)
class _Mark:
    """Where a value was written."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


class _Source:
    """The raw trees of one load, and for each key the place where it was written."""

    def __init__(self) -> None:
        self.marks: dict[KeyPath, _Mark] = {}
        self.folders: dict[KeyPath, Path] = {}  # where a section named at a key is looked for first

    def read(self, path: Path, at: KeyPath = ()) -> Tree:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        tree = self._parse(text, str(path), at, path.parent)
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected `key: value` lines, got {'nothing' if tree is None else 'a value'}")
        return tree

    def override(self, schema: type[Section], tree: Tree, override: str) -> None:
        name, equals, text = override.partition("=")
        keys: KeyPath = tuple(name.split("."))
        if not equals or not all(keys):
            raise ConfigError(f"{override}: expected section.key=value")
        mark = _Mark(f"command line ({override})")
        node, annotation = tree, schema
        for depth, key in enumerate(keys[:-1]):
            annotation = _child(annotation, node, key)
            value = node.get(key)
            if isinstance(value, str) and value.endswith(".yaml"):
                value = self._section(value, keys[: depth + 1])
            if value is None:
                value = {}
                self.marks[keys[: depth + 1]] = mark
            if not isinstance(value, dict):
                at = ".".join(map(str, keys[: depth + 1]))
                raise ConfigError(f"{override}: {at} holds a value, not a section")
            node[key] = value
            node = value
        for stale in [path for path in self.marks if path[: len(keys)] == keys]:
            del self.marks[stale]
        self.marks[keys] = mark
        node[keys[-1]] = self._parse(text, mark.file, keys, Path(), lines=False)

    def build(self, schema: type[S], tree: Tree, name: str) -> S:
        tree = self._expand(schema, tree, ())
        try:
            return schema.model_validate(tree)
        except ValidationError as error:
            # a mistyped key is often the one that is missing, and the unknown one names the nearest
            details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
            more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
            raise ConfigError(self._explain(schema, tree, details[0], name) + more) from None

    def _parse(self, text: str, file: str, at: KeyPath, folder: Path, lines: bool = True) -> Tree:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark and lines else None
            raise ConfigError(f"{_Mark(file, line)}: not YAML: {str(error.problem).removeprefix('but ')}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{file}: not YAML: {str(error).splitlines()[0]}") from None
        except RecursionError:
            raise ConfigError(f"{file}: nested more than {MAX_DEPTH} deep") from None
        budget = [MAX_NODES]
        return None if node is None else self._construct(node, file, at, folder, lines, budget)

    def _construct(self, node: yaml.Node, file: str, at: KeyPath, folder: Path, lines: bool, budget: list[int]) -> Tree:
        mark = _Mark(file, node.start_mark.line + 1 if lines else None)
        budget[0] -= 1
        if budget[0] < 0:
            raise ConfigError(f"{mark}: aliases expand to more than {MAX_NODES} values")
        if len(at) > MAX_DEPTH:
            raise ConfigError(f"{mark}: nested more than {MAX_DEPTH} deep")
        if node.tag not in TAGS:
            raise ConfigError(f"{mark}: {_dotted(at)}: tag {node.tag.replace(YAML, '!!')}: tags are not read")
        self.marks[at], self.folders[at] = mark, folder
        if isinstance(node, yaml.ScalarNode):
            plain_null = node.style is None and node.value in ("", "~", "null")
            return None if plain_null else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(v, file, (*at, i), folder, lines, budget) for i, v in enumerate(node.value)]
        tree: dict[str, Tree] = {}
        assert isinstance(node, yaml.MappingNode)
        for key_node, value_node in node.value:
            key = key_node.value
            here = _Mark(file, key_node.start_mark.line + 1 if lines else None)
            if not isinstance(key, str):
                raise ConfigError(f"{here}: expected a name as key")
            if key_node.tag == YAML + "merge":
                raise ConfigError(f"{here}: {_dotted((*at, key))}: merge keys are not read; write the keys out")
            if key in tree:
                raise ConfigError(f"{here}: {_dotted((*at, key))}: given twice")
            tree[key] = self._construct(value_node, file, (*at, key), folder, lines, budget)
            self.marks[(*at, key)] = here
        return tree

    def _section(self, name: str, at: KeyPath) -> Tree:
        folder = self.folders.get(at, Path())
        for place in (folder / name, CONFIGS / name):
            if place.is_file():
                return self.read(place, at)
        raise ConfigError(f"{self._mark(at, name)}: {_dotted(at)}: no file {name} in {folder.resolve()} or {CONFIGS}")

    def _expand(self, annotation: Any, tree: Tree, at: KeyPath) -> Tree:
        """Put each section that is named by its file in the place of the name."""
        if isinstance(tree, str) and tree.endswith(".yaml") and _section_classes(annotation):
            tree = self._section(tree, at)
        if isinstance(tree, dict):
            return {k: self._expand(_child(annotation, tree, k), v, (*at, k)) for k, v in tree.items()}
        if isinstance(tree, list):
            return [self._expand(_child(annotation, tree, i), v, (*at, i)) for i, v in enumerate(tree)]
        return tree

    def _mark(self, at: KeyPath, default: str) -> _Mark:
        while at and at not in self.marks:
            at = at[:-1]
        return self.marks.get(at, _Mark(default))

    def _explain(self, schema: type[Section], tree: Tree, error: ErrorDetails, name: str) -> str:
        at, annotation, node = _locate(schema, tree, error["loc"])
        got = error["input"]
        kind, message = error["type"], error["msg"]
        if kind == "extra_forbidden":
            problem = "unknown key" + _nearest(schema, annotation, node, at)
        elif kind == "missing":
            problem = "required, and not given"
        elif kind == "union_tag_not_found":
            problem = f"needs `kind: {' | '.join(_kinds(annotation))}`"
        elif kind == "union_tag_invalid":
            tag = str(got.get("kind")) if isinstance(got, dict) else str(got)
            near = difflib.get_close_matches(tag, _kinds(annotation), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problem = f"kind: expected {' | '.join(_kinds(annotation))}, got {tag!r}{hint}"
        elif kind == "value_error":
            problem = str(error["ctx"]["error"])
        elif kind == "literal_error":
            problem = f"expected {error['ctx']['expected']}, got {got!r}"
        elif kind in ("list_type", "tuple_type"):
            problem = f"expected a list, got {got!r}"
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            problem = f"expected a section (`key: value` lines, or the name of a .yaml file), got {got!r}"
        else:
            problem = f"{message[0].lower()}{message[1:]}, got {got!r}"
        where = f"{_dotted(at)}: " if at else ""
        return f"{self._mark(at, name)}: {where}{problem}"


def _dotted(at: KeyPath) -> str:
    return ".".join(map(str, at))


def _section_classes(annotation: Any) -> list[type[Section]]:
    """The Section classes that an annotation admits directly (not inside lists or dicts)."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    origin = get_origin(annotation)
    if origin is Annotated:
        return _section_classes(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [c for member in get_args(annotation) for c in _section_classes(member)]
    return []


def _kind_of(section: type[Section]) -> str | None:
    field = section.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def _kinds(annotation: Any) -> list[str]:
    return [kind for c in _section_classes(annotation) if (kind := _kind_of(c)) is not None]


def _chosen(annotation: Any, node: Tree) -> type[Section] | None:
    """The class that a raw mapping is going to be: the only one, or the one of its `kind`."""
    classes = _section_classes(annotation)
    if len(classes) > 1 and isinstance(node, dict):
        classes = [c for c in classes if _kind_of(c) == node.get("kind")]
    return classes[0] if len(classes) == 1 else None


def _unwrap(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _unwrap(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _unwrap(member)
    else:
        yield annotation


def _child(annotation: Any, node: Tree, key: str | int) -> Any:
    """The declared type of `node[key]`, or None where nothing is declared."""
    section = _chosen(annotation, node)
    if section is not None:
        field = section.model_fields.get(str(key))
        if field is None:
            return None
        metadata = tuple(field.metadata)
        discriminated = field.discriminator is not None or metadata
        return Annotated[field.annotation, "field"] if discriminated else field.annotation
    for member in _unwrap(annotation):
        origin, args = get_origin(member), get_args(member)
        if origin is dict and isinstance(key, str):
            return args[1]
        if origin in (list, tuple) and isinstance(key, int):
            return args[0]
    return None


def _locate(schema: type[Section], tree: Tree, loc: tuple[str | int, ...]) -> tuple[KeyPath, Any, Tree]:
    """A pydantic location as a path of ours (without union tags), the type declared for its parent, and the parent."""
    at: list[str | int] = []
    annotation, parent_annotation = schema, schema
    node, parent = tree, tree
    for index, key in enumerate(loc):
        last = index == len(loc) - 1
        is_tag = isinstance(node, dict) and key not in node and key == node.get("kind") and not last
        if is_tag or (isinstance(node, dict) and key not in node and not last):
            continue
        if not isinstance(node, dict | list):
            continue  # a validator's own label below a leaf
        if last and isinstance(node, dict) and key not in node and key == node.get("kind"):
            continue
        at.append(key)
        parent_annotation, parent = annotation, node
        annotation = _child(annotation, node, key)
        known = isinstance(node, list) or key in node
        node = node[key] if known else None  # type: ignore[index]
    if loc and at and _section_classes(annotation) and isinstance(node, dict):
        return tuple(at), annotation, node
    return tuple(at), parent_annotation if at else schema, parent


def _nearest(schema: type[Section], annotation: Any, node: Tree, at: KeyPath) -> str:
    """`; did you mean ...?` for an unknown key: the nearest of its section, else the same key of another section."""
    key = str(at[-1])
    section = _chosen(annotation, node)
    names = list(section.model_fields) if section else []
    near = difflib.get_close_matches(key, names, 1)
    if near:
        return f"; did you mean {_dotted((*at[:-1], near[0]))}?"
    owners = [_kind_of(c) for c in _section_classes(annotation) if key in c.model_fields]
    if owners:
        return f" of kind {node.get('kind')}; it is one of kind {' and '.join(map(str, owners))}"
    elsewhere = sorted({path for path in _paths(schema) if path.rsplit(".", 1)[-1] == key})
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; valid here: {', '.join(names)}" if names else ""


def _paths(annotation: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Every dotted key path of a schema; `*` stands for a name of the user's."""
    for section in _section_classes(annotation):
        for name, field in section.model_fields.items():
            path = f"{prefix}{name}"
            yield path
            for member in _unwrap(field.annotation):
                if depth < 6:
                    yield from _paths(member, f"{path}.", depth + 1)
                    if get_origin(member) is dict:
                        yield from _paths(get_args(member)[1], f"{path}.*.", depth + 1)
                    if get_origin(member) in (list, tuple):
                        yield from _paths(get_args(member)[0], f"{path}.*.", depth + 1)


def leaf_paths(schema: type[Section]) -> list[str]:
    """Every dotted path of a schema that holds a value and not a section, each once, sorted."""
    paths = set(_paths(schema))
    return sorted(path for path in paths if not any(other.startswith(f"{path}.") for other in paths))
