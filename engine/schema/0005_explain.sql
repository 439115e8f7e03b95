-- df.explain: a workflow as a tree, of an instance as it runs or of an expression that is only read (SURFACE 9.6).

-- At most so many characters, the last three of which are dots if something was cut.
CREATE FUNCTION duroxide.cut(value text, length integer) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN CASE WHEN char_length(value) > length THEN left(value, length - 3) || '...' ELSE value END;

-- The line of one node of a graph (docs/architecture.md), without connector and marker. Configuration that somebody wrote
-- by hand and that is not what it should be is shown as it is.
CREATE FUNCTION duroxide.explain_node(node jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_type text := node->>'type';
    v_query text := node->>'query';
    v_config jsonb := CASE WHEN v_type NOT IN ('SQL', 'SLEEP') AND duroxide.is_json(v_query) THEN v_query::jsonb END;
BEGIN
    RETURN CASE v_type
        WHEN 'SQL' THEN 'SQL: ' || duroxide.cut(v_query, 50)
        WHEN 'SLEEP' THEN 'SLEEP ' || v_query || 's'
        WHEN 'WAIT_SCHEDULE' THEN 'WAIT ''' || COALESCE(v_config->>'cron_expr', v_query) || ''''
            || COALESCE(' (' || (v_config->>'timezone') || ')', '')
        WHEN 'SIGNAL' THEN 'SIGNAL ''' || COALESCE(v_config->>'signal_name', v_query) || ''''
            || COALESCE(' (' || (v_config->>'timeout_seconds') || 's)', '')
        WHEN 'HTTP' THEN concat_ws(' ', 'HTTP', v_config->>'method', duroxide.cut(v_config->>'url', 40))
        WHEN 'HTTP_MULTIPART' THEN concat_ws(' ', 'HTTP_MULTIPART', v_config->>'method', v_config->>'url')
        WHEN 'LOOP' THEN CASE WHEN node ? 'condition' THEN 'LOOP (while)' ELSE 'LOOP (infinite)' END
        WHEN 'BREAK' THEN 'BREAK' || COALESCE(' ''' || duroxide.cut(v_config->>'break_value', 20) || '''', '')
        WHEN 'JOIN' THEN 'JOIN (' || 2 + COALESCE(jsonb_array_length(node->'extras'), 0) || ')'
        ELSE v_type END
        || CASE WHEN v_type <> 'RACE' THEN COALESCE(' |=> ''' || (node->>'name') || '''', '') ELSE '' END;
END $$;

-- The tree of a graph. `markers` holds a mark per node, or is NULL for a dry run. A stack of its own in place of recursion,
-- since nesting may be 256 levels deep: an entry is a node to draw, or (place -1) a finished line.
CREATE FUNCTION duroxide.explain_graph(graph jsonb, markers text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_nodes jsonb[] := ARRAY(SELECT n.value FROM jsonb_array_elements(graph) WITH ORDINALITY n(value, i) ORDER BY n.i);
    v_lines text[] := '{}';
    s_places integer[] := '{0}';
    s_prefixes text[] := '{""}';
    s_connectors text[] := '{""}';
    s_bars boolean[] := '{false}';    -- whether what is below a node hangs on a bar
    v_top integer := 1;
    v_node jsonb;
    v_type text;
    v_place integer;
    v_prefix text;
    v_connector text;
    v_bar boolean;
    v_below text;
    v_heads text[];
    v_children integer[];
    v_width integer;
BEGIN
    WHILE v_top > 0 LOOP
        v_place := s_places[v_top];
        v_prefix := s_prefixes[v_top];
        v_connector := s_connectors[v_top];
        v_bar := s_bars[v_top];
        v_top := v_top - 1;
        IF v_place < 0 THEN
            v_lines := v_lines || v_prefix;
            CONTINUE;
        END IF;
        v_node := v_nodes[v_place + 1];
        v_type := v_node->>'type';
        IF v_type = 'THEN' THEN
            -- No line of its own: its steps follow one another at the same indent.
            v_top := v_top + 1;
            s_places[v_top] := (v_node->>'right')::integer;
            s_prefixes[v_top] := v_prefix;
            s_connectors[v_top] := '→ ';
            s_bars[v_top] := false;
            v_top := v_top + 1;
            s_places[v_top] := (v_node->>'left')::integer;
            s_prefixes[v_top] := v_prefix;
            s_connectors[v_top] := v_connector;
            s_bars[v_top] := false;
            CONTINUE;
        END IF;
        v_lines := v_lines || (v_prefix || v_connector || duroxide.explain_node(v_node) || COALESCE(' ' || markers[v_place + 1], ''));
        CONTINUE WHEN NOT v_node ? 'left';

        v_below := v_prefix || CASE WHEN v_bar THEN '│   ' ELSE '    ' END;
        v_children := array_remove(CASE v_type
            WHEN 'IF' THEN ARRAY[(v_node->>'condition')::integer, (v_node->>'left')::integer, (v_node->>'right')::integer]
            WHEN 'LOOP' THEN ARRAY[(v_node->>'left')::integer, (v_node->>'condition')::integer]
            ELSE ARRAY[(v_node->>'left')::integer, (v_node->>'right')::integer]
                || ARRAY(SELECT e.value::integer FROM jsonb_array_elements_text(v_node->'extras') WITH ORDINALITY e(value, i) ORDER BY e.i)
            END, NULL);
        v_heads := CASE v_type
            WHEN 'IF' THEN CASE WHEN v_node ? 'condition' THEN '{? condition:}'::text[] ELSE '{}' END || '{✓ then:,✗ else:}'
            WHEN 'LOOP' THEN '{↻ body:,? while:}'
            ELSE ARRAY(SELECT '║ branch ' || b || ':' FROM generate_series(1, cardinality(v_children)) b ORDER BY b) END;
        FOR k IN REVERSE cardinality(v_children) .. 1 LOOP
            v_bar := v_type IN ('JOIN', 'RACE') AND k < cardinality(v_children);
            v_top := v_top + 1;
            s_places[v_top] := v_children[k];
            s_prefixes[v_top] := v_below || '  ';
            s_connectors[v_top] := CASE WHEN v_bar THEN '├─' ELSE '└─' END;
            s_bars[v_top] := v_bar;
            v_top := v_top + 1;
            s_places[v_top] := -1;
            s_prefixes[v_top] := v_below || v_heads[k];
        END LOOP;
    END LOOP;
    -- A step's text may have several lines; all are as wide as the widest and four more.
    v_lines := string_to_array(array_to_string(v_lines, E'\n'), E'\n');
    SELECT max(char_length(l.line)) + 4 INTO v_width FROM unnest(v_lines) AS l(line);
    RETURN (SELECT string_agg(rpad(l.line, v_width), E'\n' ORDER BY l.i) FROM unnest(v_lines) WITH ORDINALITY AS l(line, i));
END $$;

-- The live view.
CREATE FUNCTION duroxide.explain_instance(p_instance text) RETURNS text
LANGUAGE plpgsql STABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_instance record;
    v_status text;
    v_markers text[];
BEGIN
    SELECT i.label, i.graph, i.output, duroxide.shown_status(i.status, q.started_at) AS status INTO v_instance
      FROM duroxide.instances i LEFT JOIN duroxide.queue q ON q.instance_id = i.id WHERE i.id = p_instance;
    IF NOT FOUND THEN
        RETURN format('Instance ''%s'' not found', p_instance);
    END IF;
    SELECT array_agg(CASE n.inferred_status WHEN 'completed' THEN '✓' WHEN 'failed' THEN '✗' WHEN 'running' THEN '⏳'
                                            WHEN 'skipped' THEN '⊘' ELSE '○' END ORDER BY n.place)
      INTO v_markers FROM duroxide.node_rows(p_instance) n;
    IF v_markers IS NULL THEN
        RETURN format('No nodes found for instance ''%s''', p_instance);
    END IF;
    v_status := CASE v_instance.status WHEN 'completed' THEN '✓ Completed' WHEN 'failed' THEN '✗ Failed'
                                       WHEN 'cancelled' THEN '✗ Failed' WHEN 'running' THEN '⏳ Running'
                                       ELSE '○ ' || v_instance.status END;
    RETURN concat('Instance: ', p_instance, ' (' || v_instance.label || ')', E'\nStatus:   ', v_status,
                  E'\nOutput:   ' || duroxide.cut(v_instance.output, 60), E'\n\n',
                  duroxide.explain_graph(v_instance.graph, v_markers));
