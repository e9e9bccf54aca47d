"""`internimage shards filter`: leaves out the rows that named rules and free expressions over their columns refuse."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import duckdb

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.catalogue import Catalogue, open_catalogue, quoted
from data_pipeline.curation.decisions import SetPath, decide, held_sets
from data_pipeline.curation.pictures import Picture, contact_sheet
from data_pipeline.durable import file_sha256
from data_pipeline.errors import UserError, first_ten
from data_pipeline.format.sidecar import DROPPED, PACKED

# Columns that rules and expressions may use besides those of the sidecar.
DERIVED = {
    "side": "least(width, height)",
    "pixels": "width::BIGINT * height",
    "aspect": "greatest(width, height) / nullif(least(width, height), 0)",
    "characters": "length(caption)",
    "words": "len(list_filter(string_split_regex(caption, '\\s+'), lambda word: word != ''))",
    "domain": "lower(regexp_extract(url, '^[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)', 1))",
}
_SCRIPTS = (
    "latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "han", "hangul", "hiragana", "katakana", "thai",
)  # fmt: skip
_PREVIEWED = 50  # pictures a side


@dataclass(frozen=True)
class Rule:
    """A row stays where `keep`, an SQL expression over the columns, is true. named: by the user, as NAME=EXPRESSION."""

    name: str
    keep: str
    named: bool = False


@dataclass(frozen=True)
class FilterRules:
    """What a row must satisfy, in this order; None and () ask nothing.

    scripts: of every letter of the caption (latin, han, ...), or ascii. similarity, nsfw, licence: columns of the set,
    or of `scores`; nsfw and licence list what is allowed, domains what is not (their sub-domains neither).
    expressions: "NAME=EXPRESSION" or "EXPRESSION", in DuckDB's SQL; where NAME is a column, EXPRESSION is about it.
    keep_unknown: whether a row stays that lacks what a rule looks at. By default the row goes, and its reason says so.
    """

    min_side: int | None = None
    max_aspect: float | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    scripts: tuple[str, ...] = ()
    min_similarity: float | None = None
    nsfw: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    expressions: tuple[str, ...] = ()
    keep_unknown: bool = False

    def rules(self) -> list[Rule]:
        found = [
            ("min_side", self.min_side, f"side >= {self.min_side}"),
            ("max_aspect", self.max_aspect, f"aspect <= {self.max_aspect}"),
            ("min_characters", self.min_characters, f"characters >= {self.min_characters}"),
            ("max_characters", self.max_characters, f"characters <= {self.max_characters}"),
            ("min_words", self.min_words, f"words >= {self.min_words}"),
            ("scripts", self.scripts, _script_rule(self.scripts)),
            ("min_similarity", self.min_similarity, f"try_cast(similarity as double) >= {self.min_similarity}"),
            ("nsfw", self.nsfw, f"nsfw in ({_literals(self.nsfw)})"),
            ("licences", self.licences, f"licence in ({_literals(self.licences)})"),
            ("domains", self.domains, _domain_rule(self.domains)),
        ]
        rules = [Rule(name, keep) for name, value, keep in found if value not in (None, ())]
        for text in self.expressions:
            name, equals, rest = text.partition("=")
            named = bool(equals) and name.isidentifier() and not rest.startswith("=")
            rules.append(Rule(name, rest, named) if named else Rule(text, text))
        if len({rule.name for rule in rules}) < len(rules):
            raise UserError("two rules have one name; name expressions as in --where sharp='blur < 3'")
        return rules

    def as_json(self) -> dict[str, Any]:
        """Returns what differs from the defaults, for a history."""
        defaults = {one.name: one.default for one in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


@dataclass(frozen=True)
class Fall:
    """One step of the waterfall. alone: rows that this rule would refuse without those before it."""

    rule: str
    rows: int
    dropped: int
    unknown: int  # of these, rows that lack what the rule looks at
    left: int
    alone: int


@dataclass(frozen=True)
class FilterSummary:
    folder: Path
    rows: int  # that were used before
    left: int
    dropped: int
    waterfall: tuple[Fall, ...]
    applied: bool
    preview: Path | None = None


def filter_set(
    folder: Path,
    rules: FilterRules,
    *,
    index_folder: Path | None = None,
    scores: Path | None = None,
    dry_run: bool = False,
    preview: Path | None = None,
    memory_gb: float = 1.0,
    progress: ProgressCallback | None = None,
) -> FilterSummary:
    """Drops the used rows of a set that a rule refuses; the first one that does is the row's reason.

    scores: a Parquet file whose columns are joined by its column `key` (with `shard`, where keys repeat), `sha256` or
    `url`. dry_run: changes nothing. preview: an HTML page with pictures that stay and pictures that go.
    Raises UserError for a rule that cannot be evaluated, or scores that fit no row or name a row twice.
    """
    wanted = rules.rules()
    if not wanted:
        raise UserError("there is nothing to filter by; give a rule, as --min-side 64")
    with held_sets([SetPath(Path(folder), index_folder)], progress) as (one,):
        step: dict[str, Any] = {"what": "filter", "options": rules.as_json()}
        with open_catalogue([one], further=[scores] if scores else [], memory_gb=memory_gb) as catalogue:
            _describe(catalogue, scores)
            if scores is not None:
                step["scores"] = {"name": scores.name, "sha256": file_sha256(scores)}
            _judge(catalogue, wanted, rules.keep_unknown)
            rows, falls = _waterfall(catalogue, wanted, rules.keep_unknown)
            if preview is not None:
                _preview(catalogue, preview)
            dropped = sum(fall.dropped for fall in falls)
            if dropped and not dry_run:
                step |= {"rows": rows, "dropped": {fall.rule: fall.dropped for fall in falls}}
                decide(catalogue, f"select id, '{DROPPED}' as status, reason from refused", [step], progress)
    return FilterSummary(one.folder, rows, rows - dropped, dropped, tuple(falls), not dry_run, preview)


def check_rules(path: SetPath, rules: FilterRules, scores: Path | None, memory_gb: float = 1.0) -> None:
    """Raises UserError for rules that a set has no columns for, or none of their type; decides nothing."""
    with (
        held_sets([path]) as (one,),
        open_catalogue([one], further=[scores] if scores else [], memory_gb=memory_gb) as catalogue,
    ):
        _describe(catalogue, scores)
        _check(catalogue, rules.rules())


def _describe(catalogue: Catalogue, scores: Path | None) -> None:
    """Makes the view `described`: used rows with derived columns and scores."""
    run, present = catalogue.connection.execute, catalogue.columns()
    derived = "".join(f", {sql} as {name}" for name, sql in DERIVED.items() if name not in present)
    run(f"create view used as select *{derived} from rows where status = '{PACKED}'")
    if scores is None:
        run("create view described as select * from used")
        return
    by, names = _score_columns(catalogue, scores)
    clash = sorted(set(names) & {*present, *DERIVED} - set(by))
    if clash:
        raise UserError(f"{scores}: the set has columns {first_ten(clash)} already; rename those of the file")
    further = "".join(f", scores.{_name(name)}" for name in names if name not in by)
    shards = ", ".join(quoted(shard.name) for shard in catalogue.sets[0].shards)
    mine = {"shard": f"([{shards}])[(used.id >> 32)::BIGINT + 1]"}
    matches = " and ".join(f"scores.{name} = {mine.get(name, f'used.{name}')}" for name in by)
    run(
        f"create view described as select used.*{further} from used "
        f"left join read_parquet({quoted(str(scores))}) scores on {matches}"
    )


def _score_columns(catalogue: Catalogue, scores: Path) -> tuple[list[str], list[str]]:
    """Returns the columns that rows and scores are joined by, and all columns of the scores."""
    run = catalogue.connection.execute
    try:
        names = [str(row[0]) for row in run(f"describe select * from read_parquet({quoted(str(scores))})").fetchall()]
    except duckdb.Error as error:
        raise UserError(f"--scores {scores} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    columns = [name for name in names if name in ("key", "sha256", "url")]
    columns = sorted(columns, key=("key", "sha256", "url").index)[:1]
    if not columns:
        raise UserError(f"--scores {scores} has no column key, sha256 or url to join by; it has {first_ten(names)}")
    if columns == ["key"] and "shard" in names:
        columns = ["shard", "key"]
    grouped = f"select 1 from read_parquet({quoted(str(scores))}) group by {', '.join(columns)} having count(*) > 1"
    if run(f"{grouped} limit 1").fetchone():
        raise UserError(f"--scores {scores} has two rows of one {' and '.join(columns)}; keep one of them")
    if (
        columns == ["key"]
        and run(f"select 1 from rows where status = '{PACKED}' group by key having count(*) > 1 limit 1").fetchone()
    ):
        raise UserError(f"keys repeat in the shards of this set: give {scores} a column shard beside key")
    return columns, names


def _check(catalogue: Catalogue, rules: Sequence[Rule]) -> None:
    """Raises UserError for a rule that is no condition over the columns of `described`."""
    connection = catalogue.connection
    known = {str(row[0]).lower() for row in connection.execute("describe described").fetchall()}
    for rule in rules:
        if rule.named and _compares(rule, known):
            raise UserError(
                f"--where '{rule.name}={rule.keep}' would be a rule called {rule.name} with the condition "
                f"{rule.keep.strip()!r}; to compare a column write {rule.name} == ..., or call the rule otherwise"
            )
        try:
            statements = connection.extract_statements(f"select ({rule.keep}) from described limit 0")
            kind = connection.execute(f"select typeof({rule.keep}) from described limit 1").fetchone()
        except duckdb.Error as error:
            columns = ", ".join(sorted({*catalogue.columns(), *DERIVED} - {"id", "set"}))
            raise UserError(f"rule {rule.name!r} cannot be evaluated: {_told(error)}; columns are {columns}") from None
        if len(statements) != 1 or (kind is not None and kind[0] != "BOOLEAN"):
            raise UserError(f"rule {rule.name!r} is no condition (it gives {kind and kind[0]}): write one, as a >= 3")


def _told(error: duckdb.Error) -> str:
    """Returns what an error says, and how a column of text is compared with a number where that is its cause."""
    message = str(error).splitlines()[0]
    if "VARCHAR" in message or "convert string" in message:
        message += " (a text table's columns are text: write try_cast(NAME as double) to compare numbers)"
    return message


def _judge(catalogue: Catalogue, rules: Sequence[Rule], keep_unknown: bool) -> None:
    """Makes the table `refused`: id, number of the rule, whether a value was lacking, and the reason."""
    connection = catalogue.connection
    _check(catalogue, rules)
    cases = " ".join(f"when {_refuses(rule, keep_unknown)} then {n}" for n, rule in enumerate(rules))
    lacking = " ".join(f"when rule = {n} then ({rule.keep}) is null" for n, rule in enumerate(rules))
    names = " ".join(f"when {n} then {quoted(f'filter: {rule.name}')}" for n, rule in enumerate(rules))
    try:
        connection.execute(
            "create temp table refused as select id, rule, unknown, "
            f"(case rule {names} end) || (case when unknown then ' (unknown)' else '' end) as reason from "
            f"(select *, (case {lacking} end) as unknown from "
            f"(select *, (case {cases} end) as rule from described) where rule is not null)"
        )
    except duckdb.Error as error:
        raise UserError(f"the rules cannot be evaluated: {_told(error)}") from None


def _compares(rule: Rule, columns: set[str]) -> bool:
    """Tells whether NAME=EXPRESSION may be meant as a comparison, as SQL's `=` is: `watermark=false`.

    Taken for a name, the column would go unlooked at, and every row would go, or none.
    """
    name, keep = rule.name.lower(), rule.keep.lower()
    other = name in columns and re.search(rf"(?<!\w){name}(?!\w)", keep) is None
    return other or keep.strip() in ("true", "false")


def _waterfall(catalogue: Catalogue, rules: Sequence[Rule], keep_unknown: bool) -> tuple[int, list[Fall]]:
    run = catalogue.connection.execute
    alone = ", ".join(f"count(*) filter (where {_refuses(rule, keep_unknown)})" for rule in rules)
    counted = run(f"select count(*), {alone} from described").fetchone()
    assert counted is not None
    refused = {
        rule: (count, unknown)
        for rule, count, unknown in run(
            "select rule, count(*), count(*) filter (where unknown) from refused group by 1"
        ).fetchall()
    }
    left = rows = int(counted[0])
    falls = []
    for number, rule in enumerate(rules):
        dropped, unknown = refused.get(number, (0, 0))
        falls.append(Fall(rule.name, left, dropped, unknown, left - dropped, int(counted[1 + number])))
        left -= dropped
    return rows, falls


def _preview(catalogue: Catalogue, page: Path) -> None:
    """Draws pictures of both sides, chosen by a hash of their place."""
    select = "select id, {} as reason, caption, url from described where id {} in (select id from refused)"
    groups: Mapping[str, str] = {
        "stay": select.format("''", "not"),
        "go": "select d.id, r.reason, d.caption, d.url from described d join refused r using (id)",
    }
    shown = {}
    for name, query in groups.items():
        chosen = catalogue.connection.execute(f"{query} order by hash(id), id limit {_PREVIEWED}").fetchall()
        shown[name] = [
            Picture(*catalogue.locate(row_id), reason, caption, url) for row_id, reason, caption, url in chosen
        ]
    contact_sheet(page, f"Filter of {catalogue.sets[0].name}", catalogue.sets, shown)


def _refuses(rule: Rule, keep_unknown: bool) -> str:
    return f"({rule.keep}) is false" if keep_unknown else f"({rule.keep}) is not true"


def _script_rule(scripts: Sequence[str]) -> str:
    for script in scripts:
        if script not in (*_SCRIPTS, "ascii"):
            raise UserError(f"scripts: {script!r} is none of ascii, {', '.join(_SCRIPTS)}")
    classes = "".join("\\x00-\\x7F" if script == "ascii" else f"\\p{{{script.capitalize()}}}" for script in scripts)
    rest = "" if tuple(scripts) == ("ascii",) else "\\p{N}\\p{P}\\p{Z}\\p{S}\\p{M}\\s"
    return f"regexp_full_match(caption, '[{classes}{rest}]*')"


def _domain_rule(domains: Sequence[str]) -> str:
    return " and ".join(
        f"not (domain = {quoted(name.lower())} or ends_with(domain, {quoted('.' + name.lower())}))" for name in domains
    )


def _literals(values: Sequence[str]) -> str:
    return ", ".join(quoted(value) for value in values)


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
