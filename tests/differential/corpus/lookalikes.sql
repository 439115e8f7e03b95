## An alias df, and columns that are called like our functions
SELECT df.id FROM documents df WHERE df.id < 4 ORDER BY df.id

SELECT df.start FROM documents df WHERE df.id < 4 ORDER BY df.start

SELECT df.start, df.status, df.signal, df.label FROM documents AS df ORDER BY df.id LIMIT 2

SELECT "df".start, df."start", "df"."start" FROM documents df ORDER BY 1 LIMIT 2

SELECT df . start, df. start, df .start FROM documents df ORDER BY 1 LIMIT 2

SELECT df/* a comment */./* another */start FROM documents df ORDER BY 1 LIMIT 2

SELECT DF.START FROM documents DF ORDER BY 1 LIMIT 1

SELECT df.* FROM documents df WHERE df.id = 1

SELECT df FROM documents df WHERE df.id = 1

SELECT (df).start, (df.body).* FROM documents df WHERE id = 1

SELECT (df).start, (df).id FROM documents df WHERE id = 1

SELECT count(df.*), count(df.id), max(df.start) FROM documents df

SELECT count(*) FILTER (WHERE df.status = 'open') FROM documents df

SELECT * FROM (VALUES (1, 'a')) df(start, signal) WHERE df.start = 1

SELECT df.start FROM (SELECT 1 AS start) df

SELECT df.start FROM generate_series(1, 2) AS df(start)

WITH df AS (SELECT 1 AS start) SELECT df.start FROM df

WITH df(start, loop) AS (SELECT 1, 2) SELECT df.start + df.loop, df.start & df.loop, df.start | df.loop FROM df

SELECT df.start IN ('s1', 's2'), df.id IN (1, 2), df.id = ANY (ARRAY[1]) FROM documents df ORDER BY df.id LIMIT 2

SELECT (df.id) FROM documents df ORDER BY (df.id) LIMIT 1

SELECT df.tags[1], df.body['a'], df.body -> 'a' FROM documents df ORDER BY df.id LIMIT 1

SELECT df.id & 3, df.id | 8, df.id # 1, ~ df.id FROM documents df ORDER BY df.id LIMIT 2

SELECT df.flags & B'0011', df.flags | B'1000' FROM documents df ORDER BY df.id LIMIT 2

SELECT df.body @> '{"a": 1}', '{"a": 1}' <@ df.body, df.body ?| ARRAY['a'], df.body ?& ARRAY['a', 'b'], df.body ? 'a' FROM documents df ORDER BY df.id LIMIT 2

SELECT df.tags @> ARRAY['all'], df.tags && ARRAY['t1'], df.tags || 'x'::text FROM documents df ORDER BY df.id LIMIT 2

SELECT df.body @> df.body, df.tags @> df.tags FROM documents df WHERE df.body @> '{"a": 3}'

SELECT a.id FROM documents a JOIN documents df ON a.id = df.id AND df.start = a.start WHERE df.id = 3

SELECT a.id FROM documents a JOIN documents df USING (id, start) WHERE df.id = 3

SELECT id FROM documents df WHERE EXISTS (SELECT 1 FROM parents WHERE parents.id = df.id) ORDER BY 1

SELECT x FROM documents df, LATERAL (SELECT df.start || '!' AS x) l ORDER BY 1 LIMIT 1

UPDATE documents df SET start = df.start WHERE df.id = 1

UPDATE documents df SET start = df.start WHERE df.id = 1 RETURNING df.id, df.start

DELETE FROM documents df WHERE df.start = 'nothing' AND df.status IN ('x')

INSERT INTO documents AS df (id, title, start) VALUES (1, 'x', 'y') ON CONFLICT (id) DO UPDATE SET start = df.start RETURNING df.start

SELECT df.titel FROM documents df

SELECT df.nosuch, df.start FROM documents df

SELECT df.start + 1 FROM documents df

SELECT df.start FROM documents

