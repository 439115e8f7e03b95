## Syntax
SELEC 1

SELECT 1 FROM

SELECT (1

SELECT 1)

SELECT 'unterminated

SELECT "unterminated

SELECT $$unterminated

SELECT $a$unterminated$b$

SELECT /* unterminated

SELECT /* a /* nested */ b */ 1

SELECT 1; SELECT 2

SELECT 1;;

;

;;;

-- only a comment

/* only a comment */

SELECT 1 -- and a comment

SELECT 1 AS select

SELECT * FROM documents WHERE

SELECT 1 +

SELECT @

SELECT 1 ~> 

INSERT INTO

CREATE TABLE x

SELECT U&'\zzzz'

SELECT E'\u00'

SELECT ''::int

SELECT 1 FROM documents d JOIN ON true

SELECT 12abc

SELECT 1..2

SELECT :x

SELECT $0

SELECT $1

SELECT $99999999999

SELECT ??

SELECT 1 ||| 2

## Names
SELECT nosuch

SELECT id, nosuch FROM documents

SELECT titel FROM documents

SELECT d.nosuch FROM documents d

SELECT documents.id FROM documents d

SELECT * FROM nosuch

SELECT * FROM documents, nosuch

SELECT * FROM nosuch.nosuch

SELECT * FROM a.b.c.d

SELECT nosuch(1)

SELECT lower(1, 2)

SELECT pg_catalog.nosuch(1)

SELECT 1::nosuch

SELECT 'x' = 1

SELECT 1 + 'x'

SELECT 1 + true

SELECT NOT 1

SELECT 'a' ~~~ 'b'

SELECT 1 === 2

SELECT sum(sum(id)) FROM documents

SELECT id, count(*) FROM documents

SELECT id FROM documents GROUP BY status

SELECT 1 WHERE count(*) > 1

SELECT (SELECT 1, 2)

SELECT (SELECT id FROM documents)

SELECT 1 UNION SELECT 'x'

SELECT 1, 2 UNION SELECT 1

SELECT * FROM documents ORDER BY 99

SELECT * FROM (SELECT 1) x, (SELECT 2) x

SELECT id FROM documents a, documents b

## Values
SELECT 1/0

SELECT 1/0::float8

SELECT id / (id - 5) FROM documents ORDER BY id

SELECT 2147483647 + 1

SELECT 32768::smallint

SELECT 1e400

SELECT 'abc'::int

SELECT 'abc'::date

SELECT '2024-02-30'::date

SELECT '25:00'::time

SELECT 'abc'::uuid

SELECT '{1,2'::int[]

SELECT '{"a":'::json

SELECT '{"a": tru}'::jsonb

SELECT 'xyz'::mood

SELECT 0::positive

SELECT 12345.6789::numeric(5,2)

SELECT '12345678901'::varchar(10)

SELECT '300.1.1.1'::inet

SELECT '[1,2'::int4range

SELECT '[5,1]'::int4range

SELECT 'B2'::bit(2)

SELECT '<a>'::xml

SELECT ln(0), sqrt(-1)

SELECT chr(0)

SELECT convert_from('\xff', 'UTF8')

SELECT 'a' ~ '('

SELECT ARRAY[1, 2][1:2:3]

SELECT ARRAY[[1], [2, 3]]

SELECT to_date('x', 'YYYY')

SELECT current_setting('no.such')

SELECT repeat('x', 2000000000)

SELECT generate_series(1, 3, 0)

SELECT lo_get(0)

## Constraints and privileges
INSERT INTO parents VALUES (1, 'dup', 1)

INSERT INTO parents VALUES (3, 'one', 1)

INSERT INTO parents VALUES (3, 'three', -1)

INSERT INTO parents VALUES (NULL, 'null', 1)

INSERT INTO children VALUES (2, 99, 'x')

INSERT INTO children VALUES (2, NULL, 'x')

DELETE FROM parents WHERE id = 1

UPDATE parents SET id = 9 WHERE id = 1

UPDATE parents SET nosuch = 1

INSERT INTO parents (id, nosuch) VALUES (1, 2)

INSERT INTO parents VALUES (1, 2, 3, 4)

INSERT INTO parents (id, name) VALUES (1)

INSERT INTO kinds (id, v) VALUES (99, 'longer than ten')

INSERT INTO kinds (id, dom) VALUES (99, -1)

INSERT INTO kinds (id, mo) VALUES (99, 'angry')

SELECT * FROM pg_authid

CREATE DATABASE template1

DROP TABLE parents

DROP TABLE nosuch

DROP TABLE IF EXISTS nosuch

DROP SCHEMA IF EXISTS nosuch CASCADE

ALTER TABLE parents ADD COLUMN id int

ALTER SYSTEM SET work_mem = '1MB'

SET ROLE postgres

SET nosuch = 1

SET work_mem = 'x'

SET work_mem = -1

SET client_encoding = 'nosuch'

SHOW nosuch

SET SESSION AUTHORIZATION postgres

COPY parents TO '/tmp/x'

COPY parents FROM '/no/such'

COPY parents (nosuch) TO STDOUT

COPY nosuch TO STDOUT

LOCK TABLE parents

SAVEPOINT a

ROLLBACK TO a

RELEASE a

COMMIT

ROLLBACK

DECLARE c CURSOR FOR SELECT 1

FETCH c

CLOSE nosuch

DEALLOCATE nosuch

EXECUTE nosuch

EXECUTE nosuch(1)

PREPARE TRANSACTION 'x'

VACUUM parents, nosuch

CREATE INDEX CONCURRENTLY ON nosuch (a)

CLUSTER nosuch

NOTIFY "", 'x'

LISTEN

DO 'BEGIN RAISE EXCEPTION ''from a block''; END'

DO $$ BEGIN PERFORM 1/0; END $$

DO $$
BEGIN
    PERFORM 1;
    PERFORM nosuch(1);
END $$

DO $$
DECLARE x int := 'abc';
BEGIN
END $$

DO $$ BEGIN SELECT 1; END $$

DO $$ BEGIN IF THEN END IF; END $$

DO LANGUAGE nosuch 'x'

CREATE FUNCTION broken() RETURNS int LANGUAGE sql AS $$ SELECT nosuch $$

CREATE FUNCTION broken() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN END $$

CREATE FUNCTION broken() RETURNS int LANGUAGE sql RETURN nosuch

CALL nosuch()

CALL commits('x')

## Raised by functions
SELECT complain('debug', 'd')

SELECT complain('info', 'an info')

SELECT complain('notice', 'a notice')

SELECT complain('warning', 'a warning')

SELECT complain('error', 'an error')

SELECT outer_complain('nested')

SELECT complain('notice', 'n' || id), id FROM documents WHERE id < 4 ORDER BY id

SELECT complain('error', E'two\nlines\tand ü')

SELECT complain('error', repeat('long ', 5000))

SELECT complain('notice', repeat('long ', 5000))

SELECT xpath('(', '<a/>')

SELECT pg_terminate_backend(0)

SELECT pg_cancel_backend(0)

SELECT set_config('search_path', 'play, public', false)

SELECT 'a'::regclass

SELECT to_regclass('nosuch')

SELECT has_table_privilege('nosuch', 'documents', 'SELECT')

## df alone is a name like others
SELECT df.nosuch

SELECT * FROM df

SELECT df

SELECT df.*

SELECT nosuch.df.start

SELECT * FROM df.nosuch
