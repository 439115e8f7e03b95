-- A cheaper df.start: what depends on the future alone is worked out once for a plan, not once for a workflow.
--
-- df.start is a SQL function without settings of its own, so that the planner puts its body in the place of the call; each
-- parameter occurs there once, so that no argument is in the way. duroxide.prepare_start is IMMUTABLE: for a future of constants
-- the planner calls it, and a prepared statement, or a statement in a function, has its graph from then on. It raises nothing,
-- since the planner may call it for what is never executed; duroxide.start raises, as duroxide.submit does.
--
-- A plan that holds what prepare_start returned is made anew only when df.start is replaced: whoever changes one of the three
-- has to replace df.start too.

-- The graph that duroxide.flatten(duroxide.decode(fut), ...) makes of a future, as text, with E'\x01' and the node's place + 1 in
-- hexadecimal in the place of each id. E'\x01' is nowhere else: in JSON it would be escaped. NULL where those two would raise an
-- error, and for a few texts that look as if they might.
CREATE FUNCTION duroxide.graph_template(fut text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- With E, whatever the session's standard_conforming_strings says.
    v_not_sql CONSTANT text := E'^\\s*(\\{|OK\\s*$|(pending|running|completed|failed|cancelled|[0-9a-f]{8})\\s*$|Instance |Triggered )';
    v_node jsonb;
    v_type text;
    v_query text;
    v_name text;
    v_texts text[];          -- of the nodes, left open, by place + 1
    v_i integer := 0;        -- place + 1 of the node in hand
    v_depth integer := 0;
    s_nodes jsonb[];         -- the stack: nodes yet to visit, their parents' places + 1, what they are to them, and their depths
    s_parents integer[];
    s_members text[];
    s_depths integer[];
    v_top integer := 0;
    v_extras integer;
BEGIN
    IF fut !~ E'^[ \t\n\r]*\\{' THEN
        RETURN CASE WHEN fut !~ v_not_sql THEN E'[{"id":"\x011","type":"SQL","query":' || to_json(fut)::text || '}]' END;
    END IF;
    v_node := fut::jsonb;
    LOOP
        v_i := v_i + 1;
        v_type := v_node->>'node_type';
        v_query := v_node->>'query';
        v_name := v_node->>'result_name';
        -- The two commonest shapes, as in flatten.
        IF v_type = 'SQL' AND jsonb_typeof(v_node->'query') = 'string'
            AND NOT v_node ?| '{left_node,right_node,condition_node,extra_nodes}'
            AND (v_name IS NULL OR v_name ~ '^[A-Za-z_][A-Za-z0-9_]*$' AND jsonb_typeof(v_node->'result_name') = 'string')
            AND v_query !~ v_not_sql THEN
            NULL;
        ELSIF v_type = 'THEN' AND v_query IS NULL AND v_name IS NULL AND jsonb_typeof(v_node->'left_node') = 'object'
            AND jsonb_typeof(v_node->'right_node') = 'object' AND NOT v_node ?| '{condition_node,extra_nodes}' THEN
            NULL;
        ELSIF duroxide.node_fault(v_node) IS NOT NULL THEN
            RETURN NULL;
        END IF;
        IF v_depth > 256 OR v_i > 10000 THEN
            RETURN NULL;
        END IF;

        v_texts[v_i] := E'{"id":"\x01' || to_hex(v_i + 65536) || '","type":"' || v_type || '"'
            || COALESCE(',"query":' || to_json(v_query)::text, '') || COALESCE(',"name":"' || v_name || '"', '');
        IF v_type IN ('THEN', 'IF', 'JOIN', 'LOOP', 'RACE') THEN
            v_texts[v_i] := v_texts[v_i] || ',"left":' || v_i;
            v_depth := v_depth + 1;
            IF v_type = 'JOIN' AND v_node ? 'extra_nodes' AND v_node->'extra_nodes' <> '[]' THEN
                v_extras := jsonb_array_length(v_node->'extra_nodes');
                s_nodes := s_nodes[1 : v_top] || (SELECT array_agg(e.value ORDER BY e.n DESC)
                    FROM jsonb_array_elements(v_node->'extra_nodes') WITH ORDINALITY AS e(value, n));
                s_parents := s_parents[1 : v_top] || array_fill(v_i, ARRAY[v_extras]);
                s_depths := s_depths[1 : v_top] || array_fill(v_depth, ARRAY[v_extras]);
                s_members := s_members[1 : v_top] || array_fill(',%'::text, ARRAY[v_extras]);
                v_top := v_top + v_extras;
                s_members[v_top] := ',"extras":[%';
                s_members[v_top - v_extras + 1] := s_members[v_top - v_extras + 1] || ']';
            END IF;
            IF jsonb_typeof(v_node->'condition_node') = 'object' THEN
                v_top := v_top + 1;
                s_nodes[v_top] := v_node->'condition_node';
                s_parents[v_top] := v_i;
                s_members[v_top] := ',"condition":%';
                s_depths[v_top] := v_depth;
            END IF;
            IF v_type <> 'LOOP' THEN
                v_top := v_top + 1;
                s_nodes[v_top] := v_node->'right_node';
                s_parents[v_top] := v_i;
                s_members[v_top] := ',"right":%';
                s_depths[v_top] := v_depth;
            END IF;
            v_node := v_node->'left_node';
        ELSE
            EXIT WHEN v_top = 0;
            v_node := s_nodes[v_top];
            v_texts[s_parents[v_top]] := v_texts[s_parents[v_top]] || replace(s_members[v_top], '%', v_i::text);
            v_depth := s_depths[v_top];
            v_top := v_top - 1;
        END IF;
    END LOOP;
    -- So many digits as the last place has: the rest of an id is random.
    RETURN replace('[' || array_to_string(v_texts, '},') || '}]',
                   left(E'\x011000', 6 - length(to_hex(v_i))), E'\x01');
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN NULL;    -- not JSON, or none that jsonb can hold; as a step's text or a configuration, too
END $$;

-- What duroxide.start takes: {template, how many digits of each id are random}; or what it has to judge: {NULL, fut, transaction_mode}.
CREATE FUNCTION duroxide.prepare_start(fut text, transaction_mode text) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_template text := CASE WHEN lower(transaction_mode) = 'caller' THEN duroxide.graph_template(fut) END;
BEGIN
    RETURN CASE WHEN v_template IS NULL THEN ARRAY[NULL, fut, transaction_mode]
                -- The first id stands at the beginning, with as many digits as all others.
                ELSE ARRAY[v_template, (8 - strpos(substr(v_template, 10, 5), '"') + 1)::text] END;
END $$;

-- Starts a workflow, as duroxide.submit does: one INSERT into duroxide.instances, which the caller's own privileges and row
-- security allow. So who calls this by hand, with a graph of his own making, can do no more than with an INSERT of his own; the
-- engine trusts no graph that it loads.
CREATE FUNCTION duroxide.start(prepared text[], label text, database text) RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_template text := prepared[1];
    v_checked boolean := false;
    v_random text;
    v_id text;
BEGIN
    IF v_template IS NULL THEN
        IF prepared[3] IS NULL OR lower(prepared[3]) NOT IN ('caller', 'new') THEN
            RAISE EXCEPTION 'invalid transaction_mode "%" for df.start(): expected ''caller'' or ''new''', prepared[3]
                USING ERRCODE = '22023';
        ELSIF lower(prepared[3]) = 'new' THEN
            RETURN duroxide.launch(prepared[2], label, database);
        END IF;
        RETURN duroxide.submit(NULL, prepared[2], label, database);
    END IF;
    IF start.database IS NOT NULL AND NOT EXISTS (SELECT FROM pg_database d WHERE d.datname = start.database) THEN
        RAISE EXCEPTION 'database "%" does not exist', start.database USING ERRCODE = '3D000';
    END IF;
    FOR attempt IN 1 .. 11 LOOP
        v_random := gen_random_uuid();
        v_id := left(v_random, 8);
        INSERT INTO duroxide.instances (id, label, graph, vars, database)
        SELECT v_id, start.label, replace(v_template, E'\x01', right(v_random, prepared[2]::integer))::jsonb,
               COALESCE((SELECT jsonb_object_agg(v.name, COALESCE(v.sealed, v.value)) FROM duroxide.vars v
                          WHERE v.owner = duroxide.me() AND v.value IS NOT NULL), '{}'),
               start.database
          FROM pg_roles r WHERE r.rolname = current_user AND (v_checked OR r.rolcanlogin AND NOT r.rolsuper)
        ON CONFLICT (id) DO NOTHING;
        IF FOUND THEN
            RETURN v_id;
        ELSIF NOT v_checked THEN
            PERFORM duroxide.check_submitter(false);   -- for roles that settings may forbid to start workflows
            v_checked := true;
        END IF;
    END LOOP;
    RAISE EXCEPTION 'Failed to create instance' USING ERRCODE = '55000', DETAIL = 'Ten random ids were all taken.';
END $$;

CREATE OR REPLACE FUNCTION df.start(fut text, label text DEFAULT NULL, database text DEFAULT NULL,
                                    transaction_mode text DEFAULT 'caller') RETURNS text
LANGUAGE sql
RETURN duroxide.start(duroxide.prepare_start(fut, transaction_mode), label, database);

-- A future-or-SQL operand as the JSON of a node: as before (0002_builders.sql), but what the builders wrote is told by comparing
-- pieces of it. Regular expressions with that many states are slow.
CREATE OR REPLACE FUNCTION duroxide.step(fut text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_type text;
BEGIN
    IF fut !~ E'^[ \t\n\r]*\\{' OR NOT duroxide.is_json(fut) THEN
        RETURN '{"node_type":"SQL","query":' || to_json(fut)::text || '}';
    ELSIF left(fut, 14) = '{"node_type":"' THEN
        v_type := split_part(substr(fut, 15, 16), '"', 1);
        IF v_type IN ('THEN', 'IF', 'JOIN', 'RACE', 'LOOP') THEN
            IF substr(fut, 15 + length(v_type), 15) = '","left_node":{' AND (right(fut, 2) IN ('}}', '"}') OR right(fut, 3) = '}]}') THEN
                RETURN fut;
            END IF;
        ELSIF v_type IN ('SQL', 'BREAK', 'SLEEP', 'WAIT_SCHEDULE', 'SIGNAL', 'HTTP', 'HTTP_MULTIPART')
            AND substr(fut, 15 + length(v_type), 11) = '","query":"' AND right(fut, 2) = '"}' THEN
            RETURN fut;
        END IF;
    END IF;
    RETURN duroxide.canonical(fut);
END $$;

CREATE OR REPLACE FUNCTION df."as"(fut text, name text) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_node text;
BEGIN
    IF name = '' THEN
        RAISE EXCEPTION 'df.as: result name cannot be empty'
            USING ERRCODE = '22023', HINT = 'Name a result with an identifier, and refer to it as $name in later steps.';
    ELSIF name !~ '^[a-zA-Z_][a-zA-Z0-9_]*$' THEN
        RAISE EXCEPTION 'df.as: result name ''%'' is not a valid identifier — must match [a-zA-Z_][a-zA-Z0-9_]*', name
            USING ERRCODE = '22023';
    END IF;
    v_node := duroxide.step(fut);
    -- A node's text ends with its name, if it has one; in a string its quotes would be escaped.
    v_node := CASE WHEN strpos(v_node, ',"result_name":"') = 0 THEN left(v_node, -1)
                   ELSE regexp_replace(v_node, E'(,"result_name":"[^"\\\\]*")?\\}$', '') END;
    RETURN v_node || ',"result_name":"' || name || '"}';
END $$;

-- Strings of a function are read as the session's standard_conforming_strings says, when the function is first run in it. Those
-- that hold a backslash have to pin it, or to be written with E, as those above. duroxide.explain can't pin it: it
-- evaluates an expression in the caller's terms.
CREATE OR REPLACE FUNCTION duroxide.explain(input text, path text, diagram boolean) RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_input text := btrim(input, E' \t\n\r\f\v');
    v_node jsonb;
BEGIN
    IF v_input ~ '^[0-9a-fA-F]{8}$' THEN
        IF diagram THEN
            RETURN duroxide.diagram_instance(lower(v_input));
        END IF;
        RETURN duroxide.explain_instance(lower(v_input));
    ELSIF left(v_input, 1) = '{' AND duroxide.is_json(v_input) THEN
        v_node := v_input::jsonb;
        IF jsonb_typeof(v_node->'node_type') = 'string' THEN
            RETURN regexp_replace(duroxide.explain_future(v_input, diagram), '^Invalid durable function: ', 'Failed to parse Durofut JSON: ');
        END IF;
    END IF;
    IF v_input !~ E'~>|\\|=>|\\?>|!>|@>|df\\.' THEN
        IF v_input ~* E'^((SELECT|INSERT|UPDATE|DELETE|WITH)[ \\n]|(CREATE|ALTER|DROP|CALL|DO|TRUNCATE|GRANT|REVOKE|EXPLAIN) )' THEN
            RETURN duroxide.explain_future(v_input, diagram);
        END IF;
        RETURN E'Cannot explain input: not a valid Durofut JSON, instance ID, SQL statement, or DSL expression.\n'
               'Hint: DSL expressions use df.*() functions and operators like ~>, |=>, &, |.';
    END IF;
    PERFORM set_config('search_path', path, true);
    BEGIN
        EXECUTE 'SELECT ' || v_input INTO v_input;
    EXCEPTION WHEN undefined_function OR ambiguous_function THEN
        IF v_input !~ E'~>|\\|=>|\\?>|!>|@>| [&|] ' THEN
            RAISE;
        END IF;
        RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM,
            HINT = 'The proxy reads operators where it sees them: give the expression itself, as in df.explain(''a'' ~> ''b''), '
                   'or as a literal. In a parameter or a column, and without the proxy, functions do: df.seq(''a'', ''b'').';
    END;
    PERFORM set_config('search_path', 'pg_catalog, pg_temp', true);
    IF v_input IS NULL THEN
        RETURN 'Expression returned NULL';
    ELSIF v_input !~ E'^\\s*\\{' OR NOT duroxide.is_json(v_input) OR jsonb_typeof(v_input::jsonb->'node_type') IS DISTINCT FROM 'string' THEN
        RETURN 'Failed to parse Durofut JSON: the expression''s value is no workflow: ' || duroxide.cut(v_input, 60);
    END IF;
    RETURN regexp_replace(duroxide.explain_future(v_input, diagram), '^Invalid durable function: ', 'Failed to parse Durofut JSON: ');
END $$;

DO $do$
DECLARE
    v_function regprocedure;
BEGIN
    FOR v_function IN
        SELECT p.oid FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
         WHERE p.pronamespace IN ('df'::regnamespace, 'duroxide'::regnamespace) AND l.lanname = 'plpgsql' AND strpos(p.prosrc, E'\\') > 0
           AND p.oid NOT IN ('duroxide.graph_template(text)'::regprocedure, 'duroxide.start(text[], text, text)'::regprocedure,
                             'duroxide.step(text)'::regprocedure, 'df."as"(text, text)'::regprocedure,
                             'duroxide.explain(text, text, boolean)'::regprocedure)
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET standard_conforming_strings = on', v_function);
    END LOOP;
END $do$;
