-- The builders of `df`: functions from text to text that put a workflow together as one JSON value, a *future*.
-- They touch no table. Texts, checks and messages: SURFACE sections 1.2 and 3.
--
-- How search paths are pinned: PL/pgSQL functions carry SET search_path; SQL functions are written with RETURN, whose names
-- are resolved once, here (migrate.py sets the path of this session to pg_catalog), and may be inlined by the planner.

-- Errors and warnings of the compiler, raised by the backend (docs/architecture.md, "Private markers on the wire").
-- PL/pgSQL, since it must not be inlined; IMMUTABLE, so that constants warn once, when the statement is planned.
CREATE FUNCTION duroxide.error(sqlstate text, message text, detail text, hint text, "position" integer) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_mark CONSTANT text := 'dfproxy:position=' || COALESCE(error.position, 0);
BEGIN
    -- RAISE refuses NULL for an option, and an empty one shows as an empty line: hence the four.
    IF error.detail IS NOT NULL AND error.hint IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = error.sqlstate, MESSAGE = error.message, DETAIL = error.detail, HINT = error.hint,
            CONSTRAINT = v_mark;
    ELSIF error.detail IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = error.sqlstate, MESSAGE = error.message, DETAIL = error.detail, CONSTRAINT = v_mark;
    ELSIF error.hint IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = error.sqlstate, MESSAGE = error.message, HINT = error.hint, CONSTRAINT = v_mark;
    END IF;
    RAISE EXCEPTION USING ERRCODE = error.sqlstate, MESSAGE = error.message, CONSTRAINT = v_mark;
END $$;

CREATE FUNCTION duroxide.warning(value text, message text, hint text, "position" integer) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_mark CONSTANT text := 'dfproxy:position=' || COALESCE(warning.position, 0);
BEGIN
    IF warning.hint IS NULL THEN
        RAISE WARNING USING MESSAGE = warning.message, CONSTRAINT = v_mark;
    ELSE
        RAISE WARNING USING MESSAGE = warning.message, HINT = warning.hint, CONSTRAINT = v_mark;
    END IF;
    RETURN warning.value;
END $$;