SELECT lower(df.start), upper(df.status) FROM documents df ORDER BY 1 LIMIT 1

SELECT array_agg(df.start ORDER BY df.id) FROM documents df WHERE df.id < 3

SELECT df.id FROM documents df ORDER BY df.start COLLATE "C" DESC, df.id LIMIT 2

SELECT df.id::text || df.start::text FROM documents df ORDER BY df.id LIMIT 1

SELECT my_df.start FROM documents my_df ORDER BY id LIMIT 1

SELECT df2.start FROM documents df2 ORDER BY id LIMIT 1

SELECT dfx.start, xdf.start FROM documents dfx, documents xdf WHERE dfx.id = 1 AND xdf.id = 1

SELECT "DF".start FROM documents "DF" ORDER BY id LIMIT 1

SELECT üdf.start FROM documents üdf ORDER BY id LIMIT 1

CREATE TABLE play.df (start int, "sql" text)

INSERT INTO df (start) VALUES (1), (2)

INSERT INTO play.df (start, sql) SELECT df.start, 'x' FROM play.df RETURNING df.start

SELECT df.start, play.df.start, df.sql FROM play.df ORDER BY 1

UPDATE df SET start = df.start + 1

SELECT * FROM df ORDER BY df.start

DROP TABLE play.df

## In strings, comments and quoted identifiers
SELECT 'df.start(''SELECT 1'' ~> ''SELECT 2'')'

SELECT $$df.start('SELECT 1' ~> 'SELECT 2')$$

SELECT $x$ 'a' ~> 'b' |=> 'c' $x$ AS "df.start('a')"

SELECT 1 -- df.start('a' ~> 'b')

SELECT 1 /* df.start('a' ~> 'b') /* nested df.seq( */ @> */

SELECT "df.start" FROM (SELECT 1 AS "df.start") x

SELECT "a ~> b", "df.seq('a', 'b')" FROM (SELECT 1, 2) AS x("a ~> b", "df.seq('a', 'b')")

SELECT E'df.start(\'a\' ~> \'b\')', U&'df.start(\0041)', N'~>', B'101'

SELECT 'a~>b', 'a' '~>' || '!>'

SELECT '|=>'::text, '?>'::text, '!>', '@>'

SELECT 'it''s df.start(' || ')' AS "df."

SELECT length('~> |=> & | ?> !> @> df.start()')

SELECT position('~>' IN 'a ~> b')

SELECT 'x' LIKE '%~>%', 'df.start()' ~ 'df\.start\(\)'

SELECT jsonb '{"df.start": "a ~> b"}' ->> 'df.start'

COMMENT ON TABLE documents IS 'df.start(''a'' ~> ''b'')'

## Operators that are not ours
SELECT '{"a": 1}'::jsonb @> '{"a": 1}'::jsonb, '{"a": 1}'::jsonb <@ '{}'::jsonb

SELECT jsonb '{"a": 1}' @> '{"a": 1}', jsonb '["a"]' ?| ARRAY['a', 'b'], jsonb '{"a":1}' ?& '{a}'

SELECT body @> '{"a": 3}' FROM documents ORDER BY id LIMIT 3

SELECT id FROM documents WHERE body @> '{"a": 3}' AND tags @> '{all}' AND NOT tags @> '{t4}'

SELECT ARRAY[1,2] @> ARRAY[1], ARRAY[1] <@ ARRAY[1,2], ARRAY[1] && ARRAY[2]

SELECT int4range(1, 10) @> 5, int4range(1, 10) @> int4range(2, 3), 5 <@ int4range(1, 10), '[1,2]'::int4range -|- '[3,4]'

SELECT int4range(1, 10) @> NULL, NULL::int4range @> 1

SELECT circle '((0,0),5)' @> point '(1,1)', box '((0,0),(2,2))' @> point '(1,1)', polygon '((0,0),(1,1),(1,0))' ~= polygon '((0,0),(1,1),(1,0))'

