## Settings, with ParameterStatus where there is one
SET application_name = 'an application'

SET application_name = 'with ü'

RESET application_name

SET DateStyle = 'German, DMY'

SELECT '2024-02-29'::date, '2024-02-29 12:00'::timestamp

SET IntervalStyle = 'iso_8601'

SELECT interval '1 year 2 months 3 days 04:05:06'

SET TimeZone = 'Europe/Berlin'

SELECT '2024-07-01 12:00+00'::timestamptz

SET extra_float_digits = -5

SELECT 0.1::float8 + 0.2

SET bytea_output = 'escape'

SELECT '\x00ff41'::bytea

SET standard_conforming_strings = off

SELECT 'a\'b', 'c\\d', E'\n', 'e\tf'

SELECT 'df.start(\'a\' ~> \'b\')'

SELECT 'x' AS a, 'it\'s ~> not ours', df.start FROM documents df ORDER BY df.id LIMIT 1

SET escape_string_warning = off

SELECT 'a\'b', 'c\\d'

SET standard_conforming_strings = on

SET backslash_quote = on

SELECT E'a\'b'

SET client_min_messages = debug1

SELECT complain('debug', 'seen')

SET client_min_messages = error

SELECT complain('warning', 'not seen')

RESET ALL

SHOW search_path

SHOW DateStyle

SHOW client_encoding

SHOW standard_conforming_strings

SET LOCAL work_mem = '1MB'

BEGIN

SET LOCAL TimeZone = 'Asia/Tokyo'

SAVEPOINT s

SET LOCAL TimeZone = 'Asia/Seoul'

ROLLBACK TO s

SHOW TimeZone

COMMIT

SHOW TimeZone

SET search_path = public

SET SCHEMA 'play'

RESET search_path

SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY

CREATE TABLE play.refused ()

SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE

DISCARD ALL

DISCARD TEMP

## Transactions
BEGIN

BEGIN

SELECT 1

COMMIT

COMMIT AND CHAIN

START TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE

SHOW transaction_isolation

CREATE TABLE play.x ()

SELECT 1

ROLLBACK

BEGIN

SELECT 1/0

SELECT 1

SAVEPOINT a

COMMIT

BEGIN

CREATE TABLE play.t (id int)

SAVEPOINT a

INSERT INTO t VALUES (1), (2)

SAVEPOINT b

INSERT INTO t VALUES ('x')

INSERT INTO t VALUES (3)

ROLLBACK TO b

INSERT INTO t VALUES (4) RETURNING id, id * 2 AS twice

RELEASE a

ROLLBACK TO b

ROLLBACK AND CHAIN

SELECT 1

END

BEGIN; CREATE TABLE play.t (id serial PRIMARY KEY, v text); COMMIT

INSERT INTO t (v) SELECT 'v' || n FROM generate_series(1, 10) n

UPDATE t SET v = v || '!' WHERE id <= 3 RETURNING *

DELETE FROM t WHERE id > 8 RETURNING id

DELETE FROM t WHERE false

MERGE INTO t USING (VALUES (1, 'merged'), (100, 'new')) s(id, v) ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = s.v WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.v)

INSERT INTO t (id, v) VALUES (1, 'x') ON CONFLICT DO NOTHING

INSERT INTO t (id, v) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET v = excluded.v RETURNING *

WITH gone AS (DELETE FROM t WHERE id = 2 RETURNING *) SELECT * FROM gone

SELECT * FROM t ORDER BY id FOR UPDATE

SELECT * INTO TABLE t2 FROM t

CREATE TABLE t3 AS SELECT * FROM t WITH NO DATA

CREATE TABLE t4 AS SELECT * FROM t

CREATE MATERIALIZED VIEW mv AS SELECT count(*) FROM t

REFRESH MATERIALIZED VIEW mv

CREATE UNIQUE INDEX t_v ON t (v)

CREATE INDEX IF NOT EXISTS t_v ON t (v)

ALTER TABLE t ADD COLUMN w int DEFAULT 5, ALTER COLUMN v SET NOT NULL

ALTER TABLE IF EXISTS nosuch ADD COLUMN w int

CREATE TABLE IF NOT EXISTS t (id int)

CREATE TYPE play.colour AS ENUM ('red')

ALTER TYPE play.colour ADD VALUE 'blue'

SELECT 'blue'::colour, enum_last(NULL::colour)

DROP TYPE play.colour

TRUNCATE t, t2

ANALYZE t

VACUUM t

VACUUM (VERBOSE false, ANALYZE) t

REINDEX TABLE t

CLUSTER t USING t_pkey

CHECKPOINT

EXPLAIN (COSTS off) SELECT * FROM documents WHERE id = 1

EXPLAIN (COSTS off, FORMAT json) SELECT 1

EXPLAIN (ANALYZE, COSTS off, TIMING off, SUMMARY off, BUFFERS off) SELECT 1

DROP TABLE t CASCADE

DROP TABLE t2, t3, t4

## SQL-level prepared statements and cursors
PREPARE p (int) AS SELECT id, title FROM documents WHERE id = $1

EXECUTE p (1)

EXECUTE p ('x')

EXECUTE p (1, 2)

PREPARE p AS SELECT 1