-- Whether a text is JSON. PostgreSQL 16 and later have an operator for it; 15 must try.
DO $do$
BEGIN
    IF current_setting('server_version_num')::integer >= 160000 THEN
        EXECUTE 'CREATE FUNCTION duroxide.is_json(value text) RETURNS boolean LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE '
                'RETURN value IS JSON';
    ELSE
        EXECUTE $sql$
            CREATE FUNCTION duroxide.is_json(value text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE STRICT
            SET search_path = pg_catalog, pg_temp
            AS $$
            BEGIN
                PERFORM value::json;
                RETURN true;
            EXCEPTION WHEN invalid_text_representation OR untranslatable_character THEN
                RETURN false;
            END $$
        $sql$;
    END IF;
END $do$;

-- JSON text as jsonb; what jsonb can't hold (not JSON, \u0000, a number out of range) becomes a JSON string (SURFACE 5.1).
CREATE FUNCTION duroxide.as_jsonb(value text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN value::jsonb;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN to_jsonb(value);
END $$;

-- A text as a JSON string.
CREATE FUNCTION duroxide.quote(value text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$ BEGIN RETURN to_json(value)::text; END $$;

-- What is wrong with the members of a future, looked at one level deep; NULL if nothing is (SURFACE 3.4).
-- A null member counts as absent, except extra_nodes.
CREATE FUNCTION duroxide.decode_fault(node jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF COALESCE(jsonb_typeof(node->'left_node'), 'null') NOT IN ('object', 'null')
        OR COALESCE(jsonb_typeof(node->'right_node'), 'null') NOT IN ('object', 'null') THEN
        RETURN 'Durofut children must be JSON objects';
    ELSIF COALESCE(jsonb_typeof(node->'condition_node'), 'null') NOT IN ('object', 'null') THEN
        RETURN 'condition_node must be a Durofut JSON object';
    ELSIF node ? 'extra_nodes' AND jsonb_typeof(node->'extra_nodes') <> 'array' THEN
        RETURN 'extra_nodes must be a JSON array';
    ELSIF node ? 'extra_nodes' AND jsonb_path_exists(node, 'strict $.extra_nodes[*] ? (@.type() != "object")') THEN
        RETURN 'extra_nodes entries must be Durofut JSON objects';
    ELSIF COALESCE(jsonb_typeof(node->'query'), 'null') NOT IN ('string', 'null') THEN
        RETURN 'query must be a string';
    ELSIF COALESCE(jsonb_typeof(node->'result_name'), 'null') NOT IN ('string', 'null') THEN
        RETURN 'result_name must be a string';
    END IF;
    RETURN NULL;
END $$;

-- A future that somebody wrote by hand, in the form that the builders write: compact, members in order, no nulls.
-- Text that is no future becomes a SQL step (SURFACE 3.4, case 4).
CREATE FUNCTION duroxide.canonical(fut text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_node jsonb := fut::jsonb;
    v_json json;
    v_type text := v_node->>'node_type';
    v_fault text;
BEGIN
    IF jsonb_typeof(v_node) <> 'object' OR jsonb_typeof(v_node->'node_type') IS DISTINCT FROM 'string'
        OR v_type <> ALL ('{SQL,THEN,IF,JOIN,LOOP,BREAK,RACE,SLEEP,WAIT_SCHEDULE,HTTP,HTTP_MULTIPART,SIGNAL}'::text[]) THEN
        RETURN '{"node_type":"SQL","query":' || to_json(fut)::text || '}';
    END IF;
    v_fault := duroxide.decode_fault(v_node);
    IF v_fault IS NOT NULL THEN
        RAISE EXCEPTION 'Invalid Durofut JSON: failed to deserialize workflow step: %', v_fault
            USING ERRCODE = '22023',
                  HINT = 'Build steps with the df.* functions; their JSON need not be written by hand.';
    END IF;
    v_json := json_strip_nulls(fut::json);  -- keeps the order of members in children, drops white space
    RETURN '{"node_type":"' || v_type || '"'
        || COALESCE(',"left_node":' || (v_json->'left_node')::text, '')
        || COALESCE(',"right_node":' || (v_json->'right_node')::text, '')
        || COALESCE(',"condition_node":' || (v_json->'condition_node')::text, '')
        || CASE WHEN v_node->'extra_nodes' <> '[]' THEN ',"extra_nodes":' || (v_json->'extra_nodes')::text ELSE '' END
        || COALESCE(',"query":' || to_json(v_node->>'query')::text, '')
        || COALESCE(',"result_name":' || to_json(v_node->>'result_name')::text, '')
        || '}';
END $$;

-- A future-or-SQL operand as the JSON of a node (SURFACE 3.4). What the builders themselves wrote is recognised by its
-- beginning and end and taken as it is, after one pass of the JSON checker: the left side of a chain passes here once
-- for every step. A forgery that slips through (unknown members after the known) is found by df.start.
CREATE FUNCTION duroxide.step(fut text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF fut !~ '^[ \t\n\r]*\{' OR NOT duroxide.is_json(fut) THEN
        RETURN '{"node_type":"SQL","query":' || to_json(fut)::text || '}';
    ELSIF fut ~ '^\{"node_type":"(SQL|BREAK|SLEEP|WAIT_SCHEDULE|SIGNAL|HTTP|HTTP_MULTIPART)","query":"'
            AND right(fut, 2) = '"}'
        OR fut ~ '^\{"node_type":"(THEN|IF|JOIN|RACE|LOOP)","left_node":\{' AND right(fut, 3) ~ '(\}\}|\}\]\}|"\})$' THEN
        RETURN fut;
    END IF;
    RETURN duroxide.canonical(fut);
END $$;

-- Steps one after the other: a left-leaning chain, as `~>` makes it, written in one go. A long one is cut into pieces of
-- 100, so that nesting stays far below 256 (THEN is associative).
CREATE FUNCTION duroxide.chain(node_type text, steps text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_steps text[] := steps;
    v_head CONSTANT text := '{"node_type":"' || node_type || '","left_node":';
    v_pieces text[];
BEGIN
    IF cardinality(v_steps) > 200 THEN
        FOR i IN 1 .. cardinality(v_steps) BY 100 LOOP
            v_pieces := v_pieces || duroxide.chain(node_type, v_steps[i : i + 99]);
        END LOOP;
        v_steps := v_pieces;
    END IF;
    RETURN repeat(v_head, cardinality(v_steps) - 1) || v_steps[1]
        || COALESCE((SELECT string_agg(',"right_node":' || s.step || '}', '' ORDER BY s.i)
                       FROM unnest(v_steps[2:]) WITH ORDINALITY AS s(step, i)), '');
END $$;

-- The operands of a variadic builder as nodes; NULL if one is NULL.
CREATE FUNCTION duroxide.steps(builder text, minimum integer, futs text[]) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF cardinality(futs) < minimum THEN
        RAISE EXCEPTION '% needs at least % %', builder, minimum, CASE minimum WHEN 1 THEN 'step' ELSE 'branches' END
            USING ERRCODE = '22023', HINT = format('It was called with %s.', cardinality(futs));
    ELSIF array_position(futs, NULL) IS NOT NULL THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT array_agg(duroxide.step(f.fut) ORDER BY f.i) FROM unnest(futs) WITH ORDINALITY AS f(fut, i));
END $$;

CREATE FUNCTION df.sql(query text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '{"node_type":"SQL","query":' || duroxide.quote(query) || '}';

CREATE FUNCTION df.seq(a text, b text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '{"node_type":"THEN","left_node":' || duroxide.step(a) || ',"right_node":' || duroxide.step(b) || '}';

CREATE FUNCTION df.seq(VARIADIC steps text[]) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN duroxide.chain('THEN', duroxide.steps('df.seq', 1, steps));

CREATE FUNCTION df."as"(fut text, name text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF name = '' THEN
        RAISE EXCEPTION 'df.as: result name cannot be empty'
            USING ERRCODE = '22023', HINT = 'Name a result with an identifier, and refer to it as $name in later steps.';
    ELSIF name !~ '^[a-zA-Z_][a-zA-Z0-9_]*$' THEN
        RAISE EXCEPTION 'df.as: result name ''%'' is not a valid identifier — must match [a-zA-Z_][a-zA-Z0-9_]*', name
            USING ERRCODE = '22023';
    END IF;
    -- A node's text ends with its name, if it has one; in a string its quotes would be escaped.
    RETURN regexp_replace(duroxide.step(fut), '(,"result_name":"[^"\\]*")?\}$', '') || ',"result_name":"' || name || '"}';
END $$;

CREATE FUNCTION df.step(name text, fut text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN df."as"(fut, name);

CREATE FUNCTION df.sleep(seconds bigint) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF seconds < 0 THEN
        RAISE EXCEPTION 'Sleep duration must be non-negative' USING ERRCODE = '22023';
    END IF;
    RETURN '{"node_type":"SLEEP","query":"' || seconds || '"}';
END $$;

-- The value of one item of a cron field (a number, or a name in full or its first three letters), or NULL.
CREATE FUNCTION duroxide.cron_value(item text, names text[], base integer) RETURNS integer
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN item ~ '^[0-9]{1,4}$' THEN item::integer
            ELSE (SELECT n.i - 1 + base FROM unnest(names) WITH ORDINALITY AS n(name, i)
                   WHERE lower(item) IN (n.name, left(n.name, 3))) END;

-- What is wrong with a cron expression, or NULL: five fields with the standard Unix meaning, or a nickname (SURFACE Part I).
CREATE FUNCTION duroxide.cron_fault(expression text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_fields text[] := regexp_split_to_array(btrim(expression, E' \t\n\r'), '[ \t\n\r]+');
    v_labels CONSTANT text[] := '{minute,hour,day of month,month,day of week}';
    v_low CONSTANT integer[] := '{0,0,1,1,0}';
    v_high CONSTANT integer[] := '{59,23,31,12,7}';
    v_names text[];
    v_item text;
    v_parts text[];
    v_from integer;
    v_to integer;
    v_first_day integer := 32;   -- the earliest day of month asked for
    v_longest integer := 0;      -- the most days that a month asked for has
BEGIN
    IF lower(btrim(expression)) IN ('@yearly', '@annually', '@monthly', '@weekly', '@daily', '@midnight', '@hourly') THEN
        RETURN NULL;
    ELSIF btrim(expression) LIKE '@%' THEN
        RETURN format('unknown nickname %s; there are @yearly, @annually, @monthly, @weekly, @daily, @midnight, @hourly',
                      btrim(expression));
    ELSIF cardinality(v_fields) <> 5 OR v_fields[1] = '' THEN
        RETURN format('it has %s fields, not five (minute, hour, day of month, month, day of week)',
                      CASE WHEN v_fields[1] = '' THEN 0 ELSE cardinality(v_fields) END);
    END IF;
    FOR i IN 1 .. 5 LOOP
        v_names := CASE i WHEN 4 THEN '{january,february,march,april,may,june,july,august,september,october,november,december}'
                          WHEN 5 THEN '{sunday,monday,tuesday,wednesday,thursday,friday,saturday}' ELSE '{}' END;
        IF i IN (3, 5) AND v_fields[i] = '?' THEN
            v_fields[i] := '*';
        END IF;
        FOREACH v_item IN ARRAY string_to_array(v_fields[i], ',') LOOP
            v_parts := regexp_match(v_item, '^(?:(\*)|([0-9]+|[a-z]+)(?:-([0-9]+|[a-z]+))?)(?:/([0-9]{1,4}))?$', 'i');
            IF v_parts IS NULL THEN
                RETURN format('bad %s %L', v_labels[i], v_item);
            END IF;
            v_from := COALESCE(duroxide.cron_value(v_parts[2], v_names, v_low[i]), CASE WHEN v_parts[1] = '*' THEN v_low[i] END);
            v_to := CASE WHEN v_parts[1] = '*' THEN v_high[i] WHEN v_parts[3] IS NULL THEN v_from
                         WHEN i = 5 AND lower(v_parts[3]) IN ('sun', 'sunday') THEN 7
                         ELSE duroxide.cron_value(v_parts[3], v_names, v_low[i]) END;
            IF v_from IS NULL OR v_to IS NULL THEN
                RETURN format('bad %s %L', v_labels[i], v_item);
            ELSIF v_from < v_low[i] OR v_to > v_high[i] OR v_from > v_high[i] THEN
                RETURN format('%s %L is outside %s-%s', v_labels[i], v_item, v_low[i], v_high[i]);
            ELSIF v_to < v_from THEN
                RETURN format('%s %L runs backwards', v_labels[i], v_item);
            ELSIF v_parts[4]::integer = 0 THEN
                RETURN format('%s %L has a step of zero', v_labels[i], v_item);
            END IF;
            IF i = 3 THEN
                v_first_day := least(v_first_day, v_from);
            ELSIF i = 4 THEN
                IF v_parts[3] IS NULL AND v_parts[4] IS NOT NULL THEN
                    v_to := 12;
                END IF;
                FOR v_month IN v_from .. v_to BY COALESCE(v_parts[4]::integer, 1) LOOP
                    v_longest := greatest(v_longest, ('{31,29,31,30,31,30,31,31,30,31,30,31}'::integer[])[v_month]);
                END LOOP;
            END IF;
        END LOOP;
    END LOOP;
    IF v_first_day > v_longest AND v_fields[5] LIKE '*%' THEN
        RETURN 'no month that it names has such a day';
    END IF;
    RETURN NULL;
END $$;

-- Time zones by name. pg_timezone_names reads hundreds of files at each look; it is asked again only for a name not here.
CREATE TABLE duroxide.zones (
    name text PRIMARY KEY
);
CREATE UNIQUE INDEX zones_lower ON duroxide.zones (lower(name));
INSERT INTO duroxide.zones
SELECT DISTINCT ON (lower(z.name)) z.name FROM pg_timezone_names z WHERE z.name !~ '^(posix|right)/|^(localtime|posixrules|Factory)$'
ORDER BY lower(z.name), z.name;
GRANT SELECT ON duroxide.zones TO PUBLIC;

-- STABLE, not IMMUTABLE: which zones there are depends on the server's time zone data.
CREATE FUNCTION df.wait_for_schedule(cron_expr text, zone text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_fault text := duroxide.cron_fault(cron_expr);
    v_zone text;
BEGIN
    IF cron_expr IS NULL THEN
        RETURN NULL;
    ELSIF v_fault IS NOT NULL THEN
        RAISE EXCEPTION 'Invalid cron expression ''%'': %', cron_expr, v_fault
            USING ERRCODE = '22023',
                  HINT = 'Five fields: minute hour day-of-month month day-of-week (0-7, Sunday is 0 and 7), '
                         'for example ''*/5 * * * *'' or ''0 9 * * mon-fri''.';
    ELSIF zone IS NOT NULL THEN
        SELECT z.name INTO v_zone FROM duroxide.zones z WHERE lower(z.name) = lower(zone);
        IF NOT FOUND THEN
            SELECT z.name INTO v_zone FROM pg_timezone_names z WHERE lower(z.name) = lower(zone);
        END IF;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'unknown time zone ''%''', zone
                USING ERRCODE = '22023', HINT = 'SELECT name FROM pg_timezone_names lists them.';
        END IF;
    END IF;
    RETURN '{"node_type":"WAIT_SCHEDULE","query":'
        || to_json('{"cron_expr":' || to_json(cron_expr)::text
                   || COALESCE(',"timezone":' || to_json(v_zone)::text, '') || '}')::text || '}';
END $$;

CREATE FUNCTION df.loop(body text, condition text DEFAULT NULL, continue_on_failure boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF body IS NULL THEN
        RAISE EXCEPTION 'df.loop: body cannot be NULL' USING ERRCODE = '22004';
    END IF;
    RETURN '{"node_type":"LOOP","left_node":' || duroxide.step(body)
        || COALESCE(',"condition_node":' || duroxide.step(condition), '')
        || CASE WHEN continue_on_failure THEN ',"query":"{\"continue_on_failure\":true}"' ELSE '' END || '}';
END $$;

CREATE FUNCTION df.break(value text DEFAULT NULL) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN '{"node_type":"BREAK","query":' || duroxide.quote('{"break_value":' || COALESCE(duroxide.quote(value), 'null') || '}') || '}';

CREATE FUNCTION df.if(condition text, then_branch text, else_branch text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '{"node_type":"IF","left_node":' || duroxide.step(then_branch) || ',"right_node":' || duroxide.step(else_branch)
    || ',"condition_node":' || duroxide.step(condition) || '}';

CREATE FUNCTION df.if_rows(result_name text, then_branch text, else_branch text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '{"node_type":"IF","left_node":' || duroxide.step(then_branch) || ',"right_node":' || duroxide.step(else_branch)
    || ',"query":'
    || duroxide.quote('{"condition_type":"result_has_rows","result_name":' || duroxide.quote(result_name) || '}') || '}';

CREATE FUNCTION df.join(a text, b text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '{"node_type":"JOIN","left_node":' || duroxide.step(a) || ',"right_node":' || duroxide.step(b) || '}';

CREATE FUNCTION df.join3(a text, b text, c text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '{"node_type":"JOIN","left_node":' || duroxide.step(a) || ',"right_node":' || duroxide.step(b)
    || ',"extra_nodes":[' || duroxide.step(c) || ']}';

CREATE FUNCTION df.join(VARIADIC branches text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_steps text[] := duroxide.steps('df.join', 2, branches);
BEGIN
    RETURN '{"node_type":"JOIN","left_node":' || v_steps[1] || ',"right_node":' || v_steps[2]
        || CASE WHEN cardinality(v_steps) > 2 THEN ',"extra_nodes":[' || array_to_string(v_steps[3:], ',') || ']' ELSE '' END
        || '}';
END $$;

CREATE FUNCTION df.race(a text, b text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '{"node_type":"RACE","left_node":' || duroxide.step(a) || ',"right_node":' || duroxide.step(b) || '}';

CREATE FUNCTION df.race(VARIADIC branches text[]) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN duroxide.chain('RACE', duroxide.steps('df.race', 1, branches));

CREATE FUNCTION df.wait_for_signal(name text, timeout_seconds integer DEFAULT NULL) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF name IS NULL THEN
        RAISE EXCEPTION 'df.wait_for_signal: name cannot be NULL' USING ERRCODE = '22004';
    ELSIF name = '' THEN
        RAISE EXCEPTION 'Signal name cannot be empty' USING ERRCODE = '22023';
    ELSIF timeout_seconds <= 0 THEN
        RAISE EXCEPTION 'Timeout must be positive'
            USING ERRCODE = '22023', HINT = 'Leave the timeout out to wait for ever.';
    END IF;
    RETURN '{"node_type":"SIGNAL","query":'
        || to_json('{"signal_name":' || to_json(name)::text || ',"timeout_seconds":'
                   || COALESCE(timeout_seconds::text, 'null') || '}')::text || '}';
END $$;

-- What df.http and df.http_multipart check alike; raises (SURFACE 1.2 and Part I "HTTP").
CREATE FUNCTION duroxide.check_http(builder text, url text, method text, headers jsonb, timeout_seconds integer) RETURNS void
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_scheme text := CASE WHEN strpos(url, '://') > 0 THEN lower(split_part(url, '://', 1)) ELSE url END;
    v_multipart CONSTANT boolean := builder = 'df.http_multipart';
    v_name text;
    v_value jsonb;
BEGIN
    IF url IS NULL OR method IS NULL OR timeout_seconds IS NULL THEN
        RAISE EXCEPTION '%: % cannot be NULL', builder,
                CASE WHEN url IS NULL THEN 'url' WHEN method IS NULL THEN 'method' ELSE 'timeout_seconds' END
            USING ERRCODE = '22004';
    -- A URL that substitution completes can only be judged when the step runs.
    ELSIF v_scheme NOT IN ('http', 'https') AND strpos(url, '{') = 0 AND left(url, 1) <> '$' THEN
        RAISE EXCEPTION 'Blocked: unsupported URL scheme ''%''. Only http and https are allowed.', v_scheme
            USING ERRCODE = '22023';
    ELSIF v_multipart AND upper(method) NOT IN ('POST', 'PUT', 'PATCH') THEN
        RAISE EXCEPTION 'Invalid HTTP method for multipart: %. Must be POST, PUT, or PATCH', method USING ERRCODE = '22023';
    ELSIF upper(method) NOT IN ('GET', 'POST', 'PUT', 'DELETE', 'PATCH', 'HEAD', 'OPTIONS') THEN
        RAISE EXCEPTION 'Invalid HTTP method: %. Must be GET, POST, PUT, DELETE, or PATCH', method
            USING ERRCODE = '22023', HINT = 'HEAD and OPTIONS are accepted too.';
    ELSIF timeout_seconds <= 0 THEN
        RAISE EXCEPTION 'Timeout must be positive' USING ERRCODE = '22023';
    ELSIF jsonb_typeof(headers) NOT IN ('object', 'null') THEN
        RAISE EXCEPTION '%: headers must be a JSON object', builder
            USING ERRCODE = '22023', HINT = 'For example: ''{"Authorization": "Bearer {token}"}''.';
    ELSIF jsonb_typeof(headers) = 'object' THEN
        FOR v_name, v_value IN SELECT h.key, h.value FROM jsonb_each(headers) h LOOP
            IF v_name !~ '^[!#$%&''*+.^_`|~0-9A-Za-z-]+$' THEN
                RAISE EXCEPTION '%: header name ''%'' is not valid', builder, v_name USING ERRCODE = '22023';
            ELSIF lower(v_name) IN ('host', 'content-length', 'transfer-encoding', 'connection', 'keep-alive', 'te',
                                    'trailer', 'upgrade', 'expect', 'proxy-authorization', 'proxy-connection') THEN
                RAISE EXCEPTION '%: header ''%'' cannot be set', builder, v_name
                    USING ERRCODE = '22023', HINT = 'It is part of how the request is sent.';
            ELSIF jsonb_typeof(v_value) NOT IN ('string', 'number', 'boolean') THEN
                RAISE EXCEPTION '%: the value of header ''%'' must be a string, a number or a boolean, not %',
                        builder, v_name, jsonb_typeof(v_value)
                    USING ERRCODE = '22023';
            ELSIF v_value #>> '{}' ~ '[\r\n]' THEN
                RAISE EXCEPTION '%: the value of header ''%'' contains a line break', builder, v_name USING ERRCODE = '22023';
            END IF;
        END LOOP;
    END IF;
END $$;

CREATE FUNCTION df.http(url text, method text DEFAULT 'POST', body text DEFAULT NULL, headers jsonb DEFAULT NULL,
                        timeout_seconds integer DEFAULT 30) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM duroxide.check_http('df.http', url, method, headers, timeout_seconds);
    RETURN '{"node_type":"HTTP","query":' || to_json(
        '{"url":' || to_json(url)::text || ',"method":"' || upper(method) || '","body":' || COALESCE(to_json(body)::text, 'null')
        || ',"headers":' || COALESCE(json_strip_nulls(headers::text::json)::text, 'null')
        || ',"timeout_seconds":' || timeout_seconds || '}')::text || '}';
END $$;

CREATE FUNCTION df.http_multipart(url text, method text DEFAULT 'POST', parts jsonb DEFAULT NULL, headers jsonb DEFAULT NULL,
                                  timeout_seconds integer DEFAULT 30) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_example CONSTANT text := 'For example: ''[{"name": "file", "filename": "a.txt", "data_b64": "aGVsbG8="}]''.';
BEGIN
    PERFORM duroxide.check_http('df.http_multipart', url, method, headers, timeout_seconds);
    IF parts IS NULL THEN
        RAISE EXCEPTION 'parts is required and cannot be NULL' USING ERRCODE = '22004', HINT = v_example;
    ELSIF jsonb_typeof(parts) <> 'array' THEN
        RAISE EXCEPTION 'parts must be a JSON array of part objects' USING ERRCODE = '22023', HINT = v_example;
    ELSIF parts = '[]' THEN
        RAISE EXCEPTION 'parts must contain at least one part' USING ERRCODE = '22023', HINT = v_example;
    END IF;
    RETURN '{"node_type":"HTTP_MULTIPART","query":' || to_json(
        '{"url":' || to_json(url)::text || ',"method":"' || upper(method)
        || '","parts":' || json_strip_nulls(parts::text::json)::text
        || ',"headers":' || COALESCE(json_strip_nulls(headers::text::json)::text, 'null')
        || ',"timeout_seconds":' || timeout_seconds || '}')::text || '}';
END $$;

-- What the operators |=>, ?>, !> and @> of the original call (SURFACE 2.5). The compiler does without them.
CREATE FUNCTION df.as_op(fut text, name text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN df."as"(fut, name);

CREATE FUNCTION df.if_then_op(condition text, then_branch text) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN jsonb_build_object('condition', condition, '_partial_if', true, 'then_branch', then_branch)::text;
END $$;

CREATE FUNCTION df.if_else_op(partial_if text, else_branch text) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_partial jsonb := partial_if::jsonb;
BEGIN
    IF v_partial IS NULL THEN
        RETURN NULL;
    ELSIF jsonb_typeof(v_partial) <> 'object' OR v_partial->>'_partial_if' IS NULL THEN
        RAISE EXCEPTION 'Invalid if-then-else: left side of !> must be a ?> expression'
            USING ERRCODE = '42601',
                  HINT = 'All DSL operators have one precedence and group to the left: write condition ?> (then) !> (else), '
                         'with parentheses around every branch of more than one step.';
    END IF;
    RETURN df.if(v_partial->>'condition', v_partial->>'then_branch', else_branch);
END $$;

CREATE FUNCTION df.loop_prefix_op(body text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN df.loop(body);

REVOKE ALL ON FUNCTION df.http(text, text, text, jsonb, integer), df.http_multipart(text, text, jsonb, jsonb, integer)
    FROM PUBLIC;