SELECT 5 & 3, 5 | 3, 5 # 3, ~5, 5 << 1, 5 >> 1

SELECT B'101' & B'011', B'101' | B'011', B'101' # B'011', ~ B'101', B'101' || B'1'

SELECT inet '10.0.0.1' & inet '255.0.0.0', inet '10.0.0.1' | inet '0.0.0.255', ~ inet '10.0.0.1'

SELECT id & 1 | 2 & 3 FROM documents ORDER BY id LIMIT 2

SELECT @ -5, |/ 25.0, ||/ 27.0, @@ circle '((0,0),1)', # path '[(0,0),(1,1)]', @-@ path '[(0,0),(1,0)]', ?- lseg '((0,0),(1,0))', !! 'a'::tsquery

SELECT 'a'::tsquery && 'b', 'a'::tsquery || 'b', 'a'::tsquery <-> 'b', to_tsvector('a b') @@ 'a & b'::tsquery, 'a'::tsquery @> 'a'::tsquery

SELECT point '(0,0)' <-> point '(3,4)', point '(0,0)' <^ point '(3,4)', box '((0,0),(1,1))' ?# box '((0,0),(2,2))', lseg '((0,0),(1,1))' ?|| lseg '((0,0),(2,2))'

SELECT 'abc' ~ 'a', 'abc' !~ 'a', 'abc' ~* 'A', 'abc' ~~ 'a%', 'abc' !~~ 'a%', 'abc' ^@ 'a'

SELECT 'a' ~<~ 'b', 'a' ~>~ 'b', 'a' ~<=~ 'b', 'a' ~>=~ 'b'

SELECT name ~>~ 'a', name ~>=~ 'a' FROM parents ORDER BY 1

SELECT jsonb '{"a": [1, 2]}' @? '$.a[*] ? (@ > 1)', jsonb '{"a": 1}' @@ '$.a == 1', jsonb '{"a": 1}' #- '{a}', jsonb '{"a": 1}' - 'a'

SELECT 2 ^ 3, 7 % 3, -5 !> 3, 1 <> 2, 1 != 2

SELECT 1 !> 2, 3 ?> 4, 5 |=> 6

SELECT id !> 2, id ?> 4, id |=> 6 FROM parents ORDER BY 1

SELECT 1 ~>~> 2

SELECT @> 5

SELECT @> id FROM parents ORDER BY id

SELECT '(7,"seven")'::pair ~> 1, '(7,"seven")'::pair ~> 2

SELECT pr ~> 1, pr ~> 2 FROM kinds ORDER BY id

SELECT pr ~> id FROM kinds ORDER BY id

SELECT k.pr ~> k.id FROM kinds k WHERE (k.pr ~> 1) IS NOT NULL ORDER BY k.id

SELECT pr OPERATOR(public.~>) 1, 1 OPERATOR(public.!>) 2 FROM kinds ORDER BY id

SELECT (pr) ~> (1), (SELECT pr) ~> 2, row(5, 'x')::pair ~> 1 FROM kinds ORDER BY id

SELECT 'a' ~> 1

SELECT name |=> 'x', 'x' |=> name, name |=> name, name |=> 'a' |=> 'b', (name |=> 'y') |=> 'z' FROM parents ORDER BY id

SELECT @> name, @> (name), @> name |=> 'x', upper(@> name), ~> id, ~> 5 FROM parents ORDER BY name |=> 'x'

SELECT 'a' |=> 'b'

SELECT name |=> name, 'SELECT 1' |=> name FROM parents ORDER BY id

SELECT 'a' OPERATOR(public.|=>) 'b', OPERATOR(public.@>) 'c'

PREPARE own AS SELECT $1::text |=> $2, name |=> $1 FROM parents WHERE @> name <> $2 ORDER BY id

EXECUTE own('p', 'q')

DEALLOCATE own

SELECT CASE WHEN id > 1 THEN name END |=> 'x', coalesce(name, 'n') |=> 'y', id !> (age ?> id) FROM parents ORDER BY id

