## Every type, in text and (where the mode asks) in binary
SELECT * FROM kinds ORDER BY id

SELECT i2, i4, i8, f4, f8 FROM kinds ORDER BY id

SELECT n, n2, m FROM kinds ORDER BY id

SELECT d, tm, tmz, ts, tsz, iv FROM kinds ORDER BY id

SELECT ia, ta, ma, pr, ROW(1, 'x', NULL) FROM kinds ORDER BY id

SELECT jb -> 'a', jb ->> 'a', jb #> '{a,0}', jb ? 'a', jb ?| ARRAY['a', 'z'], jb ?& ARRAY['a'], jb @> '{"a": [1]}' FROM kinds ORDER BY id

SELECT 1

SELECT 1::smallint, 1::bigint, 1.0, 1e0, 'x', 'x'::text, NULL, true, '\x00ff'::bytea

SELECT

SELECT WHERE false

SELECT NULL::int, NULL::text, NULL::int[]

SELECT ''::text AS "", 1 AS "a b", 2 AS "ü", 3 AS "SELECT"

SELECT 1 AS x, 2 AS x, 3 AS x

SELECT 'infinity'::float8, '-infinity'::float4, 'NaN'::numeric, '-0'::float8, 1e-320::float8, 'Infinity'::numeric

SELECT 0.1::float4, 0.1::float8, 1/3.0, 1::numeric(20,10), 10::numeric ^ 100

SELECT '9999-12-31 23:59:59.999999+00'::timestamptz, 'epoch'::timestamp, '0001-01-01 BC'::date

SELECT interval '1 month -2 days 3 hours', interval '-1 year', interval '0'

SELECT '{{1,2},{3,4}}'::int[], '[2:3]={1,2}'::int[], ARRAY[]::text[], ARRAY[NULL]::int[]

SELECT ARRAY['a,b', 'c"d', 'e\f', '', NULL, 'null']

SELECT ROW(1, ROW(2, 'a b'), NULL, '')

SELECT (1, 2)::record, ROW()

SELECT 'happy'::mood, enum_range(NULL::mood)

SELECT 5::positive

SELECT '(5,"five")'::pair, ARRAY['(5,"five")'::pair, NULL]

SELECT ('(5,"five")'::pair).*

SELECT d FROM documents d WHERE d.id < 3 ORDER BY id

SELECT B'1010', B'1010'::bit varying, X'FF'

SELECT 'a'::"char", ''::"char", 'abc'::char(5), 'abc'::name

SELECT '192.168.0.1'::inet, '::ffff:1.2.3.4'::inet, '08:00:2b:01:02:03:04:05'::macaddr8

SELECT '{1,2,3}'::int2vector, '1 2 3'::oidvector, 'pg_class'::regclass, 'int4'::regtype, 'now'::regproc, 'sum(int4)'::regprocedure

SELECT '0/16B3748'::pg_lsn, '10:20:10,14,15'::pg_snapshot, '123'::xid8, '(0,1)'::tid

SELECT int4range(1, 10), daterange('2024-01-01', NULL), '{[1,2],[5,6]}'::int4multirange, 'empty'::tsrange

SELECT to_tsvector('english', 'The fat cats sat'), to_tsquery('english', 'fat & cat'), '$.a ? (@.b > 1)'::jsonpath

SELECT xmlelement(name foo, xmlattributes(1 AS a), 'bar')

SELECT json_build_object('a', 1, 'b', NULL), jsonb '{"b":1, "a":2, "a":3}', json '{"b":1,  "a":2}'

SELECT point(1, 2), circle '((1,2),3)', lseg '((0,0),(1,1))', path '[(0,0),(1,1)]', polygon '((0,0),(1,1),(1,0))', box '((0,0),(1,1))'

SELECT money '1,234.56', money '-0.01'

SELECT void_out('') FROM (SELECT 1) x, LATERAL pg_sleep(0)

SELECT pg_sleep(0)

SELECT repeat('x', 100000)

SELECT repeat('ü', 10000), decode(repeat('00', 10000), 'hex')

SELECT n, repeat('y', n) FROM generate_series(1, 500) n

SELECT string_agg(n::text, ',') FROM generate_series(1, 20000) n

SELECT chr(1), chr(127), chr(8364), chr(128512), E'\t\r\n'

SELECT 1 AS aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa

SELECT current_setting('server_version_num') > '1', current_database() = current_catalog, session_user = current_user

SELECT relname::text, relkind FROM pg_class WHERE oid < 1300 ORDER BY 1

SELECT pg_typeof(1), pg_typeof('x'), pg_typeof(NULL), pg_typeof(ARRAY[1])

SELECT * FROM generate_series(1, 3) WITH ORDINALITY AS t(a, b)

SELECT * FROM unnest(ARRAY[1,2], ARRAY['a','b','c'])

SELECT * FROM json_to_recordset('[{"a":1,"b":"x"},{"a":2}]') AS t(a int, b text)

SELECT * FROM jsonb_each('{"a": 1, "b": null}')

SELECT * FROM json_table('[{"a": 1}, {"a": 2}]'::jsonb, '$[*]' COLUMNS (a int PATH '$.a')) jt

SELECT JSON_QUERY(jsonb '{"a": [1]}', '$.a'), JSON_VALUE(jsonb '{"a": 1}', '$.a'), JSON_EXISTS(jsonb '{"a": 1}', '$.b')

SELECT grouping(status), status, count(*) FROM documents GROUP BY ROLLUP (status) ORDER BY 1, 2

SELECT id, row_number() OVER (ORDER BY id DESC), sum(id) OVER w FROM documents WINDOW w AS (ORDER BY id) ORDER BY id LIMIT 5

SELECT id FROM documents ORDER BY id LIMIT 3 OFFSET 2

SELECT id FROM documents ORDER BY id FETCH FIRST 2 ROWS WITH TIES

WITH RECURSIVE t(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM t WHERE n < 20) SELECT * FROM t

VALUES (1, 'a'), (2, 'b')

TABLE parents

SELECT 1 UNION SELECT 2 UNION ALL SELECT 2 ORDER BY 1

SELECT EXISTS (SELECT 1 FROM documents), 1 IN (1, 2), 1 = ANY (ARRAY[1, 2]), NOT true

SELECT CASE WHEN 1 = 1 THEN 'a' ELSE 'b' END, COALESCE(NULL, 1), NULLIF(1, 1), GREATEST(1, 2)

SELECT U&'d\0061t\+000061', E'\x41\u0042', 'a' 'b', $$dollar$$, $tag$dollar $$ tag$tag$, 'it''s'

SELECT N'national', b'101', x'1F', 0x1F, 0b101, 1_000_000

SELECT DATE '2024-01-01' + 1, TIMESTAMP '2024-01-01' - INTERVAL '1 hour', AGE(TIMESTAMP '2024-03-01', TIMESTAMP '2024-01-31')

SELECT EXTRACT(epoch FROM TIMESTAMPTZ '2024-01-01 00:00:00+00'), DATE_TRUNC('month', TIMESTAMP '2024-02-29')

SELECT POSITION('b' IN 'abc'), SUBSTRING('abc' FROM 2), OVERLAY('abc' PLACING 'x' FROM 2), TRIM(BOTH ' ' FROM ' a ')

SELECT '2024-01-01'::timestamptz AT TIME ZONE 'UTC', 'a' COLLATE "C" < 'b'

SELECT 'abc' LIKE 'a%', 'abc' ~ '^a', 'abc' SIMILAR TO 'a%', 'abc' ILIKE 'A_C', 'abc' !~* 'X'
