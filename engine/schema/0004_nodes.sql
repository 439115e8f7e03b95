-- The views of `df` (SURFACE section 4), and the derivation of what each node of a workflow is doing (section 9.4).
-- Nothing is stored per node: a start writes one row, a step one checkpoint. All views are security_invoker.

-- An error's fields as text for people: message, then SQLSTATE, DETAIL and HINT on lines of their own.
CREATE FUNCTION duroxide.error_text(error jsonb) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN concat_ws(E'\n', error->>'message', 'SQLSTATE: ' || (error->>'sqlstate'), 'DETAIL: ' || (error->>'detail'),
                 'HINT: ' || (error->>'hint'));

-- The rounds in an execution path, outermost first, each behind its loop's place: '/3:2/7:1' is {3,2,7,1}. Sorts by age.
CREATE FUNCTION duroxide.rounds(execution text) RETURNS integer[]
LANGUAGE sql IMMUTABLE STRICT
RETURN string_to_array(translate(ltrim(execution, '/'), '/', ':'), ':')::integer[];

-- The query of a compound node as the original stores it: children by id in its config (SURFACE 3.6).
CREATE FUNCTION duroxide.stored_query(query text, member text, value text) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN value IS NULL THEN query
            WHEN query IS NULL OR query ~ '^\s*\{\s*\}\s*$' THEN '{"' || member || '":' || value || '}'
            ELSE regexp_replace(query, '\s*\}\s*$', '') || ',"' || member || '":' || value || '}' END;

-- One row a node, in pre-order: what it is, and what it is doing, derived from the graph and the checkpoints. Three passes
-- over arrays, so that time is linear in the number of nodes:
--   down: in which execution (loop round) each node is now; a checkpoint of an older round is stale;
--   up:   how each node ended in that execution, from the leaves' checkpoints and the recorded decisions;
--   down: which nodes have been reached, which were cut off, and what 9.4 infers for the others.
-- Compare engine/interpreter.py, whose outcomes these are. No row where the caller can't see the instance.
CREATE FUNCTION duroxide.node_rows(p_instance text)
RETURNS TABLE (place integer, id text, node_type text, query text, result_name text, left_node text, right_node text,
               status text, result jsonb, error text, updated_at timestamptz, status_details jsonb,
               inferred_status text, inferred_from text)
LANGUAGE plpgsql STABLE ROWS 10
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_instance record;
    -- The graph and the newest checkpoint of each node. All arrays are by place + 1.
    n_id text[];
    n_type text[];
    n_query text[];
    n_name text[];
    n_left integer[];
    n_right integer[];
    n_condition integer[];
    n_extras text[];         -- as integer[]'s text
    h_execution text[];
    h_event text[];
    h_result text[];
    h_error jsonb[];
    h_meta jsonb[];
    h_at timestamptz[];
    v_count integer;
    -- Pass 1.
    a_execution text[];      -- where the node's checkpoint of the current rounds belongs
    a_fresh boolean[];       -- its newest checkpoint is of the current rounds
    a_scope text[];          -- the stamp (4.6) without its last generation; {n} stands for the round of the loop at place n
    a_generation text[];
    a_parent integer[];
    a_round integer[];       -- of loops
    v_path text;
    v_loops boolean;
    v_sound boolean;
    v_began boolean;
    -- Pass 2.
    a_outcome text[];        -- done, failed, broke; unset while open
    a_ref integer[];         -- whose value it has
    a_value text[];          -- JSON text of leaves and joins
    a_message text[];
    a_cause integer[];       -- the leaf whose error it has
    a_at timestamptz[];      -- when it, or something in it, was last heard of
    v_children integer[];
    v_child integer;
    v_slot integer;
    v_values text[];
    -- Pass 3.
    a_active boolean[];      -- has been reached in the current rounds
    a_lost boolean[];        -- in a branch that lost its race
    a_above text[];          -- nearest finished ancestor
    a_newest text[];         -- ancestor with the highest generation
    a_generation_above integer[];
    v_lost boolean;          -- cut off by a lost race
    v_stale boolean;         -- shows a checkpoint of an older round
    v_cause jsonb;
    v_stamp text;
    v_segment text;
    v_generation integer;
    v_passed boolean;
    v_failed boolean;
