-- Tables that conversations read. What they write belongs in the schema "play".
CREATE TABLE documents (id int PRIMARY KEY, title text NOT NULL, start text, status text, label varchar(20),
    signal int, body jsonb, tags text[], flags bit(4), processed boolean DEFAULT false);
INSERT INTO documents SELECT n, 'title ' || n, 's' || n, CASE WHEN n % 2 = 0 THEN 'open' ELSE 'done' END, 'l' || n, n * 10,
    jsonb_build_object('a', n, 'b', jsonb_build_array(n, n + 1)), ARRAY['t' || n, 'all'], n::bit(4), n % 3 = 0
    FROM generate_series(1, 20) n;

CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TYPE pair AS (a int, b text);

CREATE TABLE kinds (id int PRIMARY KEY, i2 smallint, i4 int, i8 bigint, f4 real, f8 double precision, n numeric, n2 numeric(10,3),
    b boolean, c char(5), v varchar(10), t text, name name, by bytea, d date, tm time, tmz timetz, ts timestamp, tsz timestamptz,
    iv interval, u uuid, j json, jb jsonb, ip inet, net cidr, mac macaddr, bits bit(8), vb bit varying(12), m money, p point,
    bx box, pa path, po polygon, ci circle, ln line, ls lseg, ir int4range, nr numrange, tr tstzrange, im int4multirange,
    ia int[], ta text[], ma mood[], mo mood, dom positive, pr pair, tv tsvector, tq tsquery, jp jsonpath, o oid, rc regclass);
INSERT INTO kinds VALUES
    (1, 1, 2, 3, 1.5, 2.25, 1234567890.123456789, 12.345, true, 'ab', 'varchar', 'text ü €', 'name', '\xdeadbeef', '2024-02-29', '12:34:56.789',
     '12:34:56+02', '2024-02-29 12:34:56.789', '2024-02-29 12:34:56.789+00', '1 year 2 mons 3 days 04:05:06.7', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11',
     '{"a": [1, null]}', '{"a": [1, null]}', '10.0.0.1/8', '10.0.0.0/8', '08:00:2b:01:02:03', B'10101010', B'101', '12.34', '(1,2)',
     '(3,4),(1,2)', '[(1,2),(3,4)]', '((1,2),(3,4),(5,6))', '<(1,2),3>', '{1,2,3}', '[(1,2),(3,4)]', '[1,5)', '[1.5,)', '[2024-01-01,2024-02-01)', '{[1,3),[5,7)}',
     '{1,NULL,3}', '{"a","b c","NULL",NULL}', '{sad,happy}', 'ok', 7, '(1,"x y")', 'a fat cat', 'fat & cat', '$.a[*]', 42, 'pg_class'),
    (2, -32768, -2147483648, -9223372036854775808, 'NaN', '-Infinity', 'NaN', -0.001, false, '', '', '', '', '', '-infinity', '00:00', '00:00-12',
     'infinity', '4713-01-01 00:00:00 BC', '-1 days', '00000000-0000-0000-0000-000000000000', 'null', 'null', '::1', '::/0', 'ff:ff:ff:ff:ff:ff', B'00000000', B'',
     '-0.01', '(0,0)', '(0,0),(0,0)', '((0,0))', '((0,0))', '<(0,0),0>', '{1,0,0}', '[(0,0),(0,0)]', 'empty', '(,)', 'empty', '{}', '{}', '{}', '{}', 'sad', 1,
     '(,)', '', '', '$', 0, 'pg_type');
INSERT INTO kinds (id) VALUES (3);

CREATE TABLE parents (id int PRIMARY KEY, name text UNIQUE, age int CHECK (age >= 0));
CREATE TABLE children (id int PRIMARY KEY, parent int NOT NULL REFERENCES parents (id), note text);
INSERT INTO parents VALUES (1, 'one', 10), (2, 'two', 20);
INSERT INTO children VALUES (1, 1, 'c');

CREATE FUNCTION complain(level text, message text) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    CASE level
        WHEN 'debug' THEN RAISE DEBUG '%', message;
        WHEN 'info' THEN RAISE INFO '%', message;
        WHEN 'notice' THEN RAISE NOTICE '%', message USING DETAIL = 'the detail', HINT = 'the hint';
        WHEN 'warning' THEN RAISE WARNING '%', message USING ERRCODE = '01234';
        ELSE RAISE EXCEPTION '%', message USING ERRCODE = 'XY123', DETAIL = 'the detail', HINT = 'the hint', COLUMN = 'col', CONSTRAINT = 'con',
            DATATYPE = 'typ', TABLE = 'tab', SCHEMA = 'sch';
    END CASE;
    RETURN 1;
END $$;
CREATE FUNCTION outer_complain(message text) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    RETURN complain('error', message);
END $$;
CREATE PROCEDURE commits(n int) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..n LOOP RAISE NOTICE 'round %', i; COMMIT; END LOOP;
END $$;

-- Operators of a user's own that look like ours, for types of their own.
CREATE FUNCTION pair_nth(pair, int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT CASE $2 WHEN 1 THEN $1.a::text ELSE $1.b END $$;
CREATE OPERATOR ~> (LEFTARG = pair, RIGHTARG = int, FUNCTION = pair_nth);
CREATE FUNCTION int_over(int, int) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT $1 * 100 + $2 $$;
CREATE OPERATOR !> (LEFTARG = int, RIGHTARG = int, FUNCTION = int_over);
CREATE OPERATOR ?> (LEFTARG = int, RIGHTARG = int, FUNCTION = int_over);
CREATE OPERATOR |=> (LEFTARG = int, RIGHTARG = int, FUNCTION = int_over);
CREATE FUNCTION int_prefix(int) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT -$1 $$;
CREATE OPERATOR @> (RIGHTARG = int, FUNCTION = int_prefix);
CREATE OPERATOR ~>~> (LEFTARG = int, RIGHTARG = int, FUNCTION = int_over);
GRANT USAGE, CREATE ON SCHEMA public TO PUBLIC;
CREATE OPERATOR ~> (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = int8pl);
CREATE OPERATOR |=> (LEFTARG = text, RIGHTARG = text, FUNCTION = textcat);
CREATE FUNCTION text_prefix(text) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT '<' || $1 || '>' $$;
CREATE OPERATOR @> (RIGHTARG = text, FUNCTION = text_prefix);
CREATE OPERATOR ~> (RIGHTARG = int, FUNCTION = int_prefix);
-- Plans must not change between two runs.
ALTER TABLE documents SET (autovacuum_enabled = off);
ALTER TABLE kinds SET (autovacuum_enabled = off);
ALTER TABLE parents SET (autovacuum_enabled = off);
ALTER TABLE children SET (autovacuum_enabled = off);
ANALYZE documents, kinds, parents, children;
