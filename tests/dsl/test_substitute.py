"""dsl.substitute: SURFACE 6 as amended by Part I "Substitution", case by case. What PostgreSQL makes of it is tested in
test_substitute_sql.py."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsl.substitute import (
    Raw,
    SubstitutionError,
    break_result,
    references,
    step_sql,
    substitute_base64,
    substitute_raw,
    substitute_sql,
)
from dsl.values import Column, Result, TypeCatalog, describe, encode_rows

CATALOG = TypeCatalog()
COLUMNS = describe([("id", 23, -1), ("big", 20, -1), ("name", 25, -1), ("day", 1082, -1), ("price", 1700, -1),
                    ("list", 1007, -1), ("doc", 3802, -1), ("any column", 25, -1)], CATALOG)
EMPTY = Result('{"rows":[],"row_count":0}', COLUMNS)
ROWS = Result(encode_rows(COLUMNS, [
    [b"5", b"7", b"O'Neil", b"2024-06-15", b"1.50", b"{1,2}", b'{"k": "it\'s"}', b"odd"],
    [b"-6", b"-8", None, None, b"-0.10", b"{3}", b"[]", None],
], CATALOG), COLUMNS)
MINUS = Result(encode_rows(COLUMNS[:2], [[b"-3", b"-4"]], CATALOG), COLUMNS[:2])
NULLS = Result(encode_rows(COLUMNS, [[None] * 8], CATALOG), COLUMNS)
HTTP = Result('{"status":200,"body":"say \\"hi\\"\\r\\nthere","headers":{"a":"b"},"ok":true,"none":null,"ms":-1}')
JOIN = Result("[1,[2]]")
TEXT = Result("plain text")
UNTYPED = Result('{"rows":[{"id":5,"name":"a\'b","ok":true,"doc":{"x":[1]},"f":-1.50,"none":null},{"id":6}],"row_count":2}')
RESULTS = {"n": ROWS, "e": EMPTY, "m": MINUS, "z": NULLS, "h": HTTP, "j": JOIN, "t": TEXT, "u": UNTYPED, "name": MINUS, "name_2": ROWS,
           "none": Result('{"rows":[{}],"row_count":1}', ()), "dml": Result('{"rows":[],"row_count":0}', ())}
VARIABLES = {"v": "raw '\"{w}", "w": "W", "ref": "$n.id", "tbl": "orders", "sys_label": "mine", "dollar": "$"}


def sql(text: str) -> str:
    return substitute_sql(text, variables=VARIABLES, instance_id="0a1b2c3d", label="lbl", results=RESULTS)


def raw(text: str, context: Raw = Raw.PLAIN) -> str:
    return substitute_raw(text, variables=VARIABLES, instance_id="0a1b2c3d", label=None, results=RESULTS, context=context)


def same(*texts: str) -> list[tuple[str, str]]:
    return [(text, text) for text in texts]


BRACES = [
    ("SELECT * FROM {tbl}", "SELECT * FROM orders"),
    ("'{v}'", "'raw '\"{w}'"),                      # raw, and what is inserted is not scanned for braces
    ('{"id":"{w}","n":{w}}', '{"id":"W","n":W}'),   # whole tokens wherever they stand
    ("'{1,{w}}'", "'{1,W}'"), ("{{w}}", "{W}"), ("{a {w} }", "{a W }"),
    ('"{tbl}" -- {w}', '"orders" -- W'),
    ("{sys_instance_id} {sys_label}", "0a1b2c3d lbl"),  # the sys_ names win
    ("{ref} '{ref}'", "5 '5'"),                     # a variable's text is scanned for references
    ("{dollar}n.id", "5"),
    *same("{x} { w } {W} {w", "{}", "{1}", "{w.x}"),
]
LEXICAL = [
    ("$n.id -- $n.id\n$n.id", "5 -- $n.id\n5"),
    ("/* $n.id /* $n.id */ $n.id */ $n.id /* $n.id", "/* $n.id /* $n.id */ $n.id */ 5 /* $n.id"),
    ('"$n.id" "a""$n.id" $n.id', '"$n.id" "a""$n.id" 5'), ('U&"$n.id" $n.id', 'U&"$n.id" 5'),
    ("'-- $n.id' || $n.id", "'-- 5' || 5"), ("'/*' $m.id '*/'", "'/*' (-3) '*/'"),
    ("'Hello $n.name'", "'Hello O''Neil'"), ("'''$n.name'''", "'''O''Neil'''"), ("'$n.name", "'O''Neil"),
    ("'$n.id$n.id' $n.id", "'55' 5"), ("'$n.day'", "'2024-06-15'"), ("'$n.doc'", "'{\"k\":\"it''s\"}'"), ("'$n.list'", "'{1,2}'"),
    ("'$n.price $m $e? $u.ok'", "'1.50 -3 NULL true'"), ("'$h.body'", "'say \"hi\"\r\nthere'"),
    ("'$j'", "'[1,[2]]'"), ("'$u.*'", "'" + '[{"id":5,"name":"a\'\'b","ok":true,"doc":{"x":[1]},"f":-1.50,"none":null},{"id":6}]' + "'"),
    ("N'$n.name' B'$n.id' X'$n.id'", "N'O''Neil' B'5' X'5'"),
    # Dollar quotes: the tag never, the body as SQL.
    ("$$ $n.name $$", "$$ 'O''Neil' $$"), ("$n$ $n.id $n$", "$n$ 5 $n$"), ("$q$ 'x $n.name' \"$n.id\" $q$", "$q$ 'x O''Neil' \"$n.id\" $q$"),
    ("DO $a$ BEGIN EXECUTE $b$ $n.id $b$; END $a$; $n.id", "DO $a$ BEGIN EXECUTE $b$ 5 $b$; END $a$; 5"),
    ("$$n.id$$", "$$n.id$$"), ("$n.id $$n.id", "5 $$n.id"), ("'$$n.id' $$$n.id", "'$$n.id' $$$n.id"),
    ("x$n$x", "x5$x"),  # no tag inside a word, and no digits that run into one
    ("$n$ unclosed", "5$ unclosed"),
    *same("$1 $2", "$unknown.x $unknown? $unknown.*", "$", "$$", "$$name$$", "$9n", "a $ b", "$N.id", "$nn", "'$nn $n_ $n1'", ""),
]
FORMS = [
    ("$n", "5"), ("$n?", "5"), ("$n.id?", "5"), ("$n.id.", "5."), ("$n.id,$n", "5,5"), ("$n.id?::text", "5::text"),
    ('$n."any column"', "'odd'"), ('$n."any column"?', "'odd'"), ('$n."missing one"?', "NULL"), ("'$n.\"any column\"'", "'odd'"),
    ("$name_2.id $name $name.id", "5 (-3) (-3)"),  # the longest name
    ("$n ö $nö", "5 ö 5 ö"),                     # names are ASCII
    ("$e? $e.id? $z? $z.day? $n.missing? $e.missing?", "NULL NULL NULL NULL NULL NULL"),
    ("$h", "'" + HTTP.text + "'"), ("$h?", "'" + HTTP.text + "'"), ("$h.status $h.ok $h.ms $h.none? $h.missing?", "200 true (-1) NULL NULL"),
    ("$h.headers", "'{\"a\":\"b\"}'"), ("$j", "'[1,[2]]'"), ("$j?", "'[1,[2]]'"), ("$t", "'plain text'"),
    ("$none.x?", "NULL"), ("$dml?", "NULL"),
]
TYPED = [
    ("$n.id", "5"), ("$m.id", "(-3)"), ("10-$m.id", "10-(-3)"), ("$n.big", "7::bigint"), ("$m.big", "(-4)::bigint"),
    ("$n.name", "'O''Neil'"), ("$n.day", "'2024-06-15'::date"), ("$n.price", "1.50::numeric"), ("$n.list", "'{1,2}'::integer[]"),
    ("$n.doc", "'{\"k\":\"it''s\"}'::jsonb"), ("$u", "5"), ("$u.name $u.ok $u.f", "'a''b' true (-1.50)"), ("$u.doc", "'{\"x\":[1]}'"),
    ("$n.list[1]", "('{1,2}'::integer[])[1]"), ("$n.list [1]", "('{1,2}'::integer[]) [1]"), ("$n.doc['k']", "('{\"k\":\"it''s\"}'::jsonb)['k']"),
    ("$n?AND", "5 AND"), ("SELECT$n.name", "SELECT 'O''Neil'"), ("E$n.name", "E 'O''Neil'"), ("U&$n.name", "U& 'O''Neil'"),
    ("'a' $n.name", "'a' ('O''Neil')"), ("'a'\n$n.name", "'a'\n('O''Neil')"), ("$n.name'x'", "'O''Neil' 'x'"),
    ("part_$n.big", "part_7"), ("FETCH FIRST $n.big ROWS", "FETCH FIRST 7 ROWS"),
    ("SELECT 1 FETCH FIRST $n.big ROWS ONLY", "SELECT 1 FETCH FIRST (7::bigint) ROWS ONLY"),
    ("SELECT 1 OFFSET $n.big ROWS", "SELECT 1 OFFSET (7::bigint) ROWS"),
    # Statements whose grammar takes bare constants.
    ("ALTER SEQUENCE s RESTART WITH $n.big", "ALTER SEQUENCE s RESTART WITH 7"), ("ALTER SEQUENCE s INCREMENT BY $m.big", "ALTER SEQUENCE s INCREMENT BY -4"),
    ("-- x\nset x = $n.day", "-- x\nset x = '2024-06-15'"), ("ALTER ROLE r VALID UNTIL $n.day", "ALTER ROLE r VALID UNTIL '2024-06-15'"),
]
LISTS = [
    ("id = ANY($n)", "id = ANY('{5,-6}'::integer[])"), ("id <> all ( $n.id )", "id <> all ( '{5,-6}'::integer[] )"),
    ("= SOME($n.big?)", "= SOME('{7,-8}'::bigint[])"), ("= ANY /* x */ ( -- y\n $n.day -- z\n )", "= ANY /* x */ ( -- y\n '{\"2024-06-15\",NULL}'::date[] -- z\n )"),
    ("= ANY($n.name)", "= ANY('{\"O''Neil\",NULL}')"), ("= ANY($n.list)", "= ANY('{1,2,3}'::integer[])"),
    ("= ANY($n.price)", "= ANY('{1.50,-0.10}'::numeric[])"), ("= ANY($n.doc)", "= ANY('{\"{\\\"k\\\":\\\"it''s\\\"}\",\"[]\"}'::jsonb[])"),
    ("= ANY($e)", "= ANY('{}'::integer[])"), ("= ANY($e.day)", "= ANY('{}'::date[])"), ("= ANY($u)", "= ANY('{5,6}')"), ("= ANY($dml)", "= ANY('{}')"),
    ("id IN ($n)", "id IN (5,(-6))"), ("NOT IN ($n.name)", "NOT IN ('O''Neil',NULL)"), ("in($n.day)", "in('2024-06-15'::date,NULL)"),
    ('IN ($n."any column")', "IN ('odd',NULL)"),
    ("id IN ($e)", "id IN (SELECT NULL::integer WHERE false)"), ("id IN ($e.day?)", "id IN (SELECT NULL::date WHERE false)"),
    ("IN ($u.name)", "IN ('a''b',NULL)"), ("IN ($dml)", "IN (SELECT NULL WHERE false)"),
    ("IN" + " " * 500 + "-- (\n" * 100 + "(" + "/**/" * 100 + "$n.id)", "IN" + " " * 500 + "-- (\n" * 100 + "(" + "/**/" * 100 + "5,(-6))"),
    # Not alone, not after IN or ANY: the first row.
    ("IN ($n, 1)", "IN (5, 1)"), ("IN ($n::int)", "IN (5::int)"), ("f($n)", "f(5)"), ("IN (($n))", "IN ((5))"), ("UNION ALL ($n)", "UNION ALL (5)"),
    ("= ANY($n.list::int[])", "= ANY('{1,2}'::integer[]::int[])"), ("IN ($j)", "IN ('[1,[2]]')"), ("= ANY($h.status)", "= ANY(200)"), ("'IN ($n)'", "'IN (5)'"),
]
ROW_SETS = [
    ("SELECT id FROM $m.*", "SELECT id FROM (VALUES ((-3),(-4)::bigint)) AS \"m\"(\"id\",\"big\")"),
    ("$n.*", "(VALUES (5,7::bigint,'O''Neil'::text,'2024-06-15'::date,1.50::numeric,'{1,2}'::integer[],'{\"k\":\"it''s\"}'::jsonb,'odd'::text), "
             "('-6','-8',NULL,NULL,'-0.10','{3}','[]',NULL)) AS \"n\"(\"id\",\"big\",\"name\",\"day\",\"price\",\"list\",\"doc\",\"any column\")"),
    ("$z.*", "(VALUES (NULL::integer,NULL::bigint,NULL::text,NULL::date,NULL::numeric,NULL::integer[],NULL::jsonb,NULL::text)) "
             "AS \"z\"(\"id\",\"big\",\"name\",\"day\",\"price\",\"list\",\"doc\",\"any column\")"),
    ("$e.*", "(SELECT NULL::integer,NULL::bigint,NULL::text,NULL::date,NULL::numeric,NULL::integer[],NULL::jsonb,NULL::text WHERE false) "
             "AS \"e\"(\"id\",\"big\",\"name\",\"day\",\"price\",\"list\",\"doc\",\"any column\")"),
    ("$u.*", "(VALUES (5,'a''b'::text,true,'{\"x\":[1]}'::text,(-1.50),NULL), (6,NULL,NULL,NULL,NULL,NULL)) "
             "AS \"u\"(\"id\",\"name\",\"ok\",\"doc\",\"f\",\"none\")"),
    ("$dml.*", "(SELECT NULL WHERE false) AS \"dml\""), ("$none.*", "(SELECT FROM pg_catalog.generate_series(1,1)) AS \"none\""),
]


@pytest.mark.parametrize(("text", "expected"), [*BRACES, *LEXICAL, *FORMS, *TYPED, *LISTS, *ROW_SETS])
def test_sql(text: str, expected: str) -> None:
    assert sql(text) == expected


ESCAPES = Result('{"rows":[{"v":"\\\\\' $$ \\\\"}],"row_count":1}', (Column("v", 25, "text"),))


@pytest.mark.parametrize(("text", "expected"), [
    ("$x", r"'\'' $$ \'"), ("'$x'", r"'\'' $$ \'"), ("E'$x'", r"E'\\'' $$ \\'"), ("e'\\'$x'", r"e'\'\\'' $$ \\'"),
    (r"E'\$x'", r"E'\$x'"), (r"E'\\$x'", r"E'\\\\'' $$ \\'"), ("U&'$x'", r"U&'\\'' $$ \\'"), ("fe'$x'", r"fe'\'' $$ \'"),
    ("E'a'\n  '$x'", "E'a'\n  " + r"'\\'' $$ \\'"), ("E'a' -- c\n'$x'", "E'a' -- c\n" + r"'\\'' $$ \\'"),
    ("E'a' '$x'", r"E'a' '\'' $$ \'"), ("'a'\n'$x\\'", "'a'\n" + r"'\'' $$ \\'"), (r"'\' $x", r"'\' (" + r"'\'' $$ \')"),
    # Not every e before a quote makes an escape string.
    (r"a$e'\'$x", r"a$e'\' ('\'' $$ \')"), ("$$ $$e'$x'", r"$$ $$e'\\'' $$ \\'"), ("'a'e'$x'", r"'a'e'\\'' $$ \\'"), ("1e'$x'", r"1e'\'' $$ \'"),
    ("éE'$x'", r"éE'\'' $$ \'"), ("U &'$x'", r"U &'\'' $$ \'"), ("xU&'$x'", r"xU&'\'' $$ \'"), ("--\nE'$x'", "--\n" + r"E'\\'' $$ \\'"),
    # What would end the quotes gets others.
    ("$$ $x $$", r"$df0$ '\'' $$ \' $df0$"), ("$a$ $x $a$", r"$a$ '\'' $$ \' $a$"),
    ("$$ $df0$ $df0$ $x $$", r"$df1$ $df0$ $df0$ '\'' $$ \' $df1$"), ("$a$ $$ $x $$ $a$", r"$a$ $df0$ '\'' $$ \' $df0$ $a$"),
    ("$$ $$", "$$ $$"),
])
def test_backslashes_and_dollar_quotes(text: str, expected: str) -> None:
    assert substitute_sql(text, variables={}, instance_id="", label=None, results={"x": ESCAPES}) == expected


ERRORS = [
    ("$e", "$e has no rows — query returned zero results"), ("$e.day", "$e has no rows — query returned zero results"),
    ("'$e.id'", "$e has no rows — query returned zero results"), ("$dml.id", "$dml has no rows — query returned zero results"),
    ("$z", "$z is NULL — first column of first row is NULL"), ("$z.day", "$z.day is NULL"), ("$h.none", "$h.none is NULL"), ("$u.none", "$u.none is NULL"),
    ('$z."any column"', '$z."any column" is NULL'),
    ("$j.x", "$j.x: result is neither a row set nor a JSON object"), ("$j.x?", "$j.x: result is neither a row set nor a JSON object"),
    ("$t.x", "$t.x: result is not valid JSON"),
    ("$m.missing", "$m.missing: result has no field 'missing' (available: big, id)"),
    ("$u.missing", "$u.missing: result has no field 'missing' (available: doc, f, id, name, none, ok)"),
    ("$e.missing", "$e.missing: result has no field 'missing' (available: any column, big, day, doc, id, list, name, price)"),
    ("$h.missing", "$h.missing: result has no field 'missing' (available: body, headers, ms, none, ok, status)"),
    ("= ANY($m.missing)", "$m.missing: result has no field 'missing' (available: big, id)"),
    ("$none", "$none: first row has no columns"),
    ("$j.*", "$j.* — invalid result format"), ("$h.*", "$h.* — invalid result format"), ("$t.*", "$t.* — invalid result format"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_errors(text: str, message: str) -> None:
    for substitute in (sql, raw):
        if "ANY" not in text or substitute is sql:
            with pytest.raises(SubstitutionError) as caught:
                substitute(text)
            assert str(caught.value) == message


def test_row_sets_are_limited() -> None:
    rows = ",".join(['{"id":1}'] * 10_001)
    results = {"n": Result(f'{{"rows":[{rows}],"row_count":10001}}', COLUMNS[:1])}
    with pytest.raises(SubstitutionError) as caught:
        substitute_sql("SELECT * FROM $n.*", variables={}, instance_id="", label=None, results=results)
    assert str(caught.value) == "$n.* — result has 10001 rows, exceeding the maximum of 10000 for row-set expansion."
    assert substitute_sql("= ANY($n)", variables={}, instance_id="", label=None, results=results).count(",") == 10_000


@pytest.mark.parametrize("body", ['"a\\u0000b"', '"\\ud800"'])
def test_what_postgresql_text_cannot_hold(body: str) -> None:
    results = {"h": Result(f'{{"body":{body}}}'), "n": Result(f'{{"rows":[{{"{body[1:-1]}":1}}]}}')}
    for text in ("$h.body", "'$h.body'", "$n.*"):
        with pytest.raises(SubstitutionError, match=r"which PostgreSQL text cannot hold$"):
            substitute_sql(text, variables={}, instance_id="", label=None, results=results)
    escaped = substitute_raw('{"x":"$h.body","y":$h.body}', variables={}, instance_id="", label=None, results=results, context=Raw.BODY)
    assert escaped == f'{{"x":{body},"y":{body}}}'


def test_deep_results_fail_clearly() -> None:
    results = {"n": Result("[" * 50_000 + "]" * 50_000)}
    for call in (lambda: substitute_sql("$n", variables={}, instance_id="", label=None, results=results),
                 lambda: substitute_raw("$n", variables={}, instance_id="", label=None, results=results),
                 lambda: break_result("$n.x", variables={}, instance_id="", label=None, results=results)):
        with pytest.raises(SubstitutionError, match="nested too deeply"):
            call()


def test_deep_dollar_quotes_fail_clearly() -> None:
    text = "".join(f"$a{n}$" for n in range(100)) + "".join(f"$a{n}$" for n in reversed(range(100)))
    with pytest.raises(SubstitutionError, match="dollar quotes are nested more than 50 levels deep"):
        sql(text)


@pytest.mark.parametrize("unit", ['$n."id",', "IN ($n" + " " * 50, "IN ($n" + "--" * 50, "'a'" + " -- " * 50, "'a'\n" + " -- \n" * 50, "-- ", "$a%d$", "$n.\"", "'", "/*", "\"", "E'\\", "$$", "$", "(", "ANY(", "''", "-", "{", "{w", "$n.list\"", "E'a'\n", "$n ["])
def test_hostile_texts_take_linear_time(unit: str) -> None:
    """Finishes at all: with anything quadratic, 50,000 of these would take minutes."""
    text = "".join(unit % n if "%d" in unit else unit for n in range(50_000))
    try:
        sql(text)
        raw(text)
        raw(text, Raw.JSON)
        raw(text, Raw.BODY)
    except SubstitutionError:
        pass


RAW = [
    (Raw.PLAIN, "$n.name, $n.id$n.id; {v}", "O'Neil, 55; raw '\"{w}"), (Raw.PLAIN, "$h.body", 'say "hi"\r\nthere'),
    (Raw.PLAIN, "$z? $z.day? $h.none? $e? $n.missing?", "NULL NULL NULL NULL NULL"), (Raw.PLAIN, "$j $h.headers $n.doc $n.list", '[1,[2]] {"a":"b"} {"k":"it\'s"} [1,2]'),
    (Raw.PLAIN, "$u.ok $u.f $n.price $t", "true -1.50 1.50 plain text"), (Raw.PLAIN, "$m.*", '[{"id":-3,"big":-4}]'), (Raw.PLAIN, "$e.*", "[]"),
    (Raw.PLAIN, "-- $n 'x $n' /* $n */ \"$n\" $$n $nope {nope} {sys_label}|", "-- 5 'x 5' /* 5 */ \"5\" $$n $nope {nope} |"),
    (Raw.URL, "https://h/{w}?q=$n.name&r=$h.body&x=$u.f", "https://h/W?q=O%27Neil&r=say%20%22hi%22%0D%0Athere&x=-1.50"),
    (Raw.URL, "$n.name", "O'Neil"), (Raw.URL, " $h.status ", " 200 "),
    (Raw.HEADER, "Bearer $h.body\r\n", "Bearer say \"hi\" there"), (Raw.HEADER, "$n.name", "O'Neil"),
    (Raw.BODY, '{"a":"$h.body","b":$h.body,"c":$n.id,"d":$n.doc,"e":$z?,"f":"$z?"}',
     '{"a":"say \\"hi\\"\\r\\nthere","b":"say \\"hi\\"\\r\\nthere","c":5,"d":{"k":"it\'s"},"e":null,"f":"NULL"}'),
    (Raw.BODY, '["$j",$j,$t,$n.*,"$u.f",$u.f]', '["[1,[2]]",[1,[2]],"plain text",' + ROWS.text[8:-15].replace('"k": ', '"k":') + ',"-1.50",-1.50]'),
    (Raw.BODY, '{"a":$n."any column","b":"$n.\\"any column\\"","c":"$n."}', '{"a":"odd","b":"odd","c":"5."}'),
    (Raw.BODY, '{"id":"{w}","q":$n.name}', '{"id":"W","q":"O\'Neil"}'),
    (Raw.BODY, "$n.name", "O'Neil"), (Raw.BODY, "Hello \"$h.body\"", "Hello \"say \"hi\"\r\nthere\""), (Raw.BODY, "a=$n.name&b=$n.id", "a=O'Neil&b=5"),
    (Raw.BODY, '{"a":$nope,"b":$n.name}', '{"a":$nope,"b":O\'Neil}'),  # not JSON as it stands
    (Raw.JSON, '{"a":$nope,"b":$n.name}', '{"a":$nope,"b":"O\'Neil"}'),
    (Raw.JSON, "$n.name", '"O\'Neil"'), (Raw.JSON, "$h", HTTP.text), (Raw.JSON, "$z?", "null"), (Raw.JSON, '"$n.name"', '"O\'Neil"'),
]


@pytest.mark.parametrize(("context", "text", "expected"), RAW)
def test_raw(context: Raw, text: str, expected: str) -> None:
    assert raw(text, context) == expected


@pytest.mark.parametrize(("value", "expected"), [
    ('{"a": 1}', '{"a": 1}'), (" [1] ", " [1] "), ("{broken", '"{broken"'), ("5", '"5"'), ("text", '"text"')])
def test_a_text_that_is_a_json_document_is_the_body(value: str, expected: str) -> None:
    results = {"r": Result(json.dumps({"rows": [{"b": value}], "row_count": 1}), (Column("b", 25, "text"),))}
    assert substitute_raw("$r", variables={}, instance_id="", label=None, results=results, context=Raw.JSON) == expected


@pytest.mark.parametrize(("value", "expected"), [
    (None, "null"), ("", '""'), ("done", '"done"'), ("5", "5"), ("1.50", "1.50"), ('{ "a" : [1, 2] }', '{"a":[1,2]}'), ("NaN", '"NaN"'), ('"x"', '"x"'),
    ("$n", "5"), ("$n.name", '"O\'Neil"'), ("$n.price", '"1.50"'), ("$n.doc", '{"k":"it\'s"}'), ("$z?", "null"), ("$j", "[1,[2]]"),
    ('{"who":"$n.name","id":$n.id}', '{"who":"O\'Neil","id":5}'), ("by $n.name", '"by O\'Neil"'), ("{w}", '"W"'), ('["{w}"]', '["W"]'), ("$nope", '"$nope"'),
])
def test_break_values(value: str | None, expected: str) -> None:
    assert break_result(value, variables=VARIABLES, instance_id="", label=None, results=RESULTS) == expected


def test_break_value_errors() -> None:
    with pytest.raises(SubstitutionError, match=r"^\$e has no rows"):
        break_result("$e", variables={}, instance_id="", label=None, results=RESULTS)
    with pytest.raises(SubstitutionError, match="nested too deeply"):
        break_result("[" * 50_000, variables={}, instance_id="", label=None, results={})


def base64(text: str) -> str:
    return substitute_base64(text, part="p", variables=VARIABLES, instance_id="", label=None, results=RESULTS)


def test_base64_parts() -> None:
    assert base64("aGk=") == "aGk="
    assert base64(" $n.name ") == "O'Neil"
    assert base64("$h.body?") == 'say "hi"\r\nthere'
    assert base64("{w}") == "W"
    assert base64("{ref}") == "$n.id"  # a variable's value is data here
    for mixed in ("x$n", "$n$n", "{w}{w}", "$n.*", "{a b}", "$1"):
        with pytest.raises(SubstitutionError, match=r"^data_b64 for part 'p' mixes a variable reference with other text"):
            base64(mixed)


@pytest.mark.parametrize(("text", "names"), [
    ("SELECT $a, $b.c, $d?, $e.*, '$f', \"$g\" -- $h\n/* $i */ $j$ $k $j$ $$l $1 $a", "a b d e f k"), ("SELECT 1", ""), ("$tag$ unclosed", "tag")])
def test_references(text: str, names: str) -> None:
    assert references(text) == frozenset(names.split())


@pytest.mark.parametrize(("text", "expected"), [
    ("$n.id", "SELECT 5"), (" $n.name? \n", "SELECT  'O''Neil' \n"), ("$n", "SELECT 5"), ("$n.*", None), ("$nobody", "$nobody"), ("$n.id + 1", "5 + 1"), ("SELECT $n", "SELECT 5")])
def test_a_step_that_is_nothing_but_a_reference(text: str, expected: str | None) -> None:
    filled = step_sql(text, variables={}, instance_id="", label=None, results=RESULTS)
    assert filled == expected if expected is not None else not filled.startswith("SELECT")


def test_nothing_to_substitute() -> None:
    assert substitute_sql("SELECT '$x', {x}", variables={}, instance_id="", label=None, results={}) == "SELECT '$x', {x}"


@given(st.text(alphabet="$n.'\"{}wEe\\ -/*\n?ab()IN", max_size=40))
def test_without_known_names_only_braces_change(text: str) -> None:
    results = {"unused": ROWS}
    assert substitute_sql(text, variables={}, instance_id="", label=None, results=results) == text
    assert substitute_raw(text, variables={}, instance_id="", label=None, results=results) == text
    assert substitute_raw(text, variables={}, instance_id="", label=None, results=results, context=Raw.JSON) == text


@settings(max_examples=1000)
@example(["$$", "$$", "E'", "\\", "$n.id?"])
@given(st.lists(st.sampled_from(["$n.id?", "'", "\"", "--", "\n", "/*", "*/", "$$", "$t$", "E'", "\\", " ", "x", "''", ";"]), max_size=14))
def test_the_scanner_agrees_with_a_slow_one(pieces: list[str]) -> None:
    """Which references are in code: against a character-by-character reading of the same rules."""
    text = "".join(pieces)
    expected = _slow(text)
    seen = [m.start() for m in re.finditer(r"\x00", substitute_sql(
        text, variables={}, instance_id="", label=None, results={"n": Result('{"rows":[{"id":7}],"row_count":1}')}).replace("7", "\0"))]
    assert len(seen) == expected


def _slow(text: str, ends: str | None = None) -> int:
    """How many `$n.id?` PostgreSQL would not see as a comment, a quoted identifier or a tag."""
    count, i = 0, 0
    quoted = 0  # where the last dollar quote ended: no name goes on from there

    def is_reference(at: int) -> bool:
        return text.startswith("$n.id?", at) and text[at - 1:at] != "$"

    while i < len(text):
        if text.startswith("--", i):
            while i < len(text) and text[i] != "\n":
                i += 1
        elif text.startswith("/*", i):
            depth, i = 1, i + 2
            while i < len(text) and depth:
                step = {"/*": 1, "*/": -1}.get(text[i:i + 2], 0)
                depth += step
                i += 2 if step else 1
        elif text[i] == '"':
            end = text.find('"', i + 1)
            i = len(text) if end < 0 else end + 1
        elif text[i] == "'":
            escapes = bool(re.search(r"(?<![A-Za-z0-9_$])[Ee]$", text[quoted:i]))
            i += 1
            while i < len(text):
                if (escapes and text[i] == "\\") or text.startswith("''", i):
                    i += 2
                elif text[i] == "'":
                    more = re.match(r"'(?:[ ]|--[^\n]*)*\n(?:\s|--[^\n]*\n)*'", text[i:])
                    if more is None:
                        break
                    i += more.end()
                elif is_reference(i):
                    count += 1
                    i += 6
                else:
                    i += 1
            i += 1
        elif (tag := re.match(r"\$(?:[A-Za-z_]\w*)?\$", text[i:])) and not re.match(r"\w", text[i - 1:i]) \
                and text.find(tag[0], i + len(tag[0])) >= 0:
            close = text.find(tag[0], i + len(tag[0]))
            count += _slow(text[i + len(tag[0]):close])
            i = quoted = close + len(tag[0])
        elif is_reference(i):
            count += 1
            i += 6
        else:
            i += 1
    return count


def test_many_references_in_one_text() -> None:
    random.seed(1)
    text = "SELECT " + ",".join(["$n.id"] * 20_000)
    assert sql(text) == "SELECT " + ",".join(["5"] * 20_000)