BEGIN
    SELECT i.graph, i.status, i.output, i.error, i.created_at, i.ended_at, COALESCE(i.started_at, q.started_at) AS started_at,
           i.status NOT IN ('pending', 'running') AS over
      INTO v_instance
      FROM duroxide.instances i LEFT JOIN duroxide.queue q ON q.instance_id = i.id
     WHERE i.id = p_instance;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    BEGIN
        SELECT array_agg(n.id ORDER BY n.i), array_agg(n.type ORDER BY n.i), array_agg(n.query ORDER BY n.i),
               array_agg(n.name ORDER BY n.i), array_agg(n.l + 1 ORDER BY n.i), array_agg(n.r + 1 ORDER BY n.i),
               array_agg(n.c + 1 ORDER BY n.i), array_agg(n.extras::text ORDER BY n.i), array_agg(h.execution ORDER BY n.i),
               array_agg(h.event ORDER BY n.i), array_agg(h.result ORDER BY n.i), array_agg(h.error ORDER BY n.i),
               array_agg(h.meta ORDER BY n.i), array_agg(h.ended_at ORDER BY n.i), count(*), bool_or(n.type = 'LOOP'),
               bool_or(h.node IS NOT NULL),
               bool_and(n.id IS NOT NULL AND n.type IS NOT NULL AND n.i <= ALL (array_remove(n.extras || n.l || n.r || n.c, NULL))
                        AND (n.l IS NOT NULL OR n.type NOT IN ('THEN', 'IF', 'JOIN', 'RACE', 'LOOP'))
                        AND (n.r IS NOT NULL OR n.type NOT IN ('THEN', 'IF', 'JOIN', 'RACE')))
               AND max((SELECT max(c.c) FROM unnest(n.extras || n.l || n.r || n.c || 0) c(c))) < count(*)
          INTO n_id, n_type, n_query, n_name, n_left, n_right, n_condition, n_extras,
               h_execution, h_event, h_result, h_error, h_meta, h_at, v_count, v_loops, v_began, v_sound
          FROM ROWS FROM (jsonb_to_recordset(v_instance.graph) AS (id text, type text, query text, name text, "left" integer,
                          "right" integer, condition integer, extras integer[])) WITH ORDINALITY
               AS n(id, type, query, name, l, r, c, extras, i)
          LEFT JOIN (SELECT DISTINCT ON (c.node) c.* FROM duroxide.history c WHERE c.instance_id = p_instance
                      ORDER BY c.node, duroxide.rounds(c.execution) DESC) h ON h.node = n.i - 1;
    EXCEPTION WHEN data_exception THEN
        v_sound := false;
    END;
    IF v_sound IS NOT TRUE THEN
        RETURN;    -- no graph of df.start's making; workers refuse it as well
    END IF;

    a_execution[1] := '';
    a_scope[1] := p_instance;
    a_generation[1] := CASE n_type[1] WHEN 'LOOP' THEN '{0}' ELSE '1' END;
    FOR i IN 1 .. v_count LOOP
        a_fresh[i] := COALESCE(h_execution[i] = a_execution[i], false);
        CONTINUE WHEN n_left[i] IS NULL;
        v_path := a_execution[i];
        IF n_type[i] = 'LOOP' THEN
            a_round[i] := CASE WHEN a_fresh[i] AND h_event[i] = 'round' THEN (h_meta[i]->>'round')::integer ELSE 1 END;
            v_path := v_path || '/' || i - 1 || ':' || a_round[i];
        END IF;
        FOREACH v_child IN ARRAY ARRAY[n_left[i], n_right[i], n_condition[i]]
                || CASE WHEN n_extras[i] IS NOT NULL THEN ARRAY(SELECT e.e + 1 FROM unnest(n_extras[i]::integer[]) e(e)) END LOOP
            CONTINUE WHEN v_child IS NULL;
            a_parent[v_child] := i;
            a_execution[v_child] := v_path;
            IF n_type[i] IN ('JOIN', 'RACE') OR n_type[v_child] = 'LOOP' THEN
                a_scope[v_child] := a_scope[i] || '::' || a_generation[i] || '::' || n_id[v_child];
                a_generation[v_child] := CASE n_type[v_child] WHEN 'LOOP' THEN '{' || v_child - 1 || '}' ELSE '1' END;
            ELSE
                a_scope[v_child] := a_scope[i];
                a_generation[v_child] := a_generation[i];
            END IF;
        END LOOP;
    END LOOP;

    FOR i IN REVERSE v_count .. 1 LOOP
        a_at[i] := CASE WHEN a_fresh[i] THEN h_at[i] END;
        IF a_fresh[i] AND h_event[i] = 'failed' AND v_instance.status = 'cancelled'
            AND h_error[i]->>'message' = v_instance.output THEN
            CONTINUE;    -- cut off, not failed: pass 3 says so of it and of all above it, in the same words
        ELSIF a_fresh[i] AND h_event[i] = 'failed' THEN
            a_outcome[i] := 'failed';
            a_message[i] := h_error[i]->>'message';
            a_cause[i] := i;
            CONTINUE;
        ELSIF n_left[i] IS NULL THEN
            IF a_fresh[i] AND h_event[i] = 'completed' THEN
                a_outcome[i] := CASE n_type[i] WHEN 'BREAK' THEN 'broke' ELSE 'done' END;
                a_ref[i] := i;
                a_value[i] := h_result[i];
            END IF;
            CONTINUE;
        END IF;
        a_at[i] := greatest(a_at[i], a_at[n_left[i]], a_at[n_right[i]], a_at[n_condition[i]]);
        v_child := NULL;    -- the child whose outcome this node takes over
        IF n_type[i] = 'THEN' THEN
            v_child := CASE WHEN a_outcome[n_left[i]] = 'done' THEN n_right[i] ELSE n_left[i] END;
        ELSIF n_type[i] = 'IF' THEN
            IF n_condition[i] IS NOT NULL AND a_outcome[n_condition[i]] IS DISTINCT FROM 'done' THEN
                v_child := n_condition[i];
            ELSIF a_fresh[i] AND h_event[i] = 'decided' THEN
                v_child := CASE h_result[i] WHEN 'then' THEN n_left[i] ELSE n_right[i] END;
            END IF;
        ELSIF n_type[i] = 'RACE' THEN
            IF a_fresh[i] AND h_event[i] = 'decided' THEN
                v_child := CASE h_result[i] WHEN '1' THEN n_left[i] ELSE n_right[i] END;
            END IF;
        ELSIF n_type[i] = 'LOOP' THEN
            -- A round that another one follows is no longer the current one: what is final in this one ended the loop.
            v_child := n_left[i];
            v_failed := a_outcome[v_child] = 'failed' AND duroxide.as_jsonb(n_query[i]) @> '{"continue_on_failure": true}';
            IF a_outcome[v_child] = 'done' OR v_failed THEN
                IF n_condition[i] IS NULL OR a_outcome[n_condition[i]] IS NULL THEN
                    v_child := NULL;
                ELSIF a_outcome[n_condition[i]] <> 'done' THEN
                    v_child := n_condition[i];
                ELSIF v_failed THEN
                    v_child := NULL;
                    a_outcome[i] := 'done';
                    a_ref[i] := i;
                    a_value[i] := 'null';
                END IF;
            END IF;
        ELSIF n_type[i] = 'JOIN' THEN
            v_children := ARRAY[n_left[i], n_right[i]] || ARRAY(SELECT e.e + 1 FROM unnest(n_extras[i]::integer[]) e(e));
            v_passed := true;
            FOREACH v_slot IN ARRAY v_children LOOP
                v_passed := v_passed AND a_outcome[v_slot] IS NOT NULL;
                a_at[i] := greatest(a_at[i], a_at[v_slot]);
            END LOOP;
            IF v_passed THEN
                v_values := '{}';
                FOR k IN 1 .. cardinality(v_children) LOOP
                    v_slot := v_children[k];
                    IF a_outcome[v_slot] = 'failed' THEN
                        a_message[i] := COALESCE(a_message[i] || '; ', '') || 'JOIN branch ' || k || ' failed: ' || a_message[v_slot];
                        a_cause[i] := COALESCE(a_cause[i], a_cause[v_slot]);
                    ELSIF a_outcome[v_slot] = 'broke' AND a_message[i] IS NULL THEN
                        v_child := v_slot;
                        EXIT;
                    ELSIF a_outcome[v_slot] = 'done' THEN
                        v_values := v_values || a_value[a_ref[v_slot]];
                    END IF;
                END LOOP;
                IF v_child IS NULL AND a_message[i] IS NOT NULL THEN
                    a_outcome[i] := 'failed';
                ELSIF v_child IS NULL THEN
                    a_outcome[i] := 'done';
                    a_ref[i] := i;
                    a_value[i] := '[' || array_to_string(v_values, ',') || ']';
                END IF;
            END IF;
        END IF;
        IF v_child IS NOT NULL AND a_outcome[v_child] IS NOT NULL THEN
            a_outcome[i] := CASE WHEN n_type[i] = 'LOOP' AND a_outcome[v_child] = 'broke' THEN 'done' ELSE a_outcome[v_child] END;
            a_ref[i] := a_ref[v_child];
            a_cause[i] := a_cause[v_child];
            a_message[i] := CASE WHEN n_type[i] = 'RACE' AND v_child = n_left[i] THEN 'RACE left branch failed: '
                                 WHEN n_type[i] = 'RACE' THEN 'RACE right branch failed: '
                                 WHEN n_type[i] = 'LOOP' AND i > 1 AND n_type[a_parent[i]] NOT IN ('JOIN', 'RACE')
                                     THEN 'Loop sub-orchestration failed: '
                                 ELSE '' END || a_message[v_child];
        END IF;
    END LOOP;

    -- The root is as its instance is; the instance also knows ends that no checkpoint tells (refused, given up).
    a_active[1] := v_instance.started_at IS NOT NULL AND (v_began OR v_instance.status <> 'failed');
    IF v_instance.status = 'completed' THEN
        a_outcome[1] := 'done';
        a_ref[1] := 1;
        a_value[1] := v_instance.output;
    ELSIF v_instance.status = 'failed' AND a_active[1] THEN
        a_outcome[1] := 'failed';
        a_message[1] := v_instance.output;
    END IF;
    FOR i IN 1 .. v_count LOOP
        place := i - 1;
        id := n_id[i];
        node_type := n_type[i];
        query := CASE WHEN n_condition[i] IS NOT NULL
                          THEN duroxide.stored_query(n_query[i], 'condition_node', '"' || n_id[n_condition[i]] || '"')
                      WHEN n_extras[i] IS NOT NULL
                          THEN duroxide.stored_query(n_query[i], 'extra_nodes',
                                   (SELECT '[' || string_agg('"' || n_id[e.e + 1] || '"', ',' ORDER BY e.i) || ']'
                                      FROM unnest(n_extras[i]::integer[]) WITH ORDINALITY e(e, i)))
                      ELSE n_query[i] END;
        result_name := n_name[i];
        left_node := n_id[n_left[i]];
        right_node := n_id[n_right[i]];
        result := NULL;
        error := NULL;
        status_details := NULL;
        inferred_from := NULL;
        v_lost := false;
        v_stale := false;
        IF a_outcome[i] IN ('done', 'broke') THEN
            status := 'completed';
            result := duroxide.as_jsonb(a_value[a_ref[i]]);
        ELSIF a_outcome[i] = 'failed' THEN
            status := 'failed';
            v_cause := CASE WHEN a_cause[i] IS NULL THEN v_instance.error ELSE h_error[a_cause[i]] END;
            result := to_jsonb(a_message[i]);
            error := duroxide.error_text(COALESCE(v_cause, '{}') || jsonb_build_object('message', a_message[i]));
        ELSIF a_active[i] AND (a_lost[i] OR v_instance.status IN ('failed', 'cancelled')) THEN
            v_lost := COALESCE(a_lost[i], false);
            status := 'failed';
            error := CASE WHEN v_lost THEN 'canceled: lost a RACE' ELSE v_instance.output END;
            result := to_jsonb(error);
        ELSIF a_active[i] AND NOT v_instance.over THEN
            status := 'running';
        ELSIF NOT a_fresh[i] AND h_event[i] IN ('completed', 'failed') THEN
            v_stale := true;
            status := h_event[i];
            result := CASE status WHEN 'completed' THEN duroxide.as_jsonb(h_result[i]) ELSE h_error[i]->'message' END;
            error := duroxide.error_text(h_error[i]);
        ELSE
            status := 'pending';
        END IF;
        updated_at := CASE WHEN i = 1 AND v_instance.over THEN v_instance.ended_at
                           WHEN v_stale THEN h_at[i]
                           WHEN status = 'pending' THEN v_instance.created_at
                           ELSE COALESCE(a_at[i], v_instance.started_at, v_instance.created_at) END;

        v_generation := NULL;
        IF status <> 'pending' THEN
            v_stamp := a_scope[i] || '::' || a_generation[i];
            IF v_loops THEN
                FOREACH v_segment IN ARRAY string_to_array(ltrim(CASE WHEN v_stale THEN h_execution[i] ELSE a_execution[i] END, '/'), '/') LOOP
                    v_stamp := replace(v_stamp, '{' || split_part(v_segment, ':', 1) || '}', split_part(v_segment, ':', 2));
                END LOOP;
                v_stamp := replace(v_stamp, '{' || place || '}', COALESCE(a_round[i], 1)::text);
                v_generation := split_part(v_stamp, '::', -1);
            END IF;
            status_details := jsonb_build_object('execution_id', v_stamp);
            -- SQL that can't share a transaction with its checkpoint, and HTTP: how often it began. An attempt that is not the
            -- last had an outcome that nobody heard of.
            IF (a_fresh[i] OR v_stale) AND h_meta[i] ? 'at_least_once' THEN
                status_details := status_details || jsonb_build_object('at_least_once', true, 'attempts', h_meta[i]->'attempt');
            END IF;
        END IF;

        IF status IN ('completed', 'failed') AND NOT v_lost AND NOT v_stale THEN
            inferred_status := status;
        ELSIF a_above[i] IS NOT NULL THEN
            inferred_status := 'skipped';
            inferred_from := a_above[i];
        ELSIF v_stale THEN
            inferred_status := 'pending';
            inferred_from := a_newest[i];
        ELSE
            inferred_status := status;
        END IF;
        RETURN NEXT;

        CONTINUE WHEN n_left[i] IS NULL;
        v_slot := 0;
        FOREACH v_child IN ARRAY ARRAY[n_left[i], n_right[i], n_condition[i]]
                || CASE WHEN n_extras[i] IS NOT NULL THEN ARRAY(SELECT e.e + 1 FROM unnest(n_extras[i]::integer[]) e(e)) END LOOP
            v_slot := v_slot + 1;    -- 1 left, 2 right, 3 condition, 4... extras
            CONTINUE WHEN v_child IS NULL;
            a_active[v_child] := COALESCE(a_active[i] AND CASE n_type[i]
                WHEN 'THEN' THEN v_slot = 1 OR a_outcome[n_left[i]] = 'done'
                WHEN 'IF' THEN v_slot = 3 OR a_fresh[i] AND h_event[i] = 'decided' AND v_slot = CASE h_result[i] WHEN 'then' THEN 1 ELSE 2 END
                WHEN 'LOOP' THEN
                    CASE WHEN v_slot = 3 THEN a_outcome[n_left[i]] = 'done' OR a_outcome[n_left[i]] = 'failed'
                             AND duroxide.as_jsonb(n_query[i]) @> '{"continue_on_failure": true}'
                         -- A round that is recorded but not due yet (a loop's pace) has not reached its body.
                         ELSE NOT (a_fresh[i] AND h_event[i] = 'round'
                                   AND COALESCE((h_meta[i]->>'began')::timestamptz > clock_timestamp(), false)) END
                ELSE true END, false);
            a_lost[v_child] := COALESCE(a_lost[i], false)
                OR n_type[i] = 'RACE' AND a_fresh[i] AND h_event[i] = 'decided' AND v_slot::text <> h_result[i];
            a_above[v_child] := CASE WHEN status IN ('completed', 'failed') AND NOT v_lost AND NOT v_stale THEN id ELSE a_above[i] END;
            IF v_loops THEN
                a_newest[v_child] := CASE WHEN v_generation >= COALESCE(a_generation_above[i], 0) THEN id ELSE a_newest[i] END;
                a_generation_above[v_child] := greatest(v_generation, a_generation_above[i]);
            END IF;
        END LOOP;
    END LOOP;
END $$;

-- 4.1. The id is varchar without a length: with one, the primary key's index could not serve a look-up.
CREATE VIEW df.instances WITH (security_invoker = true) AS
SELECT i.id::varchar AS id,
       i.label,
       (i.graph->0->>'id')::varchar AS root_node,
       duroxide.shown_status(i.status, q.started_at) AS status,
       i.submitted_by,
       i.database,
       i.created_at,
       greatest(i.updated_at, q.started_at) AS updated_at,
       CASE i.status WHEN 'completed' THEN i.ended_at END AS completed_at,
       i.output,
       duroxide.error_text(i.error) AS error,
       COALESCE(i.started_at, q.started_at) AS started_at,
       i.ended_at
  FROM duroxide.instances i
  LEFT JOIN duroxide.queue q ON q.instance_id = i.id;

-- 4.2.
CREATE VIEW df.nodes WITH (security_invoker = true) AS
SELECT n.id::varchar AS id,
       i.id::varchar AS instance_id,
       n.node_type,
       n.query,
       n.result_name,
       n.left_node::varchar AS left_node,
       n.right_node::varchar AS right_node,
       n.status,
       n.result,
       n.error,
       i.submitted_by,
       i.database,
       i.created_at,
       n.updated_at,
       n.status_details
  FROM duroxide.instances i
 CROSS JOIN LATERAL duroxide.node_rows(i.id) n;

-- 4.3; a simple view, so INSERT, UPDATE and DELETE work on it.
CREATE VIEW df.vars WITH (security_invoker = true) AS
SELECT v.name, v.value, v.owner FROM duroxide.vars v;

-- 4.4: the worker that was heard of last.
CREATE VIEW df._worker_epoch WITH (security_invoker = true) AS
SELECT w.id AS epoch_id, w.started_at, w.heartbeat_at AS last_seen_at
  FROM duroxide.workers w ORDER BY w.heartbeat_at DESC LIMIT 1;

-- 4.7: what scripts written for the original wait for. Runs with the owner's rights: the ledger is not for everybody.
CREATE VIEW duroxide._worker_ready AS
SELECT true AS sentinel, 1 AS schema_version, (SELECT min(m.applied_at) FROM duroxide.migrations m) AS initialized_at;
GRANT SELECT ON duroxide._worker_ready TO PUBLIC;
-- For the view above, and for duroxide.error and duroxide.warning, which the compiler uses on anybody's behalf.
GRANT USAGE ON SCHEMA duroxide TO PUBLIC;