SELECT nosuch |=> name FROM parents

SELECT id |=> name FROM parents

SELECT name |=>

SELECT name |=> FROM parents

SELECT !> 5

CREATE FUNCTION play.own(p pair, n int) RETURNS text LANGUAGE sql AS $$ SELECT p ~> n |=> ('x' || n) $$

SELECT play.own((3, 'three'), id) FROM parents ORDER BY id

CREATE OR REPLACE FUNCTION play.own(p pair, n int) RETURNS text LANGUAGE plpgsql AS $$ DECLARE r text := p ~> n; BEGIN r := @> r; RETURN r |=> 'x'; END $$

SELECT play.own((3, 'three'), id) FROM parents ORDER BY id

SELECT 1 <@ 2

SELECT 'a' <~> 'b'

SELECT 1 ~>> 2

SELECT 1 |=>> 2

SELECT '{1}'::int[] @>> '{1}'

SELECT id FROM documents WHERE id <@ int4range(1, 3) ORDER BY id

CREATE OPERATOR play.~> (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = int8pl)

COMMENT ON OPERATOR play.~> (bigint, bigint) IS 'a user''s own'

SELECT 1::bigint ~> 2::bigint, i8 ~> i8 FROM kinds WHERE id = 1

SELECT i8 ~> 5 FROM kinds WHERE id = 1

ALTER OPERATOR play.~> (bigint, bigint) SET (RESTRICT = NONE)

DROP OPERATOR play.~> (bigint, bigint)

CREATE OPERATOR CLASS play.x FOR TYPE int USING btree AS OPERATOR 1 ~>

## Bodies that mention df in ways that are not calls
DO $$ DECLARE df documents%ROWTYPE; BEGIN SELECT * INTO df FROM documents WHERE id = 1; RAISE NOTICE '% %', df.start, df.id; END $$

DO $$
DECLARE df record;
BEGIN
    FOR df IN SELECT * FROM documents ORDER BY id LIMIT 2 LOOP
        RAISE NOTICE 'row % %', df.start, df.status;
        IF df.start = 's1' THEN CONTINUE; END IF;
    END LOOP;
    PERFORM df.nosuch;
END $$

CREATE FUNCTION play.f() RETURNS text LANGUAGE sql AS 'SELECT df.start FROM documents df ORDER BY df.id LIMIT 1'

SELECT f(), play.f()

SELECT prosrc FROM pg_proc WHERE oid = 'play.f'::regproc

CREATE FUNCTION play.g() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT df.start FROM documents df ORDER BY df.id LIMIT 1; END

SELECT g()

CREATE FUNCTION play.h() RETURNS text LANGUAGE plpgsql AS $f$ BEGIN RETURN $q$df.start('a' ~> 'b')$q$; END $f$

SELECT h()

SELECT prosrc FROM pg_proc WHERE oid = 'play.h'::regproc

CREATE VIEW play.v AS SELECT df.start, df.id & 1 AS bit, df.body @> '{}' AS has FROM documents df

SELECT pg_get_viewdef('play.v'::regclass)

SELECT * FROM play.v AS df WHERE df.start = 's1'

PREPARE p AS SELECT df.start FROM documents df WHERE df.id = $1

EXECUTE p(2)

EXPLAIN (COSTS off) SELECT df.start FROM documents df WHERE df.body @> '{"a": 1}'

DEALLOCATE p

CREATE RULE r AS ON INSERT TO play.v DO INSTEAD NOTHING

CREATE SCHEMA df

GRANT SELECT ON df.instances TO df

DROP EXTENSION IF EXISTS nosuch

CREATE EXTENSION nosuch

CREATE EXTENSION IF NOT EXISTS plpgsql

## What nobody can read
SELECT df.start('unterminated

SELECT df.start("unterminated

SELECT 'a' ~> $$unterminated

SELECT 'a' ~> 'b' /* unterminated

SELECT 1 ~> 2 AND (

SELECT )df.start FROM documents df(
