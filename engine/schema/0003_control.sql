-- Starting, steering and asking after workflows: SURFACE sections 1.1, 1.3, 1.4, 3.5 to 3.7.
-- All SECURITY INVOKER: row security and the caller's own grants decide. Parameter names are part of the surface, so where
-- one is also a column's name, it is written with the function's name before it.

GRANT SELECT ON duroxide.settings TO PUBLIC;

-- A setting that the worker or `dfproxy init` mirrored here, or NULL.
CREATE FUNCTION duroxide.setting(p_name text) RETURNS text
LANGUAGE sql STABLE STRICT
RETURN (SELECT s.value FROM duroxide.settings s WHERE s.name = p_name);

-- Refuses functions that a step must not call.
CREATE FUNCTION duroxide.in_workflow() RETURNS boolean
LANGUAGE sql STABLE
RETURN COALESCE(current_setting('df.in_workflow', true), '') = 'true';

-- Place and version ------------------------------------------------------------------------------------------------

CREATE FUNCTION df.version() RETURNS text
LANGUAGE sql STABLE
RETURN '0.2.6 (dfproxy ' || COALESCE(duroxide.setting('dfproxy_version'), '?') || ')';

CREATE FUNCTION df.target_database() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN current_database()::text;

CREATE FUNCTION df.duroxide_schema() RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN 'duroxide';

-- Variables --------------------------------------------------------------------------------------------------------

CREATE FUNCTION df.setvar(name text, value text) RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF duroxide.in_workflow() THEN
        RAISE EXCEPTION 'df.setvar() cannot be called inside a workflow - set variables before starting the workflow'
            USING ERRCODE = '55000';
    END IF;
    INSERT INTO duroxide.vars (name, value) VALUES (setvar.name, setvar.value)
    ON CONFLICT (owner, name) DO UPDATE SET value = EXCLUDED.value;
    RETURN 'OK';
END $$;

CREATE FUNCTION df.getvar(name text) RETURNS text
LANGUAGE sql STRICT
RETURN (SELECT v.value FROM duroxide.vars v WHERE v.owner = duroxide.me() AND v.name = getvar.name);

CREATE FUNCTION df.unsetvar(name text) RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF duroxide.in_workflow() THEN
        RAISE EXCEPTION 'df.unsetvar() cannot be called inside a workflow - manage variables before starting the workflow'
            USING ERRCODE = '55000';
    END IF;
    DELETE FROM duroxide.vars v WHERE v.owner = duroxide.me() AND v.name = unsetvar.name;
    RETURN 'OK';
END $$;

CREATE FUNCTION df.clearvars() RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF duroxide.in_workflow() THEN
        RAISE EXCEPTION 'df.clearvars() cannot be called inside a workflow - manage variables before starting the workflow'
            USING ERRCODE = '55000';
    END IF;
    DELETE FROM duroxide.vars v WHERE v.owner = duroxide.me();
    RETURN 'OK';
END $$;

-- From a future to a graph -----------------------------------------------------------------------------------------

-- Why a step's SQL can't be SQL: what df.setvar, df.status... return, a `?>` without its `!>`, JSON of an unknown type.
-- NULL for anything else. Returns {sqlstate, constraint, message, hint}.
CREATE FUNCTION duroxide.not_sql(query text) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_text text := btrim(query, E' \t\n\r');
    v_node jsonb;
    v_helper text := CASE WHEN v_text = 'OK' THEN 'df.setvar'
                          WHEN v_text IN ('pending', 'running', 'completed', 'failed', 'cancelled') THEN 'df.await_instance'
                          WHEN v_text ~ '^[0-9a-f]{8}$' THEN 'df.start'
                          WHEN v_text ~ '^Instance [^ ]+ cancelled: ' THEN 'df.cancel'
                          WHEN v_text ~ '^Triggered run for (instance: |all pending instances$)' THEN 'df.run' END;