END $$;

-- The dry run of one future, as a tree or as a diagram (0009_diagram.sql). Problems of the graph are text, not errors.
CREATE FUNCTION duroxide.explain_future(fut text, diagram boolean) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF diagram THEN
        RETURN duroxide.diagram_graph(duroxide.flatten(duroxide.decode(fut), 0), NULL);
    END IF;
    RETURN duroxide.explain_graph(duroxide.flatten(duroxide.decode(fut), 0), NULL);
EXCEPTION
    WHEN invalid_parameter_value OR check_violation OR syntax_error OR program_limit_exceeded OR statement_too_complex THEN
        RETURN SQLERRM;
END $$;

-- `path` is the caller's search_path: an expression is evaluated by the caller, in the caller's terms.
CREATE FUNCTION duroxide.explain(input text, path text, diagram boolean) RETURNS text
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
    IF v_input !~ '~>|\|=>|\?>|!>|@>|df\.' THEN
        IF v_input ~* '^((SELECT|INSERT|UPDATE|DELETE|WITH)[ \n]|(CREATE|ALTER|DROP|CALL|DO|TRUNCATE|GRANT|REVOKE|EXPLAIN) )' THEN
            RETURN duroxide.explain_future(v_input, diagram);
        END IF;
        RETURN E'Cannot explain input: not a valid Durofut JSON, instance ID, SQL statement, or DSL expression.\n'
               'Hint: DSL expressions use df.*() functions and operators like ~>, |=>, &, |.';
    END IF;
    PERFORM set_config('search_path', path, true);
    BEGIN
        EXECUTE 'SELECT ' || v_input INTO v_input;
    EXCEPTION WHEN undefined_function OR ambiguous_function THEN
        IF v_input !~ '~>|\|=>|\?>|!>|@>| [&|] ' THEN
            RAISE;
        END IF;
        RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM,
            HINT = 'The proxy reads operators where it sees them: give the expression itself, as in df.explain(''a'' ~> ''b''), '
                   'or as a literal. In a parameter or a column, and without the proxy, functions do: df.seq(''a'', ''b'').';
    END;
    PERFORM set_config('search_path', 'pg_catalog, pg_temp', true);
    IF v_input IS NULL THEN
        RETURN 'Expression returned NULL';
    ELSIF v_input !~ '^\s*\{' OR NOT duroxide.is_json(v_input) OR jsonb_typeof(v_input::jsonb->'node_type') IS DISTINCT FROM 'string' THEN
        RETURN 'Failed to parse Durofut JSON: the expression''s value is no workflow: ' || duroxide.cut(v_input, 60);
    END IF;
    RETURN regexp_replace(duroxide.explain_future(v_input, diagram), '^Invalid durable function: ', 'Failed to parse Durofut JSON: ');
END $$;

CREATE FUNCTION df.explain(input text) RETURNS text
LANGUAGE sql STRICT
RETURN duroxide.explain(input, current_setting('search_path'), false);