DEALLOCATE p

DEALLOCATE ALL

BEGIN

DECLARE c SCROLL CURSOR FOR SELECT id, title FROM documents ORDER BY id

FETCH 2 FROM c

FETCH PRIOR FROM c

FETCH LAST FROM c

MOVE 3 FROM c

MOVE BACKWARD 3 FROM c

FETCH ALL FROM c

FETCH RELATIVE -1 FROM c

DECLARE b BINARY CURSOR FOR SELECT 1, 'x'::text, 2.5::float8

FETCH b

UPDATE documents SET title = title WHERE CURRENT OF c

CLOSE c

CLOSE ALL

COMMIT

DECLARE h CURSOR WITH HOLD FOR SELECT 1

FETCH h

CLOSE h

## COPY
COPY parents TO STDOUT

COPY (SELECT * FROM documents ORDER BY id) TO STDOUT WITH (FORMAT csv, HEADER, QUOTE '|')

COPY parents TO STDOUT (FORMAT binary)

COPY (SELECT repeat('x', 200000) FROM generate_series(1, 3)) TO STDOUT

COPY (SELECT 1 WHERE false) TO STDOUT

COPY (SELECT 10 / (5 - n) FROM generate_series(1, 10) n) TO STDOUT

COPY documents TO STDOUT (FORMAT nosuch)

## Procedures, blocks, triggers, notices
CALL commits(3)

DO $$ BEGIN FOR i IN 1..3 LOOP RAISE NOTICE 'n %', i; END LOOP; END $$

DO $$ BEGIN RAISE INFO 'i'; RAISE LOG 'l'; RAISE WARNING USING MESSAGE = 'w', ERRCODE = '01000'; END $$

DO $$ BEGIN COMMIT; RAISE NOTICE 'after'; ROLLBACK; END $$

CREATE TABLE play.trig (id int)

CREATE FUNCTION play.noisy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE '% on %', TG_OP, TG_TABLE_NAME; IF NEW.id < 0 THEN RAISE EXCEPTION 'negative' USING COLUMN = 'id', TABLE = TG_TABLE_NAME; END IF; RETURN NEW; END $$

CREATE TRIGGER noisy BEFORE INSERT OR UPDATE ON play.trig FOR EACH ROW EXECUTE FUNCTION play.noisy()

INSERT INTO trig VALUES (1), (2)

INSERT INTO trig VALUES (1), (-2)

CREATE TABLE play.deferred (id int PRIMARY KEY, other int REFERENCES play.deferred (id) DEFERRABLE INITIALLY DEFERRED)

BEGIN

INSERT INTO deferred VALUES (1, 99)

COMMIT

INSERT INTO deferred VALUES (1, 99)

CREATE PROCEDURE play.inout(INOUT a int, OUT b text) LANGUAGE plpgsql AS $$ BEGIN a := a + 1; b := 'x'; END $$

CALL inout(1, NULL)

CREATE FUNCTION play.multi() RETURNS TABLE (a int, b text) LANGUAGE sql AS $$ VALUES (1, 'x'), (2, NULL) $$

SELECT * FROM multi()

SELECT multi()

CREATE FUNCTION play.cursor(refcursor) RETURNS refcursor LANGUAGE plpgsql AS $$ BEGIN OPEN $1 FOR SELECT id FROM documents ORDER BY id LIMIT 2; RETURN $1; END $$

BEGIN

SELECT play.cursor('rc')

FETCH ALL FROM rc

ROLLBACK

CREATE TEMP TABLE tt (a int)

INSERT INTO tt VALUES (1) RETURNING *

SELECT * FROM tt

SELECT * FROM pg_temp.tt

SELECT * FROM pg_temp.nosuch

DROP TABLE tt

CREATE TEMP TABLE tt ON COMMIT DROP AS SELECT 1

SELECT * FROM tt

## Others
LISTEN channel

UNLISTEN *

SELECT pg_notify('nobody', 'x')

SELECT pg_advisory_lock(1), pg_try_advisory_lock(1), pg_advisory_unlock(1), pg_advisory_unlock(1), pg_advisory_unlock(1)

LOCK TABLE documents IN SHARE MODE

SELECT nextval('nosuch')

CREATE SEQUENCE play.s

SELECT nextval('s'), currval('s'), lastval()

SECURITY LABEL ON TABLE documents IS 'x'

GRANT SELECT ON documents TO PUBLIC

REVOKE SELECT ON documents FROM PUBLIC

GRANT SELECT ON documents TO nosuch

COMMENT ON SCHEMA play IS 'x'

ALTER DEFAULT PRIVILEGES IN SCHEMA play GRANT SELECT ON TABLES TO PUBLIC

REASSIGN OWNED BY nosuch TO nosuch

IMPORT FOREIGN SCHEMA x FROM SERVER y INTO z

CREATE PUBLICATION dfproxy_none

DROP PUBLICATION dfproxy_none

CREATE EVENT TRIGGER x ON ddl_command_start EXECUTE FUNCTION nosuch()

SELECT lo_create(987654), lo_unlink(987654)

LOAD 'nosuch'

SELECT pg_backend_pid() > 0, pg_is_in_recovery(), inet_server_addr() IS NOT NULL