BEGIN
    IF v_helper IS NOT NULL THEN
        RETURN ARRAY['22023', '', format('%1$s cannot be used as a workflow step. Call %1$s before df.start().', v_helper),
                     format('The step''s text is ''%s'', which is what %s, for one, returns. It is no SQL statement.',
                            left(v_text, 60), v_helper)];
    ELSIF left(v_text, 1) = '{' AND duroxide.is_json(v_text) THEN
        v_node := v_text::jsonb;
        IF jsonb_typeof(v_node->'node_type') = 'string' THEN
            RETURN ARRAY['22023', '', format('Unknown node_type ''%s''. Valid types: SQL, THEN, IF, JOIN, LOOP, BREAK, RACE, '
                'SLEEP, WAIT_SCHEDULE, HTTP, HTTP_MULTIPART, SIGNAL', v_node->>'node_type'),
                'Type names are in capitals.'];
        ELSIF v_node ? '_partial_if' THEN
            RETURN ARRAY['42601', '', 'a ?> without its !> cannot be used as a workflow step',
                'Write condition ?> (then) !> (else), or df.if(condition, then, else).'];
        END IF;
    END IF;
    RETURN NULL;
END $$;

-- What is wrong with one node of a graph, its children's insides aside, or NULL; all of SURFACE 3.6 but limits, and
-- the structure that the original leaves to check constraints. Returns {sqlstate, constraint, message, hint}.
CREATE FUNCTION duroxide.node_fault(node jsonb) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_type text := node->>'node_type';
    v_left boolean := jsonb_typeof(node->'left_node') = 'object';
    v_right boolean := jsonb_typeof(node->'right_node') = 'object';
    v_condition boolean := jsonb_typeof(node->'condition_node') = 'object';
    v_extras boolean := jsonb_typeof(node->'extra_nodes') = 'array' AND node->'extra_nodes' <> '[]';
    v_query text := node->>'query';
    v_config jsonb;
    v_fault text := duroxide.decode_fault(node);
    v_member text;
BEGIN
    IF v_fault IS NULL AND jsonb_typeof(node->'node_type') IS DISTINCT FROM 'string' THEN
        v_fault := 'node_type must be a string';
    END IF;
    IF v_fault IS NOT NULL THEN
        RETURN ARRAY['22023', '', 'failed to deserialize Durofut child: ' || v_fault, ''];
    ELSIF v_type <> ALL ('{SQL,THEN,IF,JOIN,LOOP,BREAK,RACE,SLEEP,WAIT_SCHEDULE,HTTP,HTTP_MULTIPART,SIGNAL}'::text[]) THEN
        RETURN ARRAY['22023', 'nodes_node_type_chk', format('Unknown node_type ''%s''. Valid types: SQL, THEN, IF, JOIN, LOOP, '
            'BREAK, RACE, SLEEP, WAIT_SCHEDULE, HTTP, HTTP_MULTIPART, SIGNAL', v_type), 'Type names are in capitals.'];
    ELSIF v_condition AND v_type NOT IN ('IF', 'LOOP') THEN
        RETURN ARRAY['22023', '', format('condition_node is not valid for %s nodes', v_type), ''];
    ELSIF v_extras AND v_type <> 'JOIN' THEN
        RETURN ARRAY['22023', '', format('extra_nodes is not valid for %s nodes', v_type), ''];
    ELSIF v_type IN ('IF', 'LOOP', 'JOIN') AND v_query IS NOT NULL THEN
        v_member := CASE v_type WHEN 'JOIN' THEN 'extra_nodes' ELSE 'condition_node' END;
        IF NOT duroxide.is_json(v_query) THEN
            RETURN ARRAY['22023', '', format('query in %s must be valid JSON config: %s', v_type, left(v_query, 60)), ''];
        END IF;
        v_config := v_query::jsonb;
        IF jsonb_typeof(v_config) <> 'object' THEN
            RETURN ARRAY['22023', '', format('query in %s must be a JSON config object', v_type), ''];
        ELSIF v_config ? v_member THEN
            RETURN ARRAY['22023', '', format('%s in %s must be a first-class Durofut field, not embedded in query', v_member, v_type), ''];
        END IF;
    END IF;
    v_fault := CASE
        WHEN v_type NOT IN ('THEN', 'IF', 'JOIN', 'LOOP', 'RACE') THEN
            CASE WHEN v_left OR v_right THEN 'takes no children' WHEN v_query IS NULL THEN 'needs a query' END
        WHEN NOT COALESCE(v_left, false) THEN 'needs left_node'
        WHEN v_type = 'LOOP' THEN CASE WHEN v_right THEN 'takes no right_node' END
        WHEN NOT COALESCE(v_right, false) THEN 'needs right_node'
        WHEN v_type IN ('THEN', 'RACE') AND v_query IS NOT NULL THEN 'takes no query'
        WHEN v_type = 'IF' AND NOT COALESCE(v_condition, false) AND v_query IS NULL THEN 'needs condition_node, or the query of df.if_rows'
    END;
    IF v_fault IS NOT NULL THEN
        RETURN ARRAY['23514', 'nodes_structure_chk', format('%s %s', v_type, v_fault), ''];
    ELSIF node->>'result_name' !~ '^[A-Za-z_][A-Za-z0-9_]*$' THEN
        RETURN ARRAY['23514', 'nodes_result_name_chk', format('result name ''%s'' is not a valid identifier — must match '
            '[a-zA-Z_][a-zA-Z0-9_]*', node->>'result_name'), ''];
    END IF;
    RETURN CASE v_type WHEN 'SQL' THEN duroxide.not_sql(v_query) END;
END $$;

-- Raises a fault as not_sql and node_fault return it.
CREATE FUNCTION duroxide.raise_fault(prefix text, fault text[]) RETURNS void
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_hint text := CASE fault[4] WHEN '' THEN 'df.explain(...) shows how a workflow is read.' ELSE fault[4] END;
BEGIN
    IF fault[2] <> '' THEN
        RAISE EXCEPTION USING ERRCODE = fault[1], MESSAGE = prefix || fault[3], HINT = v_hint, CONSTRAINT = fault[2];
    END IF;
    RAISE EXCEPTION USING ERRCODE = fault[1], MESSAGE = prefix || fault[3], HINT = v_hint;
END $$;

-- The strict decoding of df.start (SURFACE 3.5), one level deep: the root as a node.
CREATE FUNCTION duroxide.decode(fut text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_node jsonb;
    v_fault text[];
    v_detail text;
BEGIN
    IF fut ~ '^[ \t\n\r]*\{' AND duroxide.is_json(fut) THEN
        v_node := fut::jsonb;
        IF jsonb_typeof(v_node->'node_type') = 'string' AND v_node->>'node_type' = ANY (
            '{SQL,THEN,IF,JOIN,LOOP,BREAK,RACE,SLEEP,WAIT_SCHEDULE,HTTP,HTTP_MULTIPART,SIGNAL}'::text[]) THEN
            v_detail := duroxide.decode_fault(v_node);
            IF v_detail IS NOT NULL THEN
                RAISE EXCEPTION 'Invalid durable function: Malformed Durofut JSON with node_type ''%'': %',
                        v_node->>'node_type', v_detail
                    USING ERRCODE = '22023', HINT = 'Build steps with the df.* functions; their JSON need not be written by hand.';
            END IF;
            RETURN v_node;
        END IF;
    END IF;
    v_fault := duroxide.not_sql(fut);
    IF v_fault IS NOT NULL THEN
        PERFORM duroxide.raise_fault('Invalid durable function: ', v_fault);
    END IF;
    RETURN jsonb_build_object('node_type', 'SQL', 'query', fut);
END $$;

-- The graph of docs/architecture.md: a tree of futures as an array of nodes in pre-order, each checked when it is reached.
-- Node ids are a bijection of their place, shifted by `seed`: unique within the graph, different between graphs.
-- A loop with a stack of its own, since nesting may be 256 levels deep and graphs have up to 10,000 nodes. A node's text is
-- left open (no closing brace) until the places of its children are known; the left child always comes next.
CREATE FUNCTION duroxide.flatten(root jsonb, seed bigint) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_texts text[];          -- by place + 1, as are the next four
    v_parents integer[];
    v_slots integer[];       -- which child of its parent: 0 left, 1 right, 2 condition, 3... extras
    v_depths integer[];
    v_extras integer[];      -- how many extras a JOIN has; unset for other nodes
    s_nodes jsonb[];         -- the stack: nodes yet to visit, with their parents and slots
    s_parents integer[];
    s_slots integer[];
    v_top integer := 0;
    v_i integer := 0;        -- place + 1 of the node in hand
    v_node jsonb := root;
    v_parent integer := 0;
    v_slot integer := -1;
    v_type text;
    v_name text;
    v_text text;
    v_leaf boolean;
    v_count integer;
    v_fault text[];
    v_path text;
BEGIN
    LOOP
        v_i := v_i + 1;
        v_parents[v_i] := v_parent;
        v_slots[v_i] := v_slot;
        v_depths[v_i] := CASE v_parent WHEN 0 THEN 0 ELSE v_depths[v_parent] + 1 END;
        v_type := v_node->>'node_type';
        v_text := v_node->>'query';
        v_name := v_node->>'result_name';
        v_leaf := false;

        IF v_depths[v_i] > 256 THEN
            v_fault := ARRAY['54001', '', 'Graph exceeds maximum nesting depth of 256. '
                'Simplify the workflow or break it into multiple instances.',
                'A long chain written with df.seq(VARIADIC steps) nests less than one of ~>.'];
        ELSIF v_i > 10000 THEN
            v_fault := ARRAY['54000', '', 'Workflow exceeds maximum node count of 10000. '
                'Simplify the workflow or break it into multiple instances.', ''];
        -- The two commonest shapes are judged here; all others, and all faults, by node_fault.
        ELSIF v_type = 'SQL' AND jsonb_typeof(v_node->'query') = 'string'
            AND NOT v_node ?| '{left_node,right_node,condition_node,extra_nodes}'
            AND (v_name IS NULL OR v_name ~ '^[A-Za-z_][A-Za-z0-9_]*$' AND jsonb_typeof(v_node->'result_name') = 'string') THEN
            v_leaf := true;
            v_fault := CASE WHEN v_text ~ '^\s*(\{|OK\s*$|(pending|running|completed|failed|cancelled|[0-9a-f]{8})\s*$|Instance |Triggered )'
                            THEN duroxide.not_sql(v_text) END;
        ELSIF v_type = 'THEN' AND v_text IS NULL AND v_name IS NULL AND jsonb_typeof(v_node->'left_node') = 'object'
            AND jsonb_typeof(v_node->'right_node') = 'object' AND NOT v_node ?| '{condition_node,extra_nodes}' THEN
            v_fault := NULL;
        ELSE
            v_fault := duroxide.node_fault(v_node);
            v_leaf := v_type NOT IN ('THEN', 'IF', 'JOIN', 'LOOP', 'RACE');
        END IF;
        IF v_fault IS NOT NULL THEN
            LOOP
                EXIT WHEN v_slots[v_i] < 0;
                v_path := CASE v_slots[v_i] WHEN 0 THEN '.left' WHEN 1 THEN '.right' WHEN 2 THEN '.condition_node'
                              ELSE '.extra_nodes[' || v_slots[v_i] - 3 || ']' END || COALESCE(v_path, '');
                v_i := v_parents[v_i];
            END LOOP;
            PERFORM duroxide.raise_fault('Invalid durable function graph: root' || COALESCE(v_path, '') || ': ', v_fault);
        END IF;

        v_texts[v_i] := '{"id":"' || lpad(to_hex((seed + v_i * 2654435761) & 4294967295), 8, '0') || '","type":"' || v_type || '"'
            || COALESCE(',"query":' || to_json(v_text)::text, '') || COALESCE(',"name":"' || v_name || '"', '')
            || CASE WHEN v_leaf THEN '' ELSE ',"left":' || v_i END;
        IF v_slot > 0 THEN
            v_texts[v_parent] := v_texts[v_parent]
                || CASE v_slot WHEN 1 THEN ',"right":' WHEN 2 THEN ',"condition":' WHEN 3 THEN ',"extras":[' ELSE ',' END || v_i - 1
                || CASE WHEN v_slot = v_extras[v_parent] + 2 THEN ']' ELSE '' END;
        END IF;

        IF v_leaf THEN
            EXIT WHEN v_top = 0;
            v_node := s_nodes[v_top];
            v_parent := s_parents[v_top];
            v_slot := s_slots[v_top];
            v_top := v_top - 1;
            CONTINUE;
        END IF;
        IF v_type = 'JOIN' AND v_node ? 'extra_nodes' AND v_node->'extra_nodes' <> '[]' THEN
            v_count := jsonb_array_length(v_node->'extra_nodes');
            v_extras[v_i] := v_count;
            s_nodes := s_nodes[1 : v_top] || (SELECT array_agg(e.value ORDER BY e.i DESC)
                FROM jsonb_array_elements(v_node->'extra_nodes') WITH ORDINALITY AS e(value, i));
            s_parents := s_parents[1 : v_top] || array_fill(v_i, ARRAY[v_count]);
            s_slots := s_slots[1 : v_top] || ARRAY(SELECT generate_series(v_count + 2, 3, -1));
            v_top := v_top + v_count;
        END IF;
        IF jsonb_typeof(v_node->'condition_node') = 'object' THEN
            v_top := v_top + 1;
            s_nodes[v_top] := v_node->'condition_node';
            s_parents[v_top] := v_i;
            s_slots[v_top] := 2;
        END IF;
        IF v_type <> 'LOOP' THEN
            v_top := v_top + 1;
            s_nodes[v_top] := v_node->'right_node';
            s_parents[v_top] := v_i;
            s_slots[v_top] := 1;
        END IF;
        v_node := v_node->'left_node';
        v_parent := v_i;
        v_slot := 0;
    END LOOP;
    RETURN ('[' || array_to_string(v_texts, '},') || '}]')::jsonb;
END $$;

-- Starting ---------------------------------------------------------------------------------------------------------

-- Whether the calling role may submit workflows; the order of the checks is the original's (SURFACE 1.3).
CREATE FUNCTION duroxide.check_submitter(p_login_only boolean) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_super boolean;
    v_login boolean;
BEGIN
    SELECT r.rolcanlogin, r.rolsuper INTO v_login, v_super FROM pg_roles r WHERE r.rolname = current_user;
    IF NOT v_login AND duroxide.setting('require_login') IN ('on', 'true') THEN
        RAISE EXCEPTION 'current_user "%" does not have LOGIN privilege.', current_user
            USING ERRCODE = '42501', HINT = 'Grant it LOGIN, call df.start() as another role, or switch require_login off.';
    ELSIF v_super AND NOT p_login_only AND COALESCE(duroxide.setting('enable_superuser_instances'), 'off') NOT IN ('on', 'true') THEN
        RAISE EXCEPTION 'pg_durable: superuser instances are disabled. current_user "%" is a superuser, but pg_durable.enable_superuser_instances is off. Set pg_durable.enable_superuser_instances = on to allow this.',
                current_user
            USING ERRCODE = '42501',
                  HINT = 'Start workflows as an ordinary role, or set enable_superuser_instances in the settings of dfproxy.';
    END IF;
END $$;

-- One INSERT into duroxide.instances, whose trigger queues the instance: part of the caller's transaction. `p_id` is the
-- new instance's id, NULL for a random one; if it is taken, SQLSTATE DF003 says so.
CREATE FUNCTION duroxide.submit(p_id text, fut text, label text, database text) RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_root jsonb;
    v_random text;
    v_id text;
    v_graph jsonb;
BEGIN
    IF fut IS NULL THEN
        RAISE EXCEPTION 'df.start: fut cannot be NULL'
            USING ERRCODE = '22004', HINT = 'One NULL operand makes a whole workflow expression NULL.';
    END IF;
    v_root := duroxide.decode(fut);
    IF submit.database IS NOT NULL AND NOT EXISTS (SELECT FROM pg_database d WHERE d.datname = submit.database) THEN
        RAISE EXCEPTION 'database "%" does not exist', submit.database USING ERRCODE = '3D000';
    END IF;
    PERFORM duroxide.check_submitter(false);
    FOR attempt IN 1 .. CASE WHEN p_id IS NULL THEN 10 ELSE 1 END LOOP
        v_random := gen_random_uuid();
        v_id := COALESCE(p_id, left(v_random, 8));
        IF v_graph IS NULL THEN
            v_graph := duroxide.flatten(v_root, ('x' || right(v_random, 8))::bit(32)::bigint);
        END IF;
        INSERT INTO duroxide.instances (id, label, graph, vars, database)
        VALUES (v_id, submit.label, v_graph,
                COALESCE((SELECT jsonb_object_agg(v.name, COALESCE(v.sealed, v.value)) FROM duroxide.vars v
                           WHERE v.owner = duroxide.me() AND v.value IS NOT NULL), '{}'),
                submit.database)
        ON CONFLICT (id) DO NOTHING;
        IF FOUND THEN
            RETURN v_id;
        END IF;
    END LOOP;
    IF p_id IS NOT NULL THEN
        RAISE EXCEPTION 'there is an instance % already', p_id USING ERRCODE = 'DF003';
    END IF;
    RAISE EXCEPTION 'Failed to create instance' USING ERRCODE = '55000', DETAIL = 'Ten random ids were all taken.';
END $$;

-- duroxide.launch: 0008_launch.sql.
CREATE FUNCTION df.start(fut text, label text DEFAULT NULL, database text DEFAULT NULL,
                         transaction_mode text DEFAULT 'caller') RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF transaction_mode IS NULL OR lower(transaction_mode) NOT IN ('caller', 'new') THEN
        RAISE EXCEPTION 'invalid transaction_mode "%" for df.start(): expected ''caller'' or ''new''', transaction_mode
            USING ERRCODE = '22023';
    ELSIF lower(transaction_mode) = 'new' THEN
        RETURN duroxide.launch(fut, label, database);
    END IF;
    RETURN duroxide.submit(NULL, fut, label, database);
END $$;

-- Steering ---------------------------------------------------------------------------------------------------------

-- Whether an instance that the caller can see is finished; raises if it sees none.
CREATE FUNCTION duroxide.is_finished(p_instance text) RETURNS boolean
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_status text;
BEGIN
    SELECT i.status INTO v_status FROM duroxide.instances i WHERE i.id = p_instance;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'Instance not found or access denied: %', p_instance USING ERRCODE = '02000';
    END IF;
    RETURN v_status NOT IN ('pending', 'running');
END $$;

-- Sends a signal to the instance's durable inbox, as part of the caller's transaction.
CREATE FUNCTION df.signal(instance_id text, signal_name text, signal_data text DEFAULT '{}') RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF signal.instance_id = '' THEN
        RAISE EXCEPTION 'Instance ID cannot be empty' USING ERRCODE = '22023';
    ELSIF signal_name = '' THEN
        RAISE EXCEPTION 'Signal name cannot be empty' USING ERRCODE = '22023';
    ELSIF duroxide.is_finished(signal.instance_id) THEN
        RAISE NOTICE 'instance % is finished: nobody will receive the signal', signal.instance_id;
        RETURN 'OK';
    END IF;
    INSERT INTO duroxide.signals (instance_id, kind, name, data)
    VALUES (signal.instance_id, 'signal', signal_name,
            CASE WHEN duroxide.is_json(signal_data) THEN signal_data ELSE to_json(signal_data)::text END);
    RETURN 'OK';
END $$;

-- Cancels, as part of the caller's transaction; a trigger sets the status. A finished instance stays as it is.
CREATE FUNCTION df.cancel(instance_id text, reason text DEFAULT 'Cancelled by user') RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF NOT duroxide.is_finished(cancel.instance_id) THEN
        INSERT INTO duroxide.signals (instance_id, kind, name) VALUES (cancel.instance_id, 'cancel', reason);
    END IF;
    RETURN format('Instance %s cancelled: %s', cancel.instance_id, reason);
END $$;

-- The stub of the original: an instance needs no triggering.
CREATE FUNCTION df.run(instance_id text DEFAULT NULL) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN COALESCE('Triggered run for instance: ' || instance_id, 'Triggered run for all pending instances');

-- Asking -----------------------------------------------------------------------------------------------------------

-- An instance's status as users see it: `running` from the first claim on.
CREATE FUNCTION duroxide.shown_status(p_status text, p_started_at timestamptz) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN p_status = 'pending' AND p_started_at IS NOT NULL THEN 'running' ELSE p_status END;

-- VOLATILE, so that a loop in one statement sees it change.
CREATE FUNCTION df.status(instance_id text) RETURNS text
LANGUAGE sql STRICT
RETURN (SELECT duroxide.shown_status(i.status, q.started_at)
          FROM duroxide.instances i LEFT JOIN duroxide.queue q ON q.instance_id = i.id WHERE i.id = status.instance_id);

CREATE FUNCTION df.result(instance_id text) RETURNS text
LANGUAGE sql STRICT
RETURN (SELECT duroxide.as_jsonb(i.output)::text FROM duroxide.instances i
         WHERE i.id = result.instance_id AND i.status = 'completed');

-- The error text of a failed instance; NULL for any other.
CREATE FUNCTION df.error(instance_id text) RETURNS text
LANGUAGE sql STRICT
RETURN (SELECT i.output FROM duroxide.instances i WHERE i.id = error.instance_id AND i.status = 'failed');

-- Waits until an instance has ended and returns its status. Polls after 1 ms, then less and less often, up to 100 ms.
CREATE FUNCTION df.await_instance(instance_id text, timeout_seconds integer DEFAULT 30) RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_deadline timestamptz := clock_timestamp() + make_interval(secs => timeout_seconds);
    v_pause double precision := 0.001;
    v_left double precision;
    v_status text;
BEGIN
    IF duroxide.in_workflow() THEN
        RAISE EXCEPTION 'df.await_instance() cannot be called inside a workflow'
            USING ERRCODE = '55000',
                  HINT = 'Let the other workflow call df.signal(), and wait for it with df.wait_for_signal().';
    ELSIF timeout_seconds <= 0 THEN
        RAISE EXCEPTION 'Timeout must be positive' USING ERRCODE = '22023';
    END IF;
    LOOP
        v_status := df.status(await_instance.instance_id);
        IF v_status IS NULL THEN
            RAISE EXCEPTION 'Instance not found: %', await_instance.instance_id USING ERRCODE = '02000';
        ELSIF v_status NOT IN ('pending', 'running') THEN
            RETURN v_status;
        END IF;
        v_left := extract(epoch FROM v_deadline - clock_timestamp());
        EXIT WHEN v_left <= 0;
        PERFORM pg_sleep(least(v_pause, v_left));
        v_pause := least(v_pause * 1.3, 0.1);
    END LOOP;
    RAISE EXCEPTION 'Timeout after %s waiting for instance % (status: %). Check if background worker is running.',
            timeout_seconds, await_instance.instance_id, v_status
        USING ERRCODE = '55000',
              HINT = CASE
                  WHEN EXISTS (SELECT FROM duroxide.instances i WHERE i.id = await_instance.instance_id
                                  AND i.xmin = pg_current_xact_id_if_assigned()::xid) THEN
                      'The workflow was started in this transaction, and begins once it commits: await it after that.'
                  WHEN current_setting('transaction_isolation') NOT LIKE 'read %' THEN
                      'This transaction can''t see changes of others: await in READ COMMITTED.'
                  ELSE 'A worker runs in `dfproxy serve` and in `dfproxy worker`; `dfproxy doctor` shows which are alive.' END;
END $$;

CREATE FUNCTION df.wait_for_completion(instance_id text, timeout_seconds integer DEFAULT 30) RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE WARNING 'df.wait_for_completion() is deprecated; use df.await_instance() instead' USING ERRCODE = '01P01';
    RETURN df.await_instance(wait_for_completion.instance_id, timeout_seconds);
END $$;
